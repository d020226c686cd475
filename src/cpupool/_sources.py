"""Where the items of a map come from: sequences, iterators, asynchronous iterators, one or several side by side.

A source gives columns: one list (or slice) for each iterable, all of the same length, which is how items travel.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import types
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

_LONGEST_PULL = 0.005  # seconds for which a slow iterator may keep the event loop, as far as that depends on us
_LARGEST_STEP = 1024

Columns = tuple[Sequence[Any], ...]


class Source(Protocol):
    """Gives the items of one map, once.

    Attributes:
        error: what an iterator has raised instead of giving its next item.
    """

    error: BaseException | None

    @property
    def is_ended(self) -> bool:
        """True when there are no more than are held."""
        ...

    @property
    def held(self) -> int:
        """How many items have been taken from the iterables, and not from here."""
        ...

    @property
    def left(self) -> int | None:
        """How many items are still to be taken, as far as that is known."""
        ...

    def take(self, size: int) -> Columns | None:
        """Take so many items, or as many as there are now; None if there are none."""
        ...

    def close(self) -> None:
        """Close the generators among the iterators, but for those of a `FedSource`."""
        ...


def count_all(source: Source, taken: int) -> int | None:
    """Return how many items there are in all when so many have been taken; None while that is not known."""
    if source.is_ended:
        return taken + source.held
    left = source.left
    return None if left is None else taken + left


def open_source(iterables: tuple[Any, ...]) -> Source:
    """Return the source for these iterables, synchronous and asynchronous ones.

    Raises:
        TypeError: one of them cannot be iterated over, or there is none.
    """
    if not iterables:
        raise TypeError("at least one iterable is needed: map(fn, items)")
    if all(type(each) in (list, tuple, range) for each in iterables):
        return SliceSource(iterables)
    if any(hasattr(each, "__aiter__") for each in iterables):
        return FedSource(iterables)
    return IteratorSource(iterables)


class SliceSource:
    """Cuts slices from sequences: the fastest way, and a slice of a range stays one when it travels."""

    held = 0

    def __init__(self, sequences: tuple[Sequence[Any], ...]) -> None:
        self._sequences = sequences
        self._position = 0
        self.error: BaseException | None = None

    @property
    def left(self) -> int:
        return max(min(map(len, self._sequences)) - self._position, 0)

    @property
    def is_ended(self) -> bool:
        return not self.left

    def take(self, size: int) -> Columns | None:
        size = min(size, self.left)  # all columns have the same length
        start, self._position = self._position, self._position + size
        return tuple(each[start : start + size] for each in self._sequences) if size else None

    def close(self) -> None:
        """There is nothing to close."""


class IteratorSource:
    """Takes items from iterators, in the caller's own task."""

    held = 0

    def __init__(self, iterables: tuple[Iterable[Any], ...]) -> None:
        self._length = _known_length(iterables)
        self._iterators = [iter(each) for each in iterables]
        self._rows = self._iterators[0] if len(iterables) == 1 else zip(*self._iterators, strict=False)
        self._taken = 0
        self.is_ended = False
        self.error: BaseException | None = None

    @property
    def left(self) -> int | None:
        return None if self._length is None else max(self._length - self._taken, 0)

    def take(self, size: int) -> Columns | None:
        rows: list[Any] = []
        deadline = time.monotonic() + _LONGEST_PULL
        step = 1
        while len(rows) < size and not self.is_ended:
            wanted = len(rows) + min(step, size - len(rows))
            try:
                rows.extend(itertools.islice(self._rows, wanted - len(rows)))
                self.is_ended = len(rows) < wanted
            except BaseException as error:  # it goes to the one who gave the iterator, whatever it is
                self.error = error
                self.is_ended = True
            if time.monotonic() > deadline:
                break
            step = min(2 * step, _LARGEST_STEP)
        self._taken += len(rows)
        return _to_columns(rows, len(self._iterators))

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, whatever one may raise
            for each in reversed(self._iterators):
                if isinstance(each, types.GeneratorType):
                    stack.callback(each.close)


class FedSource:
    """Holds the items that a task of its own has awaited (`next_row`), until they are taken."""

    def __init__(self, iterables: tuple[Any, ...]) -> None:
        self._length = _known_length(iterables)
        self._are_async = [hasattr(each, "__aiter__") for each in iterables]
        self._iterators: list[Any] = [
            aiter(each) if is_async else iter(each) for each, is_async in zip(iterables, self._are_async, strict=True)
        ]
        self._rows: deque[Any] = deque()
        self._fed = 0
        self.is_ended = False
        self.error: BaseException | None = None

    @property
    def held(self) -> int:
        return len(self._rows)

    @property
    def left(self) -> int | None:
        return None if self._length is None else max(self._length - self._fed, 0) + len(self._rows)

    async def next_row(self) -> bool:
        """Wait for one more; returns False at the end."""
        row = []
        try:
            for each, is_async in zip(self._iterators, self._are_async, strict=True):
                item = await anext(each) if is_async else next(each)
                row.append(item)
        except (StopIteration, StopAsyncIteration):
            return False
        self._rows.append(row[0] if len(row) == 1 else tuple(row))
        self._fed += 1
        return True

    def take(self, size: int) -> Columns | None:
        rows = [self._rows.popleft() for _ in range(min(size, len(self._rows)))]
        return _to_columns(rows, len(self._iterators))

    def close(self) -> None:
        """There is nothing left to close: `aclose` does it."""

    async def aclose(self) -> None:
        """Close all generators, in the task that has iterated over them, whatever one raises; nothing else."""
        async with contextlib.AsyncExitStack() as stack:
            for each in reversed(self._iterators):
                if isinstance(each, types.GeneratorType):
                    stack.callback(each.close)
                elif isinstance(each, types.AsyncGeneratorType):
                    stack.push_async_callback(each.aclose)


def _to_columns(rows: list[Any], width: int) -> Columns | None:
    if not rows:
        return None
    return (rows,) if width == 1 else tuple(zip(*rows, strict=True))


def _known_length(iterables: tuple[Any, ...]) -> int | None:
    try:
        return min(len(each) for each in iterables)
    except Exception:  # without a length, or with one that does not want to be asked
        return None
