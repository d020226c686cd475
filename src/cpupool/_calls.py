"""The calls of a pool, with its own options or with others."""

from __future__ import annotations

import functools
from copy import copy
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, overload

from ._settings import UNSET, CallOptions, Unset
from ._waiting import BlockingWaits, refuse_in_event_loop, run_to_end, running_loop

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable

    from ._executor import PoolExecutorFace
    from ._pool import CpuPool
    from ._stream import Stream
    from ._supervisor import Supervisor
    from ._waiting import Waits

P = ParamSpec("P")
T = TypeVar("T")


class PoolCalls:
    """What a pool and its views have in common."""

    __slots__ = ()

    if TYPE_CHECKING:
        _options: CallOptions

        @property
        def _home(self) -> CpuPool:
            """The pool itself."""
            ...

        @property
        def _supervisor(self) -> Supervisor:
            """That of the pool, now: a forked child has another."""
            ...

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn(*args, **kwargs)` in a worker and return what it returns.

        The function and its arguments are pickled: define the function at the top level of a module.  Large ones are
        not copied before they are sent: do not change arrays and the like until the call has returned.

        Raises:
            Exception: whatever `fn` raises, with the worker's traceback as `__cause__`.
            RemoteError: it raised what cannot be rebuilt, or must not be raised, here.
            TaskNotPicklable: the function or an argument cannot be sent.
            ResultNotPicklable: what it returned cannot be sent back.
            WorkerDied: its worker died; other calls are unaffected.
            TaskTimeout: it ran longer than its `timeout`.
            QueueTimeout: no worker came free within its `queue_timeout`.
            PoolFull: `max_pending` calls wait already.
            InitializerFailed, PoolBroken: no worker could be started.
            PoolClosed: the pool was closed before, or while, it ran.

        Cancellation: the caller returns at once.  A call that waits leaves the queue.  A running task is interrupted
            (`TaskInterrupted` is raised in it), and its worker lives on; if it has not ended after `grace` seconds, the
            worker is killed and replaced.
        """
        call = self._home._make_call(fn, args, kwargs, self._options)
        del args, kwargs  # they are pickled, and the call may wait for long
        result: T = await call.complete(self._supervisor, async_waits())
        return result

    def run_sync(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn(*args, **kwargs)` in a worker from a thread without an event loop, and return what it returns.

        Raises:
            RuntimeError: this thread runs an event loop, which would stand still meanwhile.
            Exception: as `run`.

        Cancellation: Ctrl-C in the main thread stops the task.
        """
        refuse_in_event_loop("run_sync", "await pool.run(...)")
        call = self._home._make_call(fn, args, kwargs, self._options)
        del args, kwargs
        result: T = run_to_end(call.complete(self._supervisor, BlockingWaits()))
        return result

    def prepare(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> PreparedCall[T]:
        """Check and pickle a call now, and run it later, with this view's options: `await prepared.run()`.

        What is wrong with it is known at once, what happens to its arguments meanwhile does not concern it (they are
        copied here and now, however large they are), and they are pickled once, however often it is run.

        Raises:
            TypeError, TaskNotPicklable: as `run`.
        """
        return PreparedCall(self, self._home._make_call(fn, args, kwargs, self._options, is_copy=True))

    @overload
    async def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        return_exceptions: Literal[False] = False,
        chunksize: int | None = None,
        on_progress: Callable[[int, int | None], object] | None = None,
    ) -> list[T]: ...

    @overload
    async def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        return_exceptions: bool,
        chunksize: int | None = None,
        on_progress: Callable[[int, int | None], object] | None = None,
    ) -> list[T | Exception]: ...

    async def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        return_exceptions: bool = False,
        chunksize: int | None = None,
        on_progress: Callable[[int, int | None], object] | None = None,
    ) -> list[Any]:
        """Call `fn` with each of the items, on all workers, and return the results in order.

        Items travel in batches, whose size follows from how long they take; other callers wait for one batch at most.
        Each item runs once.  A crash, a timeout or an error concerns the one item that ran: those before it keep their
        results, those after it run elsewhere.

        Args:
            fn: the function.
            *iterables: where its arguments come from, one of each iterable for each call; the shortest ends it.  Plain
                ones are iterated over on the event loop, asynchronous ones awaited.
            return_exceptions: put the exception of an item that fails in the place of its result, and go on; otherwise
                the first failure is raised, and stops the rest.
            chunksize: how many items make a batch; by default as many as take some 30 ms.
            on_progress: called as `on_progress(done, total)` with the number of results so far, and of all items (None
                while that is not known); from this task, at most 20 times a second, and once at the end.

        Raises:
            Exception: as `run`; with a note that says which item it was.  Also what an iterable has raised.
            TypeError, ValueError: an argument is not what it can be; the message names it.

        Cancellation: as `run`, for all items that run; generators among the iterables are closed.
        """
        from ._map import FlowOptions  # here: it loads anyio, which most callers of a pool never need
        from ._stream import map_items

        flow_options = FlowOptions(return_exceptions=return_exceptions, chunksize=chunksize)
        flow = self._home._open_flow(fn, iterables, self._options, flow_options)
        return await map_items(flow, return_exceptions=return_exceptions, on_progress=on_progress)

    @overload
    def stream(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        ordered: bool = True,
        return_exceptions: Literal[False] = False,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Stream[T]: ...

    @overload
    def stream(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        ordered: bool = True,
        return_exceptions: bool,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Stream[T | Exception]: ...

    def stream(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any] | AsyncIterable[Any],
        ordered: bool = True,
        return_exceptions: bool = False,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Stream[Any]:
        """Do as `map`, but give the results while they come, and take the items only as they are needed.

        Use it as `async with pool.stream(fn, items) as results: async for value in results: ...`.  The iterables may be
        endless.  Leaving the block, at any time and in any way, stops what runs, and closes the generators among them.
        One task iterates at a time.

        Args:
            fn: the function.
            *iterables: as for `map`.
            ordered: give the results in the order of the items; otherwise as they are done.
            return_exceptions: give the exception of an item that fails in the place of its result, and go on; otherwise
                the first failure is raised when its turn comes, and ends the stream.
            chunksize: as for `map`.
            buffersize: how many items may have been taken from the iterables whose results have not been taken yet; by
                default as many as keep all workers busy, and not more than some 32 MB of them.

        Raises:
            TypeError, ValueError, TaskNotPicklable: an argument is not what it can be.  What `map` raises comes out of
                the iteration.

        Cancellation: as `map`.
        """
        from ._map import FlowOptions
        from ._stream import Stream

        flow_options = FlowOptions(
            return_exceptions=return_exceptions,
            chunksize=chunksize,
            is_lazy=True,
            buffersize=buffersize,
            ordered=ordered,
        )
        flow = self._home._open_flow(fn, iterables, self._options, flow_options)
        return Stream(flow, return_exceptions=return_exceptions)

    def options(
        self,
        *,
        timeout: float | Unset | None = UNSET,
        queue_timeout: float | Unset | None = UNSET,
        retries: int | Unset = UNSET,
        label: str | Unset | None = UNSET,
        on_report: Callable[[Any], object] | Unset | None = UNSET,
        on_start: Callable[[], object] | Unset | None = UNSET,
        background: bool | Unset = UNSET,
    ) -> CpuPoolView:
        """Return a view of the pool whose calls have other options: `pool.options(timeout=5).run(fn, 1)`.

        What is not given stays as it is here.  Views are light; make one for a call, or keep it.

        Args:
            timeout: seconds that a task may run, from the moment it is sent to a worker; None for no limit.  Then it is
                interrupted: `TaskInterrupted` is raised in it, and `TaskTimeout` here.  A task that has not ended
                `grace` seconds later is killed with its worker.  Each attempt has the whole time.
            queue_timeout: seconds that a call may wait for a worker; None for no limit.  Then `QueueTimeout` is raised,
                and it has not run.  With 0, it runs only if a worker is idle.
            retries: how often the call is run again after its worker died.
            label: a name for the call, instead of the function's, in errors and in `current_task()`.
            on_report: called as `on_report(value)` with what a task passes to `cpupool.report`; on the event loop, or
                in the thread, that waits, some 20 times a second at most, and with the last one before the call
                returns.  What it raises ends the call.  The items of a `map` report as they run, mixed: let them say
                which they are.
            on_start: called as `on_start()` when a worker is there for the call, which until then has waited; in the
                same place.  Again for each retry, and each batch of a `map`.  What it raises ends the call.
            background: wait for a worker even if `max_pending` calls do so already, and do not count as one of these.
                For work that nobody waits for, and that is bounded in another way.

        Raises:
            TypeError, ValueError: an option is not what it can be; the message names it.
        """
        options = self._options.changed(
            timeout=timeout,
            queue_timeout=queue_timeout,
            retries=retries,
            label=label,
            on_report=on_report,
            on_start=on_start,
            background=background,
        )
        return CpuPoolView(self._home, options)

    def as_executor(self) -> PoolExecutorFace:
        """Return a `concurrent.futures.Executor` over the same workers, for code that wants one.

        It works with `asyncio`'s `run_in_executor`, `concurrent.futures.wait` and `as_completed`.  Shutting it down
        does not close the pool.  Its calls have the options of this view.  They are made from a thread of its own,
        which ends with it.
        """
        from ._executor import PoolExecutorFace  # here: it loads asyncio, which most callers of a pool never need

        return PoolExecutorFace(self._home, self.run)


class PreparedCall(Generic[T]):
    """A call that is checked and pickled; `prepare` makes it.  It may be run any number of times, at once as well."""

    __slots__ = ("_call", "_calls")

    def __init__(self, calls: PoolCalls, call: Any) -> None:
        """Args: `call` is a `Call`, whose type is none of a user's concern."""
        self._calls = calls
        self._call = call

    async def run(self) -> T:
        """Run it in a worker, and return what it returns.

        Raises:
            Exception: as the `run` of a pool.

        Cancellation: as the `run` of a pool.
        """
        result: T = await copy(self._call).complete(self._calls._supervisor, async_waits())
        return result

    def run_sync(self) -> T:
        """Run it in a worker, from a thread without an event loop, and return what it returns.

        Raises:
            Exception: as the `run_sync` of a pool.

        Cancellation: as the `run_sync` of a pool.
        """
        refuse_in_event_loop("run_sync", "await prepared.run()")
        result: T = run_to_end(copy(self._call).complete(self._calls._supervisor, BlockingWaits()))
        return result


class CpuPoolView(PoolCalls):
    """A pool's calls with other options; `CpuPool.options` makes it."""

    __slots__ = ("_options", "_pool")

    def __init__(self, pool: CpuPool, options: CallOptions) -> None:
        self._pool = pool
        self._options = options

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._pool!r}: {self._options}>"

    @property
    def pool(self) -> CpuPool:
        """The pool itself."""
        return self._pool

    @property
    def _home(self) -> CpuPool:
        return self._pool

    @property
    def _supervisor(self) -> Supervisor:
        return self._pool._supervisor


def async_waits() -> Waits:
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
