"""Many items on many workers: what `map` and `stream` have in common.

Theory of operation: a `Flow` runs lanes, tasks of the caller's event loop, one for each worker.  A lane takes a batch
of items, has one worker run it (`run_attempt`), puts what comes back into the output, and goes to the end of the queue
of all who wait for a worker.  So other callers wait for one batch at most.  The caller's own task takes segments of
results from the output: as they come, or in order.

Rules:

- All of it lives in one event loop, so it needs no lock.  What a lane has to wait for is announced by `_wake`.
- An item is in exactly one place: still in the source, in a waiting batch, in a batch that a lane holds, or done.
- A batch that ends early (a crash, a timeout, the end of its time) gives the items that have not begun back to the
  head of the waiting ones.  The one that ran is blamed, if there was one: a worker may also die, or feel an interrupt,
  when all are done.  Where it is not known, because the items could not even be unpickled, none has begun, and the
  batch is halved until the culprit is alone.
"""

from __future__ import annotations

import functools
import math
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from . import _payload
from ._apart import pause_while, run_apart
from ._call import (
    check_function,
    enter_gate,
    exchange_in_context,
    leave_gate,
    run_attempt,
    weigh,
    with_reports,
)
from ._checks import check_count
from ._errors import TaskNotPicklable, decode_error
from ._frames import BatchHead, Kind, encode_batch
from ._journal import Results
from ._large import send_off
from ._lease import Lease, Verdict
from ._outcomes import Interruption, make_death_error, make_stop_error, name_task
from ._pace import Pace
from ._parcels import MOST_ON_LOOP, GivenUp, Parcel, Shipment, TooLarge, check_new_shares, packed_size
from ._segments import Segment, make_failure, rebuild
from ._settings import encode_label
from ._sources import FedSource, count_all, open_source
from ._statistics import outcome_of
from ._status import BEFORE_FIRST
from ._worker import FIRST_LOOK, LONGEST_LOOK, Death

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ._frames import Frame
    from ._settings import CallOptions
    from ._sources import Columns
    from ._statistics import Outcome
    from ._supervisor import Supervisor
    from ._waiting import Tasks, Waits
    from ._worker import Worker

_HOLD = 0.004  # seconds that results of a stream are held back; those of a map nobody takes before the end
_LONGEST_FEED = 0.005  # seconds for which items are taken from a source that never lets other tasks run
_LONGEST_CLOSE = 5.0  # seconds that an asynchronous generator has to end, once nobody wants its items


class FlowOptions(NamedTuple):
    """How the items of one map or stream are run: as `CpuPool.stream` documents it.

    Attributes:
        is_lazy: True if items are taken from the source only as results are taken.
    """

    return_exceptions: bool
    chunksize: int | None
    is_lazy: bool = False
    buffersize: int | None = None
    ordered: bool = False

    def check(self) -> None:
        """Raise TypeError or ValueError if one is not what it can be."""
        for name in ("chunksize", "buffersize"):
            if (size := getattr(self, name)) is not None:
                check_count(name, size, at_least=1)


class _Batch:
    """Some items on their way.

    Attributes:
        first: the number of its first item.
        columns: the items.
        attempt: 1, or more for an item that is tried again, alone.
        packed: the pickled items, or None.
        is_too_large: True if they are too large to be pickled on the event loop.
        limit: how many of them the worker was told to run, at most.
        sent_at: when it was sent, on the monotonic clock.
        done: how many of them have their result in the output.
        failed: how many of these are errors.
        seconds: how long the worker took for those.
    """

    __slots__ = (
        "attempt",
        "columns",
        "done",
        "failed",
        "first",
        "is_too_large",
        "limit",
        "packed",
        "seconds",
        "sent_at",
    )

    def __init__(self, first: int, columns: Columns, attempt: int = 1) -> None:
        self.first = first
        self.columns = columns
        self.attempt = attempt
        self.packed: bytes | Parcel | None = None
        self.is_too_large = False
        self.limit = self.size
        self.sent_at = math.inf
        self.done = 0
        self.failed = 0
        self.seconds = 0.0

    @property
    def size(self) -> int:
        return len(self.columns[0])

    @property
    def packed_size(self) -> int:
        """How many bytes its items are, pickled."""
        return packed_size(self.packed or b"")

    @property
    def runs_none(self) -> bool:
        """True if all items that the worker was to run are done, so that none is to blame."""
        return self.done >= self.limit

    def cut(self, start: int, stop: int | None = None, attempt: int = 1) -> _Batch:
        """Return a batch of some of its items."""
        return _Batch(self.first + start, tuple(each[start:stop] for each in self.columns), attempt)


