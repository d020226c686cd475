"""Who gets which worker: the pool's one lock and the decisions under it.

Rules:

- Every worker the dispatcher knows is in exactly one place: starting, idle, or lent to one call.  What is in none of
  them belongs to the supervisor.
- No I/O, no user code and no waiting under the lock.  Who has to be woken is woken after it is released.
- Waiting is first come, first served.  A worker that comes back goes to the first in the queue; it becomes idle only
  when nobody waits.

It knows nothing of processes: the worker type is a parameter, and the tests use plain objects.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from ._errors import PoolClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._waiting import Ticket

W = TypeVar("W")

_SWEEP_AT_LEAST = 64


class Dispatcher(Generic[W]):
    """Lends workers to calls.

    Attributes:
        max_workers: how many workers there may be at most.
        closed: True once no new call is taken.
    """

    def __init__(self, max_workers: int, name: str, notify: Callable[[], object]) -> None:
        """Args: `notify` is called when a worker may be missing; `shortfall` says how many are."""
        self.max_workers = max_workers
        self._notify = notify
        self._name = name
        self.closed = False
        self._lock = threading.Lock()
        self._starting: set[W] = set()
        self._idle: list[W] = []  # the last to come back is the next to go: its caches are warm
        self._lent: set[W] = set()
        self._queue: deque[Ticket] = deque()  # withdrawn tickets stay in it until they are met, or swept out
        self._sweep_at = _SWEEP_AT_LEAST
        self._ready_tickets: list[Ticket] = []
        self._wanted = 0  # how many workers to keep: what was needed at once so far, or all after a warm-up

    # --- calls ---

    def borrow_idle(self) -> W | None:
        """Lend an idle worker at once, or return None."""
        with self._lock:
            if self.closed or not self._idle:
                return None
            worker = self._idle.pop()
            self._lent.add(worker)
            return worker

    def enqueue(self, ticket: Ticket) -> W | None:
        """Lend an idle worker after all, or put the ticket at the end of the queue.

        A queued ticket is settled with a worker, or with the reason why there is none.

        Raises:
            PoolClosed: the ticket is not taken.
        """
        with self._lock:
            self._check_open()
            if self._idle:
                worker = self._idle.pop()
                self._lent.add(worker)
                return worker
            if len(self._queue) >= self._sweep_at:
                self._queue = deque(each for each in self._queue if each.is_open)
                self._sweep_at = max(2 * len(self._queue), _SWEEP_AT_LEAST)
            self._queue.append(ticket)
            may_grow = len(self._starting) + len(self._lent) < self.max_workers
        if may_grow:
            self._notify()
        return None

    def give_back(self, worker: W) -> bool:
        """Take a lent worker back and hand it to the first in the queue.

        Returns:
            False if it has died meanwhile and was removed: the caller still owns it, and hands it to the supervisor.
        """
        while True:
            with self._lock:
                if worker not in self._lent:
                    return False
                if not self._queue:
                    self._lent.discard(worker)
                    self._idle.append(worker)
                    return True
                ticket = self._queue.popleft()
            if ticket.settle(worker):
                return True

    def _present(self) -> int:
        return len(self._starting) + len(self._idle) + len(self._lent)

    def _check_open(self) -> None:
        if self.closed:
            raise PoolClosed(self._name)

    # --- supervisor ---

    def shortfall(self) -> int:
        """Return how many workers should be started now."""
        with self._lock:
            needed = len(self._lent) + sum(ticket.is_open for ticket in self._queue)
            if self.closed:
                target = needed  # accepted calls still run; nothing is kept for later
            else:
                target = max(self._wanted, needed)
            return max(min(target, self.max_workers) - self._present(), 0)

    def add_starting(self, worker: W) -> None:
        """Note a worker that was started and is not ready yet."""
        with self._lock:
            self._starting.add(worker)
            self._wanted = max(self._wanted, self._present())

    def add_ready(self, worker: W) -> None:
        """Note that a starting worker is ready, and lend it to the first in the queue."""
        with self._lock:
            self._starting.discard(worker)
            self._lent.add(worker)
        self.give_back(worker)
        self._settle_ready_tickets()

    def remove(self, worker: W) -> bool:
        """Take a worker out, wherever it is.  Returns True if a call owns it, and will hand it over."""
        with self._lock:
            lent = worker in self._lent
            self._lent.discard(worker)
            self._starting.discard(worker)
            if worker in self._idle:
                self._idle.remove(worker)
            return lent

    def take_idle(self) -> list[W]:
        """Take all idle workers out."""
        with self._lock:
            idle, self._idle = self._idle, []
            return idle

    def fail_start(self, make_error: Callable[[], BaseException]) -> bool:
        """Note that a worker could not be started: tell everybody who now waits in vain, each with an error of its own.

        Returns:
            True if other workers are left: then the queue is served by them.
        """
        with self._lock:
            others = self._present() > 0
            self._wanted = self._present()
        self._fail(make_error, warm_up_only=others)
        return others

    def fail_queue(self, make_error: Callable[[], BaseException]) -> None:
        """Settle every waiting ticket with an error of its own."""
        self._fail(make_error, warm_up_only=False)

    def _fail(self, make_error: Callable[[], BaseException], *, warm_up_only: bool) -> None:
        with self._lock:
            tickets = self._ready_tickets
            self._ready_tickets = []
            if not warm_up_only:
                tickets += self._queue
                self._queue.clear()
        for ticket in tickets:
            ticket.settle(error=make_error())

    # --- warm-up and close ---

    def want_all(self, ticket: Ticket) -> None:
        """Keep `max_workers` workers from now on; the ticket is settled when none of them is missing.

        Raises:
            PoolClosed: the ticket is not taken.
        """
        with self._lock:
            self._check_open()
            self._wanted = self.max_workers
            self._ready_tickets.append(ticket)
        self._settle_ready_tickets()

    def _settle_ready_tickets(self) -> None:
        with self._lock:
            if len(self._idle) + len(self._lent) < self.max_workers:
                return
            tickets = self._ready_tickets.copy()
            self._ready_tickets.clear()
        for ticket in tickets:
            ticket.settle()

    def close(self) -> None:
        """Take no more calls; what was accepted still gets its worker."""
        with self._lock:
            self.closed = True

    def is_quiet(self) -> bool:
        """Return True when no call runs or waits."""
        with self._lock:
            return not self._lent and not any(ticket.is_open for ticket in self._queue)

    def counts(self) -> tuple[int, int, int, int]:
        """Return the numbers of starting, idle and lent workers and of waiting calls."""
        with self._lock:
            waiting = sum(ticket.is_open for ticket in self._queue)
            return len(self._starting), len(self._idle), len(self._lent), waiting
