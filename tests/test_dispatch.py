"""Who gets which worker, decided without any process: every worker is in one place, and nobody waits in vain."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cpupool._dispatch import Dispatcher
from cpupool._errors import PoolClosed
from cpupool._waiting import Ticket


def make_ticket(woken: list[Ticket] | None = None) -> Ticket:
    def wake(ticket: Ticket) -> bool:
        if woken is not None:
            woken.append(ticket)
        return True

    return Ticket(None, wake)


def ready_dispatcher(workers: int) -> Dispatcher[str]:
    dispatcher: Dispatcher[str] = Dispatcher(workers, "test", bool)
    for number in range(workers):
        dispatcher.add_starting(f"worker {number}")
        dispatcher.add_ready(f"worker {number}")
    return dispatcher


def test_a_returned_worker_goes_to_the_first_in_the_queue() -> None:
    dispatcher = ready_dispatcher(1)
    worker = dispatcher.borrow_idle()
    assert worker is not None
    woken: list[Ticket] = []
    tickets = [make_ticket(woken) for _ in range(3)]
    for ticket in tickets:
        dispatcher.enqueue(ticket)
    for _ in tickets:
        dispatcher.give_back(worker)
    assert woken == tickets
    assert dispatcher.counts() == (0, 0, 1, 0)


def test_withdrawn_tickets_are_passed_over() -> None:
    dispatcher = ready_dispatcher(1)
    worker = dispatcher.borrow_idle()
    assert worker is not None
    first, second = make_ticket(), make_ticket()
    dispatcher.enqueue(first)
    dispatcher.enqueue(second)
    assert first.withdraw()
    dispatcher.give_back(worker)
    assert first.value is None
    assert second.value == worker


def test_a_worker_offered_to_a_closed_event_loop_goes_to_the_next() -> None:
    """`_wake` returns False when the one who waited can never run again."""
    dispatcher = ready_dispatcher(1)
    worker = dispatcher.borrow_idle()
    assert worker is not None
    lost, next_one = Ticket(None, lambda _: False), make_ticket()
    dispatcher.enqueue(lost)
    dispatcher.enqueue(next_one)
    dispatcher.give_back(worker)
    assert next_one.value == worker
    assert lost.value is None, "or its owner, collected later, would give back somebody else's worker"


def test_a_failed_start_leaves_the_queue_to_the_workers_that_are_left() -> None:
    dispatcher = ready_dispatcher(2)
    first, second = dispatcher.borrow_idle(), dispatcher.borrow_idle()
    assert first is not None
    assert second is not None
    waiting, warm_up = make_ticket(), make_ticket()
    dispatcher.enqueue(waiting)
    dispatcher.remove(first)
    dispatcher.want_all(warm_up)
    assert dispatcher.fail_start(lambda: RuntimeError("no process")) is True
    assert isinstance(warm_up.error, RuntimeError)
    assert waiting.is_open
    assert dispatcher.give_back(second)
    assert waiting.value == second


def test_a_worker_that_died_before_it_came_back_is_left_to_its_owner() -> None:
    dispatcher = ready_dispatcher(1)
    worker = dispatcher.borrow_idle()
    assert worker is not None
    assert dispatcher.remove(worker) is True
    assert dispatcher.give_back(worker) is False
    assert dispatcher.counts() == (0, 0, 0, 0)


def test_withdrawn_tickets_do_not_pile_up() -> None:
    dispatcher = ready_dispatcher(1)
    dispatcher.borrow_idle()
    for _ in range(10_000):
        ticket = make_ticket()
        dispatcher.enqueue(ticket)
        ticket.withdraw()
    assert len(dispatcher._queue) <= 64


def test_a_failed_start_fails_who_waits_and_is_not_repeated() -> None:
    notified: list[None] = []
    dispatcher: Dispatcher[str] = Dispatcher(2, "test", lambda: notified.append(None))
    tickets = [make_ticket(), make_ticket()]
    for ticket in tickets:
        assert dispatcher.enqueue(ticket) is None
    assert notified
    assert dispatcher.shortfall() == 2
    assert dispatcher.fail_start(lambda: RuntimeError("no process")) is False
    errors = [ticket.error for ticket in tickets]
    assert [str(error) for error in errors] == ["no process", "no process"]
    assert errors[0] is not errors[1]
    assert dispatcher.shortfall() == 0


def test_a_dead_worker_is_missed_at_once() -> None:
    dispatcher = ready_dispatcher(2)
    assert dispatcher.shortfall() == 0
    worker = dispatcher.borrow_idle()
    assert worker is not None
    assert dispatcher.remove(worker) is True
    assert dispatcher.shortfall() == 1


def test_warm_up_is_done_when_no_worker_is_missing() -> None:
    dispatcher: Dispatcher[str] = Dispatcher(2, "test", bool)
    woken: list[Ticket] = []
    dispatcher.want_all(make_ticket(woken))
    assert dispatcher.shortfall() == 2
    for name in ("a", "b"):
        dispatcher.add_starting(name)
    dispatcher.add_ready("a")
    assert not woken
    dispatcher.add_ready("b")
    assert len(woken) == 1


def test_a_closed_dispatcher_takes_no_ticket_but_serves_those_it_took() -> None:
    dispatcher: Dispatcher[str] = Dispatcher(1, "test", bool)
    accepted = make_ticket()
    dispatcher.enqueue(accepted)
    dispatcher.close()
    with pytest.raises(PoolClosed):
        dispatcher.enqueue(make_ticket())
    assert dispatcher.shortfall() == 1
    dispatcher.add_starting("a")
    dispatcher.add_ready("a")
    assert accepted.value == "a"


class DispatcherMachine(RuleBasedStateMachine):
    """Random histories of calls, births and deaths against a model that keeps only sets."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher: Dispatcher[int] = Dispatcher(3, "test", bool)
        self.born = 0
        self.starting: set[int] = set()
        self.lent: set[int] = set()
        self.waiting: list[Ticket] = []
        self.alive: set[int] = set()

    def _collect(self) -> None:
        """Note who was served: always the first of those who wait."""
        while self.waiting and self.waiting[0].value is not None:
            self.lent.add(self.waiting.pop(0).value)
        assert all(ticket.value is None for ticket in self.waiting)

    @rule()
    def call(self) -> None:
        worker = self.dispatcher.borrow_idle()
        if worker is not None:
            assert not self.waiting
            self.lent.add(worker)
            return
        ticket = make_ticket()
        self.waiting.append(ticket)
        self.dispatcher.enqueue(ticket)
        self._collect()

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.lent)))
        self.lent.discard(worker)
        self.dispatcher.give_back(worker)
        self._collect()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        assert ticket.withdraw()
        self.waiting.remove(ticket)

    @rule()
    def start_missing(self) -> None:
        for _ in range(self.dispatcher.shortfall()):
            self.born += 1
            self.starting.add(self.born)
            self.alive.add(self.born)
            self.dispatcher.add_starting(self.born)

    @precondition(lambda self: self.starting)
    @rule(data=st.data())
    def become_ready(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.starting)))
        self.starting.discard(worker)
        self.dispatcher.add_ready(worker)
        self._collect()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.alive)))
        assert self.dispatcher.remove(worker) is (worker in self.lent)
        for each in (self.alive, self.starting, self.lent):
            each.discard(worker)

    @invariant()
    def every_worker_is_in_one_place(self) -> None:
        idle = self.alive - self.starting - self.lent
        assert self.dispatcher.counts() == (len(self.starting), len(idle), len(self.lent), len(self.waiting))
        assert len(self.alive) <= 3

    @invariant()
    def nobody_waits_while_a_worker_is_idle_or_missing(self) -> None:
        if self.waiting:
            assert not self.alive - self.starting - self.lent
            assert len(self.alive) + self.dispatcher.shortfall() >= min(3, len(self.lent) + len(self.waiting))


TestDispatcher = DispatcherMachine.TestCase