class _Arrived(NamedTuple):
    """Results that have not been rebuilt.

    Attributes:
        make: rebuilds them.
        is_light: True if that may be done on the event loop.
    """

    make: Callable[[], Segment]
    is_light: bool = True


class Flow:
    """Runs `fn` with the items of a source on the workers of a pool; used as `async with flow`.

    Cancellation: leaving the block, however that comes about, stops what runs.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        waits: Waits,
        fn: Callable[..., Any],
        iterables: tuple[Any, ...],
        options: CallOptions,
        flow_options: FlowOptions,
    ) -> None:
        flow_options.check()
        check_function(fn, "stream" if flow_options.is_lazy else "map")
        self._function: bytes | Parcel = b""
        self._is_function_large = False
        try:
            self._function = _payload.pack_function(fn, options.serializer, most=MOST_ON_LOOP)
        except TooLarge:
            self._is_function_large = True
        self._source = open_source(iterables)
        self._supervisor = supervisor
        self._waits = waits
        self._fn = fn
        self._options = options
        self._label = encode_label(options)
        self._stops_at_error = not flow_options.return_exceptions
        self._ordered = flow_options.ordered
        self._is_lazy = flow_options.is_lazy
        self._pace = Pace(supervisor.dispatcher.max_workers, flow_options.chunksize, flow_options.buffersize)
        self._has_begun = False  # a worker was there for it
        self._is_end_known = False
        self._waiting: deque[_Batch] = deque()
        self._in_lanes = 0  # batches
        self._hungry = 0  # lanes that have none
        self._pulled = 0  # items that have left the source
        self._ended = 0  # items, in whatever way
        self._consumed = 0
        self._failed_at = math.inf  # the number of the first item that has failed, if that is to end it all
        self._error: BaseException | None = None  # why nothing can go on
        self._output: OrderedDict[int, _Arrived] = OrderedDict()  # by the number of the first item
        self._next = 0  # the next number to be given out, if ordered
        self._event: anyio.Event | None = None
        self._tasks: Tasks | None = None
        self._is_fed: bool | None = None  # by a task: True while it awaits an item; None without one

    @property
    def was_entered(self) -> bool:
        """True within the block, and after it."""
        return self._tasks is not None

    @property
    def total(self) -> int | None:
        """How many items there are in all, None while that is not known."""
        return count_all(self._source, self._pulled)

    async def __aenter__(self) -> Flow:
        if self._tasks is not None:
            raise RuntimeError("a stream can be entered only once; make a new one: pool.stream(...)")
        if self._is_function_large:
            self._function = await run_apart(self._pack_function, self._waits)
            self._is_function_large = False
        self._supervisor.dispatcher.add_owner(self)
        self._tasks = await self._waits.open_tasks()
        if isinstance(self._source, FedSource):
            self._is_fed = False
            self._tasks.start(self._feed, self._source)
        self._tasks.start(self._run_lane)
        return self

    def _pack_function(self, is_wanted: Callable[[], bool]) -> bytes | Parcel:
        return _payload.pack_function(self._fn, self._options.serializer, pause=pause_while(is_wanted))

    async def __aexit__(self, *_: object) -> None:
        self.fail(RuntimeError("the block of this stream was left"))
        tasks: Tasks = self._tasks  # type: ignore[assignment]  # it was entered
        try:
            with anyio.move_on_after(_LONGEST_CLOSE):
                while self._is_fed is False:  # it closes its generators: not cancelled, they can await what they need
                    await self._changed()
        finally:
            await self._stop(tasks)

    async def _stop(self, tasks: Tasks) -> None:
        try:
            await tasks.stop()
        finally:
            self._supervisor.tally.note(("cancelled", self._pulled - self._ended, None))  # no lock: it may run anywhere
            self._ended = self._pulled
            self._waiting.clear()
            self._output.clear()
            if self._supervisor.is_running:
                self._supervisor.post(self._supervisor.dispatcher.remove_owner, self)
            else:
                self._supervisor.dispatcher.remove_owner(self)
            self._source.close()

    # --- the caller's side ---

    async def next_segment(self) -> Segment | None:
        """Wait for more results; None at the end.

        Raises:
            BaseException: what the source has raised, or why the pool can run nothing.

        Cancellation: nothing is lost.
        """
        await checkpoint()  # rebuilding a segment takes a while: others have their turns between two
        while True:
            if self._error is not None:
                raise self._error
            if self._source.error is not None and not self._is_lazy:
                raise self._source.error
            if self._output and (not self._ordered or self._next in self._output):
                first = self._next if self._ordered else next(iter(self._output))
                segment = await self._rebuild(self._output[first])
                self._output.pop(first, None)  # the stream may have been left meanwhile
                self._next = segment.first + len(segment.values)
                return segment
            if self._is_finished:
                if self._source.error is not None:
                    raise self._source.error
                return None
            await self._changed()

    async def _rebuild(self, arrived: _Arrived) -> Segment:
        """Make the segment of what has arrived; apart from the event loop, if that takes a while."""
        if arrived.is_light:
            return arrived.make()
        return await run_apart(lambda _: arrived.make(), self._waits)

    def fail(self, error: BaseException) -> BaseException:
        """End it all, unless that was done before, and return the error."""
        self._error = self._error or error
        self._wake()
        return error

    def consume(self) -> None:
        """Note that the caller has taken a result out."""
        self._consumed += 1
        if self._event is not None:
            is_fed = isinstance(self._source, FedSource)
            if self._room >= (1 if is_fed else self._choose_size()):
                self._wake()

    @property
    def _is_finished(self) -> bool:
        is_dry = self._source.is_ended and not self._source.held
        return (is_dry or self._failed_at < math.inf) and not self._waiting and not self._in_lanes

    # --- lanes ---

    async def _run_lane(self) -> None:
        try:
            while (batch := await self._next_batch()) is not None:
                self._in_lanes += 1
                try:
                    await self._run_batch(batch)
                finally:
                    self._in_lanes -= 1
                    self._wake()
        except GeneratorExit:
            raise
        except BaseException as error:
            await checkpoint_if_cancelled()
            self.fail(error)

    async def _next_batch(self) -> _Batch | None:
        while self._error is None:
            if self._waiting or self._prepare():
                return self._pop_waiting()
            if self._is_finished:
                break
            self._hungry += 1
            try:
                await self._changed()
            finally:
                self._hungry -= 1
        return None

    def _pop_waiting(self) -> _Batch:
        """Take the first waiting batch; of one that was given back, as many items as one batch should have now."""
        batch = self._waiting.popleft()
        size = batch.size if batch.packed is not None else self._pace.choose_size(batch.size)
        if size >= batch.size:
            return batch
        self._waiting.appendleft(batch.cut(size))
        return batch.cut(0, size)

    def _prepare(self) -> bool:
        """Take a batch from the source, if there is one and room for it, and pickle it: then it waits for a lane."""
        size = self._choose_size()
        if self._failed_at < math.inf or (self._room < size and not self._source.held):  # what is held has its room
            return False
        started = time.perf_counter()
        columns = self._source.take(size)
        if columns is None:
            if self._source.is_ended and not self._is_end_known:
                self._is_end_known = True
                self._wake()
            return False
        batch = _Batch(self._pulled, columns)
        self._pulled += batch.size
        self._supervisor.tally.count("submitted", batch.size)
        self._waiting.append(batch)
        error = self._pickle(batch)
        batch.is_too_large = isinstance(error, TooLarge)
        if error is None or batch.is_too_large:
            size = MOST_ON_LOOP if batch.is_too_large else batch.packed_size
            self._pace.note_pickled(batch.size, size, time.perf_counter() - started)
        return True

    def _choose_size(self) -> int:
        size = self._pace.choose_size(self._source.left)
        return min(size, self._pace.room) if self._is_lazy else size

    @property
    def _room(self) -> float:
        """How many items may be taken from the iterables now."""
        if not self._is_lazy:
            return math.inf
        return self._pace.room - (self._pulled + self._source.held - self._consumed)

    def _pickle(self, batch: _Batch) -> Exception | None:
        """Pickle the items of a batch; return what is raised if one cannot be, or if that would take too long here."""
        try:
            batch.packed = _payload.pack_items(batch.columns, self._options.serializer, most=MOST_ON_LOOP)
        except Exception as error:
            return error
        return None

    async def _pickle_apart(self, batch: _Batch) -> Exception | None:
        """Pickle an item that is large, apart from the event loop; return what is raised if it cannot be, explained."""

        def pack(is_wanted: Callable[[], bool]) -> bytes | Parcel | Exception:
            serializer, pause = self._options.serializer, pause_while(is_wanted)
            try:
                return _payload.pack_items(batch.columns, serializer, pause=pause)
            except GivenUp:
                raise
            except Exception as error:
                arguments = tuple(column[0] for column in batch.columns)
                return _payload.explain(self._fn, arguments, {}, serializer, error, pause) or error

        packed = await run_apart(pack, self._waits)
        if isinstance(packed, Exception):
            return packed
        batch.packed = packed
        return None

    async def _run_batch(self, batch: _Batch) -> None:
        supervisor = self._supervisor
        lease: Lease[Worker] = Lease(
            supervisor.next_task_id(), self, is_admitted=self._has_begun or self._options.background
        )
        lease.item_timeout = self._options.timeout
        options = self._options.changed(queue_timeout=None) if self._has_begun else self._options
        has_gate = supervisor.dispatcher.has_gate
        try:
            if has_gate:
                size = None if batch.packed is None else self._count_bytes(batch)
                await enter_gate(lease, size, self._fn, options, supervisor, self._waits)
            outcome = await self._run_packed(batch, lease, options)
            if has_gate:
                leave_gate(lease, supervisor)
        except BaseException as error:
            if has_gate:
                leave_gate(lease, supervisor, error)
            raise
        if outcome is None:
            return
        if batch.done and batch.seconds:
            self._pace.note_run(batch.done, batch.seconds)
            ran, took = batch.seconds / batch.done, (time.monotonic() - batch.sent_at) / batch.done
            self._supervisor.tally.note((None, batch.done, (lease.queued, ran, max(took - ran, 0.0))))
        if lease.verdict is Verdict.INTERRUPTED and not isinstance(outcome, Death | Interruption):
            outcome = Interruption(None, None)  # the item has ended all the same
        if isinstance(outcome, Death):
            self._see_death(batch, outcome, lease)
        elif isinstance(outcome, Interruption):
            self._see_interruption(batch, outcome, lease)
        elif outcome.kind is Kind.RESULT:
            self._give_back(batch.cut(batch.done))
        elif batch.done == 0 and batch.size > 1:
            self._halve(batch)  # they could not be unpickled
        else:
            self._blame(batch, decode_error(outcome.body, name_task(self._fn, self._options)))

    async def _run_packed(
        self, batch: _Batch, lease: Lease[Worker], options: CallOptions
    ) -> Frame | Interruption | Death | None:
        """Pickle a batch, unless it is, and run it; None if it cannot be pickled, and was given back or blamed."""
        if batch.packed is None:
            error = TooLarge() if batch.is_too_large else self._pickle(batch)
            if isinstance(error, TooLarge) and batch.size == 1:
                error = await self._pickle_apart(batch)
            if error is not None:
                if batch.size > 1:
                    self._halve(batch)
                elif isinstance(error, TaskNotPicklable):
                    self._blame(batch, error)
                else:
                    arguments = tuple(column[0] for column in batch.columns)
                    self._blame(
                        batch, _payload.explain(self._fn, arguments, {}, self._options.serializer, error) or error
                    )
                await checkpoint()  # the next one may be no better
                return None
            weigh(lease, self._count_bytes(batch), self._supervisor)
        errand = _Delivery(self, batch)
        return await run_attempt(lease, errand, self._fn, options, self._supervisor, self._waits, batch.size)

    def _count_bytes(self, batch: _Batch) -> int:
        return batch.packed_size + packed_size(self._function)

    def encode(self, batch: _Batch, task_id: int, context: bytes, worker: Worker) -> tuple[bytes, Shipment | None]:
        """Return the frame of a batch, and what belongs to it, for a worker, which is there now."""
        if not self._has_begun and self._tasks is not None:
            self._has_begun = True
            for _ in range(self._pace.lanes - 1):
                self._tasks.start(self._run_lane)  # there is work for them
        batch.limit = int(min(batch.size, worker.tasks_left))
        is_timed = self._options.timeout is not None or self._supervisor.slow_task is not None
        hold = _HOLD if self._is_lazy else math.inf
        head = BatchHead(
            batch.attempt, batch.first, batch.limit, self._pace.budget, hold, self._stops_at_error, is_timed
        )
        function, items, shipment = self._function, batch.packed or b"", None
        if not isinstance(function, bytes) or not isinstance(items, bytes):
            function, items, shipment = _ship_together(function, items, worker.known_shares)
        files, tail = (len(shipment.descriptors), shipment.tail_size) if shipment is not None else (0, 0)
        return encode_batch(task_id, head, self._label, context, function, items, files=files, tail=tail), shipment

    def look_ahead(self) -> None:
        """Prepare the next batch while others run; but not where bytes are counted, and it would hold some."""
        has_gate = self._supervisor.dispatcher.has_gate
        if not has_gate and len(self._waiting) < self._pace.lanes and self._prepare():
            self._wake()

    def take(self, batch: _Batch, body: memoryview | bytes, received: Sequence[Any] = ()) -> None:
        """Put results of a batch into the output, except those that are there."""
        results = Results(body, received)
        known = batch.done - results.first
        if 0 <= known < results.count:  # below: they are from the journal, and what was sent before has yet to be read
            first = batch.first + batch.done
            make = functools.partial(rebuild, first, results, known, self._fn, self._options)
            self._output[first] = _Arrived(make, is_light=results.are_numbers or results.are_light)
            self._pace.note_results(results.count, results.nbytes)
            if results.first_error is not None and self._stops_at_error:
                self._note_failure(batch.first + results.first + results.first_error)
            failed = results.count_errors(known)
            batch.failed += failed
            self._count("succeeded", results.count - known - failed)
            self._count("failed", failed)
            batch.done = results.first + results.count
            self._wake()
        if results.seconds:
            batch.seconds = results.seconds

    @property
    def on_report(self) -> Callable[[Any], object] | None:
        """What takes the reports of items."""
        return self._options.on_report

    @property
    def first_look(self) -> float:
        """After how many seconds without an answer a lane looks how far its worker has come."""
        return FIRST_LOOK if self._is_lazy else min(self._pace.budget, LONGEST_LOOK)

    def wants_rest_of(self, batch: _Batch) -> bool:
        """Return True if a batch has taken its time, and others could do something with what is left of it."""
        is_late = time.monotonic() > batch.sent_at + self._pace.budget
        return is_late and (self._hungry > 0 or self._supervisor.dispatcher.has_queue)

    # --- batches that end early ---

    def _see_death(self, batch: _Batch, death: Death, lease: Lease[Worker]) -> None:
        self._supervisor.dispatcher.forget_bereaved(lease)
        self._supervisor.notify()
        is_closing = self._supervisor.dispatcher.closed and death.by_pool
        if lease.verdict not in (None, Verdict.TIMED_OUT) or (lease.verdict is None and is_closing):
            raise make_stop_error(death, lease, self._fn, self._options, self._supervisor.name)
        if death.last_task_id != lease.task_id:
            self._give_back(batch)  # it was not picked up
            return
        if death.journal is not None:
            self.take(batch, death.journal)
        if batch.runs_none:
            self._give_back(batch.cut(batch.done))
        elif not death.has_begun and batch.size > 1:
            self._halve(batch)
        elif lease.verdict is not None and lease.condemned_item in (BEFORE_FIRST, batch.done):
            self._blame(batch, make_stop_error(death, lease, self._fn, self._options, self._supervisor.name))
        elif batch.attempt <= self._options.retries:
            self._supervisor.tally.count("retried")
            self._give_back(batch.cut(batch.done + 1))
            self._give_back(batch.cut(batch.done, batch.done + 1, batch.attempt + 1))
        else:
            self._blame(batch, make_death_error(death, self._fn, self._options))

    def _see_interruption(self, batch: _Batch, interruption: Interruption, lease: Lease[Worker]) -> None:
        error = make_stop_error(interruption, lease, self._fn, self._options, self._supervisor.name)
        if lease.verdict is not Verdict.TIMED_OUT:
            raise error
        if batch.runs_none:
            self._give_back(batch.cut(batch.done))
        elif lease.condemned_item == BEFORE_FIRST and batch.size > 1:
            self._halve(batch)
        else:
            self._blame(batch, error)

    def _halve(self, batch: _Batch) -> None:
        middle = batch.size // 2
        self._give_back(batch.cut(middle))
        self._give_back(batch.cut(0, middle))

    def _give_back(self, batch: _Batch) -> None:
        """Let a batch wait as the first, unless it is empty, or comes after a failure that ends it all."""
        if batch.size and batch.first < self._failed_at:
            self._waiting.appendleft(batch)

    def _blame(self, batch: _Batch, error: Exception) -> None:
        """Let the item fail that ran, and give the rest back."""
        number = batch.first + batch.done
        self._output[number] = _Arrived(functools.partial(make_failure, number, error))
        self._count(outcome_of(error, has_run=True))
        if self._stops_at_error:
            self._note_failure(number)
        self._give_back(batch.cut(batch.done + 1))

    def _count(self, outcome: Outcome, items: int = 1) -> None:
        """Note in the pool's statistics how some items have ended."""
        if items:
            self._ended += items
            self._supervisor.tally.count(outcome, items)

    def _note_failure(self, number: int) -> None:
        if number < self._failed_at:
            self._failed_at = number
            self._waiting = deque(each for each in self._waiting if each.first < number)

    # --- asynchronous sources ---

    async def _feed(self, source: FedSource) -> None:
        """Await the source's items, as far as there is room; and close it here, where it was iterated over."""
        try:
            rested = time.monotonic()
            while not source.is_ended and self._failed_at == math.inf and self._error is None:
                if self._room < 1:
                    await self._changed()
                    continue
                self._is_fed = True
                source.is_ended = not await source.next_row()
                self._is_fed = False
                self._wake()
                if time.monotonic() - rested > _LONGEST_FEED:
                    await checkpoint()
                    rested = time.monotonic()
        except GeneratorExit:
            raise
        except BaseException as error:
            await checkpoint_if_cancelled()  # then it is none of the source's
            source.error = error
            source.is_ended = True
        finally:
            try:
                await source.aclose()
            finally:
                self._is_fed = None
                self._wake()

    # --- waking ---

    async def _changed(self) -> None:
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()

    def _wake(self) -> None:
        if self._event is not None:
            event, self._event = self._event, None
            event.set()


