"""What workers log, taken in by the pool: as much of it as the program can bear."""

from __future__ import annotations

import functools
import math
import time
from typing import TYPE_CHECKING, Literal

from ._events import logger
from ._logs import MOST_BYTES, handle_record

if TYPE_CHECKING:
    from ._crew import Crew
    from ._events import Announcer
    from ._worker import Worker

# Records of one worker: so many at once, and so many a second, with all their handlers some 4 % of a CPU.  What is more
# waits in the socket, and is lost when that is full.
_BURST, _RATE = 2000, 2000
_REST = 0.05  # seconds
_MOST_WAITING = 16 * 1024 * 1024  # bytes of records that wait for the program's handlers


class LogKeeper:
    """Reads the records of a crew's workers; all in the supervisor's thread."""

    def __init__(self, pool: str, crew: Crew, announcer: Announcer) -> None:
        self._pool = pool
        self._crew = crew
        self._announcer = announcer
        self._credits: dict[Worker, tuple[float, float]] = {}  # records that may come, as of when
        self._resting: dict[Worker, float] = {}  # until when
        self._lost: dict[Worker, int] = {}
        self._delivered = 0  # bytes
        self._handled = 0  # of them; written by the announcer's thread

    def watch(self, worker: Worker) -> None:
        """Read what a new worker logs from now on."""
        self._credits[worker] = _BURST, time.monotonic()
        self._lost[worker] = 0
        self._watch(worker)

    def _watch(self, worker: Worker) -> None:
        self._crew.watch_descriptor(worker.process.logs.fileno(), functools.partial(self._read, worker))

    def _unwatch(self, worker: Worker) -> None:
        self._crew.unwatch_descriptor(worker.process.logs.fileno())

    def next_deadline(self) -> float:
        """Return when to go on reading."""
        return min(self._resting.values(), default=math.inf)

    def resume(self, now: float) -> None:
        """Go on with those that have rested."""
        for worker, until in list(self._resting.items()):
            if until <= now:
                del self._resting[worker]
                self._watch(worker)

    def _read(self, worker: Worker) -> None:
        credit, since = self._credits[worker]
        now = time.monotonic()
        credit = min(credit + (now - since) * _RATE, _BURST)
        room = _MOST_WAITING - (self._delivered - self._handled)
        records, left = self._take(worker, int(credit), room)
        self._credits[worker] = credit - len(records), now
        self._deliver(worker, records)
        if left != "nothing":
            self._unwatch(worker)
        if left == "some":
            self._resting[worker] = now + _REST

    def _take(
        self, worker: Worker, most: int, room: float = math.inf
    ) -> tuple[list[bytes], Literal["nothing", "some", "end"]]:
        """Return the records that have come, so many at most, while there is room for their bytes; and what is left."""
        records: list[bytes] = []
        while len(records) < most and room > 0:
            try:
                packed = worker.process.logs.recv(2 * MOST_BYTES)
            except OSError:  # nothing is there, or it was reset
                return records, "nothing"
            if not packed:
                return records, "end"  # it has closed its end
            records.append(packed)
            room -= len(packed)
        return records, "some"

    def _deliver(self, worker: Worker, records: list[bytes]) -> None:
        for packed in records:
            self._delivered += len(packed)
            self._announcer.deliver(functools.partial(self._handle, packed))
        lost = worker.process.lost_logs()
        if more := lost - self._lost[worker]:
            self._lost[worker] = lost
            pid = worker.process.pid
            self._announcer.deliver(lambda: self._tell_of_lost(pid, more))

    def _handle(self, packed: bytes) -> None:
        self._handled += len(packed)
        handle_record(packed)

    def _tell_of_lost(self, pid: int, count: int) -> None:
        logger.warning(
            "%s: worker %d has logged more than can be taken in: %d records are lost", self._pool, pid, count
        )

    def finish(self, worker: Worker) -> None:
        """Read what an ended worker has left behind."""
        if self._credits.pop(worker, None) is None:
            return
        self._resting.pop(worker, None)
        self._unwatch(worker)
        self._deliver(worker, self._take(worker, _BURST)[0])
        del self._lost[worker]
