"""The pool as users see it: its settings, its start and its end.

Its calls are in `_calls`; what happens to the workers meanwhile, in `_supervisor`.
"""

from __future__ import annotations

import atexit
import os
import time
import warnings
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ._call import Call
from ._calls import PoolCalls, async_waits
from ._checks import check_seconds
from ._door import allow_inspection_if_wanted
from ._errors import PoolClosed
from ._events import Announcer
from ._forking import at_fork
from ._settings import Settings
from ._share import Share
from ._starting import WorkerStarter
from ._supervisor import Supervisor
from ._waiting import BlockingWaits, refuse_in_event_loop, run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.context import BaseContext
    from types import TracebackType
    from typing import Self

    from ._events import Event
    from ._map import FlowOptions
    from ._settings import CallOptions
    from ._statistics import Statistics
    from ._stream import Segments
    from ._supervisor import Health
    from ._waiting import Waits

T = TypeVar("T")

_pools: weakref.WeakSet[CpuPool] = weakref.WeakSet()
_abandoned: deque[str] = deque(maxlen=16)  # names of pools that were collected while they ran


class CpuPool(PoolCalls):
    """Runs functions in worker processes, for any event loop, any thread, several at once.

    Creating a pool starts nothing.  Workers start when calls need them, or all at once with `warm_up()`; entering the
    pool (`async with`, `with`) warms it up, leaving it closes it; entered again, it starts anew, as an application does
    that is started for each of its tests.  After `os.fork()` the child's copy of a pool starts
    workers of its own.

    Args:
        max_workers: how many tasks run at once at most, each in a worker of its own; by default `suggest_workers()`,
            with the memory limit below as what a worker needs.
        mp_context: how they start: "forkserver", "spawn", "fork", or a `multiprocessing` context.  By default
            forkserver on Linux and spawn elsewhere.  "fork" is unsafe in a program with threads.
        initializer: called as `initializer(*initargs)` once in each new worker, before its first task.
        initargs: its arguments; as with any new process, `multiprocessing` locks and queues are allowed among them.
        finalizer: called as `finalizer()` in each worker that leaves in peace: it is replaced, not needed any more, or
            the pool closes.  It has `grace` seconds.  A worker that is killed does not come to it.
        preload: full names of modules that are imported once, in a fork server of this pool's own; workers then start
            in milliseconds, and share that memory.  "__main__" is the program's main module, which otherwise every
            worker imports by itself.  The modules must not start threads or open connections when they are imported:
            the workers would have copies of them.
        env: environment variables for the workers only, on top of the program's.
        start_timeout: seconds after which a worker that is not ready is killed.
        min_workers: how many workers stay, however long they have nothing to do; by default none need to.
        idle_timeout: seconds without a task after which a worker leaves, down to `min_workers`; by default they stay.
        max_tasks_per_child: how many tasks a worker runs before another takes its place; by default any number.  Its
            successor starts while it runs its last task, so for a moment there are more processes than `max_workers`,
            but never more tasks.  Limits of ten and more vary by up to a tenth downwards, so that workers are not all
            replaced at once.
        max_memory_per_child: bytes of memory (resident size, shared pages included) above which a worker is replaced,
            between two tasks, once its successor is ready; by default any amount.  Varied likewise.
        hard_memory_per_child: bytes of memory above which a task is killed with its worker, and fails with
            `WorkerDied`; by default any amount.  It is looked at every few hundredths of a second.
        timeout: seconds that a task may run; by default any time.  See `options`.
        queue_timeout: seconds that a call may wait for a worker; by default any time.  See `options`.
        grace: seconds that an interrupted task has to end, and a dismissed worker to exit, before it is killed.
        drain: seconds that `close` and `aclose` let accepted calls run on.
        max_pending: how many calls may wait while all workers are busy; one more raises `PoolFull`.  By default any
            number.
        max_inflight_bytes: how many bytes of functions and arguments the calls that wait and run may hold together, as
            they are pickled, arrays and other buffers included; what is shared (`share`) does not count, nor do
            results.  A call that is too much waits until there is room, before it is pickled if it is large, and counts
            as waiting for `max_pending` and `queue_timeout`.  One that is larger than that goes alone.  By default any
            number.
        retries: how often a call is run again after its worker died (`WorkerDied`).  The function must be safe to
            run twice: the worker may have died after it did its work.
        serializer: "pickle", or "cloudpickle" (an optional dependency) to send lambdas, functions inside functions, and
            what an interactive session defines.
        context: context variables (`contextvars`) whose values go along with each call, as they are when it is sent.
            They must stand at the top level of a module.  Each task has a context of its own, so nothing is left for
            the next one.  Also what carries a context in another way, like `cpupool.opentelemetry.trace_context`.
        slow_task: seconds after which a task that still runs is told of, once, with its stack: as a warning in the log,
            and to `on_event`; by default never.
        name: for messages and thread names.

    Raises:
        TypeError, ValueError: a setting is not what it can be; the message names it.
    """

    _supervisor: Supervisor
    _options: CallOptions

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make a pool without workers where the environment says so (`CPUPOOL_MODE=inline`)."""
        if cls is CpuPool and is_inline_mode():
            from ._inline import InlinePool

            return super().__new__(InlinePool)  # type: ignore[return-value]  # it is one of these
        return super().__new__(cls)

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        mp_context: str | BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        finalizer: Callable[[], object] | None = None,
        preload: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        start_timeout: float = 60.0,
        min_workers: int | None = None,
        idle_timeout: float | None = None,
        max_tasks_per_child: int | None = None,
        max_memory_per_child: int | None = None,
        hard_memory_per_child: int | None = None,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        grace: float = 1.0,
        drain: float = 5.0,
        max_pending: int | None = None,
        max_inflight_bytes: int | None = None,
        retries: int = 0,
        serializer: str = "pickle",
        context: Sequence[Any] = (),
        slow_task: float | None = None,
        name: str = "CpuPool",
    ) -> None:
        self.settings: Settings = Settings(
            max_workers=max_workers,
            mp_context=mp_context,
            initializer=initializer,
            initargs=initargs,
            finalizer=finalizer,
            preload=preload,  # type: ignore[arg-type]  # it makes a tuple of it
            env=env,
            start_timeout=start_timeout,
            min_workers=min_workers,
            idle_timeout=idle_timeout,
            max_tasks_per_child=max_tasks_per_child,
            max_memory_per_child=max_memory_per_child,
            hard_memory_per_child=hard_memory_per_child,
            timeout=timeout,
            queue_timeout=queue_timeout,
            grace=grace,
            drain=drain,
            max_pending=max_pending,
            max_inflight_bytes=max_inflight_bytes,
            retries=retries,
            serializer=serializer,
            context=tuple(context),
            slow_task=slow_task,
            name=name,
        )
        self._options = self.settings.call_options()
        self._announcer = Announcer()
        self._set_up()
        _pools.add(self)

    @classmethod
    def from_env(cls, prefix: str = "CPUPOOL_", **overrides: Any) -> Self:
        """Make a pool whose settings come from environment variables: `CPUPOOL_MAX_WORKERS=4`, `CPUPOOL_TIMEOUT=30`.

        Every argument of the pool has its variable: the prefix and its name in capitals.  "none" means None; an empty
        variable, like one that is not set, the default.  Sizes may have a unit (512M, 1.5G: powers of 1024; 200MB:
        powers of 1000), functions are written `package.module:function`, `preload` is a list with commas, `initargs` a
        JSON array, `env` a JSON object.

        Args:
            prefix: what the variables' names begin with.
            overrides: settings that are taken from here, whatever the variables say.

        Raises:
            ValueError: a variable does not hold what its setting can be; the message names it.
        """
        from ._environment import read_settings

        found = read_settings(prefix, without=overrides)
        try:
            return cls(**{**found, **overrides})
        except ValueError as error:
            variables = ", ".join(prefix + setting.upper() for setting in found)
            raise ValueError(f"{error} (read from the environment: {variables or 'nothing'})") from error

    def _set_up(self) -> None:
        starter = WorkerStarter(self.settings)
        self._supervisor = Supervisor(self.settings, starter, self._announcer, allow_inspection_if_wanted)
        self._dispatcher = self._supervisor.dispatcher

    def __repr__(self) -> str:
        starting, idle, busy, waiting = self._dispatcher.counts()
        state = "closed" if self._dispatcher.closed else "open"
        counts = f"{idle} idle, {busy} busy, {starting} starting, {waiting} waiting"
        return f"<{type(self).__name__} {self.settings.name!r} {state}: {counts}>"

    @property
    def max_workers(self) -> int:
        """The largest number of workers, as set or as `suggest_workers()` said when the pool was made."""
        return self._dispatcher.max_workers

    @property
    def is_started(self) -> bool:
        """True from the pool's first use, or from when it is entered, to the end of its last worker."""
        return self._supervisor.is_running

    @property
    def is_closed(self) -> bool:
        """True once the pool takes no more calls."""
        return self._dispatcher.closed

    @property
    def is_closing(self) -> bool:
        """True once the pool has been told to close, also by `close_soon`, while it still takes calls."""
        return self._dispatcher.closed or self._supervisor.is_closing

    @property
    def health(self) -> Health:
        """Whether the pool works, in a word.

        "ready"; "degraded" while the last start of a worker has failed, or so many calls wait that another would be
        refused (`max_pending`); "broken" when no worker is there after several failed starts, or the pool is closed.
        """
        return self._supervisor.health

    def statistics(self) -> Statistics:
        """Return what is known of the pool: its workers now, and what was counted since it was started.

        From any thread, but not in a signal handler.  It takes some 50 microseconds for each worker, most of them to
        ask the system what they use.
        Entering a closed pool again begins to count anew.
        """
        return self._supervisor.statistics()

    def dump_stacks(self, pid: int | None = None) -> dict[int, str]:
        """Return where the tasks of all busy workers are, in Python, by the workers' process ids.

        They write it down in between and go on.  That works in C code too, also where that holds the GIL.  They are
        asked by a signal (SIGURG, then a real-time one): Python goes on with what that interrupts, but C code that
        calls `sleep` or `poll` by itself may come back from it early.

        From any thread, but not in a signal handler.  It takes some milliseconds, and a quarter of a second where a
        process does not answer, which the text says then; in a task of an event loop use `asyncio.to_thread`.

        Args:
            pid: ask only that worker.
        """
        stacks: dict[int, str] = self._ask_supervisor(self._supervisor.dump_stacks, pid, default={})
        return stacks

    def interrupt(self, pid: int) -> bool:
        """Stop the task that a worker runs, as a timeout does: its caller gets `TaskStopped`.

        Of a `map` it ends the whole.  From any thread, but not in a signal handler.

        Args:
            pid: the worker's process id, as in `statistics()`.

        Returns:
            True if it ran one, which was asked to stop; it may have ended by itself in the same moment.
        """
        found: bool = self._ask_supervisor(self._supervisor.interrupt, pid, default=False)
        return found

    def _ask_supervisor(self, order: Callable[..., object], *args: Any, default: Any) -> Any:
        """Have the supervisor's thread carry out an order that settles a ticket, and return what it says."""
        supervisor = self._supervisor
        if not supervisor.is_running:
            return default
        supervisor.refuse_in_its_thread()
        waits = BlockingWaits()
        ticket = waits.ticket()
        supervisor.post(order, ticket, *args)
        run_to_end(waits.settled(ticket))
        return ticket.result()

    def on_event(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call `callback(event)` when something happens to the pool: see `Event`.  Returns what ends that.

        It is called in a thread of its own, one event after another; in asyncio, let it use
        `loop.call_soon_threadsafe`.  While it takes its time nothing else is told, what workers log neither, and the
        end of the pool waits for a second, or up to ten if many events are left.  What it raises is logged.  The same
        events are logged, by the logger `cpupool`.

        Raises:
            TypeError: it cannot be called.
        """
        return self._announcer.subscribe(callback)

    @property
    def _home(self) -> CpuPool:
        return self

    def _make_call(
        self,
        fn: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        options: CallOptions,
        *,
        is_copy: bool = False,
    ) -> Call:
        return Call(fn, args, kwargs, options, is_copy=is_copy)

    def _open_flow(
        self, fn: Callable[..., Any], iterables: tuple[Any, ...], options: CallOptions, flow_options: FlowOptions
    ) -> Segments:
        from ._map import Flow

        return Flow(self._supervisor, async_waits(), fn, iterables, options, flow_options)

    @overload
    def share(self, value: bytes | bytearray) -> Share[memoryview]: ...

    @overload
    def share(self, value: T) -> Share[T]: ...

    def share(self, value: Any) -> Share[Any]:
        """Share a large object with any number of calls: `with pool.share(array) as shared: ...`, or `async with`.

        Give `shared` to the calls; in the task `shared.get()` is the object, with read-only views of one and the same
        memory.  See `Share`.

        Args:
            value: an array, a frame, `bytes`, or whatever holds buffers of the kind of PEP 574.  What is no buffer in
                it is pickled, and made anew by each `get()`.

        Raises:
            Exception: whatever pickling it raises, when the block is entered.
        """
        return Share(value, self._options.serializer, _end_share)

    # --- start and end ---

    async def warm_up(self) -> None:
        """Start all workers and wait until each has run its initializer.

        Raises:
            InitializerFailed, PoolBroken: a worker could not be started.
            PoolClosed: the pool was closed.

        Cancellation: the workers go on starting.
        """
        await self._warm_up(async_waits())

    async def _warm_up(self, waits: Waits) -> None:
        ticket = waits.ticket()
        self._dispatcher.want_all(ticket)
        self._supervisor.run()
        self._supervisor.notify()
        await waits.settled(ticket)
        ticket.result()

    async def aclose(self, drain: float | None = None) -> None:
        """Take no more calls, let the accepted ones finish, and stop the workers.

        It may be called several times, and at once: the one with the least time left decides.

        Args:
            drain: after so many seconds what still runs is interrupted, and what still waits is sent away; their
                callers get `PoolClosed`.  What runs on is killed `grace` seconds later.  By default the pool's
                `drain`.

        Cancellation: the pool closes all the same; only the waiting ends.
        """
        await self._close(drain, async_waits())

    def close(self, drain: float | None = None) -> None:
        """Do as `aclose`, from a thread without an event loop.

        Raises:
            RuntimeError: this thread runs an event loop, which would stand still meanwhile.
        """
        refuse_in_event_loop("close", "await pool.aclose()")
        run_to_end(self._close(drain, BlockingWaits()))

    def close_soon(self, drain: float | None = None) -> None:
        """Close the pool in `drain` seconds, by default its own setting, without waiting for that.

        Until then it takes calls; then what runs is interrupted, and its callers get `PoolClosed`.  For a program that
        has been told to end, and ends when its requests are answered; it may be called in a signal handler.
        """
        if self._supervisor.is_running:
            self._supervisor.is_closing = True
            self._supervisor.post(self._supervisor.close_by, time.monotonic() + self._drain(drain))

    def _drain(self, drain: float | None) -> float:
        if drain is None:
            return self.settings.drain
        check_seconds("drain", drain)
        return drain

    async def _close(self, drain: float | None, waits: Waits) -> None:
        drain = self._drain(drain)
        self._dispatcher.close()
        if not self._supervisor.is_running:
            return
        self._supervisor.refuse_in_its_thread()
        ticket = waits.ticket()
        self._supervisor.post(self._supervisor.stop, time.monotonic() + drain, ticket)
        try:
            await waits.settled(ticket)
        finally:
            waits.rest()

    def _begin_anew(self) -> None:
        """Open the pool again if it was closed and is over."""
        if self._dispatcher.closed:
            if self._supervisor.is_running:
                raise PoolClosed(self.settings.name)
            self._set_up()

    async def __aenter__(self) -> Self:
        self._begin_anew()
        waits = async_waits()
        is_first = not self._supervisor.is_running
        try:
            await self._warm_up(waits)
        except BaseException:
            if is_first:  # else others use it
                self._stop_soon()
                with waits.shielded():
                    await self._close(0, waits)  # soon done: no call was accepted
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        waits = async_waits()
        drain = _drain_after(kind)
        try:
            with waits.shielded():
                await self._close(drain, waits)
        except BaseException:
            self._hurry_after(drain)
            raise

    def __enter__(self) -> Self:
        refuse_in_event_loop("with pool", "async with pool")
        self._begin_anew()
        is_first = not self._supervisor.is_running
        try:
            run_to_end(self._warm_up(BlockingWaits()))
        except BaseException:
            if is_first:  # else others use it
                self._stop_soon()
                run_to_end(self._close(0, BlockingWaits()))  # soon done: no call was accepted
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        drain = _drain_after(kind)
        try:
            self.close(drain)
        except BaseException:
            self._hurry_after(drain)
            raise

    def _hurry_after(self, drain: float | None) -> None:
        """Kill what still runs if a block that Ctrl-C or a cancellation has left is told so again while it closes."""
        if drain == 0:
            self._supervisor.post(self._supervisor.hurry)

    def __del__(self) -> None:
        supervisor: Supervisor | None = getattr(self, "_supervisor", None)
        if supervisor is not None and supervisor.is_running and not self._dispatcher.closed:
            warnings.warn(
                f"{self.settings.name!r} was never closed; use it in a 'with' block",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            _abandoned.append(self.settings.name)
            self._supervisor.stop_soon()

    def _start(self) -> None:
        """Start the pool's thread, as the first call does."""
        self._supervisor.run()

    def _stop_soon(self) -> None:
        """Stop everything without waiting for it."""
        self._supervisor.stop_soon()

    def _after_fork_in_child(self) -> None:
        self._announcer.begin_anew()
        closed = self._dispatcher.closed
        self._set_up()
        self._dispatcher.closed = closed


def is_inline_mode() -> bool:
    """Return True if the environment says that pools are to have no workers.

    Raises:
        ValueError: it says something else.
    """
    mode = os.environ.get("CPUPOOL_MODE", "").strip().lower()
    if mode not in ("", "inline", "processes"):
        raise ValueError(f"the environment variable CPUPOOL_MODE is {mode!r}; it can be 'inline' or 'processes'")
    return mode == "inline"


def _drain_after(kind: type[BaseException] | None) -> float | None:
    """Return how long to drain a pool whose block was left: not at all by Ctrl-C, or when its task was cancelled."""
    return None if kind is None or issubclass(kind, Exception) else 0


# --- the process's end, and its forks ---


def list_pools() -> list[CpuPool]:
    """Return the pools of this process, whether they run or not."""
    while True:
        try:
            return list(_pools)
        except RuntimeError:
            continue  # another thread has just made one


def _end_share(number: int) -> None:
    """Have the workers of all pools forget a share: it may have been used in any."""
    for pool in list_pools():
        if is_running(pool):
            pool._supervisor.post(pool._supervisor.end_share, number)


def is_running(pool: CpuPool) -> bool:
    """Return True if it has been used or entered, and its end is still to come."""
    return pool._supervisor.is_running


def take_abandoned() -> list[str]:
    """Return, and forget, the names of the pools that were collected while they ran."""
    names = list(_abandoned)
    _abandoned.clear()
    return names


def _close_at_exit() -> None:
    pools = [pool for pool in list_pools() if is_running(pool)]
    for pool in pools:
        pool._supervisor.stop_soon()
    for pool in pools:
        run_to_end(pool._close(0, BlockingWaits()))


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._after_fork_in_child()


at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_at_exit)
