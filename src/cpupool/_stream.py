"""What `CpuPool.map` and `CpuPool.stream` give their callers, over a `Flow`."""

from __future__ import annotations

import inspect
import math
import time
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self


T = TypeVar("T")

_REPORT_INTERVAL = 0.05  # seconds between two calls of `on_progress`


class Segment(Protocol):
    """What has become of some consecutive items: see `_map`."""

    @property
    def first(self) -> int: ...

    @property
    def values(self) -> list[Any]: ...

    @property
    def failures(self) -> list[int]: ...


class Segments(Protocol):
    """What gives them: a `Flow`."""

    @property
    def is_open(self) -> bool: ...

    @property
    def total(self) -> int | None: ...

    async def next_segment(self) -> Segment | None: ...

    def consume(self) -> None: ...

    def fail(self, error: Exception) -> Exception: ...

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

    async def __aenter__(self) -> Self:
        await self._flow.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._values.clear()
        await self._flow.__aexit__(kind, error, traceback)

    def __aiter__(self) -> Self:
        if not self._flow.is_open:
            raise TypeError("a stream is a context manager: 'async with pool.stream(fn, items) as results:'")
        return self

    async def __anext__(self) -> T:
        """Return the next result.

        Raises:
            StopAsyncIteration: there are no more.
            Exception: what the next item's function has raised, as `run`, if exceptions are not returned; what the
                source has raised; or why the pool can run nothing.
        """
        while not self._values:
            segment = await self._flow.next_segment()
            if segment is None:
                raise StopAsyncIteration
            self._values = segment.values
            self._values.reverse()
            self._failures = set() if self._return_exceptions else {len(self._values) - at for at in segment.failures}
        has_failed = len(self._values) in self._failures
        value = self._values.pop()
        self._flow.consume()
        if has_failed:
            self._values.clear()
            raise self._flow.fail(value)
        result: T = value
        return result


async def map_items(
    flow: Segments, *, return_exceptions: bool, on_progress: Callable[[int, int | None], object] | None
) -> list[Any]:
    """Return all results of a flow, in order."""
    progress = None if on_progress is None else _Progress(on_progress)
    parts: list[tuple[int, list[Any]]] = []
    done = 0
    async with flow:
        while (segment := await flow.next_segment()) is not None:
            if segment.failures and not return_exceptions:
                raise segment.values[segment.failures[0]]
            parts.append((segment.first, segment.values))
            done += len(segment.values)
            if progress is not None:
                progress.report(done, flow.total)
        if progress is not None:
            progress.report(done, done, is_last=True)
    parts.sort(key=lambda part: part[0])
    results: list[Any] = []
    for _, values in parts:
        results += values
    return results


class _Progress:
    """Calls `on_progress`, but not too often."""

    def __init__(self, on_progress: Callable[[int, int | None], object]) -> None:
        if not callable(on_progress) or inspect.iscoroutinefunction(on_progress):
            raise TypeError(f"on_progress must be a function made with 'def', or None, not {on_progress!r}")
        self._on_progress = on_progress
        self._said: tuple[int, int | None] | None = None
        self._next = -math.inf

    def report(self, done: int, total: int | None, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if (now >= self._next or is_last) and self._said != (done, total):
            self._next = now + _REPORT_INTERVAL
            self._said = done, total
            self._on_progress(done, total)
