"""How workers are started and become ready, or do not.

Rules: workers start on demand, one after another.  When a start fails, the next try is put off, each time for longer,
so that a broken initializer cannot become a storm of processes.  While others are left they serve the queue.  If none
is, everybody who waits is told why, and it is tried again only when somebody asks.

After some failures in a row a circuit breaker opens: who asks before the next try is due, and finds no worker, is
refused at once.  The breaker closes when a start succeeds.
"""

from __future__ import annotations

import logging
import math
import random
import time
from typing import TYPE_CHECKING

from . import _roles
from ._errors import InitializerFailed, PoolBroken, decode_error, describe_callable, describe_exit
from ._events import Event
from ._forking import starting_or_forking
from ._frames import Frame, Kind, ProtocolError
from ._serving import ServerKeeper
from ._status import SENT_BY_OTHERS, STAGE_INITIALIZING
from ._worker import State, Worker, WorkerGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._crew import Crew
    from ._dispatch import Dispatcher
    from ._events import Announcer, EventKind
    from ._memory import OomWitness
    from ._settings import Settings
    from ._starting import WorkerStarter

# A worker that a signal ends while it starts is replaced; one that always dies is not.  The first number is for signals
# that others send, which is nobody's fault, the second for crashes.
MAX_START_KILLS, MAX_START_DEATHS = 10, 3

# Seconds between one failed start and the next; doubled each time.
FIRST_DELAY, LONGEST_DELAY = 0.1, 30.0

# How it shows that a fork server has just ended, ours or multiprocessing's.
_SERVER_GONE = (ConnectionError, EOFError, FileNotFoundError)

_STACK_TIME = 0.05  # seconds that a worker whose initializer is overdue has to say where it is

# Failed starts in a row after which the breaker opens.
BREAKER_THRESHOLD = 3

# Limits of so much and more are varied by up to one part in so many, from worker to worker.
_JITTER = 10


