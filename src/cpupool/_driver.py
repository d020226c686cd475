"""What makes the calls of an executor: a thread of its own, and the futures for what comes of them.

Theory of operation: submitting must neither block nor need an event loop, so the calls of one executor live in one
thread of its own, as tasks of an asyncio loop that runs there.  As many tasks as the pool has workers take the calls
one after another from a deque and await `pool.run`; so all that holds for a call holds here too.  A future that is
cancelled while its call runs cancels that await.

Rules: the thread and its loop know the `Driver`, never the executor, so that an executor that nobody holds any more is
collected, and then its thread ends when all calls are done.  What a collection calls takes no lock.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import sys
import threading
import weakref
from collections import deque
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import _base as states
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ._errors import InitializerFailed, PoolBroken, WorkerDied
from ._forking import at_fork

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._settings import Settings

T = TypeVar("T")


class ExecutorWorkerDied(WorkerDied, BrokenProcessPool):
    """`WorkerDied`, for those who expect `BrokenProcessPool`; the executor is not broken and goes on."""


class ExecutorInitializerFailed(InitializerFailed, BrokenProcessPool):
    """`InitializerFailed`, for those who expect `BrokenProcessPool`; the next call tries again."""


class ExecutorPoolBroken(PoolBroken, BrokenProcessPool):
    """`PoolBroken`, for those who expect `BrokenProcessPool`; the next call tries again."""


_BROKEN: dict[type, Callable[..., BaseException]] = {
    WorkerDied: ExecutorWorkerDied,
    InitializerFailed: ExecutorInitializerFailed,
    PoolBroken: ExecutorPoolBroken,
}


class DrivenPool(Protocol):
    """What an executor needs to know of its pool."""

    @property
    def max_workers(self) -> int: ...

    @property
    def is_closed(self) -> bool: ...

    settings: Settings

    def _start(self) -> None: ...

    def _stop_soon(self) -> None: ...


class CallFuture(Future[T]):
    """A future whose `cancel` works as long as the call is not done: one that runs is stopped."""

    def __init__(self, stop: Callable[[CallFuture[T]], object]) -> None:
        super().__init__()
        self._stop = stop

    def cancel(self) -> bool:
        """Cancel the call.  Its worker is interrupted if it runs.  Returns False if it is done."""
        with self._condition:
            if self._state == states.RUNNING:
                self._state = states.CANCELLED
                self._condition.notify_all()
                was_running = True
            else:
                was_running = False
        if was_running:
            self._stop(self)
            self.begin()
            self._invoke_callbacks()  # type: ignore[attr-defined]  # the user's, which may do anything, come last
            return True
        if not super().cancel():
            return False
        self.begin()
        return True

    def begin(self) -> bool:
        """Mark the call as running, unless it is cancelled; then tell `wait` and `as_completed`, once."""
        with self._condition:
            if self._state in (states.PENDING, states.CANCELLED):
                self.set_running_or_notify_cancel()
            return self._state == states.RUNNING


class _Work:
    """One call that was submitted."""

    __slots__ = ("args", "context", "fn", "future", "kwargs")

    def __init__(
        self, future: CallFuture[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.future = future
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.context = contextvars.copy_context()  # the submitter's


class Driver:
    """Makes the calls of one executor in a thread of its own."""

    def __init__(
        self, pool: DrivenPool, run: Callable[..., Awaitable[Any]], at_end: Callable[[], Awaitable[object]] | None
    ) -> None:
        """Args: `run` makes one call; `at_end` is awaited when the executor is shut down and all calls are done."""
        self.pool = pool
        self._run = run
        self._at_end = at_end
        self.is_shut = False
        self._lock = threading.Lock()  # of the queue and the number of lanes
        self._reset()
        _drivers.add(self)

    def _reset(self) -> None:
        self._queue: deque[_Work] = deque()
        self._lanes = 0  # how many tasks make calls
        self._running: dict[Future[Any], asyncio.Task[None] | None] = {}  # and who makes the call, once it has begun
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # --- from any thread ---

    def submit(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallFuture[T]:
        with self._lock:
            if _is_exiting:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            if self.is_shut or self.pool.is_closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._loop is None:
                self._start()
            future: CallFuture[T] = CallFuture(self._stop)
            if self._lanes + len(self._queue) < self.pool.max_workers:
                future.begin()
            self._queue.append(_Work(future, fn, args, kwargs))
        if self._lanes < self.pool.max_workers:
            self._call_in_loop(self._look)
        return future

    def _start(self) -> None:
        """Start all threads now, in the caller's: where the program is about to end, none can be started later on."""
        unbegun = [None]
        loop = None
        try:
            self.pool._start()
            loop = asyncio.new_event_loop()
            self._ended: asyncio.Future[None] = loop.create_future()
            arguments = (loop, unbegun)
            thread = threading.Thread(target=self._main, args=arguments, name="cpupool-executor", daemon=True)
            self._loop, self._thread = loop, thread
            thread.start()
        except BaseException as error:
            if not unbegun:
                raise  # a signal handler raised, and the thread runs
            unbegun.clear()  # it never will
            self._loop = self._thread = None
            if loop is not None:
                loop.close()
            if isinstance(error, Exception):
                raise ExecutorPoolBroken(f"the executor could not be started: {error}", error) from error
            raise

    def _call_in_loop(self, function: Callable[..., object], *args: object) -> None:
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass  # closed: there is nothing left to do

    def shut(self) -> None:
        """Take no more calls.  It may run inside a garbage collection."""
        self.is_shut = True
        if self._loop is None and self._at_end is not None:
            self.pool._stop_soon()  # there is no thread that could close it
        self._call_in_loop(self._look)

    def cancel_pending(self) -> None:
        """Cancel all calls that do not run and are not about to."""
        with self._lock:
            pending = [work for work in self._queue if not work.future.running()]
        for work in pending:
            work.future.cancel()

    def cancel_all(self) -> None:
        """Stop all calls, running ones too."""
        with self._lock:
            futures = [work.future for work in self._queue] + list(self._running)
        for future in futures:
            future.cancel()

    def join(self) -> None:
        """Wait until all calls are done, after `shut`."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _stop(self, future: Future[Any]) -> None:
        self._call_in_loop(self._cancel_call, future)

    # --- the thread ---

    def _main(self, loop: asyncio.AbstractEventLoop, unbegun: list[None]) -> None:
        try:
            unbegun.pop()
        except IndexError:
            return  # who started it was interrupted, and has given that up
        try:
            loop.run_until_complete(self._ended)
            if self._at_end is not None:
                loop.run_until_complete(self._close_pool(self._at_end))
        finally:
            loop.close()

    async def _close_pool(self, at_end: Callable[[], Awaitable[object]]) -> None:
        await at_end()

    def _look(self) -> None:
        """Begin what can begin, and end when there is nothing left to do."""
        while (work := self._next_work(is_new_lane=True)) is not None:
            task = asyncio.get_running_loop().create_task(self._serve(work))
            self._tasks.add(task)  # a loop itself does not keep its tasks
            task.add_done_callback(self._tasks.discard)
        if self.is_shut and not self._queue and not self._lanes and not self._ended.done():
            self._ended.set_result(None)

    async def _serve(self, work: _Work | None) -> None:
        """Make a call, and then others until none is left."""
        lane: asyncio.Task[None] = asyncio.current_task()  # type: ignore[assignment]  # there is one
        while work is not None:
            self._running[work.future] = lane
            await self._make_call(work)
            work = self._next_work(work.future)
        self._look()

    def _next_work(self, done: Future[Any] | None = None, *, is_new_lane: bool = False) -> _Work | None:
        """Take the next call for a lane that has just made one, or that is to begin; None if there is none for it."""
        with self._lock:
            if done is not None:
                del self._running[done]
            if is_new_lane:
                if self._lanes >= self.pool.max_workers:
                    return None
                self._lanes += 1
            while self._queue:
                work = self._queue.popleft()
                if work.future.begin():
                    self._running[work.future] = None
                    return work
            self._lanes -= 1
            return None

    async def _make_call(self, work: _Work) -> None:
        future = work.future
        if future.cancelled():
            return  # before it began
        finish: Callable[[Any], object]
        try:
            outcome = await self._run_in(work)
            finish = future.set_result
        except asyncio.CancelledError as error:
            if future.cancelled():
                asyncio.current_task().uncancel()  # type: ignore[union-attr]  # the call was meant, not the lane
                return
            outcome, finish = error, future.set_exception  # the task's arguments raised it while they were pickled
        except BaseException as error:
            outcome = _as_executor_error(error)
            finish = future.set_exception
        try:
            finish(outcome)
        except InvalidStateError:
            pass  # it was cancelled in the moment of its outcome
        except BaseException as error:  # a callback of the user's: it must not end the others' calls
            context = {"message": "a done-callback of a future raised", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    async def _run_in(self, work: _Work) -> Any:
        """Make a call; with the context variables of who has submitted it, if some go along with calls."""
        if not self.pool.settings.context:
            return await self._run(work.fn, *work.args, **work.kwargs)
        changed = [(each, each.set(value)) for each, value in work.context.items()]
        try:
            return await self._run(work.fn, *work.args, **work.kwargs)
        finally:
            for variable, token in reversed(changed):
                variable.reset(token)

    def _cancel_call(self, future: Future[Any]) -> None:
        lane = self._running.get(future)
        if lane is not None:
            lane.cancel()

    # --- forks ---

    def forget_parent(self) -> None:
        """Begin anew in a forked child: the thread, its loop and its calls are the parent's."""
        _of_parent.append(self._loop)  # it cannot be closed: it looks as if it were running
        self._lock = threading.Lock()
        self._reset()


def _as_executor_error(error: BaseException) -> BaseException:
    """Return the error that a future gets: without this thread's frames, which would hold the call's arguments."""
    make = _BROKEN.get(type(error))
    if make is None:
        return error.with_traceback(None)
    new = make(*error.args)
    new.__cause__ = error.__cause__
    return new


# --- the process's end, and its forks ---

_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()
_of_parent: list[asyncio.AbstractEventLoop | None] = []
_is_exiting = False


def _finish_at_exit() -> None:
    """Make the calls that were accepted, as executors do, unless the program ends by Ctrl-C."""
    global _is_exiting  # noqa: PLW0603  # a fact about this process
    _is_exiting = True
    drivers = list(_drivers)
    for driver in drivers:
        if getattr(sys, "last_type", None) is KeyboardInterrupt:
            driver.cancel_all()
        driver.shut()
    for driver in drivers:
        driver.join()


def _after_fork_in_child() -> None:
    for driver in list(_drivers):
        driver.forget_parent()


at_fork(after_in_child=_after_fork_in_child)
atexit.register(_finish_at_exit)
