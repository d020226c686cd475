"""Results of a batch: how they are written down so that a crash loses none, and how they travel.

A worker does not send the result of each tiny item at once; it holds some back for a few milliseconds.  Until they are
sent they stand in the journal: memory behind the status page, which the pool can read while the worker runs, and after
its death.  So an item that is done stays done, whatever happens to the next one.

The journal is a column of numbers, 8 bytes each, and behind it room for data.  Either all results in it are ints of 64
bits, or all are floats: then the column holds them.  Or they are records, pickles one behind another in the data: then
the column holds where each ends, as `~end` if it is an encoded error.

Rules: an item counts as done (`DONE` in the status page) when its result is written down, not before; a result is
written down in one piece.  What was sent (`SENT`) is counted when all of it is sent, not before.  So whatever arrives
twice, by a frame and by the journal, has the same number both times.

It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import struct

from ._status import COLUMN, DONE, NOT_BEGUN, SENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

COLUMN_LENGTH = 8 * 1024  # results
NUMBER_SIZE = 8
DATA_SIZE = 256 * 1024
JOURNAL_SIZE = COLUMN_LENGTH * NUMBER_SIZE + DATA_SIZE

# What a column holds, as in COLUMN: the codes that `memoryview.cast` knows, and one for the ends of records.
INTS, FLOATS, RECORDS = b"qdr"
FORMATS = {int: INTS, float: FLOATS}

# The number of the first result within its batch, how many there are, what the column holds, and seconds since the
# batch began; then the column, then the data.
_HEAD = struct.Struct("<QIBd")
_END = struct.Struct("=q")


class Journal:
    """The worker's side of the journal."""

    def __init__(self, page: memoryview, memory: memoryview) -> None:
        """Args: the status page, and the memory of the journal."""
        self.page = page
        column, self.data = memory[: COLUMN_LENGTH * NUMBER_SIZE], memory[COLUMN_LENGTH * NUMBER_SIZE :]
        self._column = column
        self.columns = {code: column.cast(chr(code)) for code in (INTS, FLOATS)}  # type: ignore[call-overload]
        self.end = 0  # of the data

    def begin(self) -> None:
        """Empty it for a new batch, whose items are there now."""
        self.page[COLUMN] = RECORDS
        self.page[SENT] = 0
        self.page[DONE] = 0
        self.end = 0

    @property
    def held(self) -> int:
        """How many results are in it."""
        return self.page[DONE] - self.page[SENT]  # type: ignore[no-any-return]

    def add(self, record: bytes, *, is_error: bool = False) -> bool:
        """Write a record down and count its item as done; False if there is no room."""
        end = self.end + len(record)
        if end > DATA_SIZE:
            return False
        self.data[self.end : end] = record
        page = self.page
        done = page[DONE]
        self.columns[INTS][done - page[SENT]] = ~end if is_error else end
        self.end = end
        page[DONE] = done + 1
        return True

    def pack(self, seconds: float) -> bytes:
        """Return the body of a frame with all results in it."""
        page = self.page
        head = _HEAD.pack(page[SENT], self.held, page[COLUMN], seconds)
        return b"".join((head, self._column[: self.held * NUMBER_SIZE], self.data[: self.end]))

    def pack_alone(self, record: bytes, seconds: float, *, is_error: bool) -> bytes:
        """Return the body of a frame with one record that does not fit in; everything before it has been sent."""
        end = ~len(record) if is_error else len(record)
        return _HEAD.pack(self.page[DONE], 1, RECORDS, seconds) + _END.pack(end) + record

    def empty(self) -> None:
        """Forget the results in it, which were sent."""
        self.end = 0
        self.page[SENT] = self.page[DONE]
        self.page[COLUMN] = RECORDS


def read_journal(read_cell: Callable[[int], int], read: Callable[[int, int], bytes]) -> bytes | None:
    """Return what `Journal.pack` would, from the pool's side; None if there is nothing, or it is just being sent.

    Args:
        read_cell: reads a cell of the status page.
        read: reads so many bytes of the journal, from such an offset.
    """
    done, sent, code = read_cell(DONE), read_cell(SENT), read_cell(COLUMN)
    held = done - sent
    if done == NOT_BEGUN or held <= 0 or held > COLUMN_LENGTH:
        return None
    column = read(held * NUMBER_SIZE, 0)
    data = b""
    if code == RECORDS:
        (end,) = _END.unpack_from(column, (held - 1) * NUMBER_SIZE)
        data = read(max(end, ~end), COLUMN_LENGTH * NUMBER_SIZE)
    if read_cell(SENT) != sent:
        return None
    return _HEAD.pack(sent, held, code, 0.0) + column + data


class Results:
    """Some results of a batch, as they came.

    Attributes:
        first: the number of the first one within its batch.
        seconds: how long the batch had run then.
        numbers: the values themselves, if they are numbers, else None.
        records: else, for each its pickle, and whether that is an encoded error.
    """

    __slots__ = ("first", "numbers", "records", "seconds")

    def __init__(self, body: memoryview | bytes) -> None:
        """Args: `body` is what `Journal.pack` or `read_journal` made."""
        body = memoryview(body)
        self.first, count, code, self.seconds = _HEAD.unpack_from(body)
        data = _HEAD.size + count * NUMBER_SIZE
        column = body[_HEAD.size : data].cast("B").cast("d" if code == FLOATS else "q").tolist()
        self.numbers: list[int | float] | None = None
        self.records: list[tuple[memoryview, bool]] = []
        if code != RECORDS:
            self.numbers = column
            return
        start = data
        for end in column:
            is_error = end < 0
            stop = data + (~end if is_error else end)
            self.records.append((body[start:stop], is_error))
            start = stop
