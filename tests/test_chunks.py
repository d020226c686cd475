"""Cutting text: nothing is lost, and nothing that belongs together is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpupool import split_text

texts = st.text(st.sampled_from("ab .\n\u00e9"), max_size=80)


@given(texts, st.integers(1, 30))
def test_pieces_joined_are_the_text(text: str, max_chars: int) -> None:
    pieces = list(split_text(text, max_chars))
    assert "".join(pieces) == text
    assert all(pieces)


@given(texts, st.integers(1, 30))
def test_every_cut_is_behind_a_boundary(text: str, max_chars: int) -> None:
    pieces = list(split_text(text, max_chars))
    assert all(piece[-1].isspace() for piece in pieces[:-1])


@given(texts, st.integers(1, 30))
def test_a_piece_is_longer_only_where_there_is_no_boundary(text: str, max_chars: int) -> None:
    for piece in split_text(text, max_chars):
        assert len(piece) <= max_chars or not any(character.isspace() for character in piece[:-1])


@given(texts, st.integers(1, 30))
def test_a_piece_is_as_long_as_it_may_be(text: str, max_chars: int) -> None:
    """The next character, or the run up to the next boundary, would not have fitted."""
    pieces = list(split_text(text, max_chars))
    for piece, following in itertools.pairwise(pieces):
        run = next((index + 1 for index, character in enumerate(following) if character.isspace()), len(following))
        assert len(piece) + run > max_chars


def test_another_boundary() -> None:
    assert list(split_text("aa;bb;cc", 4, lambda character: character == ";")) == ["aa;", "bb;", "cc"]


@pytest.mark.parametrize(("size", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("9", TypeError)])
def test_a_bad_size_is_an_error_at_the_call(size: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="max_chars must be"):
        split_text("text", size)  # type: ignore[arg-type]
