"""What `CpuPool.map` and `CpuPool.stream` give their callers, over a `Flow`."""

from __future__ import annotations

import inspect
import math
import time
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self

    from ._segments import Segment

T = TypeVar("T")

_REPORT_INTERVAL = 0.05  # seconds between two calls of `on_progress`


class Segments(Protocol):
    """What gives them: a `Flow`."""

    @property
    def was_entered(self) -> bool: ...

    @property
    def total(self) -> int | None: ...

    async def next_segment(self) -> Segment | None: ...

    def consume(self) -> None: ...

    def fail(self, error: BaseException) -> BaseException: ...

    async def __aenter__(self) -> object: ...

    async def __aexit__(self, *_: object) -> None: ...


class Stream(Generic[T]):
    """Results as they come: `async with pool.stream(fn, items) as results: async for value in results: ...`.

    Leaving the block, also early or by an error, stops what still runs, and closes the generators among the sources.
    """

    def __init__(self, flow: Segments, *, return_exceptions: bool) -> None:
        self._flow = flow
        self._return_exceptions = return_exceptions
        self._values: list[Any] = []  # the segment in hand, the next one last
        self._failures: set[int] = set()  # how many are left in it before each that failed
        self._is_fetching = False

    async def __aenter__(self) -> Self:
        await self._flow.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._values.clear()
        await self._flow.__aexit__(kind, error, traceback)

    def __aiter__(self) -> Self:
        self._check_entered()
        return self

    def _check_entered(self) -> None:
        if not self._flow.was_entered:
            raise TypeError("a stream is a context manager: 'async with pool.stream(fn, items) as results:'")

    async def __anext__(self) -> T:
        """Return the next result.

        Raises:
            StopAsyncIteration: there are no more.
            Exception: what the next item's function has raised, as `run`, if exceptions are not returned; what the
                source has raised; or why the pool can run nothing.
        """
        while not self._values:
            await self._fetch()
        has_failed = len(self._values) in self._failures
        value = self._values.pop()
        self._flow.consume()
        if has_failed:
            self._values.clear()
            raise self._flow.fail(value)
        result: T = value
        return result

    async def _fetch(self) -> None:
        self._check_entered()
        if self._is_fetching:
            raise RuntimeError("another task waits for the next result of this stream; let one task hand them out")
        self._is_fetching = True
        try:
            segment = await self._flow.next_segment()
        finally:
            self._is_fetching = False
        if segment is None:
            raise StopAsyncIteration
        self._values = segment.values
        self._values.reverse()
        self._failures = set() if self._return_exceptions else {len(self._values) - at for at in segment.failures}


async def map_items(
    flow: Segments, *, return_exceptions: bool, on_progress: Callable[[int, int | None], object] | None
) -> list[Any]:
    """Return all results of a flow, in order."""
    progress = _Progress(on_progress)
    parts: list[tuple[int, list[Any]]] = []
    async with flow:
        while (segment := await progress.watch(flow.next_segment)) is not None:
            if segment.failures and not return_exceptions:
                raise segment.values[segment.failures[0]]
            parts.append((segment.first, segment.values))
            progress.note(len(segment.values), flow.total)
        progress.end()
    parts.sort(key=lambda part: part[0])
    results: list[Any] = []
    for _, values in parts:
        results += values
    return results


class _Progress:
    """Calls `on_progress`, but not too often, and not much too late."""

    def __init__(self, on_progress: Callable[[int, int | None], object] | None) -> None:
        if on_progress is not None and (not callable(on_progress) or inspect.iscoroutinefunction(on_progress)):
            raise TypeError(f"on_progress must be a function made with 'def', or None, not {on_progress!r}")
        self._on_progress = on_progress
        self._done: tuple[int, int | None] = (0, None)
        self._said: tuple[int, int | None] | None = None
        self._next = -math.inf

    async def watch(self, next_segment: Callable[[], Awaitable[Segment | None]]) -> Segment | None:
        """Wait for the next segment; meanwhile say what there was no time to say before."""
        if self._on_progress is not None and self._done[0] and self._said != self._done:
            with anyio.move_on_after(self._next - time.monotonic()):
                return await next_segment()
            self._say()
        return await next_segment()

    def note(self, results: int, total: int | None) -> None:
        self._done = self._done[0] + results, total
        if time.monotonic() >= self._next:
            self._say()

    def end(self) -> None:
        self._done = self._done[0], self._done[0]
        self._say()

    def _say(self) -> None:
        if self._on_progress is not None and self._said != self._done:
            self._next = time.monotonic() + _REPORT_INTERVAL
            self._said = self._done
            self._on_progress(*self._done)
