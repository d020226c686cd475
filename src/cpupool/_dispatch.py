"""Who gets which worker: the pool's one lock and the decisions under it.

Rules:

- Every worker the dispatcher knows is in exactly one place: expected (it starts, or recovers from an interrupt), idle,
  or lent under one lease.  What is in none of them belongs to the supervisor, or is on its way to it.
- A lease holds its worker from the moment it is written into it, under the lock, until it is taken out of it, under the
  lock.  Whoever gives up a call needs to know nothing else.
- No I/O, no user code and no waiting under the lock.  Who has to be woken is woken after it is released.
- Waiting is first come, first served.  A worker that comes back goes to the first in the queue; it becomes idle only
  when nobody waits.
- At most `max_workers` are lent at once.  There may be more: one that is outgoing (it runs its last task, or has grown
  too large) is not counted as present, so that its successor is started, and waits idle for it to leave.
- A signal handler may raise in the main thread after any function call, but nowhere else.  So within `with self._lock`
  a worker is written to where it goes before it is deleted from where it was, and a call comes last.

It knows nothing of processes: the worker type is a parameter, and the tests use plain objects.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ._errors import PoolClosed, PoolFull
from ._gate import Gate
from ._statistics import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._lease import Lease
    from ._waiting import Ticket

W = TypeVar("W")

_SWEEP_AT_LEAST = 64
_GUESSED_RUN = 0.1  # seconds, before anything was measured: about what the start of the first worker takes
_SMOOTHING = 0.1  # weight of the newest run time in the average


class Snapshot(NamedTuple, Generic[W]):
    """A dispatcher at one moment.

    Attributes:
        idle: the workers that nobody holds.
        lent: those that calls hold, and their leases; None for one that will be killed.
        waiting: how many calls wait.
        counted: what its tally has read.
    """

    idle: set[W]
    lent: dict[W, Lease[W] | None]
    waiting: int
    counted: dict[str, Any]


class Dispatcher(Generic[W]):
    """Lends workers to calls.

    Attributes:
        max_workers: how many workers there may be at most.
        max_pending: how many calls may wait when all workers are lent, or None.
        has_gate: True if the bytes of calls are counted: then each has to `enter`, and to `leave`.
        closed: True once no new call is taken.
        has_withdrawn: set, without the lock, when a waiting call has withdrawn its ticket.
        tally: counts what becomes of the calls.
    """

    def __init__(
        self,
        max_workers: int,
        name: str,
        notify: Callable[[], object],
        *,
        hand_over: Callable[[Lease[W]], bool] | None = None,
        max_pending: int | None = None,
        max_inflight_bytes: int | None = None,
    ) -> None:
        """Open one, without workers.

        Args:
            max_workers: see above.
            name: the pool's.
            notify: is called when a worker may be missing; `shortfall` says how many are.
            hand_over: may begin the task of a lease that has just got its worker; True if it has claimed the ticket,
                and will see to it that whoever waits is woken.
            max_pending: see above.
            max_inflight_bytes: how many bytes the calls may have that are in, or None.
        """
        self.max_workers = max_workers
        self.max_pending = max_pending
        self._gate = None if max_inflight_bytes is None else Gate(max_inflight_bytes)
        self.has_gate = self._gate is not None
        self._notify = notify
        self._hand_over = hand_over or (lambda _: False)
        self._name = name
        self.closed = False
        self.has_withdrawn = False
        self._lock = threading.Lock()
        self.tally = Tally(self._lock)
        self._expected: set[W] = set()
        self._idle: list[W] = []  # the last to come back is the next to go: its caches are warm
        self._idle_since: dict[W, float] = {}
        self._lent: dict[W, Lease[W] | None] = {}  # None: the supervisor will kill it, and it cannot be given back
        self._borrowed: set[Lease[W]] = set()  # by the supervisor, each for a moment
        self._outgoing: set[W] = set()  # each is expected, idle or lent as well
        self._recovering: set[W] = set()  # each is expected as well: its task may still run
        self._queue: deque[Lease[W]] = deque()  # withdrawn ones stay in it until they are met, or swept out
        self._queue_deadlines: list[tuple[float, int, Lease[W]]] = []  # a heap; likewise
        self._sweep_at = _SWEEP_AT_LEAST
        self._bereaved: dict[Lease[W], Ticket | None] = {}  # their worker died, and they may try again
        self._owners: weakref.WeakSet[Any] = weakref.WeakSet()  # maps and streams: their lanes ask again and again
        self._ready_tickets: list[Ticket] = []
        self._wanted = 0  # how many workers to keep: what was needed at once so far, or all after a warm-up
        self._average_run = 0.0  # seconds; 0 before any task has ended

    # --- calls ---

    def enter(self, lease: Lease[W], size: int | None, queue_deadline: float = math.inf) -> bool:
        """Count the bytes of a call (None: not known yet), or let it wait until there is room for them.

        Returns:
            True if it is in.  Otherwise its open ticket is settled when it is; or without that, by `expire_queue`.

        Raises:
            PoolClosed, PoolFull: it is not taken.
        """
        with self._lock:
            if self.closed and lease.owner not in self._owners:
                raise PoolClosed(self._name)
            if self._gate is None or self._gate.enter(lease, size):
                lease.ticket = None
                return True
            if self.max_pending is not None and not lease.is_admitted:
                served = self.max_workers - self._count_lent()  # a worker that is still to come counts as free
                pending = sum(each.is_waiting and not each.is_admitted for each in self._queue) - served
                pending = max(pending, 0) + sum(each.is_waiting for each, _ in self._gate.queue) - 1  # but this one
                if pending >= self.max_pending:
                    self._gate.queue.pop()
                    lease.ticket = None
                    raise PoolFull(pending, (pending + 1) * self._estimate_run() / self.max_workers)
            if queue_deadline < math.inf:
                heapq.heappush(self._queue_deadlines, (queue_deadline, lease.task_id, lease))
            return False

    def weigh(self, lease: Lease[W], size: int) -> None:
        """Note the size of a call that has entered; 0 if it is over.  `let_in` is to be called then."""
        if self._gate is not None:
            with self._lock:
                self._gate.resize(lease, size)

    def borrow_idle(self, lease: Lease[W]) -> bool:
        """Lend an idle worker at once, if there is one."""
        if not self._idle:
            return False  # spares the lock; if that changes in this moment, `enqueue` sees it
        with self._lock:
            if self.closed or not self._idle or len(self._lent) + len(self._recovering) >= self.max_workers:
                return False
            worker = self._idle[-1]
            lease.worker = worker
            self._lent[worker] = lease
            del self._idle[-1]
            if self._bereaved:
                self._bereaved.pop(lease, None)
        return True

    def enqueue(self, lease: Lease[W], queue_deadline: float = math.inf) -> bool:
        """Lend an idle worker after all, or put the lease, with its open ticket, at the end of the queue.

        Returns:
            True if it has a worker, and its ticket is not needed.

        The ticket of a queued lease is settled when the lease has its worker, or with the reason why there is none;
        or without either, by `expire_queue` after `queue_deadline`.

        Raises:
            PoolClosed, PoolFull: the lease is not taken.
        """
        with self._lock:
            if self.closed and lease not in self._bereaved and lease.owner not in self._owners:
                raise PoolClosed(self._name)
            if self._idle and len(self._lent) + len(self._recovering) < self.max_workers:
                worker = self._idle[-1]
                lease.worker = worker
                self._lent[worker] = lease
                lease.ticket = None
                del self._idle[-1]
                self._bereaved.pop(lease, None)
                return True
            if self.max_pending is not None and not lease.is_admitted:
                self._check_room(lease, self.max_pending)
            if len(self._queue) + len(self._queue_deadlines) >= self._sweep_at:
                self._sweep()
            if queue_deadline < math.inf:
                heapq.heappush(self._queue_deadlines, (queue_deadline, lease.task_id, lease))
            self._queue.append(lease)
            self._bereaved.pop(lease, None)
            is_complete = len(self._lent) >= self.max_workers and not self._outgoing  # as it mostly is
            present = self.max_workers if is_complete else self._present()
            may_grow = present < self.max_workers
            if may_grow:
                self._wanted = max(self._wanted, present + 1)  # even if it does not wait that long
        if may_grow:
            self._notify()
        return False

    @property
    def has_queue(self) -> bool:
        """True if somebody waits for a worker, as far as that can be told without the lock."""
        return bool(self._queue)

    def add_owner(self, owner: object) -> None:
        """Take on a map or stream: the leases of its lanes are accepted, even after `close`, until it is removed.

        Raises:
            PoolClosed: it is not taken.
        """
        with self._lock:
            if self.closed:
                raise PoolClosed(self._name)
            self._owners.add(owner)

    def remove_owner(self, owner: object) -> None:
        """Note that a map or stream has ended."""
        with self._lock:
            self._owners.discard(owner)

    def _check_room(self, lease: Lease[W], max_pending: int) -> None:
        room = max_pending + self.max_workers - self._count_lent()  # a worker that is still to come counts as free
        if self._gate is not None:
            room -= sum(each.is_waiting for each, _ in self._gate.queue)
        if len(self._queue) >= room and self.has_withdrawn:
            self._sweep()
        if len(self._queue) < room or lease in self._bereaved:
            return
        pending = sum(not each.is_admitted for each in self._queue)
        if pending >= room:
            lease.ticket = None  # it waits for nothing
            raise PoolFull(pending, (pending + 1) * self._estimate_run() / self.max_workers)

    def _sweep(self) -> None:
        self.has_withdrawn = False
        self._queue = deque(lease for lease in self._queue if lease.is_waiting)
        self._queue_deadlines = [entry for entry in self._queue_deadlines if entry[2].is_waiting]
        heapq.heapify(self._queue_deadlines)
        self._sweep_at = max(2 * (len(self._queue) + len(self._queue_deadlines)), _SWEEP_AT_LEAST)

    def _estimate_run(self) -> float:
        """Return the average run time in seconds; before any task has ended, the longest so far, or a guess."""
        if self._average_run:
            return self._average_run
        now = time.monotonic()
        begun = [lease.started for lease in self._lent.values() if lease is not None and lease.started]
        return max(now - min(begun, default=now), _GUESSED_RUN)

    def give_back(self, lease: Lease[W]) -> bool:
        """Take the worker out of a lease and hand it to the first in the queue.

        Returns:
            False if it cannot be given back, because it has died or is about to be killed, or because its successor is
            there: then the lease keeps it.
        """
        try:
            return self._pass_on(lease)
        except BaseException:  # a signal handler raised somewhere in it: finish that first
            self._pass_on(lease)
            raise

    def _pass_on(self, lease: Lease[W]) -> bool:
        while True:
            with self._lock:
                heir = lease.heir
                if heir is None:  # else this had begun before, and was broken off
                    worker = lease.worker
                    if worker is None:
                        return True
                    if self._lent.get(worker) is not lease:
                        return False
                    if self._outgoing and worker in self._outgoing and self._has_successor():
                        return False
                    now = time.monotonic()
                    if lease.started:
                        seconds = now - lease.started
                        average = self._average_run or seconds
                        self._average_run = average + _SMOOTHING * (seconds - average)
                    while self._queue and self._queue[0].is_expired:
                        del self._queue[0]
                    if not self._queue:
                        self._idle_since[worker] = now
                        del self._lent[worker]
                        lease.worker = None
                        self._idle.append(worker)
                        return True
                    heir = self._queue[0]
                    heir.worker = worker
                    self._lent[worker] = lease.heir = heir
                    lease.worker = None
                    del self._queue[0]
                ticket = heir.ticket
            if ticket is not None and (self._hand_over(heir) or ticket.settle()):
                lease.heir = None
                return True
            lease = heir

    def retire(self, lease: Lease[W]) -> None:
        """Give a place free without its worker, which the lease keeps: the first in the queue gets a spare one."""
        try:
            self._retire(lease)
        except BaseException:  # as in `give_back`
            self._retire(lease)
            raise

    def _retire(self, lease: Lease[W]) -> None:
        with self._lock:
            heir = lease.heir
            if heir is None:
                worker = lease.worker
                if worker is None or self._lent.get(worker) is not lease:
                    return  # it has died, or is about to be killed; or this was done before
                while self._queue and self._queue[0].is_expired:
                    del self._queue[0]
                if self._queue and self._idle:  # there is room: it takes the place of this one
                    heir = self._queue[0]
                    position = self._best_idle()
                    spare = self._idle[position]
                    heir.worker = spare
                    self._lent[spare] = lease.heir = heir
                    del self._idle[position]
                    del self._queue[0]
                del self._lent[worker]
                self._outgoing.discard(worker)
        if heir is None:
            return
        ticket = heir.ticket
        is_taken = ticket is not None and ticket.settle()
        lease.heir = None
        if not is_taken:
            self.give_back(heir)

    # --- supervisor ---

    def let_in(self) -> None:
        """Let those in for whose bytes there is room now."""
        gate = self._gate
        while gate is not None:
            with self._lock:
                entered = gate.let_in()
            gone = [lease for lease in entered if lease.ticket is None or not lease.ticket.settle()]
            if not gone:
                return
            with self._lock:
                for lease in gone:  # they have given up meanwhile
                    gate.resize(lease, 0)

    def leave(self, lease: Lease[W]) -> None:
        """Note that a call that has entered, or wanted to, is over."""
        self.weigh(lease, 0)
        self.let_in()

    def borrow(self, worker: W, lease: Lease[W]) -> bool:
        """Lend this worker if it is idle."""
        with self._lock:
            if worker not in self._idle:
                return False
            lease.worker = worker
            self._lent[worker] = lease
            self._borrowed.add(lease)
            self._idle.remove(worker)
            return True

    def return_borrowed(self, lease: Lease[W]) -> bool:
        """Do as `give_back`, after `borrow`."""
        is_back = self.give_back(lease)
        with self._lock:
            self._borrowed.discard(lease)
        return is_back

    def _count_lent(self) -> int:
        """Return how many workers calls hold.  What the supervisor has borrowed for a moment is as good as free."""
        return len(self._lent) - len(self._borrowed)

    def take_over(self, lease: Lease[W], *, expected: bool = False) -> W | None:
        """Take the worker out of a lease whose call gave it up; None if it has left the lease before.

        `expected` says that it is going to be ready again, so that no other is started in its place.
        """
        with self._lock:
            worker = lease.worker
            lease.worker = None
            if worker is not None:
                if self._lent.pop(worker, None) is not None and expected:
                    self._expected.add(worker)
                    self._recovering.add(worker)
                else:
                    self._outgoing.discard(worker)
            return worker

    def doom(self, lease: Lease[W]) -> bool:
        """Decide that the worker of a lease will be killed; False if it has left the lease before."""
        with self._lock:
            worker = lease.worker
            if worker is None or self._lent.get(worker) is not lease:
                return False
            self._lent[worker] = None
            return True

    def leases(self) -> list[Lease[W]]:
        """Return the leases of all workers that are lent and not going to be killed."""
        with self._lock:
            return [lease for lease in self._lent.values() if lease is not None]

    def lease_of(self, worker: W) -> Lease[W] | None:
        """Return the lease under which a worker is lent, unless it is going to be killed."""
        with self._lock:
            return self._lent.get(worker)

    def next_queue_deadline(self) -> float:
        """Return when the next call has waited long enough."""
        with self._lock:
            while self._queue_deadlines and not self._queue_deadlines[0][2].is_waiting:
                heapq.heappop(self._queue_deadlines)
            return self._queue_deadlines[0][0] if self._queue_deadlines else math.inf

    def expire_queue(self, now: float) -> None:
        """Send those away who have waited long enough: settle their tickets without a worker."""
        overdue = []
        with self._lock:
            while self._queue_deadlines and self._queue_deadlines[0][0] <= now:
                lease = heapq.heappop(self._queue_deadlines)[2]
                if lease.ticket is not None and lease.worker is None and lease.is_waiting:
                    overdue.append(lease.ticket)
                    lease.is_expired = True
                    self.has_withdrawn = True
        for ticket in overdue:
            ticket.settle()

    def shortfall(self) -> int:
        """Return how many workers should be started now."""
        with self._lock:
            waiting = (lease for lease in self._queue if lease.is_waiting)
            staying = len(self._lent) - len(self._outgoing & self._lent.keys())
            needed = staying + sum(1 for _ in itertools.islice(waiting, self.max_workers))
            if self.closed:
                target = needed  # accepted calls still run; nothing is kept for later
            else:
                target = max(self._wanted, needed)
            return max(min(target, self.max_workers) - self._present(), 0)

    def _present(self) -> int:
        return len(self._expected) + len(self._idle) + len(self._lent) - len(self._outgoing)

    def _best_idle(self) -> int:
        """Return where in `_idle` the next to be lent is: the last one that is not outgoing, if there is one.

        An outgoing one that is not wanted after all could not be given back.
        """
        return next((at for at in range(-1, -len(self._idle) - 1, -1) if self._idle[at] not in self._outgoing), -1)

    def _has_successor(self) -> bool:
        return any(each not in self._outgoing for each in self._idle)

    def has_workers(self) -> bool:
        """Return True if a worker is there, or is going to be."""
        with self._lock:
            return bool(self._expected or self._idle or self._lent)

    def expect(self, worker: W) -> None:
        """Note a worker that was started and is not ready yet."""
        with self._lock:
            self._expected.add(worker)
            self._wanted = max(self._wanted, self._present())

    def add_ready(self, worker: W) -> None:
        """Note that an expected worker is ready, and serve the queue."""
        with self._lock:
            self._expected.discard(worker)
            self._recovering.discard(worker)
            self._idle_since[worker] = time.monotonic()
            self._idle.append(worker)
        self.serve_queue()

    def serve_queue(self) -> None:
        """Lend idle workers to those who wait, as far as that may be; in the supervisor's thread."""
        while True:
            with self._lock:
                while self._queue and self._queue[0].is_expired:
                    del self._queue[0]
                if not self._queue or not self._idle:
                    return
                if len(self._lent) + len(self._recovering) >= self.max_workers:
                    return
                lease = self._queue.popleft()
                worker = self._idle.pop(self._best_idle())
                lease.worker = worker
                self._lent[worker] = lease
                ticket = lease.ticket
            if ticket is None or not ticket.settle():
                self.give_back(lease)  # it has given up meanwhile

    def remove(self, worker: W) -> bool:
        """Take a worker out, wherever it is.  Returns True if a call holds it, and will hand it over."""
        with self._lock:
            is_lent = worker in self._lent
            lease = self._lent.pop(worker, None)
            if lease is not None:
                self._bereaved[lease] = None
            for each in (self._expected, self._recovering, self._outgoing):
                each.discard(worker)
            self._idle_since.pop(worker, None)
            if worker in self._idle:
                self._idle.remove(worker)
            return is_lent

    # --- supervisor: replacing and dismissing ---

    def replace(self, worker: W) -> None:
        """Note that a worker is going to leave, so that its successor is started."""
        with self._lock:
            if worker in self._expected or worker in self._lent or worker in self._idle:
                self._outgoing.add(worker)

    def take_replaced(self) -> list[W]:
        """Take those idle workers out that have a successor."""
        with self._lock:
            if not self._outgoing:
                return []
            spare = len(self._idle) + len(self._lent) - min(self._wanted, self.max_workers)
            replaced = [worker for worker in self._idle if worker in self._outgoing][: max(spare, 0)]
            self._take_out(replaced)
            return replaced

    def take_surplus(self, now: float, idle_timeout: float, min_workers: int) -> list[W]:
        """Take those workers out that have been idle for `idle_timeout`, but leave `min_workers`."""
        with self._lock:
            if self._ready_tickets:
                return []  # all workers are wanted
            most = max(self._present() - min_workers, 0)
            surplus = [each for each in self._idle if self._idle_since[each] + idle_timeout <= now][:most]
            self._take_out(surplus)
            if surplus:
                self._wanted = min(self._wanted, self._present())
            return surplus

    def next_surplus(self, idle_timeout: float, min_workers: int) -> float:
        """Return when the next worker will have been idle for `idle_timeout`; infinite while none may leave."""
        with self._lock:
            if self._ready_tickets or not self._idle or self._present() <= min_workers:
                return math.inf
            return self._idle_since[self._idle[0]] + idle_timeout  # the longest idle one is the first

    def _take_out(self, workers: list[W]) -> None:
        for worker in workers:
            self._idle.remove(worker)
            del self._idle_since[worker]
            self._outgoing.discard(worker)

    def take_idle(self) -> list[W]:
        """Take all idle workers out."""
        with self._lock:
            idle = list(self._idle)
            self._take_out(idle)
            return idle

    def fail_start(self, make_error: Callable[[], BaseException]) -> None:
        """Note that a worker could not be started: tell everybody who now waits in vain, each with an error of its own.

        If other workers are left, the queue is served by them.
        """
        with self._lock:
            self._wanted = len(self._expected) + len(self._idle) + len(self._lent)
            others = self._wanted > 0
        self._fail(make_error, warm_up_only=others)

    def fail_queue(self, make_error: Callable[[], BaseException]) -> None:
        """Settle every waiting ticket with an error of its own."""
        self._fail(make_error, warm_up_only=False)

    def note_bereaved(self, lease: Lease[W], ticket: Ticket) -> None:
        """Note that a call knows that it has lost its worker: it may begin again, even after `close`.

        `ticket` tells it of the death; the call withdraws it if it does not want to know any more.
        """
        with self._lock:
            self._bereaved = {each: its for each, its in self._bereaved.items() if _is_wanted(its)}
            self._bereaved[lease] = ticket

    def forget_bereaved(self, lease: Lease[W] | None = None) -> None:
        """Note that this call does not begin again; or that none does, nor any lane."""
        with self._lock:
            if lease is None:
                self._bereaved.clear()
                self._owners.clear()
            else:
                self._bereaved.pop(lease, None)

    def _fail(self, make_error: Callable[[], BaseException], *, warm_up_only: bool) -> None:
        with self._lock:
            tickets = self._ready_tickets
            self._ready_tickets = []
            if not warm_up_only:
                tickets += [lease.ticket for lease in self._queue if lease.ticket is not None]
                self._queue.clear()
                if self._gate is not None:
                    tickets += [lease.ticket for lease, _ in self._gate.queue if lease.ticket is not None]
                    self._gate.queue.clear()
        for ticket in tickets:
            ticket.settle(error=make_error())

    # --- warm-up and close ---

    def want_all(self, ticket: Ticket) -> None:
        """Keep `max_workers` workers from now on; `settle_warm_ups` settles the ticket when none of them is missing.

        Raises:
            PoolClosed: the ticket is not taken.
        """
        with self._lock:
            if self.closed:
                raise PoolClosed(self._name)
            self._wanted = self.max_workers
            self._ready_tickets = [each for each in self._ready_tickets if each.is_open]  # the others have gone
            self._ready_tickets.append(ticket)

    def settle_warm_ups(self) -> None:
        """Settle the tickets of `want_all` if all workers are ready; from then on they count as idle."""
        with self._lock:
            if not self._ready_tickets or len(self._idle) + len(self._lent) < self.max_workers:
                return
            self._idle_since |= dict.fromkeys(self._idle, time.monotonic())
            tickets = self._ready_tickets
            self._ready_tickets = []
        for ticket in tickets:
            ticket.settle()

    def close(self) -> None:
        """Take no more calls; what was accepted still gets its worker."""
        with self._lock:
            self.closed = True

    def is_quiet(self) -> bool:
        """Return True when no call runs or waits."""
        with self._lock:
            bereaved = any(_is_wanted(ticket) for ticket in self._bereaved.values())
            waiting = any(lease.is_waiting for lease in self._all_waiting())
            return not (self._lent or self._owners or bereaved or waiting)

    @property
    def is_full(self) -> bool:
        """True while so many calls wait that another one would be refused."""
        if not self.max_pending:
            return False  # with 0, none ever waits
        with self._lock:
            return sum(lease.is_waiting and not lease.is_admitted for lease in self._all_waiting()) >= self.max_pending

    def counts(self) -> tuple[int, int, int, int]:
        """Return the numbers of expected, idle and lent workers and of waiting calls."""
        with self._lock:
            waiting = sum(lease.is_waiting for lease in self._all_waiting())
            return len(self._expected), len(self._idle), len(self._lent), waiting

    def snapshot(self) -> Snapshot[W]:
        """Return where all workers are, how many calls wait, and what was counted, all of the same moment."""
        with self._lock:
            waiting = sum(lease.is_waiting for lease in self._all_waiting())
            return Snapshot(set(self._idle), dict(self._lent), waiting, self.tally.read())

    def _all_waiting(self) -> Iterator[Lease[W]]:
        at_gate = () if self._gate is None else self._gate.queue
        return itertools.chain(self._queue, (lease for lease, _ in at_gate))


def _is_wanted(ticket: Ticket | None) -> bool:
    return ticket is None or ticket.is_open or ticket.is_settled
