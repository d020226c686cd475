"""Cutting work into pieces without losing any of it."""

from __future__ import annotations

import itertools
import re
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from ._checks import check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

T = TypeVar("T")
S = TypeVar("S", bound="Sequence[Any]")


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut an iterable into lists of `size` items; the last one may be shorter.

    Nothing is lost: the lists joined are the items.  It takes no more items than it needs for the next list.

    Raises:
        TypeError, ValueError: `size` is not a positive int, or `items` cannot be iterated over.
    """
    check_count("size", size, at_least=1)
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def split_evenly(items: S, parts: int) -> list[S]:
    """Cut a sequence into `parts` slices whose lengths differ by one at most, the longer ones first.

    Nothing is lost: the slices joined are the items.  None is empty, so there are fewer where there are fewer items.

    Raises:
        TypeError, ValueError: `parts` is not a positive int.
    """
    check_count("parts", parts, at_least=1)
    length, longer = divmod(len(items), parts)
    stops = [part * length + min(part, longer) for part in range(1, min(parts, len(items)) + 1)]
    slices: list[Any] = [items[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    return slices


def split_text(
    text: str, max_chars: int, is_boundary: Callable[[str], bool] | re.Pattern[str] = str.isspace
) -> Iterator[str]:
    """Split a text into pieces of at most `max_chars` characters, cutting only right behind a boundary.

    Nothing is lost: the pieces joined are the text.  Where no boundary lies within `max_chars`, a piece is longer, up
    to the next one: what stands between two boundaries is never cut.

    Args:
        text: what to split.
        max_chars: how long a piece should be at most, in characters.
        is_boundary: says of a single character whether the text may be cut behind it; or, much faster where boundaries
            are rare, a pattern that matches such characters.

    Raises:
        TypeError, ValueError: `max_chars` is not a positive int.
    """
    check_count("max_chars", max_chars, at_least=1)
    if isinstance(is_boundary, re.Pattern):
        return _pieces(text, max_chars, _Pattern(is_boundary))
    return _pieces(text, max_chars, _Predicate(is_boundary))


def _pieces(text: str, max_chars: int, boundaries: _Pattern | _Predicate) -> Iterator[str]:
    start = 0
    while len(text) - start > max_chars:
        end = start + max_chars
        stop = boundaries.last(text, start, end) or boundaries.first(text, end) or len(text)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


class _Predicate:
    """Boundaries that a function knows.  Both methods return the place behind one, or None."""

    def __init__(self, is_boundary: Callable[[str], bool]) -> None:
        self._is_boundary = is_boundary

    def last(self, text: str, start: int, end: int) -> int | None:
        return next((at for at in range(end, start, -1) if self._is_boundary(text[at - 1])), None)

    def first(self, text: str, start: int) -> int | None:
        return next((at for at in range(start + 1, len(text) + 1) if self._is_boundary(text[at - 1])), None)


class _Pattern:
    """Boundaries that a pattern matches."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern

    def last(self, text: str, start: int, end: int) -> int | None:
        length = 64
        while True:
            begin = max(end - length, start)
            last = deque(self._pattern.finditer(text, begin, end), maxlen=1)
            if last or begin == start:
                return last[0].end() if last else None
            length *= 8

    def first(self, text: str, start: int) -> int | None:
        found = self._pattern.search(text, start)
        return None if found is None else found.end()
