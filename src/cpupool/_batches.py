"""What runs in a worker when one task has many items.

Theory of operation: a batch brings a function and columns of items, one for each iterable of a `map`.  The items run
one after another.  Their results are written into the journal (`_journal`) and sent from it when they are as old as the
head of the batch allows, so that many share a frame, while nothing that is done can be lost.  The clock is looked at
between strides: runs of items, so many that a stride takes a fraction of that time; one, if they are long.

It runs in the workers: stdlib and lower layers only.
"""

from __future__ import annotations

import itertools
import pickle
import time

from . import _payload
from ._context import in_context, skip_own_frames
from ._current import Task, set_current_task
from ._errors import STAGE_ARGUMENTS, STAGE_TASK, TaskInterrupted, encode_error, encode_unpicklable
from ._frames import Kind, encode_frame, split_batch
from ._journal import COLUMN_LENGTH, DATA_SIZE, NUMBERS, RECORDS
from ._parcels import LARGE, PROTOCOL, Parcel, count_files
from ._replies import Arrival, Reply
from ._status import COLUMN, HELD, NOT_BEGUN, NOT_NOW, SENT, SINCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from ._frames import BatchHead, Frame
    from ._interrupts import Interrupts
    from ._journal import Journal
    from ._payload import Serializer

_STRIDE = 0.0005  # seconds that a stride should take