class Births:
    """Starts the workers of a crew that the dispatcher misses; all in the supervisor's thread.

    Attributes:
        stopped: set it when no worker is to be started any more.
        server: the fork server, if there is one.
    """

    def __init__(
        self,
        settings: Settings,
        starter: WorkerStarter,
        crew: Crew,
        dispatcher: Dispatcher[Worker],
        witness: OomWitness,
        announcer: Announcer,
    ) -> None:
        self.stopped = False
        self._settings = settings
        self._starter = starter
        self._crew = crew
        self._dispatcher = dispatcher
        self._witness = witness
        self._announcer = announcer
        self._deaths = 0
        self._failures = 0
        self._delay = FIRST_DELAY
        self._again_at = 0.0
        self._last_error: Callable[[], BaseException] | None = None
        self.server = ServerKeeper(starter, crew, settings.start_timeout, self._on_start_error)
        self._has_warned = False

    def next_deadline(self) -> float:
        """Return when there is something to do."""
        return min(self.server.deadline, self._next_start())

    def _next_start(self) -> float:
        if self.stopped or self.server.is_starting or not self._has_room() or not self._dispatcher.shortfall():
            return math.inf
        return self._again_at

    def _has_room(self) -> bool:
        """Return False while too many workers are on their way out: they may take long, and new ones come fast."""
        leaving = sum(worker.state is State.LEAVING for worker in self._crew.workers)
        return leaving < self._dispatcher.max_workers

    @property
    def failures(self) -> int:
        """How many starts in a row have failed, those aside that were made at the same time; from any thread."""
        return self._failures

    def refuse_while_broken(self) -> None:
        """Tell those who wait in vain, while the breaker is open, that it is."""
        make_cause = self._last_error
        wait = self._again_at - time.monotonic()
        if make_cause is None or self._failures < BREAKER_THRESHOLD or wait <= 0 or self._dispatcher.has_workers():
            return
        failures = self._failures

        def make_error() -> BaseException:
            cause = make_cause()
            text = f"{failures} starts of a worker in a row have failed; the next try is in {wait:.1f} s. {cause}"
            return PoolBroken(text, cause)

        self._dispatcher.fail_queue(make_error)

    def start_one_if_missing(self) -> Worker | None:
        """Start one worker; the supervisor comes back at once for the next, and sees to everything else in between."""
        if time.monotonic() < self._next_start():
            return None
        try:
            with starting_or_forking:
                self._starter.prepare()
                if not self.server.is_ready():
                    return None
                process = self._starter()
        except Exception as error:
            if isinstance(error, _SERVER_GONE):
                self.server.close()
            self._on_start_error(error)
            return None
        settings = self._settings
        worker = Worker(
            process,
            time.monotonic() + settings.start_timeout,
            max_tasks=_vary(settings.max_tasks_per_child),
            max_memory=_vary(settings.max_memory_per_child),
        )
        self._witness.look()
        self._crew.workers.add(worker)
        self._dispatcher.expect(worker)
        self._dispatcher.tally.count("workers_started")
        self._tell("worker_started", f"worker {process.pid} was started", worker)
        if process.packed_duties is not None:
            worker.post(*self._starter.ship_duties(process.packed_duties), is_call=False)
        self._crew.watch_channel(worker, self._on_channel, writable=worker.unsent is not None)
        return worker

    def _on_start_error(self, error: Exception) -> None:
        """Try again soon if a fork server has just ended; else tell those who wait."""
        self._deaths += 1
        if isinstance(error, _SERVER_GONE) and self._deaths < MAX_START_KILLS:
            self._again_at = time.monotonic() + FIRST_DELAY
            return
        self._deaths = 0
        text = f"no worker could be started: {type(error).__name__}: {error}"
        cause = error.__cause__
        if cause is not None:
            text += f" ({type(cause).__name__}: {cause})"
        self._fail(lambda: PoolBroken(text, error))

    def close(self) -> None:
        """Stop the fork server; there are no workers any more."""
        self.stopped = True
        self.server.close()

    # --- a worker's first words ---

    def _on_channel(self, worker: Worker) -> None:
        """Send the rest of the initializer, and hear the worker's first words."""
        try:
            if worker.unsent is not None and worker.send_rest():
                self._crew.watch_channel(worker, self._on_channel)
            frame = worker.receive()
        except (WorkerGone, ConnectionError, ProtocolError):
            self._crew.unwatch_channel(worker)
            worker.deadline = time.monotonic() + self._settings.grace  # to exit; how it does says more
            return
        if frame is None:
            return
        self._crew.unwatch_channel(worker)
        if worker.state is not State.STARTING:
            return
        if frame.kind is Kind.READY:
            if self._has_initialized_too_much(worker):
                return
            if self._failures >= BREAKER_THRESHOLD:
                self._tell("breaker_closed", "workers can be started again")
            seconds = time.monotonic() - worker.born
            text = f"worker {worker.process.pid} is ready, {seconds:.3g} s after its start"
            self._tell("worker_ready", text, worker, seconds)
            self._deaths = self._failures = 0
            self._delay = FIRST_DELAY
            self._again_at = 0
            self._last_error = None
            self._warn_of_size(worker)
            worker.state = State.READY
            worker.deadline = math.inf
            self._dispatcher.add_ready(worker)
        else:
            self._report_failed_initializer(worker, frame)
            worker.state = State.LEAVING
            worker.deadline = time.monotonic() + self._settings.grace

    def _has_initialized_too_much(self, worker: Worker) -> bool:
        """Report a worker that passes the hard limit already: each of its tasks would be blamed for that."""
        limit, resident = self._settings.hard_memory_per_child, worker.process.resident()
        if limit is None or resident <= limit:
            return False
        text = (
            f"a worker holds {resident / 2**20:,.0f} MiB of memory before its first task, more than "
            f"hard_memory_per_child ({limit / 2**20:,.0f} MiB)"
        )
        self._dispatcher.remove(worker)
        self._crew.kill(worker)
        self._fail(lambda: PoolBroken(text), worker)
        return True

    def _warn_of_size(self, worker: Worker) -> None:
        """Say, once, that `max_memory_per_child` is too little for any worker."""
        if worker.is_too_large and not self._has_warned:
            self._has_warned = True
            logging.getLogger("cpupool").warning(
                "%s: a worker holds %.0f MiB of memory before its first task, more than max_memory_per_child allows "
                "(%.0f MiB at most): each will be replaced after one task",
                self._settings.name,
                worker.process.resident() / 2**20,
                (self._settings.max_memory_per_child or 0) / 2**20,
            )

    def hear_last_words(self, worker: Worker) -> None:
        """Read what an ended worker said before it was ready, to the end of the connection."""
        worker.hang_up()
        while self._crew.watches_channel(worker):
            self._on_channel(worker)

    def _report_failed_initializer(self, worker: Worker, frame: Frame) -> None:
        name = describe_callable(self._settings.initializer)
        body = bytes(frame.body)
        pid = worker.process.pid

        def make_error() -> BaseException:
            error = InitializerFailed(name, pid)
            error.__cause__ = decode_error(body, name)
            return error

        self._dispatcher.remove(worker)
        self._fail(make_error, worker)

    def is_asked_for_stack(self, worker: Worker) -> bool:
        """Let a worker whose initializer is overdue say where it is; True if its answer is to be waited for."""
        asked_at = worker.born + self._settings.start_timeout
        now = time.monotonic()
        if not self._is_initializing(worker) or now >= asked_at + _STACK_TIME:
            return False
        worker.process.ask_for_stack()
        worker.deadline = asked_at + _STACK_TIME
        return now < worker.deadline

    def report_overdue(self, worker: Worker) -> None:
        """Tell those who wait that it was not ready in time."""
        self._dispatcher.remove(worker)
        timeout = self._settings.start_timeout
        if self._is_initializing(worker):
            stack = worker.process.take_stack()
            reason = f"had not ended {timeout:g} s after the worker's start (start_timeout)"
            self._report_lost_initializer(worker, f"{reason}\n{stack}\n" if stack else reason)
            return
        text = (
            f"a worker was not ready {timeout:g} s after its start (start_timeout), "
            "or closed its connection to the pool and went on"
        )
        self._fail(lambda: PoolBroken(text), worker)

    def _is_initializing(self, worker: Worker) -> bool:
        return self._settings.initializer is not None and worker.process.stage() == STAGE_INITIALIZING

    def _report_lost_initializer(self, worker: Worker, reason: str) -> None:
        name, pid = describe_callable(self._settings.initializer), worker.process.pid
        self._fail(lambda: InitializerFailed(name, pid, reason), worker)

    def explain_death(self, worker: Worker) -> None:
        """Deal with the end of a worker that was not ready yet."""
        death = worker.death()
        self._deaths += 1
        patience = MAX_START_KILLS if death.signal in SENT_BY_OTHERS and not death.oom else MAX_START_DEATHS
        if death.signal is not None and self._deaths < patience:
            return  # the next look at the dispatcher starts another
        if self._is_initializing(worker):
            self._deaths = 0
            memory = ", by the kernel, for want of memory" if death.oom else ""
            stack = f"\n{death.stack}\n" if death.stack else ""
            reason = f"did not come back: the worker {describe_exit(death.exitcode, death.signal)}{memory}{stack}"
            self._report_lost_initializer(worker, reason)
            return
        self._deaths = 0
        if death.exitcode == _roles.EXIT_UNGUARDED_MAIN:
            text = f"the program's main module starts a pool when it is imported. {_roles.GUARD_ADVICE}"
        else:
            text = f"worker {death.pid} {describe_exit(death.exitcode, death.signal)} before it was ready. "
            if death.oom:
                text += "The kernel did it, for want of memory. "
            if death.signal is None:
                text += (
                    "What it wrote to standard error says why; often it is an error in the program's main module, "
                    f"which every worker imports, or a missing guard there. {_roles.GUARD_ADVICE}"
                )
            if death.stack:
                text += f"\n{death.stack}"
        self._fail(lambda: PoolBroken(text), worker)

    def _fail(self, make_error: Callable[[], BaseException], worker: Worker | None = None) -> None:
        """Note that a start has failed, and tell those who wait in vain."""
        self._last_error = make_error
        if worker is None or worker.born >= self._again_at:  # else it was started together with one that has failed
            self._put_off(make_error)
        self._dispatcher.fail_start(make_error)

    def _put_off(self, make_error: Callable[[], BaseException]) -> None:
        self._failures += 1
        if self._failures == BREAKER_THRESHOLD:
            text = f"{self._failures} starts of a worker in a row have failed; who asks for one is refused for a while"
            self._tell("breaker_opened", f"{text}. {make_error()}")
        self._again_at = time.monotonic() + self._delay
        self._delay = min(2 * self._delay, LONGEST_DELAY)

    def _tell(self, kind: EventKind, text: str, worker: Worker | None = None, seconds: float | None = None) -> None:
        pid = None if worker is None else worker.process.pid
        self._announcer.announce(Event(kind=kind, pool=self._settings.name, text=text, pid=pid, seconds=seconds))


def _vary(limit: int | None) -> int | None:
    return None if limit is None else limit - random.randrange(limit // _JITTER + 1)
