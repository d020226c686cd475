"""The pool: takes a call, lends it a worker, gives back what the worker answers.

The way of a call, from `run` or `run_sync` down: `Call` checks and pickles it; `_complete` repeats `_attempt` until
one has an outcome; an attempt borrows a worker from the dispatcher, exchanges frames with it in the caller's own task
or thread (`Worker.exchange`) and gives it back; `Call.outcome` rebuilds the value or raises the error.

Rules: whoever holds a worker either gives it back whole, or hands it to the supervisor.  Giving up a call for whatever
reason (cancellation, Ctrl-C, a coroutine that is garbage-collected) is one `except BaseException` in `_attempt`, and
takes no lock.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from . import _roles
from ._call import Call
from ._errors import PoolClosed
from ._forking import at_fork
from ._frames import Frame
from ._settings import Settings, check_seconds
from ._sizing import usable_cpus
from ._supervisor import Supervisor
from ._waiting import BlockingWaits, refuse_in_event_loop, run_to_end, running_loop
from ._worker import Death, Worker, WorkerGone

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext
    from types import TracebackType
    from typing import Self

    from ._process import WorkerProcess
    from ._waiting import Ticket, Waits

P = ParamSpec("P")
T = TypeVar("T")

_pools: weakref.WeakSet[CpuPool] = weakref.WeakSet()


class CpuPool:
    """Runs functions in worker processes, for any event loop, any thread, several at once.

    Creating a pool starts nothing.  Workers start when calls need them, or all at once with `warm_up()`; entering the
    pool (`async with`, `with`) warms it up, leaving it closes it.  After `os.fork()` the child's copy of a pool starts
    workers of its own.

    Args:
        max_workers: how many worker processes at most; by default `usable_cpus()`.
        mp_context: how they start: "forkserver", "spawn", "fork", or a `multiprocessing` context.  By default
            forkserver on Linux and spawn elsewhere.  "fork" is unsafe in a program with threads.
        initializer: called as `initializer(*initargs)` once in each new worker, before its first task.
        initargs: its arguments; as with any new process, `multiprocessing` locks and queues are allowed among them.
        start_timeout: seconds after which a worker that is not ready is killed.
        grace: seconds a worker has to exit by itself before it is killed.
        drain: seconds that `close` and `aclose` let accepted calls run on.
        retries: how often a call is run again after its worker died (`WorkerDied`).  The function must be safe to
            run twice: the worker may have died after it did its work.
        name: for messages and thread names.

    Raises:
        TypeError, ValueError: a setting is not what it can be; the message names it.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        mp_context: str | BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        start_timeout: float = 60.0,
        grace: float = 1.0,
        drain: float = 5.0,
        retries: int = 0,
        name: str = "CpuPool",
    ) -> None:
        self.settings: Settings = Settings(
            max_workers=max_workers,
            mp_context=mp_context,
            initializer=initializer,
            initargs=initargs,
            start_timeout=start_timeout,
            grace=grace,
            drain=drain,
            retries=retries,
            name=name,
        )
        self._set_up()
        _pools.add(self)

    def _set_up(self) -> None:
        start = _WorkerStarter(self.settings)
        self._supervisor = Supervisor(self.settings, start.max_workers, start)
        self._dispatcher = self._supervisor.dispatcher
        self._task_ids = itertools.count(1)

    def __repr__(self) -> str:
        starting, idle, busy, waiting = self._dispatcher.counts()
        state = "closed" if self._dispatcher.closed else "open"
        counts = f"{idle} idle, {busy} busy, {starting} starting, {waiting} waiting"
        return f"<{type(self).__name__} {self.settings.name!r} {state}: {counts}>"

    @property
    def max_workers(self) -> int:
        """The largest number of workers, as set or as `usable_cpus()` said when the pool was made."""
        return self._dispatcher.max_workers

    @property
    def is_closed(self) -> bool:
        """True once the pool takes no more calls."""
        return self._dispatcher.closed

    # --- calls ---

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn(*args, **kwargs)` in a worker and return what it returns.

        The function and its arguments are pickled: define the function at the top level of a module.

        Raises:
            Exception: whatever `fn` raises, with the worker's traceback as `__cause__`.
            RemoteError: it raised what cannot be rebuilt, or must not be raised, here.
            TaskNotPicklable: the function or an argument cannot be sent.
            ResultNotPicklable: what it returned cannot be sent back.
            WorkerDied: its worker died; other calls are unaffected.
            InitializerFailed, PoolBroken: no worker could be started.
            PoolClosed: the pool was closed before, or while, it ran.

        Cancellation: the caller returns at once; a running task is killed with its worker, which is replaced.
        """
        call = Call(fn, args, kwargs)
        result: T = await self._complete(call, _async_waits())
        return result

    def run_sync(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn(*args, **kwargs)` in a worker from a thread without an event loop, and return what it returns.

        Raises:
            RuntimeError: this thread runs an event loop, which would stand still meanwhile.
            Exception: as `run`.

        Cancellation: Ctrl-C in the main thread stops the task.
        """
        refuse_in_event_loop("run_sync", "await pool.run(...)")
        call = Call(fn, args, kwargs)
        result: T = run_to_end(self._complete(call, BlockingWaits()))
        return result

    async def _complete(self, call: Call, waits: Waits) -> Any:
        deaths = 0
        while True:
            task_id = next(self._task_ids)
            outcome = await self._attempt(task_id, call.body, waits)
            if isinstance(outcome, Frame):
                return call.outcome(outcome)
            if outcome.last_task_id != task_id:
                continue  # the worker died before it picked the task up: nothing has run
            if self._dispatcher.closed and outcome.by_pool:
                raise PoolClosed(self.settings.name)
            deaths += 1
            if deaths > self.settings.retries:
                raise call.death(outcome)

    async def _attempt(self, task_id: int, body: bytes, waits: Waits) -> Frame | Death:
        """Have one worker run the task: returns its answer, or how it died."""
        ticket = worker = None
        try:
            worker = self._dispatcher.borrow_idle()
            if worker is None:
                ticket = waits.ticket()
                worker = await self._wait_for_worker(ticket, waits)
                ticket = None
            try:
                reply = await worker.exchange(task_id, body, waits)
            except WorkerGone:
                lost, worker = worker, None
                return await self._learn_death(lost, waits)
            if not self._dispatcher.give_back(worker):
                self._supervisor.post(self._supervisor.bury, worker, None)  # it has died since
        except BaseException:
            self._give_up(ticket, worker)
            raise
        if self._dispatcher.closed:
            self._supervisor.notify()  # it may be the last one that the pool waits for
        return reply

    async def _wait_for_worker(self, ticket: Ticket, waits: Waits) -> Worker:
        worker = self._dispatcher.enqueue(ticket)
        if worker is not None:
            return worker
        self._start_supervisor()  # after queueing: a start that fails fails the queue
        await waits.settled(ticket)
        granted: Worker = ticket.result()
        return granted

    async def _learn_death(self, worker: Worker, waits: Waits) -> Death:
        ticket = waits.ticket()
        self._supervisor.post(self._supervisor.bury, worker, ticket)
        await waits.settled(ticket)
        death: Death = ticket.result()
        return death

    def _give_up(self, ticket: Ticket | None, worker: Worker | None) -> None:
        """Leave an attempt in the middle.  It may run inside a garbage collection: no lock, no waiting."""
        if worker is not None:
            self._supervisor.post(self._supervisor.bury, worker, None)
        elif ticket is not None and not ticket.withdraw() and ticket.value is not None:
            self._supervisor.post(self._supervisor.take_back, ticket.value)  # lent in the same moment, and untouched
        elif self._dispatcher.closed:
            self._supervisor.notify()  # it may have been the last one that the pool waits for

    # --- start and end ---

    async def warm_up(self) -> None:
        """Start all workers and wait until each has run its initializer.

        Raises:
            InitializerFailed, PoolBroken: a worker could not be started.
            PoolClosed: the pool was closed.

        Cancellation: the workers go on starting.
        """
        await self._warm_up(_async_waits())

    async def _warm_up(self, waits: Waits) -> None:
        ticket = waits.ticket()
        self._dispatcher.want_all(ticket)
        self._start_supervisor()
        self._supervisor.notify()
        await waits.settled(ticket)
        ticket.result()

    async def aclose(self, drain: float | None = None) -> None:
        """Take no more calls, let the accepted ones finish, and stop the workers.

        Args:
            drain: after so many seconds what still runs is killed and its callers get `PoolClosed`; by default the
                pool's `drain`.

        Cancellation: the pool closes all the same; only the waiting ends.
        """
        await self._close(drain, _async_waits())

    def close(self, drain: float | None = None) -> None:
        """Do as `aclose`, from a thread without an event loop.

        Raises:
            RuntimeError: this thread runs an event loop, which would stand still meanwhile.
        """
        refuse_in_event_loop("close", "await pool.aclose()")
        run_to_end(self._close(drain, BlockingWaits()))

    async def _close(self, drain: float | None, waits: Waits) -> None:
        if drain is None:
            drain = self.settings.drain
        check_seconds("drain", drain)
        self._dispatcher.close()
        if not self._supervisor.is_running:
            return
        self._supervisor.refuse_in_its_thread()
        ticket = waits.ticket()
        self._supervisor.post(self._supervisor.stop, time.monotonic() + drain, ticket)
        await waits.settled(ticket)

    async def __aenter__(self) -> Self:
        try:
            await self.warm_up()
        except BaseException:
            self._stop_soon()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        waits = _async_waits()
        with waits.shielded():
            await self._close(None, waits)

    def __enter__(self) -> Self:
        refuse_in_event_loop("with pool", "async with pool")
        try:
            run_to_end(self._warm_up(BlockingWaits()))
        except BaseException:
            self._stop_soon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        supervisor: Supervisor | None = getattr(self, "_supervisor", None)
        if supervisor is not None and supervisor.is_running and not self._dispatcher.closed:
            warnings.warn(
                f"{self.settings.name!r} was never closed; use it in a 'with' block",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            self._stop_soon()

    def _stop_soon(self) -> None:
        """Stop everything without waiting for it."""
        self._dispatcher.closed = True  # no lock: it may run inside a garbage collection
        if self._supervisor.is_running:
            self._supervisor.post(self._supervisor.stop, time.monotonic(), None)

    def _start_supervisor(self) -> None:
        if self._supervisor.is_running:
            self._supervisor.refuse_in_its_thread()
            return
        _roles.refuse_pool_here()
        self._supervisor.run()
        if self._dispatcher.closed:
            self._stop_soon()  # closed in the same moment, by one who saw nothing to stop

    def _after_fork_in_child(self) -> None:
        closed = self._dispatcher.closed
        self._set_up()
        self._dispatcher.closed = closed


class _WorkerStarter:
    """Starts one worker process after another as the settings say; the supervisor's thread calls it."""

    def __init__(self, settings: Settings) -> None:
        cpus = usable_cpus()
        self.max_workers = settings.max_workers or cpus
        self._threads = max(1, cpus // self.max_workers)
        self._settings = settings
        self._context: BaseContext | None = None
        self._numbers = itertools.count(1)

    def __call__(self) -> WorkerProcess:
        from ._process import WorkerProcess, get_context  # here, in the supervisor's thread: it takes milliseconds

        if self._context is None:
            self._context = get_context(self._settings.mp_context)
        name = f"{_roles.NAME_PREFIX}{next(self._numbers)}"
        return WorkerProcess(self._context, name, self._threads, self._settings.initializer, self._settings.initargs)


def _async_waits() -> Waits:
    return _waits_on(running_loop())


@functools.cache
def _waits_on(library: str | None) -> Waits:
    """Load what waiting on an event loop needs: by the first call that does."""
    if library == "asyncio":
        from ._asyncio_waits import AsyncioWaits

        return AsyncioWaits()
    if library == "trio":
        from ._trio_waits import TrioWaits

        return TrioWaits()
    raise RuntimeError("no event loop of asyncio or trio is running in this thread; use run_sync without one")


# --- the process's end, and its forks ---


def _close_at_exit() -> None:
    pools = [pool for pool in list(_pools) if pool._supervisor.is_running]
    for pool in pools:
        pool._stop_soon()
    for pool in pools:
        run_to_end(pool._close(0, BlockingWaits()))


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._after_fork_in_child()


at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_at_exit)
