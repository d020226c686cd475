"""What a running task says of its progress: how it is written down in the worker, and read here.

Theory of operation: a report stands in the worker's status file, behind the journal, where the next one takes its
place.  So it costs the task no message, and nobody who is slow to read can hold it up.  Whoever wants the reports of a
call looks there a few times a second while waiting for its answer, and once more when that is here.

Rules: the number of a report (`REPORTED`) is odd while it is being written; what is read between two equal, even
numbers is whole.

The worker's side runs in the workers: stdlib and layer 0 only.
"""

from __future__ import annotations

import _thread
import mmap

from . import _payload
from ._journal import JOURNAL_SIZE
from ._status import REPORT_SIZE, REPORTED, STATUS_PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from ._waiting import Waits

MAX_REPORT = 64 * 1024  # bytes, pickled
STACKS_OFFSET = STATUS_PAGE_SIZE + JOURNAL_SIZE + MAX_REPORT  # where stacks begin, in the status file
_OFFSET = STATUS_PAGE_SIZE + JOURNAL_SIZE

LOOK_INTERVAL = 0.05  # seconds between two looks


class Reporter:
    """The worker's side: writes down what the running task reports."""

    def __init__(self, page: memoryview, status: int, dumps: Callable[[object], bytes]) -> None:
        self._page = page
        self._slot = mmap.mmap(status, MAX_REPORT, offset=_OFFSET)
        self._dumps = dumps
        self._lock = _thread.allocate_lock()  # a task may have threads

    def __call__(self, value: object) -> None:
        """Write a report down; see `cpupool.report`."""
        pickled = self._dumps(value)
        if len(pickled) > MAX_REPORT:
            raise ValueError(
                f"report() is for small values: this {type(value).__name__} takes {len(pickled):,} bytes pickled, and "
                f"{MAX_REPORT:,} is the most; let the task return what is large"
            )
        page = self._page
        with self._lock:
            number = page[REPORTED] | 1  # it is odd already if an interrupt has broken off the one before
            page[REPORTED] = number
            self._slot[: len(pickled)] = pickled
            page[REPORT_SIZE] = len(pickled)
            page[REPORTED] = number + 1


def read_report(
    read_cell: Callable[[int], int], read: Callable[[int, int], bytes], seen: int
) -> tuple[int, bytes] | None:
    """Return the number and the pickled value of the last report, from the pool's side; None if there is no new one.

    Args:
        read_cell: reads a cell of the status page.
        read: reads so many bytes of the status file, from such an offset.
        seen: the number of the one that was read last.
    """
    while (number := read_cell(REPORTED)) != seen and not number % 2:
        pickled = read(read_cell(REPORT_SIZE), _OFFSET)
        if read_cell(REPORTED) == number:
            return number, pickled
    return None


class ReportingWaits:
    """Waits for a worker's answer as the caller's own `Waits` do, and looks for reports meanwhile.

    `readable` may come back before there is anything to read.
    """

    def __init__(
        self, waits: Waits, read: Callable[[int], tuple[int, bytes] | None], on_report: Callable[[Any], object]
    ) -> None:
        """Args: `read(seen)` reads a new report, see `read_report`; what is there already is of another task."""
        self.writable = waits.writable
        self._readable = waits.readable
        self._read = read
        self._on_report = on_report
        before = read(0)
        self._seen = 0 if before is None else before[0]

    async def readable(self, channel: socket.socket, timeout: float | None = None) -> None:
        await self._readable(channel, LOOK_INTERVAL if timeout is None else min(timeout, LOOK_INTERVAL))
        self.look()

    def look(self) -> None:
        """Pass a new report on."""
        found = self._read(self._seen)
        if found is not None:
            self._seen, pickled = found
            self._on_report(_payload.loads(pickled))
