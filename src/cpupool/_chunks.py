"""Cutting work into pieces without losing any of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._checks import check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