def run_chunk(fn: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call `fn` with the arguments in each item."""
    return [fn(*item) for item in items]


def run_batch(
    frame: Frame,
    interrupts: Interrupts,
    journal: Journal,
    serializer: Serializer,
    shares: dict[int, Any],
    channel: socket.socket,
) -> bytes:
    """Run a batch; send results on the way, and return the frame that answers it, whatever happens."""
    batch = None
    interrupts.page[SENT] = NOT_BEGUN
    task_id, files = frame.task_id, frame.files
    head, label, context, function, items = split_batch(frame.body)
    own = count_files(function)
    arrivals = Arrival(function, files[:own], shares), Arrival(items, files[own:], shares)
    try:
        try:
            interrupts.arm(task_id)
            fn, columns = [arrival.unpack() for arrival in arrivals]
            batch = _Run(task_id, in_context(context, fn), columns, head, interrupts, journal, serializer, channel)
            set_current_task(lambda: Task(task_id, label.decode() or None, head.attempt, batch.item))
            batch.run()
        finally:
            interrupts.armed = 0  # as for a call
            for arrival in arrivals:
                arrival.close()
    except BaseException as error:
        if batch is None:
            body_of_error = b"" if _is_interrupt(error, interrupts) else encode_error(error, STAGE_ARGUMENTS)
        else:
            batch.send_held()
            body_of_error = b"" if _is_interrupt(error, interrupts) else batch.encode_error(error)
        kind = Kind.INTERRUPTED if interrupts.hit else Kind.ERROR
        return encode_frame(kind, task_id, body_of_error)
    return encode_frame(Kind.RESULT, task_id, batch.take_held())


def _is_interrupt(error: BaseException, interrupts: Interrupts) -> bool:
    return isinstance(error, TaskInterrupted) and interrupts.hit


class _Run:
    """A batch that runs.

    Rules: how many items are done stands in the status page alone, so that the pool and an interrupt see the same.  An
    interrupt may come anywhere, except while results are being sent.
    """

    def __init__(
        self,
        task_id: int,
        fn: Callable[..., Any],
        columns: tuple[Iterable[Any], ...],
        head: BatchHead,
        interrupts: Interrupts,
        journal: Journal,
        serializer: Serializer,
        channel: socket.socket,
    ) -> None:
        self._task_id = task_id
        self._fn = fn
        self._head = head
        self._interrupts = interrupts
        self._journal = journal
        self._serializer = serializer
        self._plain = _payload.PLAIN if serializer is _payload.BY_NAME else frozenset()
        self._pack = _payload.make_record_packer(serializer)
        self._channel = channel
        self._page = interrupts.page
        self._only: Iterator[Any] = iter(columns[0])  # the items themselves, where each is the only argument
        self._arguments = zip(self._only, *columns[1:], strict=False)
        self._may_hold_numbers = len(columns) == 1 and not head.is_timed
        self._is_over = False
        self._began = time.monotonic()
        self._sent_at = self._began

    @property
    def item(self) -> int:
        """The number of the running item in the whole map."""
        return self._head.first + self._journal.done

    @property
    def _done(self) -> int:
        done: int = self._page[SENT] + self._page[HELD]
        return done

    def run(self) -> None:
        head, journal, page = self._head, self._journal, self._page
        page[SINCE] = time.monotonic_ns() if head.is_timed else NOT_NOW
        journal.begin()
        stride, now = 1, self._began
        while not self._is_ending and (left := head.limit - self._done) > 0 and now - self._began <= head.budget:
            count = min(stride, left, COLUMN_LENGTH - page[HELD])
            self._run_stride(self._done + count)
            before, now = now, time.monotonic()
            stride = min(max(int(count * _STRIDE / max(now - before, 1e-9)), 1), 4 * count)
            if now - self._sent_at >= head.hold or page[HELD] == COLUMN_LENGTH:
                self.send_held()
                now = time.monotonic()

    def _run_stride(self, goal: int) -> None:
        """Run items until `goal` of them are done, or the batch is over."""
        page = self._page
        while (left := goal - self._done) > 0 and not self._is_ending:
            try:
                if page[COLUMN] == RECORDS:
                    self._run_for_records(left)
                else:
                    self._run_for_numbers(left)
            except BaseException as error:
                if self._interrupts.hit:
                    raise  # it is the interrupt, or made of it
                self._add_error(self.encode_error(error))

    @property
    def _is_ending(self) -> bool:
        """True if no further item may begin: also if one has caught its interrupt, and returned all the same."""
        return self._is_over or self._interrupts.hit or self._interrupts.is_late

    def _run_for_numbers(self, count: int) -> None:
        """Run items as long as they return numbers of one type."""
        fn, page, interrupts = self._fn, self._page, self._interrupts
        code, held = page[COLUMN], page[HELD]
        number, column = NUMBERS[code], self._journal.columns[code]
        try:
            for item in itertools.islice(self._only, count):
                value = fn(item)
                if type(value) is not number:
                    break
                try:
                    column[held] = value
                except ValueError:  # more than 64 bits
                    break
                held += 1
                if interrupts.is_late:
                    return
            else:
                return
        finally:
            page[HELD] = held
        self._add_value(value)

    def _run_for_records(self, count: int) -> None:
        fn, interrupts, page, journal = self._fn, self._interrupts, self._page, self._journal
        dumps, protocol, pack, plain = pickle.dumps, PROTOCOL, self._pack, self._plain
        data, column = journal.data, journal.columns[RECORDS]
        is_timed, held_cell = self._head.is_timed, HELD
        held, end = page[HELD], journal.end
        if not held and self._may_hold_numbers:
            self._run_first()
            return
        for arguments in itertools.islice(self._arguments, count):
            value = fn(*arguments)
            try:
                record = dumps(value, protocol) if type(value) in plain else pack(value)
            except BaseException:
                if interrupts.hit:
                    raise
                self._add_value(value)  # there may be another way
                return
            if type(record) is not bytes:
                self._add_packed(record)
                return
            start, end = end, end + len(record)
            if end > DATA_SIZE:
                self._add_packed(pack(value) if type(value) is str else record)
                return
            data[start:end] = record
            column[held] = end
            held += 1
            if is_timed:
                page[SINCE] = time.monotonic_ns()  # first: the pool may look at any time, and see the next item
            page[held_cell] = held
            if interrupts.hit or interrupts.is_late:
                return

    def _run_first(self) -> None:
        """Run one item while the journal is empty: what it returns decides what the journal will hold."""
        value = self._fn(next(self._only))
        if not self._journal.begin_numbers(value):
            self._add_value(value)

    # --- results that take longer ---

    def _add_value(self, value: object) -> None:
        try:
            record = self._pack(value)
        except BaseException as error:
            self._note_unpicklable(error, value)
        else:
            self._add_packed(record)

    def _add_packed(self, record: bytes | Parcel) -> None:
        if not isinstance(record, bytes):
            self._send_parcel(record)
        elif len(record) >= LARGE:
            self._send_parcel(Parcel([record], len(record), []))
        else:
            self._add_record(record)

    def _note_unpicklable(self, error: BaseException, value: object) -> None:
        if self._interrupts.hit:
            raise error
        self._add_error(encode_unpicklable(error, value))

    def _add_error(self, record: bytes) -> None:
        self._add_record(record, is_error=True)
        self._is_over = self._head.stops_at_error

    def _add_record(self, record: bytes, *, is_error: bool = False) -> None:
        journal = self._journal
        if self._page[COLUMN] != RECORDS:
            self.send_held()
        if self._head.is_timed:
            self._page[SINCE] = time.monotonic_ns()
        if not journal.add(record, is_error=is_error):
            self.send_held()
            if not journal.add(record, is_error=is_error):
                self._send_body(journal.pack_alone(record, self._seconds(), is_error=is_error), 1)

    # --- sending ---

    def _send_parcel(self, parcel: Parcel) -> None:
        """Send a large result, alone."""
        self.send_held()

        def encode(head: bytes, *, files: int, tail: int) -> bytes:
            size = len(head) + tail
            body = self._journal.pack_alone(head, self._seconds(), is_error=False, size=size)
            return encode_frame(Kind.PARTIAL, self._task_id, body, files=files, tail=tail)

        self._send(lambda: Reply.of_parcel(parcel, encode), 1)

    def send_held(self) -> None:
        """Send the results in the journal."""
        if held := self._page[HELD]:
            self._send_body(self._journal.pack(self._seconds()), held)
        self._sent_at = time.monotonic()

    def take_held(self) -> bytes:
        """Return the results in the journal, packed, at the end."""
        return self._journal.pack(self._seconds())

    def _send_body(self, body: bytes, results: int) -> None:
        self._send(lambda: Reply(encode_frame(Kind.PARTIAL, self._task_id, body)), results)

    def _send(self, make_reply: Callable[[], Reply], results: int) -> None:
        """Send a frame with so many results, while nothing can interrupt it, and no item's time runs."""
        interrupts, page = self._interrupts, self._page
        was_armed, interrupts.armed = interrupts.armed, 0
        page[SINCE] = NOT_NOW
        make_reply().send(self._channel)
        self._journal.empty(results)
        if self._head.is_timed:
            page[SINCE] = time.monotonic_ns()
        interrupts.armed = was_armed
        interrupts.raise_if_condemned()

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def encode_error(self, error: BaseException) -> bytes:
        """Encode what an item raised, with the traceback from its own first line."""
        error = error.with_traceback(skip_own_frames(error.__traceback__, __file__))
        return encode_error(error, STAGE_TASK, dumps=self._serializer.dumps)
