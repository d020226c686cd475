"""What a worker has last written to standard error: kept where the pool can read it after a crash.

Theory of operation: the worker's `sys.stderr` writes to the same descriptor as ever, and copies what it writes into a
ring in the status file.  So standard error stays what it was, for programs that the task starts and for C code too;
but what these write is not kept, nor what goes through `sys.__stderr__`.

It runs in the workers too: stdlib and layer 0 only.
"""

from __future__ import annotations

import io
import mmap
import sys

from ._reports import REPORTS_END
from ._status import SAID, SAID_BEFORE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_RING_SIZE = 8 * 1024  # bytes, a multiple of a page
_MOST_LINES = 20
STACKS_OFFSET = REPORTS_END + _RING_SIZE  # where stacks begin, in the status file


class _KeptFile(io.FileIO):
    """Standard error, the descriptor itself."""

    def __init__(self, page: memoryview, status: int) -> None:
        super().__init__(2, "wb", closefd=False)
        self.name = "<stderr>"
        self._page: memoryview | None = page
        self._ring = mmap.mmap(status, _RING_SIZE, offset=REPORTS_END)

    def write(self, data: Any) -> int:
        written = super().write(data)
        if self._page is not None:
            self._keep(memoryview(data).cast("B")[:written], self._page)
        return written

    def keep_no_more(self) -> None:
        """Keep nothing of what a forked process says: it is no worker."""
        self._page = None

    def _keep(self, view: memoryview, page: memoryview) -> None:
        said = page[SAID] + len(view)
        view = view[-_RING_SIZE:]
        start = (said - len(view)) % _RING_SIZE
        first = view[: _RING_SIZE - start]
        self._ring[start : start + len(first)] = first
        self._ring[: len(view) - len(first)] = view[len(first) :]
        page[SAID] = said


def keep_last_words(page: memoryview, status: int) -> Callable[[], object]:
    """Let `sys.stderr` keep what is written to it, unless it is the program's own; returns what ends that."""
    stream = sys.stderr
    if stream is None or stream is not sys.__stderr__ or not isinstance(stream, io.TextIOWrapper):
        return bool
    try:
        file = _KeptFile(page, status)
    except OSError:
        return bool  # there is no standard error
    kept = io.BufferedWriter(file)
    stream.flush()
    sys.stderr = io.TextIOWrapper(kept, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
    return file.keep_no_more


def read_last_words(read_cell: Callable[[int], int], read: Callable[[int, int], bytes]) -> str | None:
    """Return the last lines that the running task has written to standard error; None if it has not.

    Args:
        read_cell: reads a cell of the status page.
        read: reads so many bytes of the status file, from such an offset.
    """
    said = read_cell(SAID)
    size = min(said - read_cell(SAID_BEFORE), _RING_SIZE)
    if size <= 0:
        return None
    ring = read(_RING_SIZE, REPORTS_END)
    end = said % _RING_SIZE
    text = (ring[end:] + ring[:end])[-size:]
    if size == _RING_SIZE:
        text = text.partition(b"\n")[2]  # the first line is not whole
    return "\n".join(text.decode("utf-8", "replace").rstrip().splitlines()[-_MOST_LINES:]) or None
