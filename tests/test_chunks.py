"""Cutting text: nothing is lost, and nothing that belongs together is cut."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpupool import chunked, split_evenly, split_text

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


@given(texts, st.integers(1, 30))
def test_a_pattern_cuts_where_a_function_does(text: str, max_chars: int) -> None:
    assert list(split_text(text, max_chars, re.compile(r"\s"))) == list(split_text(text, max_chars))


def test_a_pattern_looks_back_as_far_as_needed() -> None:
    text = "a b" + "c" * 5000 + " d"
    assert list(split_text(text, 5000, re.compile(" "))) == ["a ", "b" + "c" * 5000 + " ", "d"]


def test_another_boundary() -> None:
    assert list(split_text("aa;bb;cc", 4, lambda character: character == ";")) == ["aa;", "bb;", "cc"]


@pytest.mark.parametrize(("size", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("9", TypeError)])
def test_a_bad_size_is_an_error_at_the_call(size: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="max_chars must be"):
        split_text("text", size)  # type: ignore[arg-type]


# --- chunked, split_evenly ---


@given(st.lists(st.integers()), st.integers(1, 20))
def test_chunks_joined_are_the_items_and_all_but_the_last_are_full(items: list[int], size: int) -> None:
    chunks = list(chunked(iter(items), size))
    assert list(itertools.chain.from_iterable(chunks)) == items
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= size for chunk in chunks[-1:])


def test_chunked_takes_no_more_than_it_needs() -> None:
    taken = iter(itertools.count())
    chunks = chunked(taken, 3)
    assert next(chunks) == [0, 1, 2]
    assert next(taken) == 3


@given(st.text(max_size=60), st.integers(1, 70))
def test_parts_joined_are_the_items_and_are_evenly_long(items: str, parts: int) -> None:
    slices = split_evenly(items, parts)
    assert "".join(slices) == items
    assert len(slices) == min(parts, len(items))
    lengths = [len(each) for each in slices]
    assert lengths == sorted(lengths, reverse=True)
    assert not lengths or max(lengths) - min(lengths) <= 1


def test_parts_have_the_type_of_the_whole() -> None:
    assert split_evenly(range(5), 2) == [range(3), range(3, 5)]
    assert split_evenly(b"abc", 2) == [b"ab", b"c"]
    assert split_evenly([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(("size", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (None, TypeError)])
def test_a_bad_number_is_an_error_at_the_call(size: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="size must be"):
        chunked([], size)  # type: ignore[arg-type]
    with pytest.raises(kind, match="parts must be"):
        split_evenly([], size)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not iterable"):
        chunked(5, 1)  # type: ignore[arg-type]
