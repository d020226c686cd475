"""Cutting work into pieces without losing any of it."""

from __future__ import annotations

import itertools
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


def split_text(text: str, max_chars: int, is_boundary: Callable[[str], bool] = str.isspace) -> Iterator[str]:
    """Split a text into pieces of at most `max_chars` characters, cutting only right behind a boundary.

    Nothing is lost: the pieces joined are the text.  Where no boundary lies within `max_chars`, a piece is longer, up
    to the next one: what stands between two boundaries is never cut.

    Args:
        text: what to split.
        max_chars: how long a piece should be at most, in characters.
        is_boundary: says of a single character whether the text may be cut behind it.

    Raises:
        TypeError, ValueError: `max_chars` is not a positive int.
    """
    check_count("max_chars", max_chars, at_least=1)
    return _pieces(text, max_chars, is_boundary)


def _pieces(text: str, max_chars: int, is_boundary: Callable[[str], bool]) -> Iterator[str]:
    start = 0
    while len(text) - start > max_chars:
        last = start + max_chars - 1
        backwards = (index for index in range(last, start - 1, -1) if is_boundary(text[index]))
        forwards = (index for index in range(last + 1, len(text)) if is_boundary(text[index]))
        cut = next(backwards, None)
        if cut is None:
            cut = next(forwards, len(text) - 1)
        yield text[start : cut + 1]
        start = cut + 1
    if start < len(text):
        yield text[start:]
