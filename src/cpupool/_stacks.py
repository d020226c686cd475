"""Where the tasks of workers are, in Python, while they run; and tasks that are slow.

Theory of operation: a task is asked by the same signal that interrupts one; its handler writes the stack into the
status file at the task's next step in Python.  If nothing has come for a while, the task is in C code, and
`faulthandler` is asked, whose handler the system runs at once.  The task goes on, and knows nothing of it.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._events import Event
from ._outcomes import name_task_of
from ._status import BEFORE_FIRST
from ._worker import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._crew import Crew
    from ._dispatch import Dispatcher
    from ._events import Announcer
    from ._lease import Lease
    from ._waiting import Ticket
    from ._worker import Worker

_FIRST_LOOK = 0.001  # seconds after the signal; then at growing intervals
_SILENCE = 0.02  # seconds after which `faulthandler` is asked; before, it might see a frame that is only half made
_WRITING = 0.002  # seconds between two looks, after which what `faulthandler` has written is all
_LONGEST_WAIT = 0.25  # seconds, then there is no answer


@dataclass(slots=True)
class _Request:
    """Somebody wants a stack; times in seconds, monotonic."""

    number: int
    start: int
    asked: float
    on_stack: list[Callable[[str | None], object]]
    due: float
    interval: float = _FIRST_LOOK
    is_urgent: bool = False  # `faulthandler` was asked
    found: str | None = None


class Stacks:
    """Asks workers for the stacks of their tasks; all in the supervisor's thread."""

    def __init__(self, crew: Crew, dispatcher: Dispatcher[Worker]) -> None:
        self._crew = crew
        self._dispatcher = dispatcher
        self._requests: dict[Worker, _Request] = {}
        self._next_number = itertools.count(1).__next__
        self._is_over = False

    def ask(self, worker: Worker, lease: Lease[Worker] | None, on_stack: Callable[[str | None], object]) -> None:
        """Call `on_stack` with the stack of a worker's task: empty if there is none, None if it does not answer.

        Args:
            worker: the worker.
            lease: that of its task, which may be a function of C, and have no stack; None if it was given up.
            on_stack: it is called in this thread.
        """
        if lease is not None:
            on_stack = functools.partial(_tell_stack, on_stack, worker, lease, lease.task_id)
        if self._is_over:
            on_stack(None)
            return
        request = self._requests.get(worker)
        if request is not None:
            request.on_stack.append(on_stack)
            return
        process, now = worker.process, time.monotonic()
        number = self._next_number()
        self._requests[worker] = _Request(number, process.stacks_end(), now, [on_stack], now + _FIRST_LOOK)
        process.ask_task_for_stack(number)

    def ask_all(self, ticket: Ticket, pid: int | None) -> None:
        """Settle the ticket with the stacks of all busy workers, or of that one, by their process ids."""
        found: dict[int, str] = {}
        leases = {lease.worker: lease for lease in self._dispatcher.leases() if lease.started}
        busy = [*leases, *(worker for worker in self._crew.workers if worker.state is State.RECOVERING)]
        missing = {worker for worker in busy if worker is not None and pid in (None, worker.process.pid)}
        if not missing:
            ticket.settle(found)

        def note(worker: Worker, stack: str | None) -> None:
            missing.discard(worker)
            if stack is None:
                stack = "no answer: the process is stopped, or waits in the system"
            if stack:
                found[worker.process.pid] = stack
            if not missing:
                ticket.settle(dict(sorted(found.items())))

        for worker in list(missing):
            self.ask(worker, leases.get(worker), functools.partial(note, worker))

    def next_deadline(self) -> float:
        """Return when to look again."""
        return min((request.due for request in self._requests.values()), default=math.inf)

    def look(self, now: float) -> None:
        """Look for answers."""
        for worker, request in list(self._requests.items()):
            if worker.state in (State.KILLED, State.ENDED) or now >= request.asked + _LONGEST_WAIT:
                self._answer(worker, request, request.found)
            elif now >= request.due:
                self._look_for(worker, request, now)

    def _look_for(self, worker: Worker, request: _Request, now: float) -> None:
        process = worker.process
        if process.has_told_stack(request.number):
            self._answer(worker, request, process.read_stack(request.start))
            return
        if request.is_urgent:
            found = process.read_stack(request.start)
            if found is not None and found == request.found:
                self._answer(worker, request, found)
                return
            request.found, request.interval = found, _WRITING
        elif now >= request.asked + _SILENCE:
            request.is_urgent, request.interval = True, _WRITING
            process.ask_for_stack()
        else:
            request.interval *= 2
        request.due = now + request.interval

    def _answer(self, worker: Worker, request: _Request, stack: str | None) -> None:
        del self._requests[worker]
        if worker.state is State.READY:  # else what is written now may be of its end
            worker.process.forget_old_stacks()
        for on_stack in request.on_stack:
            on_stack(stack)

    def give_up(self) -> None:
        """Let nobody wait any more: the thread ends."""
        self._is_over = True
        for worker, request in list(self._requests.items()):
            self._answer(worker, request, None)


