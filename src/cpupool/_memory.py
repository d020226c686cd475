"""Memory that a worker must not hold, and workers that the kernel has killed for want of it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from ._outcomes import name_task_of
from ._sizing import count_oom_kills
from ._usage import read_resident
from ._worker import State

if TYPE_CHECKING:
    from ._crew import Crew
    from ._dispatch import Dispatcher
    from ._lease import Lease
    from ._worker import Worker

# Seconds between two looks at the workers that run a task.  One look costs about 20 microseconds a worker; memory grows
# by 1 to 3 GB/s at most (the speed of page faults), so by 75 MB at most meanwhile.
SAMPLING_INTERVAL = 0.025

# Seconds for which a counted kill explains a death: several processes may be killed at once, and are reaped one by one.
_EXPLAINS_FOR = 1.0


class MemoryGuard:
    """Kills workers whose task holds more memory than a limit; all in the supervisor's thread."""

    def __init__(self, limit: int | None, crew: Crew, dispatcher: Dispatcher[Worker]) -> None:
        self._limit = limit
        self._crew = crew
        self._dispatcher = dispatcher
        self._sampled = -math.inf

    def next_deadline(self) -> float:
        """Return when to look again: only while there is a limit and a task runs."""
        if self._limit is None or not self._leases_and_workers():
            return math.inf
        return self._sampled + SAMPLING_INTERVAL

    def enforce_limit(self, now: float) -> None:
        """Look at all workers that run a task, and kill those that hold too much."""
        if self._limit is None or now < self._sampled + SAMPLING_INTERVAL:
            return
        for lease, worker in self._leases_and_workers():
            self._sampled = now
            resident = read_resident(worker.process.pid) or 0  # it has ended
            if resident > self._limit and (lease is None or self._dispatcher.doom(lease)):
                worker.excess = resident, self._limit
                worker.last_task = name_task_of(lease)
                self._crew.kill(worker)

    def _leases_and_workers(self) -> list[tuple[Lease[Worker] | None, Worker]]:
        """Return the workers that run a task, and their leases; those whose call was given up have none."""
        leases = [lease for lease in self._dispatcher.leases() if lease.started]
        running = [(lease, worker) for lease in leases if (worker := lease.worker) is not None]
        given_up = [worker for worker in self._crew.workers if worker.state is State.RECOVERING]
        return [*running, *((None, worker) for worker in given_up)]


class OomWitness:
    """Tells kills by the kernel for want of memory from other SIGKILLs, by the count of them that the cgroup keeps."""

    def __init__(self) -> None:
        self._count: int | None = None
        self._unexplained = 0
        self._grown_at = -math.inf

    def look(self) -> None:
        """Count again.  What is counted now explains deaths that are noticed in the next moments, and none later."""
        count = count_oom_kills()
        now = time.monotonic()
        if now - self._grown_at > _EXPLAINS_FOR:
            self._unexplained = 0
        if count is not None and self._count is not None and count > self._count:
            self._unexplained += count - self._count
            self._grown_at = now
        self._count = count

    def was_oom_kill(self) -> bool | None:
        """Return whether a worker that was just found killed was killed for that; None if nobody counts."""
        self.look()
        if self._count is None:
            return None
        if not self._unexplained:
            return False
        self._unexplained -= 1
        return True
