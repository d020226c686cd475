"""Results of a batch: how they are written down so that a crash loses none, and how they travel.

A worker does not send the result of each tiny item at once; it holds some back for a few milliseconds.  Until they are
sent they stand in the journal: memory behind the status page, which the pool can read while the worker runs, and after
its death.  So an item that is done stays done, whatever happens to the next one.

The journal is a column of numbers, 8 bytes each, and behind it room for data.  Either all results in it are ints of 64
bits, or all are floats: then the column holds them.  Or they are records, pickles one behind another in the data: then
the column holds where each ends, as `~end` if it is an encoded error.

Rules: an item is done when its result is written down, not before, and that happens in one piece.  How many are, stands
in the status page (`HELD`); but while numbers come, only once for many of them, because counting would take as long as
the rest.  There the column itself shows it: it was filled with a random number before (`VOID`).  Results count as sent
when all of them are (`SENT`).  So what arrives twice, by a frame and by the journal, has the same number both times.

It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys

from ._parcels import MOST_ON_LOOP, sizes_of
from ._status import COLUMN, HELD, NOT_BEGUN, SENT, STATUS_PAGE_SIZE, VOID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

COLUMN_LENGTH = 8 * 1024  # results
NUMBER_SIZE = 8
DATA_SIZE = 256 * 1024
JOURNAL_SIZE = COLUMN_LENGTH * NUMBER_SIZE + DATA_SIZE

# What a column holds, as in COLUMN: the codes that `memoryview.cast` knows, and one for the ends of records.
INTS, FLOATS, RECORDS = b"qdr"
NUMBERS = {INTS: int, FLOATS: float}
CODES = {number: code for code, number in NUMBERS.items()}

_DATA = STATUS_PAGE_SIZE + COLUMN_LENGTH * NUMBER_SIZE  # where the data are, in the status file

# The number of the first result within its batch, how many there are, what the column holds, seconds since the batch
# began, the position of the first error, or -1, and how many errors there are; then the column, then the data.
_HEAD = struct.Struct("<QIBdiI")
_END = struct.Struct("=q")


class Journal:
    """The worker's side of the journal.

    Attributes:
        page: the cells of the status page.
        data: the room for records.
        columns: the column, as what it holds.
    """

    def __init__(self, page: memoryview, column: memoryview, data: mmap.mmap) -> None:
        self.page = page
        self.data = data
        self._column = column
        ints = column.cast("q")
        self.columns: dict[int, Any] = {INTS: ints, FLOATS: column.cast("d"), RECORDS: ints}
        self._first_error, self._errors = -1, 0
        self._void = os.urandom(NUMBER_SIZE)
        page[VOID] = int.from_bytes(self._void, sys.byteorder)

    def begin(self) -> None:
        """Empty it for a new batch, whose items are there now."""
        self.page[COLUMN] = RECORDS
        self.page[HELD] = 0
        self.page[SENT] = 0
        self._first_error, self._errors = -1, 0

    def begin_numbers(self, value: float) -> bool:
        """Make the empty journal one of numbers, and this one the first; False if it is none of them."""
        code = CODES.get(type(value))
        if code is None:
            return False
        self._column[:] = self._void * COLUMN_LENGTH
        try:
            self.columns[code][0] = value
        except ValueError:  # more than 64 bits
            return False
        self.page[COLUMN] = code
        self.page[HELD] = 1
        return True

    @property
    def done(self) -> int:
        """How many items of the batch are done, which is the number of the one that runs."""
        held = self.page[HELD]
        if self.page[COLUMN] != RECORDS:
            held = _count_numbers(self._column.cast("Q"), held, self.page[VOID])
        done: int = self.page[SENT] + held
        return done

    @property
    def end(self) -> int:
        """Where the next record goes."""
        held = self.page[HELD]
        if not held or self.page[COLUMN] != RECORDS:
            return 0
        end: int = self.columns[RECORDS][held - 1]
        return max(end, ~end)

    def add(self, record: bytes, *, is_error: bool = False) -> bool:
        """Write a record down and count its item as done; False if there is no room."""
        start = self.end
        end = start + len(record)
        if end > DATA_SIZE:
            return False
        held = self.page[HELD]
        self.data[start:end] = record
        self.columns[RECORDS][held] = ~end if is_error else end
        if is_error:
            self._errors += 1
            if self._first_error < 0:
                self._first_error = held
        self.page[HELD] = held + 1
        return True

    def pack(self, seconds: float) -> bytes:
        """Return the body of a frame with all results in it."""
        page = self.page
        held = page[HELD]
        head = _HEAD.pack(page[SENT], held, page[COLUMN], seconds, self._first_error, self._errors)
        return b"".join((head, self._column[: held * NUMBER_SIZE], self.data[: self.end]))

    def pack_alone(self, record: bytes, seconds: float, *, is_error: bool, size: int | None = None) -> bytes:
        """Return the body of a frame with one record that does not fit in; everything before it has been sent.

        Args:
            record: the record, or its beginning, if it is to have `size` bytes.
            seconds: since the batch began.
            is_error: True if it is an encoded error.
            size: how many bytes it has in all.
        """
        end = len(record) if size is None else size
        head = _HEAD.pack(self.page[SENT], 1, RECORDS, seconds, 0 if is_error else -1, is_error)
        return head + _END.pack(~end if is_error else end) + record

    def empty(self, sent: int) -> None:
        """Forget the results in it: so many were sent."""
        self.page[HELD] = 0  # first: what `read_journal` reads meanwhile must not get the numbers of the next ones
        self.page[SENT] += sent
        self.page[COLUMN] = RECORDS
        self._first_error, self._errors = -1, 0


def open_journal(status: int) -> Journal:
    """Return the journal in a status file, and with it the status page."""
    view = memoryview(mmap.mmap(status, _DATA))
    page, column = view[:STATUS_PAGE_SIZE].cast("Q"), view[STATUS_PAGE_SIZE:_DATA]
    return Journal(page, column, mmap.mmap(status, DATA_SIZE, offset=_DATA))


def read_journal(read_cell: Callable[[int], int], read: Callable[[int, int], bytes]) -> bytes | None:
    """Return what `Journal.pack` would, from the pool's side; None if there is nothing, or it is just being sent.

    Args:
        read_cell: reads a cell of the status page.
        read: reads so many bytes of the status file, from such an offset.
    """
    sent, held, code = read_cell(SENT), read_cell(HELD), read_cell(COLUMN)
    if sent == NOT_BEGUN or not 0 < held <= COLUMN_LENGTH:
        return None
    column = read(COLUMN_LENGTH * NUMBER_SIZE, STATUS_PAGE_SIZE)
    if read_cell(SENT) != sent:
        return None  # the column may be of the next ones
    data = b""
    first_error, errors = -1, 0
    if code != RECORDS:
        held = _count_numbers(memoryview(column).cast("Q"), held, read_cell(VOID))
    column = column[: held * NUMBER_SIZE]
    if code == RECORDS:
        ends = memoryview(column).cast("q").tolist()
        data = read(max(ends[-1], ~ends[-1]), _DATA)
        first_error = next((at for at, end in enumerate(ends) if end < 0), -1)
        errors = sum(end < 0 for end in ends)
    if read_cell(SENT) != sent:
        return None
    return _HEAD.pack(sent, held, code, 0.0, first_error, errors) + column + data


def find_record(body: memoryview) -> memoryview:
    """Return the record of a frame that `Journal.pack_alone` made."""
    return body[_HEAD.size + NUMBER_SIZE :]


def _count_numbers(column: memoryview, least: int, void: int) -> int:
    """Return how many numbers are in a column, which are `least` or more, in front of what is void."""
    return next((at for at in range(least, COLUMN_LENGTH) if column[at] == void), COLUMN_LENGTH)


class Results:
    """Some results of a batch, as they came.

    Attributes:
        first: the number of the first one within its batch.
        count: how many they are.
        seconds: how long the batch had run then; 0 if that is not known.
        first_error: the position of the first error among them, or None.
        are_numbers: True if they are all numbers of one type.
        received: what of the record came through a stream, if it is one, and large.
    """

    __slots__ = ("_body", "_code", "_errors", "count", "first", "first_error", "received", "seconds")

    def __init__(self, body: memoryview | bytes, received: Sequence[Any] = ()) -> None:
        """Args: `body` is what `Journal.pack` or `read_journal` made; `received`, see there."""
        self._body = memoryview(body)
        self.received = received
        self.first: int
        self.count: int
        self.seconds: float
        self._errors: int
        self.first, self.count, self._code, self.seconds, first_error, self._errors = _HEAD.unpack_from(body)
        self.first_error: int | None = None if first_error < 0 else first_error

    @property
    def are_light(self) -> bool:
        """True if they can be rebuilt on an event loop."""
        body = self._body
        return len(body) <= MOST_ON_LOOP and (not self.received or sizes_of(find_record(body))[0] <= MOST_ON_LOOP)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return len(self._body) + sum(map(len, self.received))

    def count_errors(self, known: int) -> int:
        """Return how many of them are errors, but for the first `known` ones."""
        if not known or self.are_numbers:
            return self._errors
        return sum(end < 0 for end in self.column[known:])

    @property
    def are_numbers(self) -> bool:
        return bool(self._code != RECORDS)

    @property
    def column(self) -> list[Any]:
        """The numbers; or of each record the end in `data`, as `~end` if it is an encoded error."""
        column = self._body[_HEAD.size : self._data_offset]
        return column.cast("d").tolist() if self._code == FLOATS else column.cast("q").tolist()

    @property
    def data(self) -> bytes:
        """The records, one behind another."""
        return bytes(self._body[self._data_offset :])

    @property
    def _data_offset(self) -> int:
        return _HEAD.size + self.count * NUMBER_SIZE