def _ship_together(function: bytes | Parcel, items: bytes | Parcel, known: set[int]) -> tuple[bytes, bytes, Shipment]:
    """Begin to send what is large of a batch: returns the heads of function and items, and what belongs to both."""
    check_new_shares(known, *(each for each in (function, items) if isinstance(each, Parcel)))
    of_function = Shipment(function) if isinstance(function, bytes) else send_off(function, known)
    known = known | {each.number for each in of_function.shares}
    of_items = Shipment(items) if isinstance(items, bytes) else send_off(items, known)
    both = Shipment(
        b"",
        of_items.tail,
        [*of_function.streams, *of_items.streams],
        [*of_function.files, *of_items.files],
        [*of_function.shares, *of_items.shares],
        [*of_function.sendings, *of_items.sendings],
    )
    return b"".join((of_function.head, *of_function.tail)), of_items.head, both


class _Delivery(NamedTuple):
    """One batch on its way to a worker, and what comes back."""

    flow: Flow
    batch: _Batch

    def exchange(self, lease: Lease[Worker], waits: Waits) -> Awaitable[Frame]:
        worker: Worker = lease.worker  # type: ignore[assignment]  # it has one now

        def send(context: bytes) -> Awaitable[Frame]:
            task_id = lease.task_id
            frame, shipment = self.flow.encode(self.batch, task_id, context, worker)
            limit = self.batch.limit
            return with_reports(
                worker,
                self.flow.on_report,
                waits,
                lambda waits: worker.exchange_batch(task_id, frame, limit, waits, self, shipment),
            )

        return exchange_in_context(lease, send, lambda reply: reply.kind is not Kind.RESULT or self.batch.failed > 0)

    @property
    def first_look(self) -> float:
        return self.flow.first_look

    def on_sent(self) -> None:
        self.batch.sent_at = time.monotonic()
        self.flow.look_ahead()

    def take(self, body: memoryview | bytes, received: Sequence[Any] = ()) -> int:
        self.flow.take(self.batch, body, received)
        return self.batch.done

    def is_late(self) -> bool:
        return self.flow.wants_rest_of(self.batch)
