"""How workers are started and become ready, or do not.

Rules: workers start on demand, one after another.  When a start fails and no worker is left, everybody who waits is
told, and it is tried again only when somebody asks again; while others are left they serve the queue, and the next try
is put off, each time for longer.  So a broken initializer cannot become a storm of processes.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from . import _roles
from ._errors import InitializerFailed, PoolBroken, decode_error, describe_callable, describe_exit
from ._forking import starting_or_forking
from ._frames import Frame, Kind, ProtocolError, encode_frame
from ._worker import State, Worker, WorkerGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._crew import Crew
    from ._dispatch import Dispatcher
    from ._process import WorkerProcess
    from ._settings import Settings

# A worker killed from outside while it starts is nobody's fault and is replaced; one that always dies is not.
MAX_START_DEATHS = 3

# Seconds between one failed start and the next, while other workers are left; doubled each time.
FIRST_DELAY, LONGEST_DELAY = 0.05, 30.0


class Births:
    """Starts the workers of a crew that the dispatcher misses; all in the supervisor's thread.

    Attributes:
        stopped: True once no worker is to be started any more.
    """

    def __init__(
        self, settings: Settings, start: Callable[[], WorkerProcess], crew: Crew, dispatcher: Dispatcher[Worker]
    ) -> None:
        self.stopped = False
        self._settings = settings
        self._start = start
        self._crew = crew
        self._dispatcher = dispatcher
        self._deaths = 0
        self._failures = 0
        self._again_at = 0.0

    def next_deadline(self) -> float:
        """Return when the next start is due."""
        return self._again_at if not self.stopped and self._dispatcher.shortfall() else math.inf

    def start_one_if_missing(self) -> Worker | None:
        """Start one worker; the supervisor comes back at once for the next, and sees to everything else in between."""
        if self.stopped or time.monotonic() < self._again_at or not self._dispatcher.shortfall():
            return None
        try:
            with starting_or_forking:
                process = self._start()
        except (ConnectionError, EOFError) as error:  # multiprocessing's fork server has just ended
            self._deaths += 1
            if self._deaths < MAX_START_DEATHS:
                self._again_at = time.monotonic() + FIRST_DELAY
            else:
                self._report_start_error(error)
            return None
        except Exception as error:
            self._report_start_error(error)
            return None
        deadline = time.monotonic() + self._settings.start_timeout
        worker = Worker(process, deadline, self._settings.max_tasks_per_child)
        self._crew.workers.add(worker)
        self._dispatcher.expect(worker)
        if process.initializer_pickle is not None:
            worker.unsent = memoryview(encode_frame(Kind.SETUP, 0, process.initializer_pickle))
        self._crew.watch_channel(worker, self._on_channel, writable=worker.unsent is not None)
        return worker

    def _report_start_error(self, error: Exception) -> None:
        self._deaths = 0
        text = f"no worker could be started: {type(error).__name__}: {error}"
        self._fail(lambda: PoolBroken(text, error))

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
            self._deaths = self._failures = 0
            self._again_at = 0
            worker.state = State.READY
            worker.deadline = math.inf
            self._dispatcher.add_ready(worker)
        else:
            self._report_failed_initializer(worker, frame)
            worker.state = State.LEAVING
            worker.deadline = time.monotonic() + self._settings.grace

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
        self._fail(make_error)

    def report_overdue(self, worker: Worker) -> None:
        """Tell those who wait that it was not ready in time."""
        self._dispatcher.remove(worker)
        text = (
            f"a worker was not ready {self._settings.start_timeout:g} s after its start (start_timeout), "
            "or closed its connection to the pool and went on"
        )
        self._fail(lambda: PoolBroken(text))

    def explain_death(self, worker: Worker) -> None:
        """Deal with the end of a worker that was not ready yet."""
        death = worker.death()
        self._deaths += 1
        if death.signal is not None and self._deaths < MAX_START_DEATHS:
            return  # the next look at the dispatcher starts another
        self._deaths = 0
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
        self._fail(lambda: PoolBroken(text))

    def _fail(self, make_error: Callable[[], BaseException]) -> None:
        if self._dispatcher.fail_start(make_error):
            self._failures += 1
            delay = min(FIRST_DELAY * 2**self._failures, LONGEST_DELAY)
            self._again_at = time.monotonic() + delay
        else:
            self._failures = 0
            self._again_at = 0