def _tell_stack(
    on_stack: Callable[[str | None], object],
    worker: Worker,
    lease: Lease[Worker],
    task_id: int,
    stack: str | None,
) -> None:
    is_there = lease.worker is worker and lease.task_id == task_id and not worker.process.has_finished(task_id)
    if stack == "" and is_there:
        stack = f"no Python code: it is in {name_task_of(lease)} itself, which is C code, or sends and receives"
    on_stack(stack)


class SlowTasks:
    """Tells of tasks that run longer than a limit, once each; all in the supervisor's thread."""

    def __init__(
        self, limit: float | None, pool: str, dispatcher: Dispatcher[Worker], stacks: Stacks, announcer: Announcer
    ) -> None:
        self._limit = limit
        self._pool = pool
        self._dispatcher = dispatcher
        self._stacks = stacks
        self._announcer = announcer
        self._told: set[tuple[int, int]] = set()  # ids of tasks that run, and the numbers of their items

    def next_deadline(self) -> float:
        """Return when the next task will have run too long."""
        if self._limit is None:
            return math.inf
        return min((since + self._limit for _, _, _, since in self._untold()), default=math.inf)

    def _untold(self) -> list[tuple[Lease[Worker], Worker, int, float]]:
        """Return those that run and were not told of: the lease, the worker, the item's number, and when it began."""
        found = []
        leases = self._dispatcher.leases()
        running = {lease.task_id for lease in leases}
        self._told = {(task_id, item) for task_id, item in self._told if task_id in running}
        for lease in leases:
            worker = lease.worker
            if not lease.started or worker is None or worker.process.has_finished(lease.task_id):
                continue  # if it is done, its caller is late to see that
            item, since = 0, lease.started
            if lease.owner is not None:
                item, since = worker.process.running_item(lease.task_id) or (BEFORE_FIRST, since)
            if (lease.task_id, item) in self._told:
                if lease.owner is None:
                    continue
                since = max(since, time.monotonic())  # the next one cannot have begun before
            found.append((lease, worker, item, since))
        return found

    def look(self, now: float) -> None:
        """Ask those tasks for their stacks, and tell of them."""
        if self._limit is None:
            return
        for lease, worker, item, since in self._untold():
            if since + self._limit <= now:
                self._told.add((lease.task_id, item))
                self._ask(lease, worker, since)

    def _ask(self, lease: Lease[Worker], worker: Worker, started: float) -> None:
        task, pid = name_task_of(lease), worker.process.pid

        def tell(stack: str | None) -> None:
            seconds = time.monotonic() - started
            text = f"{task} has run for {seconds:.3g} s in worker {pid}, more than slow_task allows ({self._limit:g} s)"
            self._announcer.announce(
                Event(
                    kind="task_slow",
                    pool=self._pool,
                    text=text,
                    pid=pid,
                    task=task,
                    seconds=seconds,
                    stack=stack or None,
                )
            )

        self._stacks.ask(worker, lease, tell)
