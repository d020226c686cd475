"""The thread that starts, replaces, kills and reaps workers.

Rules:

- It owns every worker that is neither idle nor lent to a call.  Other threads reach it by `post`, which takes no lock
  and never blocks, so that a call can be given up from anywhere, even while it is being garbage-collected.
- It sleeps until a descriptor or a deadline wakes it; there is no polling.
- It starts workers on demand.  When a start fails and no worker is left, everybody who waits is told, and it is tried
  again only when somebody asks again; while others are left they serve the queue, and the next try is put off, each
  time for longer.  So a broken initializer cannot become a storm of processes.

Theory of operation: each worker's sentinel is watched from birth to death.  When a process ends that a call owns, its
channel is shut down, the call sees the end of the connection and hands the worker over (`bury`) with a ticket, which is
settled with its `Death`.  Whichever comes first, hand-over or death, the worker is closed when both have happened.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from . import _roles
from ._dispatch import Dispatcher
from ._errors import InitializerFailed, PoolBroken, PoolClosed, decode_error, describe_callable, describe_exit
from ._forking import starting_or_forking
from ._frames import Frame, Kind, ProtocolError
from ._worker import State, Worker, WorkerGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._process import WorkerProcess
    from ._settings import Settings
    from ._waiting import Ticket

# A worker killed from outside while it starts is nobody's fault and is replaced; one that always dies is not.
MAX_START_DEATHS = 3

# Seconds between one failed start and the next, while other workers are left; doubled each time.
FIRST_DELAY, LONGEST_DELAY = 0.05, 30.0

LONGEST_EXIT = 0.5  # seconds that a worker which has hung up in the middle of a call has to exit

LONGEST_SLEEP = 3600.0  # seconds; a deadline may be infinite, the system's timers are not


class Supervisor:
    """Runs the workers of one pool.

    Attributes:
        finished: True when it has stopped and all its workers are gone.
        dispatcher: lends the workers that are ready.
    """

    def __init__(self, settings: Settings, max_workers: int, start: Callable[[], WorkerProcess]) -> None:
        self.finished = False
        self.dispatcher: Dispatcher[Worker] = Dispatcher(max_workers, settings.name, self.notify)
        self._settings = settings
        self._start = start
        self._thread_id: int | None = None
        self._orders: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._unstarted = [None]
        self._workers: set[Worker] = set()
        self._start_deaths = 0
        self._start_failures = 0
        self._start_again_at = 0.0
        self._stop_at: float | None = None
        self._dismissed = False
        self._stop_tickets: list[Ticket] = []

    # --- from any thread ---

    def run(self) -> None:
        """Start the thread, unless it was started before."""
        try:
            self._unstarted.pop()
        except IndexError:
            return
        try:
            with contextlib.ExitStack() as opened:
                self._open_descriptors(opened)
                threading.Thread(target=self._main, name=f"{self._settings.name}-supervisor", daemon=True).start()
                opened.pop_all()  # the thread closes them
        except BaseException as error:
            cause = error
            self._unstarted.append(None)  # the next call tries again
            text = f"the pool's thread could not be started: {type(error).__name__}: {error}"
            self.dispatcher.fail_queue(lambda: PoolBroken(text, cause))
            raise

    def _open_descriptors(self, opened: contextlib.ExitStack) -> None:
        self._selector = opened.enter_context(selectors.DefaultSelector())
        self._wake_receiver, self._wake_sender = socket.socketpair()
        for end in (self._wake_receiver, self._wake_sender):
            opened.callback(end.close)
            end.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, self._empty_wake_receiver)

    def refuse_in_its_thread(self) -> None:
        """Raise in the supervisor's own thread, where garbage collection may run anybody's code."""
        if threading.get_ident() == self._thread_id:
            raise RuntimeError("the pool's own thread cannot wait for the pool; do not call it in __del__")

    @property
    def is_running(self) -> bool:
        return not self._unstarted and not self.finished

    def notify(self) -> None:
        """Let it look at the dispatcher again."""
        try:
            self._wake_sender.send(b"\0")
        except (BlockingIOError, OSError, AttributeError):
            pass  # it has been woken already, or has stopped, or has not begun: it will look anyway

    def post(self, order: Callable[..., object], *args: object) -> None:
        """Let the thread carry out `order(*args)`; once it has finished, do so here."""
        self._orders.append((order, args))
        if self.finished:
            self._carry_out_orders()
        else:
            self.notify()

    # --- orders, carried out in the thread ---

    def bury(self, worker: Worker, heir: Ticket | None) -> None:
        """Take over a worker that its call gave up, and kill it, or that it lost; tell `heir` how it ended."""
        worker.heir = heir
        if not self.finished:  # afterwards this may run inside a garbage collection, and must take no lock
            self.dispatcher.remove(worker)
        if worker.state is State.ENDED:
            self._close_worker(worker)
        elif worker in self._workers and heir is not None and worker.deadline is None:
            worker.deadline = time.monotonic() + min(self._settings.grace, LONGEST_EXIT)  # its own end says more
        elif worker in self._workers:
            self._kill(worker)
        elif heir is not None:
            heir.settle(
                error=PoolBroken("this call was made by the parent of this forked process, and is the parent's")
            )

    def take_back(self, worker: Worker) -> None:
        """Take a worker that was lent to a call which did not take it."""
        if self.finished or not self.dispatcher.give_back(worker):
            self.bury(worker, None)

    def stop(self, deadline: float, ticket: Ticket | None) -> None:
        """Dismiss all workers when no call runs any more, at `deadline` (monotonic) at the latest."""
        self._stop_at = deadline if self._stop_at is None else min(self._stop_at, deadline)
        if ticket is None:
            return
        if self.finished:
            ticket.settle()
        else:
            self._stop_tickets.append(ticket)

    # --- the thread ---

    def _main(self) -> None:
        self._thread_id = threading.get_ident()
        try:
            while not self.finished:
                for key, _ in self._selector.select(self._seconds_to_next_deadline()):
                    key.data()
                self._carry_out_orders()
                self._kill_overdue()
                self._start_one_if_missing()
                self._advance_stop()
        except BaseException as error:
            self._give_up(error)
            raise
        finally:
            self._close_descriptors()
            self._carry_out_orders()  # what was posted while `finished` was not yet set
            for ticket in self._stop_tickets:
                ticket.settle()

    def _empty_wake_receiver(self) -> None:
        self._wake_receiver.recv(4096)

    def _carry_out_orders(self) -> None:
        while True:
            try:
                order, args = self._orders.popleft()
            except IndexError:
                return
            order(*args)

    def _seconds_to_next_deadline(self) -> float | None:
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        if self.dispatcher.shortfall():
            deadlines.append(self._start_again_at)
        if self._stop_at is not None and not self._dismissed:
            deadlines.append(self._stop_at)
        if not deadlines:
            return None
        return min(max(min(deadlines) - time.monotonic(), 0), LONGEST_SLEEP)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.deadline is not None and worker.deadline <= now:
                if worker.state is State.STARTING:
                    self._report_failed_start(worker, self._make_start_timeout_error)
                self._kill(worker)

    def _make_start_timeout_error(self) -> PoolBroken:
        return PoolBroken(
            f"a worker was not ready {self._settings.start_timeout:g} s after its start (start_timeout), "
            "or closed its connection to the pool and went on"
        )

    def _kill(self, worker: Worker) -> None:
        worker.deadline = None
        if worker.state not in (State.KILLED, State.ENDED):
            worker.state = State.KILLED
            worker.was_killed = True
            worker.process.kill()

    # --- birth ---

    def _start_one_if_missing(self) -> None:
        """Start one worker; the loop comes back at once for the next, and sees to everything else in between."""
        if self._dismissed or time.monotonic() < self._start_again_at or not self.dispatcher.shortfall():
            return
        try:
            with starting_or_forking:
                process = self._start()
        except (ConnectionError, EOFError) as error:  # multiprocessing's fork server has just ended
            self._start_deaths += 1
            if self._start_deaths < MAX_START_DEATHS:
                self._start_again_at = time.monotonic() + FIRST_DELAY
            else:
                self._report_start_error(error)
            return
        except Exception as error:
            self._report_start_error(error)
            return
        worker = Worker(process, time.monotonic() + self._settings.start_timeout)
        self._workers.add(worker)
        self.dispatcher.add_starting(worker)
        self._selector.register(process.sentinel, selectors.EVENT_READ, lambda: self._on_sentinel(worker))
        self._selector.register(process.channel, selectors.EVENT_READ, lambda: self._on_first_words(worker))

    def _report_start_error(self, error: Exception) -> None:
        self._start_deaths = 0
        text = f"no worker could be started: {type(error).__name__}: {error}"
        self._fail_start(lambda: PoolBroken(text, error))

    def _on_first_words(self, worker: Worker) -> None:
        if worker.state is State.ENDED or worker.process.channel not in self._selector.get_map():
            return  # its end was noticed in the same moment, and its last words are heard
        try:
            frame = worker.receive()
        except (WorkerGone, ConnectionError, ProtocolError):
            self._selector.unregister(worker.process.channel)
            worker.deadline = time.monotonic() + self._settings.grace  # to exit; how it does says more
            return
        if frame is None:
            return
        self._selector.unregister(worker.process.channel)
        if worker.state is not State.STARTING:
            return
        if frame.kind is Kind.READY:
            self._start_deaths = self._start_failures = 0
            self._start_again_at = 0
            worker.state = State.READY
            worker.deadline = None
            self.dispatcher.add_ready(worker)
        else:
            self._report_failed_initializer(worker, frame)
            worker.state = State.LEAVING
            worker.deadline = time.monotonic() + self._settings.grace

    def _hear_last_words(self, worker: Worker) -> None:
        """Read what an ended worker said before it was ready, to the end of the connection."""
        worker.hang_up()
        while worker.process.channel in self._selector.get_map():
            self._on_first_words(worker)

    def _report_failed_initializer(self, worker: Worker, frame: Frame) -> None:
        name = describe_callable(self._settings.initializer)
        body = bytes(frame.body)
        pid = worker.process.pid

        def make_error() -> BaseException:
            error = InitializerFailed(name, pid)
            error.__cause__ = decode_error(body, name)
            return error

        self._report_failed_start(worker, make_error)

    def _report_failed_start(self, worker: Worker, make_error: Callable[[], BaseException]) -> None:
        self.dispatcher.remove(worker)
        self._fail_start(make_error)

    def _fail_start(self, make_error: Callable[[], BaseException]) -> None:
        if self.dispatcher.fail_start(make_error):
            self._start_failures += 1
            delay = min(FIRST_DELAY * 2**self._start_failures, LONGEST_DELAY)
            self._start_again_at = time.monotonic() + delay
        else:
            self._start_failures = 0
            self._start_again_at = 0

    # --- death ---

    def _on_sentinel(self, worker: Worker) -> None:
        process = worker.process
        self._selector.unregister(process.sentinel)
        if worker.state is State.STARTING:
            self._hear_last_words(worker)
        if worker.state in (State.STARTING, State.READY):
            process.kill()  # what it has started must not outlive it
        if process.poll() is None and process.stop_watching_pid():
            self._selector.register(process.sentinel, selectors.EVENT_READ, lambda: self._on_sentinel(worker))
        else:
            self._end(worker)

    def _end(self, worker: Worker) -> None:
        died_starting = worker.state is State.STARTING
        worker.state = State.ENDED
        worker.deadline = None
        if self.dispatcher.remove(worker):
            worker.hang_up()  # its call will hand it over
            return
        if died_starting and not self._dismissed:
            self._explain_death_at_start(worker)
        self._close_worker(worker)

    def _explain_death_at_start(self, worker: Worker) -> None:
        death = worker.death()
        self._start_deaths += 1
        if death.signal is not None and self._start_deaths < MAX_START_DEATHS:
            return  # the next look at the dispatcher starts another
        self._start_deaths = 0
        if death.exitcode == _roles.EXIT_UNGUARDED_MAIN:
            text = f"the program's main module starts a pool when it is imported. {_roles.GUARD_ADVICE}"
        else:
            text = f"worker {death.pid} {describe_exit(death.exitcode, death.signal)} before it was ready. "
            if death.signal is None:
                text += (
                    "What it wrote to standard error says why; often it is an error in the program's main module, "
                    f"which every worker imports, or a missing guard there. {_roles.GUARD_ADVICE}"
                )
            if death.stack:
                text += f"\n{death.stack}"
        self._fail_start(lambda: PoolBroken(text))

    def _close_worker(self, worker: Worker) -> None:
        self._workers.discard(worker)
        heir, worker.heir = worker.heir, None
        if heir is not None:
            heir.settle(worker.death())
        worker.process.close()

    # --- the end ---

    def _advance_stop(self) -> None:
        if self._stop_at is None:
            return
        if not self._dismissed and (self.dispatcher.is_quiet() or time.monotonic() >= self._stop_at):
            self._dismiss_all()
        if self._dismissed and all(worker.state is State.ENDED for worker in self._workers):
            self.finished = True

    def _dismiss_all(self) -> None:
        """Send idle workers home and kill the others."""
        self._dismissed = True
        self.dispatcher.fail_queue(lambda: PoolClosed(self._settings.name))
        for worker in self.dispatcher.take_idle():
            if worker.state is State.READY:
                worker.state = State.LEAVING
                worker.deadline = time.monotonic() + self._settings.grace
                worker.say_bye()
        for worker in list(self._workers):
            if worker.state in (State.STARTING, State.READY):
                self._kill(worker)

    def _give_up(self, error: BaseException) -> None:
        """The thread itself failed: let nobody wait for it."""
        self.dispatcher.close()
        text = f"the pool's supervisor failed, which is a bug in cpupool: {type(error).__name__}: {error}"
        self.dispatcher.fail_queue(lambda: PoolBroken(text, error))
        for worker in list(self._workers):
            self._kill(worker)
            if worker.state is not State.ENDED:
                self._end(worker)
        self.finished = True

    def _close_descriptors(self) -> None:
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()
