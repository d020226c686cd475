"""The executor face of a pool: `concurrent.futures` over the same workers."""

from __future__ import annotations

import itertools
import time
import weakref
from collections import deque
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ._batches import run_chunk
from ._driver import Driver

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from concurrent.futures import Future
    from types import TracebackType

    from ._driver import CallFuture, DrivenPool

P = ParamSpec("P")
T = TypeVar("T")


class PoolExecutorFace(Executor):
    """A `concurrent.futures.Executor` over the workers of a pool; `CpuPool.as_executor` makes it.

    It differs from `ProcessPoolExecutor` where that fails its users: `Future.cancel()` stops a call that runs, and a
    crash fails one future, with an error that is both `WorkerDied` and `BrokenProcessPool`, and nothing else.
    """

    def __init__(
        self,
        pool: DrivenPool,
        run: Callable[..., Awaitable[Any]],
        at_end: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._driver = Driver(pool, run, at_end)
        self._finalizer = weakref.finalize(self, self._driver.shut)
        self._finalizer.atexit = False  # `_driver` sees to the end of the program

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a worker run `fn(*args, **kwargs)` and return a future for its result.

        What goes wrong, also in pickling, is the future's exception.  Its done-callbacks are called in the executor's
        own thread, in which an event loop runs: submit calls there, but do not wait for them.

        Raises:
            RuntimeError: the executor was shut down, the pool closed, or the program is ending.

        Cancellation: `Future.cancel()` as `CpuPool.run`; also while the call runs.
        """
        return self._driver.submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Call `fn` with the items of the iterables; return an iterator over the results, in order.

        Args:
            fn: the function.
            *iterables: where its arguments come from, one of each iterable for each call; the shortest ends it.
            timeout: seconds from now after which the iterator raises `TimeoutError`.
            chunksize: how many items make one call.
            buffersize: how many calls are submitted ahead of the iterator; by default all at once.

        Raises:
            ValueError: `chunksize` or `buffersize` is less than 1.

        Cancellation: when the iterator is closed or raises, the calls that are left are cancelled, running ones too.
        """
        for name, size in (("chunksize", chunksize), ("buffersize", buffersize)):
            if size is not None and not isinstance(size, int):
                raise TypeError(f"{name} must be an int, not {size!r}")
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or >= 1.")
        deadline = None if timeout is None else time.monotonic() + timeout
        items = zip(*iterables, strict=False)
        futures: Iterator[CallFuture[Any]]
        if chunksize == 1:
            futures = (self._driver.submit(fn, args, {}) for args in items)
        else:
            chunks = iter(lambda: tuple(itertools.islice(items, chunksize)), ())
            futures = (self._driver.submit(run_chunk, (fn, chunk), {}) for chunk in chunks)
        submitted = deque(futures if buffersize is None else itertools.islice(futures, buffersize))
        results = _results(submitted, futures, deadline)
        next(results)  # into its `try`, so that closing it cancels what is left even if nobody has asked for a result
        return results if chunksize == 1 else _flatten(results)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; those accepted are still made.

        Args:
            wait: also wait until they are done.
            cancel_futures: cancel those that do not run and are not about to.
        """
        with self._driver._lock:
            self._driver.shut()
        if cancel_futures:
            self._driver.cancel_pending()
        if wait:
            self._driver.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Shut down; after Ctrl-C and the like, stop all calls instead of making them."""
        if kind is not None and not issubclass(kind, Exception):
            self._driver.cancel_all()
        self.shutdown()


def _results(
    submitted: deque[CallFuture[Any]], more: Iterator[CallFuture[Any]], deadline: float | None
) -> Iterator[Any]:
    refused: RuntimeError | None = None
    try:
        yield None
        while submitted:
            try:
                submitted.extend(itertools.islice(more, 1))
            except RuntimeError as error:  # the executor was shut down: what was submitted before still counts
                refused, more = error, iter(())
            yield _take_result(submitted, deadline)
        if refused is not None:
            raise refused
    finally:
        for future in submitted:
            future.cancel()


def _take_result(submitted: deque[CallFuture[Any]], deadline: float | None) -> Any:
    """Wait for the first, and keep no reference to it or its result."""
    result = submitted[0].result(None if deadline is None else deadline - time.monotonic())
    submitted.popleft()
    return result


def _flatten(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()
