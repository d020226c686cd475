"""How many bytes may be on their way: the gate alone, and under the dispatcher's lock, without processes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpupool import PoolClosed, PoolFull
from cpupool._dispatch import Dispatcher
from cpupool._gate import Gate
from cpupool._lease import Lease
from cpupool._waiting import BlockingWaits

numbers = iter(range(1, 10**9))


def waiting() -> Lease[Any]:
    """Return the lease of a call that wants to go in."""
    lease: Lease[Any] = Lease(next(numbers))
    lease.ticket = BlockingWaits().ticket()
    return lease


def is_settled(lease: Lease[Any]) -> bool:
    return lease.ticket is not None and lease.ticket.is_settled


def new_dispatcher(most: int, max_pending: int | None = None) -> Dispatcher[str]:
    return Dispatcher(1, "test", bool, max_pending=max_pending, max_inflight_bytes=most)


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "withdraw", "weigh"]), st.integers(0, 150)), max_size=60))
def test_there_is_never_more_inside_than_fits_and_nobody_is_forgotten(steps: list[tuple[str, int]]) -> None:
    gate = Gate(100)
    inside: list[Lease[Any]] = []
    unknown: set[Lease[Any]] = set()
    outside: list[Lease[Any]] = []

    def let_in() -> None:
        for lease in gate.let_in():
            assert lease is next(each for each in outside if each.is_waiting)  # first come, first served
            outside.remove(lease)
            inside.append(lease)

    for what, number in steps:
        if what == "enter":
            size = number if number <= 120 else None
            lease = waiting()
            if gate.enter(lease, size):
                inside.append(lease)
            else:
                outside.append(lease)
            if size is None:
                unknown.add(lease)
        elif what == "leave" and inside:
            gate.resize(inside.pop(number % len(inside)), 0)
        elif what == "weigh" and unknown & set(inside):
            lease = min(unknown & set(inside), key=lambda each: each.task_id)
            unknown.discard(lease)
            gate.resize(lease, min(number, lease.weight))
        elif what == "withdraw" and outside:
            ticket = outside.pop(number % len(outside)).ticket
            assert ticket is not None
            ticket.withdraw()
        let_in()
        assert gate.inside == sum(lease.weight for lease in inside)
        assert gate.inside <= 100 or sum(lease.weight > 0 for lease in inside) == 1
    while inside:
        gate.resize(inside.pop(), 0)
        let_in()
    assert gate.inside == 0
    assert not outside


def test_a_large_call_is_not_overtaken_for_ever() -> None:
    gate = Gate(100)
    first, large, small = waiting(), waiting(), waiting()
    assert gate.enter(first, 60)
    assert not gate.enter(large, 80)
    assert not gate.enter(small, 1)  # there would be room for it
    gate.resize(first, 0)
    assert gate.let_in() == [large, small]


def test_only_one_call_of_unknown_size_is_in_at_a_time() -> None:
    gate = Gate(100)
    first, second, small = waiting(), waiting(), waiting()
    assert gate.enter(first, None)
    assert not gate.enter(second, None)
    assert not gate.enter(small, 1)
    gate.resize(first, 30)
    assert gate.let_in() == [second]
    gate.resize(second, 500)  # more than one would have thought
    assert gate.let_in() == []
    gate.resize(second, 0)
    assert gate.let_in() == [small]


def test_who_waits_is_told_when_there_is_room() -> None:
    dispatcher = new_dispatcher(100)
    first, second = waiting(), waiting()
    assert dispatcher.enter(first, 100)
    assert not dispatcher.enter(second, 1)
    assert not is_settled(second)
    dispatcher.leave(first)
    assert is_settled(second)
    assert second.weight == 1


def test_who_has_given_up_makes_room_for_the_next() -> None:
    dispatcher = new_dispatcher(100)
    first, second, third = waiting(), waiting(), waiting()
    dispatcher.enter(first, 100)
    dispatcher.enter(second, 90)
    dispatcher.enter(third, 90)
    assert second.ticket is not None
    assert third.ticket is not None
    second.ticket.withdraw()
    dispatcher.leave(first)
    assert is_settled(third)
    assert (second.weight, third.weight) == (0, 90)


def test_what_waits_too_long_goes_away_without_its_bytes() -> None:
    dispatcher = new_dispatcher(100)
    first, second, third = waiting(), waiting(), waiting()
    dispatcher.enter(first, 100)
    dispatcher.enter(second, 90, 5.0)
    dispatcher.enter(third, 50)
    assert dispatcher.next_queue_deadline() == 5.0
    dispatcher.expire_queue(5.0)
    assert is_settled(second)
    assert not second.weight
    dispatcher.leave(first)
    assert third.weight == 50


def test_max_pending_concerns_who_waits_for_room_too() -> None:
    dispatcher = new_dispatcher(100, max_pending=1)
    dispatcher.enter(waiting(), 100)
    dispatcher.enter(waiting(), 1)
    assert dispatcher.is_full
    with pytest.raises(PoolFull) as caught:
        dispatcher.enter(waiting(), 1)
    assert caught.value.pending == 1
    assert dispatcher.counts()[3] == 1


def test_a_closed_pool_takes_nothing_in_and_keeps_nobody_waiting() -> None:
    dispatcher = new_dispatcher(100)
    first, second = waiting(), waiting()
    dispatcher.enter(first, 100)
    dispatcher.enter(second, 100)
    dispatcher.close()
    with pytest.raises(PoolClosed):
        dispatcher.enter(waiting(), 1)
    assert not dispatcher.is_quiet()  # what was accepted still runs
    dispatcher.fail_queue(lambda: PoolClosed("test"))
    assert second.ticket is not None
    assert isinstance(second.ticket.error, PoolClosed)
    assert dispatcher.is_quiet()


def test_many_that_have_given_up_do_not_pile_up_behind_one_that_waits() -> None:
    gate = Gate(100)
    assert gate.enter(waiting(), 100)
    assert not gate.enter(waiting(), 100)
    for _ in range(1000):
        lease = waiting()
        gate.enter(lease, 1)
        assert lease.ticket is not None
        lease.ticket.withdraw()
    assert len(gate.queue) < 200
