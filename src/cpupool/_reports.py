"""What a running task says of its progress: how it is written down in the worker, and read here.

Theory of operation: reports stand in the worker's status file, behind the journal, in a few slots that they take in
turn.  So they cost the task no message, and nobody who is slow to read can hold it up.  Whoever wants the reports of a
call looks there a few times a second while waiting for its answer, and once more when that is here.

Rules: the worker notes the number of the report that it is about to write (`REPORTING`), and when it is there
(`REPORTED`).  What was read of the last one is whole if its slot's next one has not been begun meanwhile.

The worker's side runs in the workers: stdlib and layer 0 only.
"""

from __future__ import annotations

import _thread
import mmap
import struct

from . import _payload
from ._journal import JOURNAL_SIZE
from ._status import REPORTED, REPORTING, STATUS_PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from ._waiting import Waits

MAX_REPORT = 64 * 1024 - 8  # bytes, pickled
_SLOT = struct.Struct("<Q")  # at the beginning of each slot: the size of what follows
_SLOT_SIZE = _SLOT.size + MAX_REPORT
_SLOTS = 8
_OFFSET = STATUS_PAGE_SIZE + JOURNAL_SIZE
REPORTS_END = _OFFSET + _SLOTS * _SLOT_SIZE  # in the status file
_TRIES = 5  # to read a report that is being overtaken

LOOK_INTERVAL = 0.05  # seconds between two looks


class Reporter:
    """The worker's side: writes down what the running task reports."""

    def __init__(self, page: memoryview, status: int, dumps: Callable[[object], bytes]) -> None:
        self._page = page
        self._slots = mmap.mmap(status, _SLOTS * _SLOT_SIZE, offset=_OFFSET)
        self._dumps = dumps
        self._lock = _thread.allocate_lock()  # a task may have threads

    def __call__(self, value: object) -> None:
        """Write a report down; see `cpupool.report`."""
        pickled = dump_report(value, self._dumps)
        record = _SLOT.pack(len(pickled)) + pickled
        size, page = len(record), self._page
        with self._lock:
            number = page[REPORTED] + 1
            page[REPORTING] = number
            start = number % _SLOTS * _SLOT_SIZE
            self._slots[start : start + size] = record
            page[REPORTED] = number


def dump_report(value: object, dumps: Callable[[object], bytes]) -> bytes:
    """Pickle what a task reports.

    Raises:
        ValueError: it is too large.
    """
    pickled = dumps(value)
    if len(pickled) > MAX_REPORT:
        raise ValueError(
            f"report() is for small values: this {type(value).__name__} takes {len(pickled):,} bytes pickled, and "
            f"{MAX_REPORT:,} is the most; let the task return what is large"
        )
    return pickled


def read_report(
    read_cell: Callable[[int], int], read: Callable[[int, int], bytes], seen: int
) -> tuple[int, bytes] | None:
    """Return the number and the pickled value of the last report, from the pool's side; None if there is no new one.

    Args:
        read_cell: reads a cell of the status page.
        read: reads so many bytes of the status file, from such an offset.
        seen: the number of the one that was read last.
    """
    for _ in range(_TRIES):
        number = read_cell(REPORTED)
        if number == seen:
            break
        start = _OFFSET + number % _SLOTS * _SLOT_SIZE
        (size,) = _SLOT.unpack(read(_SLOT.size, start))
        pickled = read(min(size, MAX_REPORT), start + _SLOT.size)
        if read_cell(REPORTING) < number + _SLOTS:
            return number, pickled
    return None


class ReportingWaits:
    """Waits for a worker's answer as the caller's own `Waits` do, and looks for reports meanwhile.

    `readable` may come back before there is anything to read.
    """

    def __init__(
        self,
        waits: Waits,
        read: Callable[[int], tuple[int, bytes] | None],
        seen: int,
        on_report: Callable[[Any], object],
    ) -> None:
        """Args: `read(seen)` reads a new report, see `read_report`; that of number `seen` is of another task."""
        self.writable, self.ticket, self.settled = waits.writable, waits.ticket, waits.settled
        self._readable = waits.readable
        self._read = read
        self._on_report = on_report
        self._seen = seen

    async def readable(self, channel: socket.socket, timeout: float | None = None) -> None:
        await self._readable(channel, LOOK_INTERVAL if timeout is None else min(timeout, LOOK_INTERVAL))
        self.look()

    def look(self) -> None:
        """Pass a new report on."""
        found = self._read(self._seen)
        if found is not None:
            self._seen, pickled = found
            try:
                value = _payload.loads_result(pickled)
            except _payload.RebuildFailed as failed:
                import logging  # here: no worker needs it

                cause = failed.__cause__
                logging.getLogger("cpupool").warning(
                    "a task's report cannot be rebuilt here: %s: %s", type(cause).__name__, cause
                )
            else:
                self._on_report(value)
