"""The journal of a batch, without a worker: what is written down is what both sides read, at any moment."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpupool import TaskInterrupted, _batches
from cpupool._current import set_current_task
from cpupool._frames import HEADER_SIZE, BatchHead, Frame, FrameDecoder, Kind, encode_batch, split_batch
from cpupool._interrupts import Interrupts
from cpupool._journal import COLUMN_LENGTH, DATA_SIZE, JOURNAL_SIZE, Results, open_journal, read_journal
from cpupool._payload import BY_NAME, dumps
from cpupool._status import (
    BEFORE_FIRST,
    CELL_SIZE,
    CONDEMNED,
    CONDEMNED_ITEM,
    CUT,
    HELD,
    NOT_BEGUN,
    SENT,
    STATUS_PAGE_SIZE,
)


class Both:
    """Both sides of a journal."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("journal")
        os.truncate(self.fd, STATUS_PAGE_SIZE + JOURNAL_SIZE)
        self.journal = open_journal(self.fd)

    def close(self) -> None:
        del self.journal  # and with it its memory
        os.close(self.fd)

    def read(self) -> bytes | None:
        return read_journal(lambda cell: self.journal.page[cell], partial(os.pread, self.fd))


@pytest.fixture
def both() -> Iterator[Both]:
    sides = Both()
    yield sides
    sides.close()


def values(results: Results) -> list[Any]:
    """Return the values among some results; of an error what was recorded, in a tuple."""
    if results.are_numbers:
        return results.column
    found: list[Any] = []
    start = 0
    for end in results.column:
        record = results.data[start : max(end, ~end)]
        found.append((record,) if end < 0 else pickle.loads(record))
        start = max(end, ~end)
    return found


def test_records_and_errors_are_read_as_they_were_written(both: Both) -> None:
    journal = both.journal
    journal.begin()
    assert both.read() is None
    assert journal.add(dumps("a"))
    assert journal.add(b"broken", is_error=True)
    assert journal.add(dumps([1]))
    for body in (both.read(), journal.pack(1.5)):
        assert body is not None
        results = Results(body)
        assert (results.first, results.count, results.first_error) == (0, 3, 1)
        assert values(results) == ["a", (b"broken",), [1]]
    journal.empty(3)
    assert both.read() is None
    assert journal.add(dumps(None))
    body = both.read()
    assert body is not None
    assert (Results(body).first, Results(body).first_error, values(Results(body))) == (3, None, [None])


def test_what_does_not_fit_is_refused_and_travels_alone(both: Both) -> None:
    journal = both.journal
    journal.begin()
    assert journal.add(bytes(DATA_SIZE))
    assert not journal.add(b"x")
    journal.empty(1)
    alone = Results(journal.pack_alone(bytes(DATA_SIZE + 1), 0.5, is_error=True))
    assert (alone.first, alone.count, alone.first_error, len(alone.data)) == (1, 1, 0, DATA_SIZE + 1)


@pytest.mark.parametrize("number", [7, -(2**63), 2**63 - 1, 0.0, float("-inf")])
def test_numbers_are_counted_by_themselves(both: Both, number: float) -> None:
    """Each is there for the other side as soon as it is stored, before it is counted."""
    journal = both.journal
    journal.begin()
    assert journal.begin_numbers(number)
    for position in range(1, COLUMN_LENGTH):
        if position in (1, 2, 1000):
            assert journal.done == position
            body = both.read()
            assert body is not None
            assert values(Results(body)) == [number] * position
        journal.columns[b"q"[0] if isinstance(number, int) else b"d"[0]][position] = number
    assert journal.done == COLUMN_LENGTH
    assert journal.page[HELD] == 1


def test_other_things_are_no_numbers(both: Both) -> None:
    both.journal.begin()
    for other in (True, 2**63, None, "1"):
        assert not both.journal.begin_numbers(other)  # type: ignore[arg-type]
        assert both.journal.page[HELD] == 0


@pytest.mark.parametrize("at", [4, 5])
def test_what_is_being_sent_meanwhile_is_not_read(both: Both, at: int) -> None:
    """The column, or the data, may be those of the next results already."""
    journal = both.journal
    journal.begin()
    journal.add(dumps("a"))
    looks = 0

    def read_cell(cell: int) -> int:
        nonlocal looks
        looks += 1
        if looks == at:
            journal.empty(1)
        value: int = journal.page[cell]
        return value

    assert read_journal(read_cell, partial(os.pread, both.fd)) is None
    assert looks == at


heads = st.builds(
    BatchHead,
    st.integers(1, 2**32 - 1),
    st.integers(0, 2**63),
    st.integers(0, 2**63),
    st.floats(0, allow_infinity=True),
    st.floats(0, allow_infinity=True),
    st.booleans(),
    st.booleans(),
)


@given(heads, *[st.binary(max_size=20)] * 4)
def test_a_batch_travels_whole(head: BatchHead, label: bytes, context: bytes, function: bytes, columns: bytes) -> None:
    decoder = FrameDecoder()
    decoder.feed(encode_batch(7, head, label, context, function, columns))
    frame = decoder.next_frame()
    assert frame is not None
    assert (frame.kind, frame.task_id) == (Kind.BATCH, 7)
    found, *parts = split_batch(frame.body)
    assert found == head
    assert list(map(bytes, parts)) == [label, context, function, columns]
    assert decoder.next_frame() is None


