"""The thread that starts, stops, replaces and reaps workers.

Rules:

- It owns every worker that is neither idle nor lent to a call.  Other threads reach it by `post`, which takes no lock
  and never blocks, so that a call can be given up from anywhere, even while it is being garbage-collected.
- It sleeps until a descriptor or a deadline wakes it; there is no polling.

Theory of operation: each worker's sentinel is watched from birth to death.  When a process ends that a call holds, its
channel is shut down, the call sees the end of the connection and hands the worker over (`bury`) with a ticket, which is
settled with its `Death`.  Whichever comes first, hand-over or death, the worker is closed when both have happened.
How workers become ready is in `_births`, how their tasks are stopped in `_stopping`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from . import _roles
from ._births import BREAKER_THRESHOLD, Births
from ._crew import Crew
from ._dispatch import Dispatcher
from ._errors import PoolBroken, PoolClosed, describe_exit
from ._events import Event
from ._frames import Kind, ProtocolError
from ._inspection import describe_worker
from ._lease import Lease, Verdict
from ._log_keeper import LogKeeper
from ._memory import SAMPLING_INTERVAL, MemoryGuard, OomWitness
from ._outcomes import name_task_of, read_interruption
from ._stacks import SlowTasks, Stacks
from ._statistics import Statistics
from ._stopping import Stopping
from ._worker import State, Worker, WorkerGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._events import Announcer
    from ._frames import Frame
    from ._settings import CallOptions, Settings
    from ._starting import WorkerStarter
    from ._waiting import Ticket

Health: TypeAlias = Literal["ready", "degraded", "broken"]

LONGEST_REPORT = 1.0  # seconds that a fork server has to report how an ended worker has ended
LONGEST_TELLING = 1.0  # seconds that the end of a pool waits for who is told what has happened
LONGEST_EXIT = 0.5  # seconds that a worker which has hung up in the middle of a call has to exit


class Supervisor:
    """Runs the workers of one pool.

    Attributes:
        name: the pool's.
        finished: True when it has stopped and all its workers are gone.
        is_closing: set it when `close_by` is posted.
        dispatcher: lends the workers that are ready.
        tally: counts what becomes of the calls.
        next_task_id: gives the next number.
        notify, look_by: see `Crew.wake` and `Crew.look_by`.
        idle_timeout: as in the settings.
        slow_task: as in the settings.
        first_look: after so many seconds a task must be looked at: at its memory, or because it is slow; or None.
    """

    def __init__(
        self, settings: Settings, starter: WorkerStarter, announcer: Announcer, on_start: Callable[[], object]
    ) -> None:
        """Args: `on_start` is called when the first call, or whoever starts the pool, starts the thread."""
        self.name = settings.name
        self.finished = False
        self.is_closing = False
        self._crew = Crew()
        self.notify, self.look_by = self._crew.wake, self._crew.look_by
        self.dispatcher: Dispatcher[Worker] = Dispatcher(
            starter.max_workers,
            settings.name,
            self.notify,
            hand_over=self.begin_early,
            max_pending=settings.max_pending,
            max_inflight_bytes=settings.max_inflight_bytes,
        )
        self.tally = self.dispatcher.tally
        self.next_task_id = itertools.count(1).__next__
        self._settings = settings
        self._oom_witness = OomWitness()
        self._announcer = announcer
        self._on_start = on_start
        self._births = Births(settings, starter, self._crew, self.dispatcher, self._oom_witness, announcer)
        self._stopping = Stopping(settings.grace, self._crew, self.dispatcher, self._recycle)
        self._memory_guard = MemoryGuard(settings.hard_memory_per_child, self._crew, self.dispatcher)
        self.idle_timeout = settings.idle_timeout
        self._stacks = Stacks(self._crew, self.dispatcher)
        self._slow_tasks = SlowTasks(settings.slow_task, settings.name, self.dispatcher, self._stacks, announcer)
        self._log_keeper = LogKeeper(settings.name, self._crew, announcer)
        sampling_interval = None if settings.hard_memory_per_child is None else SAMPLING_INTERVAL
        looks = [each for each in (sampling_interval, settings.slow_task) if each is not None]
        self.slow_task = settings.slow_task
        self.first_look = min(looks, default=None)
        self._thread_id: int | None = None
        self._orders: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._unstarted = [None]
        self._is_stopping = False
        self._stop_at = math.inf
        self._close_at = math.inf
        self._killed_at = math.inf
        self._has_grace = True
        self._stop_tickets: list[Ticket] = []

    # --- from any thread ---

    def begin(self, lease: Lease[Worker], tasks: int = 1) -> None:
        """Note that what a call wants to have run, as so many tasks, is sent now to the worker that it has."""
        options: CallOptions = lease.options  # type: ignore[assignment]  # it has them by now
        worker: Worker = lease.worker  # type: ignore[assignment]
        if options.on_start is not None:
            options.on_start()
        lease.started = now = time.monotonic()
        if options.timeout is not None and lease.verdict is None:  # there may be one, when the pool closes
            lease.deadline = now + options.timeout
            self.look_by(lease.deadline)
        if self.first_look is not None:
            self.look_by(now + self.first_look)
        if worker.tasks_left <= tasks:
            self.post(self.dispatcher.replace, worker)

    def begin_early(self, lease: Lease[Worker]) -> bool:
        """Send the task of a call that has just got its worker, if it waits on the event loop that runs here.

        So the worker goes on at once, and the call wakes up only when it has its answer.
        """
        ticket, errand = lease.ticket, lease.errand
        if errand is None or ticket is None or not ticket.is_here or not ticket.claim():
            return False
        worker: Worker = lease.worker  # type: ignore[assignment]  # it has just got it
        self.begin(lease)
        if not worker.send_early(errand.encode(lease.task_id), lease):
            return False
        ticket.follow(worker.process.channel, functools.partial(self._finish_early, lease, worker))
        return True

    def finish(self, lease: Lease[Worker], reply: Frame) -> None:
        """Note the answer to a call, and give its worker back, or dismiss it."""
        dispatcher = self.dispatcher
        worker: Worker = lease.worker  # type: ignore[assignment]  # it has one
        lease.outcome = reply if lease.verdict is None else read_interruption(reply, worker)
        if worker.max_memory is not None and worker.is_too_large:
            self.post(dispatcher.replace, worker)
        if not worker.tasks_left or not dispatcher.give_back(lease):
            dispatcher.retire(lease)
            self.post(self.take_back, lease)
        elif self.idle_timeout is not None:
            self.look_by(time.monotonic() + self.idle_timeout)
        if worker.ended_shares:
            self.post(self.tell_of_ended_shares, worker)
        if dispatcher.closed:
            self.notify()  # it may be the last one that the pool waits for

    def _finish_early(self, lease: Lease[Worker], worker: Worker) -> bool:
        """Do what is to be done with an answer before its caller wakes up; False if it is not complete."""
        if lease.worker is not worker:
            return True
        try:
            reply = worker.take_early()
        except (WorkerGone, ConnectionError, ProtocolError):
            return True
        if reply is None:
            return False
        is_plain = lease.verdict is None and reply.kind is not Kind.INTERRUPTED and not reply.files
        if is_plain and reply.task_id == lease.task_id:  # all else is for the caller
            # Nothing is called until all is noted: no signal handler can raise in between.  What one breaks off after
            # that is `finish`, and the caller has its outcome all the same.
            worker.taken = None
            worker.in_call = False
            worker.tasks_done += 1
            lease.outcome = reply
            self.finish(lease, reply)
        return True

    def run(self) -> None:
        """Start the thread, unless it was started before.

        Raises:
            RuntimeError: this is the thread, or a process that must not start workers.
        """
        if not self._unstarted:
            self.refuse_in_its_thread()
            return
        _roles.refuse_pool_here()
        try:
            self._unstarted.pop()
        except IndexError:
            return  # another thread does
        opened = contextlib.ExitStack()  # the thread closes it
        unbegun = [None]
        try:
            self._crew.open(opened)
            threading.Thread(target=self._main, args=(unbegun,), name=f"{self.name}-supervisor", daemon=True).start()
        except BaseException as error:
            if not unbegun:
                raise  # a signal handler raised, and the thread runs
            unbegun.clear()  # it never will
            opened.close()
            self._unstarted.append(None)  # the next call tries again
            text, cause = f"the pool's thread could not be started: {type(error).__name__}: {error}", error
            self.dispatcher.fail_queue(lambda: PoolBroken(text, cause))
            if isinstance(error, Exception):
                raise PoolBroken(text, error) from error
            raise
        self._on_start()
        if self.dispatcher.closed:
            self.stop_soon()  # closed in the same moment, by one who saw nothing to stop

    def refuse_in_its_thread(self) -> None:
        """Raise in the supervisor's own thread, where garbage collection may run anybody's code."""
        if threading.get_ident() == self._thread_id:
            raise RuntimeError("the pool's own thread cannot wait for the pool; do not call it in __del__")

    @property
    def is_running(self) -> bool:
        return not self._unstarted and not self.finished

    @property
    def health(self) -> Health:
        """How the pool is, from any thread; see `CpuPool.health`."""
        if self.dispatcher.closed:
            return "broken"
        failures = self._births.failures
        _, idle, busy, _ = self.dispatcher.counts()
        if failures >= BREAKER_THRESHOLD and not idle and not busy:
            return "broken"
        return "degraded" if failures or self.dispatcher.is_full else "ready"

    def statistics(self) -> Statistics:
        """Return what is known of the pool now, from any thread; see `CpuPool.statistics`."""
        now = time.monotonic()
        workers = sorted(self._crew.workers, key=lambda worker: worker.born)
        idle, lent, waiting, counted = self.dispatcher.snapshot()
        found = tuple(describe_worker(each, idle, lent, now) for each in workers if each.state is not State.ENDED)
        states = [worker.state for worker in found]
        return Statistics(
            name=self.name,
            workers=found,
            max_workers=self.dispatcher.max_workers,
            idle=states.count("idle"),
            busy=states.count("busy") + states.count("stopping"),
            starting=states.count("starting"),
            pending=waiting,
            **counted,
        )

    def stop_soon(self) -> None:
        """Stop everything without waiting for it."""
        self.dispatcher.closed = True  # no lock: it may run inside a garbage collection
        if self.is_running:
            self.post(self.stop, time.monotonic(), None)

    def post(self, order: Callable[..., object], *args: object) -> None:
        """Let the thread carry out `order(*args)`; once it has finished, do so here."""
        self._orders.append((order, args))
        if self.finished:
            self._carry_out_orders()
        else:
            self.notify()

    # --- orders, carried out in the thread ---

    def take_back(self, lease: Lease[Worker]) -> None:
        """Take over the worker of a call that was given up, or of one that could not give it back."""
        worker = lease.worker
        if worker is None:
            return
        if self.finished or worker not in self._crew.workers or worker.state is not State.READY:
            self.bury(lease, None)
        elif worker.in_call:
            self._stopping.recover(lease)
        elif not worker.tasks_left or not self.dispatcher.give_back(lease):
            self.dispatcher.take_over(lease)
            self._recycle(worker)  # its last task is done, or its successor there
        elif worker.ended_shares:
            self.tell_of_ended_shares(worker)

    def bury(self, lease: Lease[Worker], heir: Ticket | None) -> None:
        """Take over a worker that its call has lost, and tell `heir` how it ended; without an heir, kill it."""
        if self.finished:  # this may run inside a garbage collection, and must take no lock
            worker, lease.worker = lease.worker, None
        else:
            worker = self.dispatcher.take_over(lease)
            if heir is None:
                self.dispatcher.forget_bereaved(lease)
            else:
                self.dispatcher.note_bereaved(lease, heir)
        if worker is None:
            return  # it was taken over before
        worker.heir = heir
        worker.last_task = name_task_of(lease)
        if worker.state is State.ENDED:
            self._close_worker(worker)
        elif worker in self._crew.workers and heir is not None and worker.deadline == math.inf:
            worker.deadline = time.monotonic() + min(self._settings.grace, LONGEST_EXIT)  # its own end says more
        elif worker in self._crew.workers and not worker.process.has_ended:
            self._crew.kill(worker)
        elif worker not in self._crew.workers and heir is not None:
            heir.settle(
                error=PoolBroken("this call was made by the parent of this forked process, and is the parent's")
            )

    def end_share(self, number: int) -> None:
        """Have all workers forget a share that has ended."""
        for worker in list(self._crew.workers):
            if number in worker.shares:
                worker.ended_shares.append(number)
                self.tell_of_ended_shares(worker)

    def tell_of_ended_shares(self, worker: Worker) -> None:
        """Tell a worker if it is idle; otherwise who gives it back has this called again."""
        lease: Lease[Worker] = Lease(0)
        if self.dispatcher.borrow(worker, lease):
            worker.forget_ended_shares()
            if not self.dispatcher.return_borrowed(lease):
                self.dispatcher.take_over(lease)
                self._recycle(worker)  # its successor is there

    def stop(self, deadline: float, ticket: Ticket | None) -> None:
        """Dismiss all workers when no call runs any more; from `deadline` on interrupt what still runs."""
        self._is_stopping = True
        self._stop_at = min(self._stop_at, deadline)
        if ticket is None:
            return
        if self.finished:
            ticket.settle()
        else:
            self._stop_tickets.append(ticket)

    def dump_stacks(self, ticket: Ticket, pid: int | None) -> None:
        """Settle the ticket with the stacks of all busy workers, or of that one; see `CpuPool.dump_stacks`."""
        self._stacks.ask_all(ticket, pid)

    def interrupt(self, ticket: Ticket, pid: int) -> None:
        """Interrupt the task of that worker; settles the ticket with True, or with False if it runs none."""
        leases = [lease for lease in self.dispatcher.leases() if lease.started and lease.verdict is None]
        found = [lease for lease in leases if lease.worker is not None and lease.worker.process.pid == pid]
        for lease in found:
            self._stopping.interrupt(lease, Verdict.INTERRUPTED)
        ticket.settle(bool(found))

    def close_by(self, deadline: float) -> None:
        """Take no more calls from `deadline` on, and interrupt what still runs then."""
        self._close_at = min(self._close_at, deadline)

    def hurry(self) -> None:
        """Kill all workers at once; `stop` was ordered before."""
        self._has_grace = False
        self._killed_at = -math.inf

    # --- the thread ---

    def _main(self, unbegun: list[None]) -> None:
        try:
            unbegun.pop()
        except IndexError:
            return  # who started it was interrupted, and has given that up
        self._thread_id = threading.get_ident()
        try:
            while not self.finished:
                self._crew.sleep(self._next_deadline)
                self._carry_out_orders()
                self._enforce_deadlines(time.monotonic())
                self._dismiss_workers(time.monotonic())
                self._births.server.stop_overdue(time.monotonic())
                self._births.refuse_while_broken()
                if (worker := self._births.start_one_if_missing()) is not None:
                    self._crew.watch_end(worker, self._on_end)
                    self._log_keeper.watch(worker)
                self.dispatcher.serve_queue()
                self.dispatcher.settle_warm_ups()
                self._advance_stop()
        except BaseException as error:
            self._give_up(error)
            raise
        finally:
            self._births.close()
            self._crew.close()
            self._stacks.give_up()
            self._carry_out_orders()  # what was posted while `finished` was not yet set
            self._announcer.finish(LONGEST_TELLING)
            for ticket in self._stop_tickets:
                ticket.settle()

    def _carry_out_orders(self) -> None:
        while True:
            try:
                order, args = self._orders.popleft()
            except IndexError:
                return
            order(*args)

    def _next_deadline(self) -> float:
        return min(
            self._crew.next_deadline(),
            self._stopping.next_deadline(),
            self._births.next_deadline(),
            self._memory_guard.next_deadline(),
            self._stacks.next_deadline(),
            self._slow_tasks.next_deadline(),
            self._log_keeper.next_deadline(),
            self._next_surplus(),
            self.dispatcher.next_queue_deadline(),
            self._killed_at if self._births.stopped else min(self._stop_at, self._close_at),
        )

    def _enforce_deadlines(self, now: float) -> None:
        self.dispatcher.expire_queue(now)
        self._stopping.enforce_deadlines(now)
        self._memory_guard.enforce_limit(now)
        self._stacks.look(now)
        self._slow_tasks.look(now)
        self._log_keeper.resume(now)
        for worker in list(self._crew.workers):
            if worker.deadline <= now:
                if worker.process.has_ended:
                    self._crew.unwatch_end(worker)
                    worker.process.give_up_status()
                    self._end(worker)
                    continue
                if worker.state is State.STARTING:
                    if self._births.is_asked_for_stack(worker):
                        continue
                    self._births.report_overdue(worker)
                self._crew.kill(worker)

    # --- workers that leave in peace ---

    def _dismiss_workers(self, now: float) -> None:
        """Send home workers whose successor is there, and those that had nothing to do for too long."""
        for worker in self.dispatcher.take_replaced():
            self._recycle(worker)
        if self._settings.idle_timeout is not None:
            min_workers = self._settings.min_workers or 0
            for worker in self.dispatcher.take_surplus(now, self._settings.idle_timeout, min_workers):
                self._send_home(worker)

    def _next_surplus(self) -> float:
        if self._settings.idle_timeout is None or self._births.stopped:
            return math.inf
        min_workers = self._settings.min_workers or 0
        return self.dispatcher.next_surplus(self._settings.idle_timeout, min_workers)

    def _recycle(self, worker: Worker) -> None:
        self.tally.count("recycled")
        pid = worker.process.pid
        text = f"worker {pid} leaves after {worker.tasks_done:,} tasks, and another takes its place"
        self._announcer.announce(Event(kind="worker_recycled", pool=self.name, text=text, pid=pid))
        self._send_home(worker)

    def _send_home(self, worker: Worker) -> None:
        self._crew.send_home(worker, time.monotonic() + self._settings.grace)

    # --- death ---

    def _on_end(self, worker: Worker) -> None:
        """See to a worker whose sentinel says that its process has ended."""
        process = worker.process
        self._crew.unwatch_end(worker)
        if worker.state is State.STARTING:
            self._births.hear_last_words(worker)
        process.kill()  # what it has started must not outlive it
        if process.poll() is None and process.stop_watching_pid():
            self._crew.watch_end(worker, self._on_end)
            worker.deadline = time.monotonic() + LONGEST_REPORT
        else:
            self._end(worker)

    def _end(self, worker: Worker) -> None:
        died_starting = worker.state is State.STARTING
        self._log_keeper.finish(worker)
        if worker.was_killed_by_others:
            worker.oom = self._oom_witness.was_oom_kill()
        if not worker.was_sent_home and not self._births.stopped:
            self.tally.count("workers_died")
            if worker.state is not State.LEAVING:  # else its initializer has failed, and callers are told
                self._announcer.announce(self._tell_death(worker))
        worker.state = State.ENDED
        worker.deadline = math.inf
        self._crew.unwatch_channel(worker)
        if self.dispatcher.remove(worker):
            worker.hang_up()  # its call will hand it over
            return
        if died_starting and not self._births.stopped:
            self._births.explain_death(worker)
        self._close_worker(worker)

    def _tell_death(self, worker: Worker) -> Event:
        """Make the event of a worker that has ended without being told to leave; its status may be unknown."""
        death = worker.death()
        task = worker.last_task or name_task_of(self.dispatcher.lease_of(worker))
        if death.by_pool:
            how = "was killed by the pool, because it did not come to an end in time"
        elif death.excess is not None:
            how = "was killed by the pool, because it held too much memory"
        else:
            how = describe_exit(death.exitcode, death.signal) + (", for want of memory," if death.oom else "")
        text = f"worker {death.pid} {how}"
        if worker.state is State.STARTING:
            text += " before it was ready"
        elif task is not None:
            text += f" while it ran {task}"
        return Event(kind="worker_died", pool=self.name, text=text, pid=death.pid, task=task, stack=death.crash_stack)

    def _close_worker(self, worker: Worker) -> None:
        self._crew.workers.discard(worker)
        heir, worker.heir = worker.heir, None
        if heir is not None:
            heir.settle(worker.death())
        worker.drop_unsent()
        worker.process.close()

    # --- the end ---

    def _advance_stop(self) -> None:
        now = time.monotonic()
        if now >= self._close_at:
            self._close_at = math.inf
            self.dispatcher.close()
            self.stop(now, None)
        if not self._is_stopping:
            return
        if not self._births.stopped and (self.dispatcher.is_quiet() or now >= self._stop_at):
            self._births.stopped = True
            self._killed_at = now + (self._settings.grace if self._has_grace else 0)
            self._stop_running_tasks()
        if self._births.stopped:
            for worker in self.dispatcher.take_idle():
                self._send_home(worker)
            if now >= self._killed_at:
                self._killed_at = math.inf
                for worker in self._crew.workers:
                    self._crew.kill(worker)
            self.finished = all(worker.state is State.ENDED for worker in self._crew.workers)

    def _stop_running_tasks(self) -> None:
        self.dispatcher.fail_queue(lambda: PoolClosed(self.name))
        self.dispatcher.forget_bereaved()
        for lease in self.dispatcher.leases():
            self._stopping.interrupt(lease, Verdict.POOL_CLOSED)
        for worker in self._crew.workers:
            if worker.state is State.STARTING:
                self._crew.kill(worker)

    def _give_up(self, error: BaseException) -> None:
        """The thread itself failed: let nobody wait for it."""
        self.dispatcher.close()
        text = f"the pool's supervisor failed, which is a bug in cpupool: {type(error).__name__}: {error}"
        self.dispatcher.fail_queue(lambda: PoolBroken(text, error))
        for worker in list(self._crew.workers):
            self._crew.kill(worker)
            if worker.state is not State.ENDED:
                self._end(worker)
        self.finished = True
