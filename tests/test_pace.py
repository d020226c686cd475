"""Sizes of batches, decided without any process: what each of them should be, for all that may come."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpupool._pace import BUDGET, Pace

seconds = st.floats(1e-8, 10)


def simulate(item_seconds: list[float], lanes: int, count: int) -> tuple[float, list[int]]:
    """Run items on perfect workers, the next batch always on the one that is free first; return the time and sizes."""
    pace = Pace(lanes, None, None)
    free = [0.0] * lanes
    sizes = []
    done = 0
    while done < count:
        lane = free.index(min(free))
        wanted = pace.choose_size(count - done)
        sizes.append(wanted)
        took = 0.0
        size = 0
        for number in range(done, min(done + wanted, count)):
            took += item_seconds[number % len(item_seconds)]
            size += 1
            if took > BUDGET:
                break
        done += size
        free[lane] += took
        pace.note_run(size, took)
    return max(free), sizes


@given(st.lists(seconds, min_size=1, max_size=5), st.integers(1, 8), st.integers(1, 2000))
def test_the_total_is_near_the_ideal_whatever_the_items_take(times: list[float], lanes: int, count: int) -> None:
    """No schedule can beat the sum over the lanes, nor the longest item; ours adds one batch at most."""
    total, _ = simulate(times, lanes, count)
    every = [times[number % len(times)] for number in range(count)]
    assert total <= sum(every) / lanes + max(every) + BUDGET


def test_items_of_any_length_make_batches_of_the_same_time() -> None:
    for each in (1e-5, 1e-3, 0.01, 0.1, 1.0):
        _, sizes = simulate([each], 2, int(2 / each) + 10)
        largest = max(sizes)
        assert largest == 1 or 0.02 <= largest * each <= 0.05


def test_an_alternation_of_tiny_and_long_items_is_within_a_tenth_of_the_ideal() -> None:
    total, _ = simulate([1e-6, 0.05], 2, 200)
    assert total <= 1.1 * 100 * 0.05 / 2


@given(st.integers(1, 8), st.integers(1, 10_000), st.integers(1, 100), st.floats(0.003, 10))
def test_at_most_half_of_what_is_left_is_shared_out_at_once(lanes: int, left: int, items: int, took: float) -> None:
    """Unless it takes no time worth sharing."""
    pace = Pace(lanes, None, None)
    pace.note_run(items, took)
    assert 1 <= pace.choose_size(left) <= max(math.ceil(left / (2 * lanes)), int(0.002 / (took / items)))


@pytest.mark.parametrize(("buffersize", "lanes", "most"), [(1, 2, 1), (8, 2, 2), (1000, 2, 250)])
def test_a_small_buffer_is_shared_by_all_lanes(buffersize: int, lanes: int, most: int) -> None:
    pace = Pace(lanes, None, buffersize)
    for _ in range(10):
        pace.note_run(100_000, 0.001)
    assert pace.choose_size(None) == most


def test_items_that_are_slow_to_pickle_go_in_small_batches() -> None:
    """The event loop stands still meanwhile."""
    pace = Pace(2, None, None)
    for _ in range(10):
        pace.note_run(10_000, 0.001)
    before = pace.choose_size(None)
    pace.note_pickled(100, 1000, 0.1)
    assert pace.choose_size(None) == 2 < before


def test_a_chunksize_is_taken_at_its_word() -> None:
    pace = Pace(2, 7, None)
    pace.note_run(1, 10.0)
    assert pace.choose_size(3) == 7
    assert pace.budget == float("inf")
    assert Pace(2, 100, 10).choose_size(None) == 10, "more than the buffer has room for would never be taken"


def test_the_room_of_a_stream_follows_from_the_bytes_of_its_items() -> None:
    pace = Pace(2, None, None)
    assert pace.room == 64
    pace.note_results(10, 10 * 2**20)
    assert pace.room == 32
    pace.note_results(1, 2**30)
    assert pace.room == 4
    for _ in range(40):
        pace.note_results(1000, 1000)
    assert pace.room == 64
    assert Pace(2, 100, None).room == 800
    huge = Pace(2, 100, None)
    huge.note_results(1, 2**30)
    assert huge.room == 100, "or a chunk would never have room"


def test_small_items_tell_nothing_of_the_size_of_their_results() -> None:
    """Many batches may be prepared between two results."""
    pace = Pace(2, None, None)
    pace.note_results(1, 2**22)
    for _ in range(10):
        pace.note_pickled(1, 20, 1e-5)
    assert pace.room == 8
    pace.note_pickled(1, 2**23, 1e-5)
    assert pace.room == 4