@pytest.mark.parametrize("number", [-1, -1.5])
def test_negative_numbers_are_no_errors(both: Both, number: float) -> None:
    """Also where some of them are known already, and the rest is looked at."""
    both.journal.begin()
    assert both.journal.begin_numbers(number)
    results = Results(both.journal.pack(1.0))
    assert results.are_numbers
    assert (results.count_errors(0), results.count_errors(1)) == (0, 0)


# --- a batch that runs in this very process ---

kinds = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(0, 3),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.none(),
    st.booleans(),
    st.just(ZeroDivisionError()),
)


def returned_or_raised(item: Any) -> Any:
    if isinstance(item, Exception):
        raise item
    return item


def run(both: Both, items: list[Any], head: BatchHead) -> tuple[list[Any], list[Any]]:
    """Run a batch; return the kinds of frames and all results, by their numbers."""
    frames: list[bytes] = []
    body = encode_batch(5, head, b"", b"", dumps(returned_or_raised), dumps((items,)))[HEADER_SIZE:]
    batch = Frame(Kind.BATCH, 5, 0.0, memoryview(body))
    interrupts = Interrupts(both.journal.page, -1)

    class Channel(socket.socket):
        def sendall(self, frame: Any, _: int = 0) -> None:
            assert interrupts.armed == 0, "an interrupt would send half a frame"
            frames.append(bytes(frame))

    with Channel() as channel:
        answer = _batches.run_batch(batch, interrupts, both.journal, BY_NAME, {}, channel)
    set_current_task(None)
    frames.append(answer)
    decoder = FrameDecoder()
    found: list[Any] = []
    seen = []
    for each in frames:
        decoder.feed(each)
        frame = decoder.next_frame()
        assert frame is not None
        seen.append(frame.kind)
        if frame.kind in (Kind.PARTIAL, Kind.RESULT):
            results = Results(frame.body)
            assert results.first == len(found)
            found += values(results)
    return seen, found


@given(st.lists(kinds, min_size=1, max_size=60))
def test_values_come_back_as_they_are_whatever_stands_beside_them(items: list[Any]) -> None:
    both = Both()
    try:
        seen, found = run(both, items, BatchHead(1, 0, len(items), 60.0, 0.004, False, False))
    finally:
        both.close()
    assert seen[-1] is Kind.RESULT
    assert len(found) == len(items)
    for item, value in zip(items, found, strict=True):
        if isinstance(item, Exception):
            assert isinstance(value, tuple)
        else:
            assert type(value) is type(item)
            assert value == item


def test_a_limit_and_the_first_error_end_a_batch(both: Both) -> None:
    assert run(both, [1, 2, 3, 4], BatchHead(1, 0, 3, 60.0, 0.004, True, False))[1] == [1, 2, 3]
    found = run(both, ["a", ZeroDivisionError(), "c"], BatchHead(1, 0, 3, 60.0, 0.004, True, True))[1]
    assert (len(found), found[0]) == (2, "a")


def test_a_batch_that_was_condemned_before_it_began_runs_nothing(both: Both) -> None:
    page = both.journal.page
    page[CONDEMNED_ITEM] = 2 ** (8 * CELL_SIZE) - 1
    page[CONDEMNED] = 5
    assert run(both, [1, 2], BatchHead(1, 0, 2, 60.0, 0.004, True, False)) == ([Kind.INTERRUPTED], [])
    page[CONDEMNED] = 0


def test_a_batch_that_is_cut_ends_after_the_item_that_runs(both: Both) -> None:
    page = both.journal.page
    interrupts = Interrupts(page, -1)
    seen = []
    for armed, cut in ((9, 8), (9, 9), (10, 9)):
        interrupts.arm(armed)
        page[CUT] = cut
        interrupts.raise_if_condemned()
        seen.append(interrupts.is_late)
    assert seen == [False, True, False]
    assert page[CUT] == 9, "the last one was not for it"
    assert not interrupts.hit


def test_what_is_condemned_before_the_first_item_spares_all_items(both: Both) -> None:
    page = both.journal.page
    interrupts = Interrupts(page, -1)
    interrupts.arm(9)
    page[CONDEMNED_ITEM], page[CONDEMNED] = BEFORE_FIRST, 9
    both.journal.begin()
    interrupts.raise_if_condemned()
    page[SENT] = NOT_BEGUN
    with pytest.raises(TaskInterrupted):
        interrupts.raise_if_condemned()
    page[CONDEMNED] = 0


def test_only_the_item_that_was_condemned_feels_it(both: Both) -> None:
    page = both.journal.page
    interrupts = Interrupts(page, -1)
    both.journal.begin()
    interrupts.arm(9)
    page[SENT], page[HELD] = 3, 4
    page[CONDEMNED_ITEM], page[CONDEMNED] = 6, 9
    interrupts.raise_if_condemned()
    page[CONDEMNED_ITEM] = 7
    with pytest.raises(TaskInterrupted):
        interrupts.raise_if_condemned()
    assert interrupts.hit
    page[CONDEMNED] = 0
