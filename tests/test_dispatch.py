"""Who gets which worker, decided without any process: every worker is in one place, and nobody waits in vain."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cpupool._dispatch import Dispatcher
from cpupool._errors import PoolClosed, PoolFull
from cpupool._lease import Lease
from cpupool._waiting import Ticket

numbers = itertools.count(1)


def make_ticket(woken: list[Ticket] | None = None) -> Ticket:
    def wake(ticket: Ticket) -> bool:
        if woken is not None:
            woken.append(ticket)
        return True

    return Ticket(None, wake)


def ready_dispatcher(workers: int, max_pending: int | None = None) -> Dispatcher[str]:
    dispatcher: Dispatcher[str] = Dispatcher(workers, "test", bool, max_pending=max_pending)
    for number in range(workers):
        dispatcher.expect(f"worker {number}")
        dispatcher.add_ready(f"worker {number}")
    return dispatcher


def borrow(dispatcher: Dispatcher[str]) -> Lease[str]:
    lease: Lease[str] = Lease(next(numbers))
    assert dispatcher.borrow_idle(lease)
    assert lease.worker is not None
    return lease


def enqueue(dispatcher: Dispatcher[str], ticket: Ticket | None = None, deadline: float = math.inf) -> Lease[str]:
    lease: Lease[str] = Lease(next(numbers))
    lease.ticket = ticket or make_ticket()
    lease.asked = time.monotonic()
    assert not dispatcher.enqueue(lease, deadline)
    return lease


def is_waiting_for_something(lease: Lease[str]) -> bool:
    return lease.ticket is not None


def withdraw(dispatcher: Dispatcher[str], lease: Lease[str]) -> None:
    assert lease.ticket is not None
    assert lease.ticket.withdraw()
    dispatcher.has_withdrawn = True


def test_a_returned_worker_goes_to_the_first_in_the_queue() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    woken: list[Ticket] = []
    waiting = [enqueue(dispatcher, make_ticket(woken)) for _ in range(3)]
    for heir in waiting:
        assert dispatcher.give_back(lease)
        assert lease.worker is None
        lease = heir
        assert lease.worker == "worker 0"
    assert woken == [each.ticket for each in waiting]
    assert dispatcher.counts() == (0, 0, 1, 0)


def test_withdrawn_calls_are_passed_over() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    first, second = enqueue(dispatcher), enqueue(dispatcher)
    withdraw(dispatcher, first)
    dispatcher.give_back(lease)
    assert first.worker is None
    assert second.worker == "worker 0"


def test_a_worker_offered_to_a_closed_event_loop_goes_to_the_next() -> None:
    """`_wake` returns False when the one who waited can never run again."""
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    lost, next_one = enqueue(dispatcher, Ticket(None, lambda _: False)), enqueue(dispatcher)
    dispatcher.give_back(lease)
    assert next_one.worker == "worker 0"
    assert lost.worker is None, "or its owner, collected later, would give back somebody else's worker"


def test_a_failed_start_leaves_the_queue_to_the_workers_that_are_left() -> None:
    dispatcher = ready_dispatcher(2)
    first, second = borrow(dispatcher), borrow(dispatcher)
    waiting, warm_up = enqueue(dispatcher), make_ticket()
    assert first.worker is not None
    dispatcher.remove(first.worker)
    dispatcher.want_all(warm_up)
    dispatcher.fail_start(lambda: RuntimeError("no process"))
    assert isinstance(warm_up.error, RuntimeError)
    assert waiting.is_waiting
    assert dispatcher.give_back(second)
    assert waiting.worker is not None


def test_a_worker_that_died_before_it_came_back_is_left_to_its_owner() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    assert dispatcher.remove("worker 0") is True
    assert dispatcher.give_back(lease) is False
    assert dispatcher.counts() == (0, 0, 0, 0)
    assert dispatcher.take_over(lease) == "worker 0"


def test_a_doomed_worker_cannot_be_given_back() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    waiting = enqueue(dispatcher)
    assert dispatcher.doom(lease) is True
    assert dispatcher.give_back(lease) is False
    assert waiting.is_waiting
    assert dispatcher.take_over(lease) == "worker 0"
    assert dispatcher.shortfall() == 1


def test_a_worker_that_came_back_in_time_cannot_be_doomed() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    waiting = enqueue(dispatcher)
    assert dispatcher.give_back(lease)
    assert dispatcher.doom(lease) is False
    assert dispatcher.doom(Lease(0)) is False
    assert dispatcher.give_back(waiting)


def test_a_recovering_worker_is_expected_and_not_replaced() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    waiting = enqueue(dispatcher)
    assert dispatcher.take_over(lease, expected=True) == "worker 0"
    assert dispatcher.counts() == (1, 0, 0, 1)
    assert dispatcher.shortfall() == 0
    dispatcher.add_ready("worker 0")
    assert waiting.worker == "worker 0"


def test_withdrawn_calls_do_not_pile_up() -> None:
    dispatcher = ready_dispatcher(1)
    borrow(dispatcher)
    for _ in range(10_000):
        withdraw(dispatcher, enqueue(dispatcher, deadline=1e9))
    assert len(dispatcher._queue) + len(dispatcher._queue_deadlines) <= 64


def test_the_first_to_expire_is_not_always_the_first_in_the_queue() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    patient, hasty, served = (enqueue(dispatcher, deadline=deadline) for deadline in (30.0, 10.0, math.inf))
    assert dispatcher.next_queue_deadline() == 10.0
    dispatcher.expire_queue(9.0)
    assert dispatcher.counts()[3] == 3
    dispatcher.expire_queue(10.0)
    assert dispatcher.counts()[3] == 2
    assert hasty.worker is None
    assert not hasty.is_waiting
    assert dispatcher.next_queue_deadline() == 30.0
    dispatcher.give_back(lease)
    assert patient.worker is not None
    assert dispatcher.next_queue_deadline() == math.inf
    dispatcher.expire_queue(1e9)
    assert served.is_waiting
    dispatcher.give_back(patient)
    assert served.worker is not None


def test_no_more_calls_wait_than_max_pending_allows() -> None:
    dispatcher = ready_dispatcher(1, max_pending=2)
    lease = borrow(dispatcher)
    lease.started = time.monotonic() - 3
    first, second = enqueue(dispatcher), enqueue(dispatcher)
    with pytest.raises(PoolFull) as caught:
        enqueue(dispatcher)
    assert caught.value.pending == 2
    assert caught.value.retry_after == pytest.approx(9, abs=0.5), "3 calls, of 3 s each as far as anyone knows"
    withdraw(dispatcher, first)
    third = enqueue(dispatcher)
    dispatcher.give_back(lease)
    assert second.worker is not None
    second.started = time.monotonic() - 3
    enqueue(dispatcher)
    with pytest.raises(PoolFull) as caught:
        enqueue(dispatcher)
    assert caught.value.retry_after == pytest.approx(9, abs=0.5)
    assert third.is_waiting


def test_a_refused_call_leaves_nothing_to_sweep() -> None:
    """Or each refusal would look through the whole queue."""
    dispatcher = ready_dispatcher(1, max_pending=0)
    borrow(dispatcher)
    lease: Lease[str] = Lease(next(numbers))
    lease.ticket = make_ticket()
    with pytest.raises(PoolFull):
        dispatcher.enqueue(lease)
    assert not is_waiting_for_something(lease)
    assert dispatcher.has_withdrawn is False


def test_a_kept_lease_holds_no_other() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    for _ in range(10):
        heir = enqueue(dispatcher)
        assert dispatcher.give_back(lease)
        assert lease.heir is None
        lease = heir


def test_a_call_that_lost_its_worker_may_begin_again_while_the_pool_closes() -> None:
    dispatcher = ready_dispatcher(1)
    lease, ticket = borrow(dispatcher), make_ticket()
    dispatcher.close()
    assert dispatcher.remove("worker 0") is True
    assert not dispatcher.is_quiet()
    assert dispatcher.take_over(lease) == "worker 0"
    dispatcher.note_bereaved(lease, ticket)
    assert not dispatcher.is_quiet()
    ticket.settle("died")
    assert not dispatcher.is_quiet()
    lease.begin_anew(next(numbers))
    lease.ticket = make_ticket()
    assert not dispatcher.enqueue(lease)
    assert dispatcher.shortfall() == 1
    with pytest.raises(PoolClosed):
        enqueue(dispatcher)


def test_a_call_that_does_not_begin_again_does_not_keep_the_pool_open() -> None:
    dispatcher = ready_dispatcher(2)
    first, second, ticket = borrow(dispatcher), borrow(dispatcher), make_ticket()
    dispatcher.close()
    for lease in (first, second):
        dispatcher.take_over(lease)
        dispatcher.note_bereaved(lease, ticket if lease is first else make_ticket())
    assert ticket.withdraw()
    assert not dispatcher.is_quiet()
    dispatcher.forget_bereaved(second)
    assert dispatcher.is_quiet()


def test_workers_that_are_to_come_leave_room_for_calls() -> None:
    """Or a pool that has not started yet could take no call with `max_pending=0`."""
    dispatcher: Dispatcher[str] = Dispatcher(2, "test", bool, max_pending=0)
    enqueue(dispatcher)
    enqueue(dispatcher)
    with pytest.raises(PoolFull):
        enqueue(dispatcher)


def test_a_failed_start_fails_who_waits_and_is_not_repeated() -> None:
    notified: list[None] = []
    dispatcher: Dispatcher[str] = Dispatcher(2, "test", lambda: notified.append(None))
    waiting = [enqueue(dispatcher), enqueue(dispatcher)]
    assert notified
    assert dispatcher.shortfall() == 2
    dispatcher.fail_start(lambda: RuntimeError("no process"))
    errors = [lease.ticket.error for lease in waiting if lease.ticket is not None]
    assert [str(error) for error in errors] == ["no process", "no process"]
    assert errors[0] is not errors[1]
    assert dispatcher.shortfall() == 0


def test_a_dead_worker_is_missed_at_once() -> None:
    dispatcher = ready_dispatcher(2)
    assert dispatcher.shortfall() == 0
    borrow(dispatcher)
    assert dispatcher.remove("worker 1") is True
    assert dispatcher.shortfall() == 1


def test_warm_up_is_done_when_no_worker_is_missing() -> None:
    dispatcher: Dispatcher[str] = Dispatcher(2, "test", bool)
    woken: list[Ticket] = []
    dispatcher.want_all(make_ticket(woken))
    assert dispatcher.shortfall() == 2
    for name in ("a", "b"):
        dispatcher.expect(name)
    dispatcher.add_ready("a")
    dispatcher.settle_warm_ups()
    assert not woken
    dispatcher.add_ready("b")
    dispatcher.settle_warm_ups()
    assert len(woken) == 1


def test_a_closed_dispatcher_takes_no_call_but_serves_those_it_took() -> None:
    dispatcher: Dispatcher[str] = Dispatcher(1, "test", bool)
    accepted = enqueue(dispatcher)
    dispatcher.close()
    with pytest.raises(PoolClosed):
        enqueue(dispatcher)
    assert dispatcher.shortfall() == 1
    dispatcher.expect("a")
    dispatcher.add_ready("a")
    assert accepted.worker == "a"


class Owner:
    """A map or stream."""


def enqueue_for(dispatcher: Dispatcher[str], owner: Owner, *, is_admitted: bool = True) -> Lease[str]:
    lease: Lease[str] = Lease(next(numbers), owner, is_admitted=is_admitted)
    lease.ticket = make_ticket()
    dispatcher.enqueue(lease)
    return lease


def test_the_lanes_of_a_map_that_was_accepted_are_served_while_the_pool_closes() -> None:
    dispatcher = ready_dispatcher(1)
    owner = Owner()
    dispatcher.add_owner(owner)
    dispatcher.close()
    lease = enqueue_for(dispatcher, owner)
    assert lease.worker == "worker 0"
    dispatcher.give_back(lease)
    assert not dispatcher.is_quiet(), "it comes again"
    with pytest.raises(PoolClosed):
        dispatcher.add_owner(Owner())
    with pytest.raises(PoolClosed):
        enqueue_for(dispatcher, Owner())
    dispatcher.remove_owner(owner)
    assert dispatcher.is_quiet()
    with pytest.raises(PoolClosed):
        enqueue_for(dispatcher, owner)


def test_a_map_that_nobody_holds_any_more_keeps_no_pool_open() -> None:
    dispatcher = ready_dispatcher(1)
    owner = Owner()
    dispatcher.add_owner(owner)
    del owner
    assert dispatcher.is_quiet()


def test_a_map_that_has_begun_is_not_refused_for_want_of_room() -> None:
    dispatcher = ready_dispatcher(1, max_pending=0)
    borrow(dispatcher)
    owner = Owner()
    dispatcher.add_owner(owner)
    with pytest.raises(PoolFull):
        enqueue_for(dispatcher, owner, is_admitted=False)
    assert enqueue_for(dispatcher, owner).is_waiting


def test_at_the_end_of_the_drain_no_map_comes_again() -> None:
    dispatcher = ready_dispatcher(1)
    owner = Owner()
    dispatcher.add_owner(owner)
    dispatcher.close()
    dispatcher.forget_bereaved()
    with pytest.raises(PoolClosed):
        enqueue_for(dispatcher, owner)


def test_a_successor_waits_until_the_outgoing_worker_has_left() -> None:
    """Or more tasks than `max_workers` would run at once."""
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    dispatcher.replace("worker 0")
    assert dispatcher.shortfall() == 1
    waiting = enqueue(dispatcher)
    dispatcher.expect("successor")
    dispatcher.add_ready("successor")
    assert waiting.is_waiting
    assert not dispatcher.borrow_idle(Lease(0))
    assert dispatcher.shortfall() == 0
    assert dispatcher.give_back(lease) is False
    dispatcher.retire(lease)
    assert waiting.worker == "successor"
    dispatcher.retire(lease)
    assert dispatcher.take_over(lease) == "worker 0"
    assert dispatcher.counts() == (0, 0, 1, 0)


def test_a_spare_offered_to_one_who_has_gone_serves_the_next() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    dispatcher.replace("worker 0")
    dispatcher.expect("successor")
    dispatcher.add_ready("successor")
    lost, next_one = enqueue(dispatcher, Ticket(None, lambda _: False)), enqueue(dispatcher)
    dispatcher.retire(lease)
    assert lost.worker is None
    assert next_one.worker == "successor"


@pytest.mark.parametrize("how", ["retire", "take over"])
def test_a_spare_that_nobody_took_stays_though_others_are_outgoing(how: str) -> None:
    dispatcher = ready_dispatcher(2)
    leases = [borrow(dispatcher), borrow(dispatcher)]
    for worker in ("worker 0", "worker 1"):
        dispatcher.replace(worker)
    for name in ("a", "b"):
        dispatcher.expect(name)
        dispatcher.add_ready(name)
    dispatcher.replace("b")  # the last to come, and so the first to go
    lost = enqueue(dispatcher, Ticket(None, lambda _: False))
    if how == "retire":
        dispatcher.retire(leases[0])
    else:
        dispatcher.take_over(leases[0])
        dispatcher.serve_queue()
    assert lost.worker is None
    assert dispatcher.counts() == (0, 2, 1, 0)


def test_a_worker_that_is_too_large_serves_until_its_successor_is_there() -> None:
    dispatcher = ready_dispatcher(1)
    lease = borrow(dispatcher)
    dispatcher.replace("worker 0")
    assert dispatcher.give_back(lease)
    assert dispatcher.take_replaced() == []
    dispatcher.expect("successor")
    assert dispatcher.give_back(borrow(dispatcher))
    assert dispatcher.take_replaced() == []
    dispatcher.add_ready("successor")
    assert dispatcher.take_replaced() == ["worker 0"]
    assert dispatcher.counts() == (0, 1, 0, 0)
    assert dispatcher.take_replaced() == []


def test_workers_that_were_idle_too_long_leave_but_some_stay() -> None:
    dispatcher = ready_dispatcher(4)
    busy = borrow(dispatcher)
    since = time.monotonic()
    assert since + 9 < dispatcher.next_surplus(10, 2) <= since + 10
    assert dispatcher.take_surplus(since + 9, 10, 2) == []
    assert dispatcher.take_surplus(since + 10, 10, 2) == ["worker 0", "worker 1"], "those that were idle longest"
    assert dispatcher.next_surplus(10, 2) == math.inf
    assert dispatcher.shortfall() == 0, "they are not missed"
    for _ in range(3):
        enqueue(dispatcher) if not dispatcher.borrow_idle(Lease(0)) else None
    assert dispatcher.shortfall() == 2, "until they are needed"
    assert dispatcher.give_back(busy)


class DispatcherMachine(RuleBasedStateMachine):
    """Random histories of calls, births and deaths against a model that keeps only sets."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher: Dispatcher[str] = Dispatcher(3, "test", bool, max_pending=5)
        self.expected: set[str] = set()
        self.lent: dict[str, Lease[str]] = {}
        self.doomed: set[str] = set()
        self.waiting: list[Lease[str]] = []
        self.deadlines: dict[int, int] = {}
        self.now = 0
        self.alive: set[str] = set()
        self.outgoing: set[str] = set()
        self.recovering: set[str] = set()

    def _collect(self) -> None:
        """Note who was served: always the first of those who wait."""
        while self.waiting and self.waiting[0].worker is not None:
            lease = self.waiting.pop(0)
            assert lease.worker is not None
            self.lent[lease.worker] = lease
        assert all(lease.worker is None and lease.is_waiting for lease in self.waiting)

    @rule(patience=st.integers(1, 9))
    def call(self, patience: int) -> None:
        lease: Lease[str] = Lease(next(numbers))
        if self.dispatcher.borrow_idle(lease):
            assert not self.waiting
            assert lease.worker is not None
            self.lent[lease.worker] = lease
            return
        lease.ticket = make_ticket()
        room = 5 + 3 - len(self.lent) - len(self.doomed)
        try:
            self.dispatcher.enqueue(lease, self.now + patience)
        except PoolFull:
            assert len(self.waiting) >= room
        else:
            assert len(self.waiting) < room
            self.waiting.append(lease)
            self.deadlines[lease.task_id] = self.now + patience
            self._collect()

    @rule()
    def time_passes(self) -> None:
        self.now += 1
        self.dispatcher.expire_queue(self.now)
        overdue = [lease for lease in self.waiting if self.deadlines[lease.task_id] <= self.now]
        for lease in overdue:
            assert not lease.is_waiting
            assert lease.worker is None
            self.waiting.remove(lease)
        self._collect()
        first = min((self.deadlines[lease.task_id] for lease in self.waiting), default=math.inf)
        assert self.dispatcher.next_queue_deadline() == first

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.lent)))
        lease = self.lent.pop(worker)
        if self.dispatcher.give_back(lease):
            assert lease.worker is None
        else:
            assert worker in self.outgoing
            assert self._idle() - self.outgoing, "it leaves because its successor is there"
            self._retire(worker, lease)
        self._collect()

    def _retire(self, worker: str, lease: Lease[str]) -> None:
        self.dispatcher.retire(lease)
        self._leave(worker)
        self._collect()
        self.every_worker_is_in_one_place()
        self.nobody_waits_while_a_worker_is_idle_or_missing()
        assert self.dispatcher.take_over(lease) == worker

    def _idle(self) -> set[str]:
        return self.alive - self.expected - self.lent.keys() - self.doomed

    def _leave(self, worker: str) -> None:
        for each in (self.alive, self.expected, self.doomed, self.outgoing, self.recovering):
            each.discard(worker)

    @precondition(lambda self: self.alive - self.doomed)
    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.alive - self.doomed)))
        self.dispatcher.replace(worker)
        self.outgoing.add(worker)

    @rule()
    def dismiss_replaced(self) -> None:
        before = self._idle()
        for worker in self.dispatcher.take_replaced():
            assert worker in before & self.outgoing
            self._leave(worker)

    @rule(least=st.integers(0, 3))
    def dismiss_idle(self, least: int) -> None:
        before, staying = self._idle(), len(self.alive - self.outgoing)
        for worker in self.dispatcher.take_surplus(math.inf, 0, least):
            assert worker in before
            self._leave(worker)
        assert len(self.alive - self.outgoing) >= min(least, staying)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def run_last_task(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.lent)))
        self.dispatcher.replace(worker)
        self._retire(worker, self.lent.pop(worker))

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.lent)))
        assert self.dispatcher.take_over(self.lent.pop(worker), expected=True) == worker
        self.expected.add(worker)
        self.recovering.add(worker)
        self.dispatcher.serve_queue()
        self._collect()

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def doom(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.lent)))
        lease = self.lent.pop(worker)
        assert self.dispatcher.doom(lease)
        assert self.dispatcher.give_back(lease) is False
        self.doomed.add(worker)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.waiting))
        withdraw(self.dispatcher, lease)
        self.waiting.remove(lease)

    @rule()
    def start_missing(self) -> None:
        for _ in range(self.dispatcher.shortfall()):
            worker = f"worker {next(numbers)}"
            self.expected.add(worker)
            self.alive.add(worker)
            self.dispatcher.expect(worker)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def become_ready(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.expected)))
        self.expected.discard(worker)
        self.recovering.discard(worker)
        self.dispatcher.add_ready(worker)
        self._collect()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.alive)))
        assert self.dispatcher.remove(worker) is (worker in self.lent or worker in self.doomed)
        if (lease := self.lent.pop(worker, None)) is not None:
            assert self.dispatcher.give_back(lease) is False
            assert self.dispatcher.take_over(lease) == worker
        self._leave(worker)
        self.dispatcher.serve_queue()
        self._collect()

    @invariant()
    def every_worker_is_in_one_place(self) -> None:
        busy = len(self.lent) + len(self.doomed)
        idle = len(self.alive) - len(self.expected) - busy
        assert self.dispatcher.counts() == (len(self.expected), idle, busy, len(self.waiting))
        assert len(self.alive - self.outgoing) <= 3
        assert busy + len(self.recovering) <= 3, "at most so many tasks run"

    @invariant()
    def nobody_waits_while_a_worker_is_idle_or_missing(self) -> None:
        if self.waiting:
            busy = self.lent.keys() | self.doomed
            assert not self._idle() or len(busy | self.recovering) == 3
            staying = self.alive - self.outgoing
            assert len(staying) + self.dispatcher.shortfall() >= min(3, len(busy & staying) + len(self.waiting))


TestDispatcher = DispatcherMachine.TestCase
TestDispatcher.settings = settings(max_examples=300)
