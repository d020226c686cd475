"""Many items on many workers: what `map` and `stream` have in common.

Theory of operation: a `Flow` runs lanes, tasks of the caller's event loop, one for each worker.  A lane takes a batch
of items, has one worker run it (`run_attempt`), puts what comes back into the output, and goes to the end of the queue
of all who wait for a worker.  So other callers wait for one batch at most.  The caller's own task takes segments of
results from the output: as they come, or in order.

Rules:

- All of it lives in one event loop, so it needs no lock.  What a lane has to wait for is announced by `_wake`.
- An item is in exactly one place: still in the source, in a waiting batch, in a batch that a lane holds, or done.
- A batch that ends early (a crash, a timeout, the end of its time) gives the items that have not begun back to the
  head of the waiting ones.  The one that ran is blamed.  Where that is not known, because the items could not even be
  unpickled, none has begun, and each is sent alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import checkpoint

from . import _payload
from ._call import check_function, run_attempt
from ._checks import check_count
from ._errors import decode_error
from ._frames import BatchHead, Kind, encode_batch
from ._journal import Results
from ._lease import Lease, Verdict
from ._outcomes import Interruption, make_death_error, make_rebuild_error, make_stop_error, name_task
from ._pace import Pace
from ._settings import encode_label
from ._sources import FedSource, open_source
from ._worker import Death

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from ._frames import Frame
    from ._settings import CallOptions
    from ._sources import Columns
    from ._supervisor import Supervisor
    from ._waiting import Waits
    from ._worker import Worker

_LEAST_ROOM = 64  # items on their way in a stream without `buffersize`
_LONGEST_FEED = 0.005  # seconds for which items are taken from a source that never lets other tasks run


class _Batch:
    """Some items on their way.

    Attributes:
        first: the number of its first item.
        columns: the items.
        attempt: the how manieth time it is that its one item is tried, else 1.
        body: the pickled items, or None.
        done: how many of them have their result in the output.
        seconds: how long the worker took for those.
    """

    __slots__ = ("attempt", "body", "columns", "done", "first", "seconds")

    def __init__(self, first: int, columns: Columns, attempt: int = 1) -> None:
        self.first = first
        self.columns = columns
        self.attempt = attempt
        self.body: bytes | None = None
        self.done = 0
        self.seconds = 0.0

    @property
    def size(self) -> int:
        return len(self.columns[0])

    def cut(self, start: int, stop: int | None = None, attempt: int = 1) -> _Batch:
        """Return a batch of some of its items."""
        return _Batch(self.first + start, tuple(each[start:stop] for each in self.columns), attempt)


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """What has become of some consecutive items.

    Attributes:
        first: the number of the first one.
        values: their results; exceptions in the place of those that failed.
        failures: the positions of those among `values`.
    """

    first: int
    values: list[Any]
    failures: list[int]


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
        return_exceptions: bool,
        chunksize: int | None,
        is_lazy: bool = False,
        buffersize: int | None = None,
        ordered: bool = False,
    ) -> None:
        """Args: as those of `CpuPool.stream`; one that is not lazy takes from the source whatever lanes can use."""
        for name, size in (("chunksize", chunksize), ("buffersize", buffersize)):
            if size is not None:
                check_count(name, size, at_least=1)
        check_function(fn)
        self._function = _payload.dumps_function(fn, options.dumps)
        self._source = open_source(iterables)
        self._supervisor = supervisor
        self._waits = waits
        self._fn = fn
        self._options = options
        self._label = encode_label(options)
        self._stops_at_error = not return_exceptions
        self._ordered = ordered
        self._is_lazy = is_lazy
        self._buffersize = buffersize
        self._pace = Pace(supervisor.dispatcher.max_workers, chunksize, buffersize)
        self._has_begun = False  # a worker was there for it
        self._is_end_known = False
        self._waiting: deque[_Batch] = deque()
        self._in_lanes = 0
        self._pulled = 0  # items that have left the source
        self._consumed = 0
        self._failed_at = math.inf  # the number of the first item that has failed, if that is to end it all
        self._error: Exception | None = None  # why nothing can go on
        self._output: OrderedDict[int, Callable[[], Segment]] = OrderedDict()  # by the number of the first item
        self._next = 0  # the next number to be given out, if ordered
        self._event: anyio.Event | None = None
        self._group: TaskGroup | None = None

    @property
    def is_open(self) -> bool:
        """True within the block."""
        return self._group is not None and self._error is None

    @property
    def total(self) -> int | None:
        """How many items there are in all, None while that is not known."""
        if self._source.is_ended:
            return self._pulled + self._count_fed()
        left = self._source.left
        return None if left is None else self._pulled + left

    async def __aenter__(self) -> Flow:
        if self._group is not None:
            raise RuntimeError("a stream can be entered only once; make a new one: pool.stream(...)")
        self._supervisor.dispatcher.add_owner(self)
        self._group = group = anyio.create_task_group()
        await group.__aenter__()
        if isinstance(self._source, FedSource):
            group.start_soon(self._feed, self._source)
        group.start_soon(self._run_lane)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.fail(RuntimeError("the block of this stream was left"))
        group: TaskGroup = self._group  # type: ignore[assignment]  # there is one
        group.cancel_scope.cancel()
        try:
            await group.__aexit__(None, None, None)
        finally:
            self._waiting.clear()
            self._output.clear()
            self._supervisor.post(self._supervisor.dispatcher.remove_owner, self)
            await self._source.close()

    # --- the caller's side ---

    async def next_segment(self) -> Segment | None:
        """Wait for more results; None at the end.

        Raises:
            Exception: what the source has raised, or why the pool can run nothing.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._source.error is not None and not self._is_lazy:
                raise self._source.error
            if self._output and (not self._ordered or self._next in self._output):
                make = self._output.pop(self._next) if self._ordered else self._output.popitem(last=False)[1]
                segment = make()
                self._next = segment.first + len(segment.values)
                return segment
            if self._is_finished:
                if self._source.error is not None:
                    raise self._source.error
                return None
            await self._changed()

    def fail(self, error: Exception) -> Exception:
        """End it all, unless that was done before, and return the error."""
        self._error = self._error or error
        self._wake()
        return error

    def consume(self) -> None:
        """Note that the caller has taken a result out."""
        self._consumed += 1
        if self._event is not None and self._find_room() >= self._pace.choose_size(self._source.left):
            self._wake()

    @property
    def _is_finished(self) -> bool:
        is_dry = self._source.is_ended and not self._count_fed()
        return (is_dry or self._failed_at < math.inf) and not self._waiting and not self._in_lanes

    def _count_fed(self) -> int:
        return len(self._source.rows) if isinstance(self._source, FedSource) else 0

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
        except Exception as error:
            self.fail(error)

    async def _next_batch(self) -> _Batch | None:
        while self._error is None:
            if self._waiting or self._prepare():
                return self._pop_waiting()
            if self._is_finished:
                break
            await self._changed()
        return None

    def _pop_waiting(self) -> _Batch:
        """Take the first waiting batch; of one that was given back, as many items as one batch should have now."""
        batch = self._waiting.popleft()
        size = batch.size if batch.body is not None else self._pace.choose_size(batch.size)
        if size >= batch.size:
            return batch
        self._waiting.appendleft(batch.cut(size))
        return batch.cut(0, size)

    def _prepare(self) -> bool:
        """Take a batch from the source, if there is one and room for it, and pickle it: then it waits for a lane."""
        size = self._pace.choose_size(self._source.left)
        if self._failed_at < math.inf or self._find_room() < (0 if self._count_fed() else size):
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
        self._waiting.append(batch)
        if self._pickle(batch) is None:
            self._pace.note_pickled(batch.size, len(batch.body or b""), time.perf_counter() - started)
        return True

    def _find_room(self) -> float:
        """Return how many items may be taken from the source now."""
        if not self._is_lazy:
            return math.inf
        room = self._buffersize or max(4 * self._pace.lanes * self._pace.choose_size(None), _LEAST_ROOM)
        return room - (self._pulled + self._count_fed() - self._consumed)

    def _pickle(self, batch: _Batch) -> Exception | None:
        """Pickle the items of a batch; return what is raised if one cannot be."""
        try:
            batch.body = self._options.dumps(batch.columns)
        except Exception as error:
            return error
        return None

    def _begin(self) -> None:
        """Start the other lanes: there is work for them."""
        if not self._has_begun and self._group is not None:
            self._has_begun = True
            for _ in range(self._pace.lanes - 1):
                self._group.start_soon(self._run_lane)

    async def _run_batch(self, batch: _Batch) -> None:
        if batch.body is None and (error := self._pickle(batch)) is not None:
            if batch.size > 1:
                self._split(batch)
            else:
                arguments = tuple(column[0] for column in batch.columns)
                self._blame(batch, _payload.explain(self._fn, arguments, {}, self._options.dumps, error) or error)
            await checkpoint()  # the next one may be no better
            return
        supervisor, waits = self._supervisor, self._waits
        lease: Lease[Worker] = Lease(supervisor.next_task_id(), self, is_admitted=self._has_begun)
        lease.item_timeout = self._options.timeout
        options = self._options.changed(queue_timeout=None) if self._has_begun else self._options
        exchange = functools.partial(self._exchange, batch, lease.task_id)
        outcome = await run_attempt(lease, exchange, self._fn, options, supervisor, waits, batch.size)
        if batch.done and batch.seconds:
            self._pace.note_run(batch.done, batch.seconds)
        if isinstance(outcome, Death):
            self._see_death(batch, outcome, lease)
        elif isinstance(outcome, Interruption):
            self._see_interruption(batch, outcome, lease)
        elif outcome.kind is Kind.RESULT:
            self._give_rest_back(batch, batch.done)
        elif batch.done == 0 and batch.size > 1:
            self._split(batch)  # they could not be unpickled; which one, they show one by one
        else:
            self._blame(batch, decode_error(outcome.body, name_task(self._fn, self._options)))

    def _exchange(self, batch: _Batch, task_id: int, worker: Worker) -> Awaitable[Frame]:
        self._begin()
        limit = int(min(batch.size, worker.tasks_left))
        is_timed = self._options.timeout is not None
        head = BatchHead(batch.attempt, batch.first, limit, self._pace.budget, self._stops_at_error, is_timed)
        request = encode_batch(task_id, head, self._label, self._function, batch.body or b"")
        take = functools.partial(self._take, batch)
        return worker.exchange_batch(task_id, request, limit, self._waits, self._look_ahead, take)

    def _look_ahead(self) -> None:
        """Prepare the next batch while this one runs."""
        if len(self._waiting) < self._pace.lanes and self._prepare():
            self._wake()

    def _take(self, batch: _Batch, body: memoryview | bytes) -> int:
        """Put results of a batch into the output, except those that are there."""
        results = Results(body)
        known = batch.done - results.first
        if 0 <= known < results.count:  # below: they are from the journal, and what was sent before has yet to be read
            first = batch.first + batch.done
            self._output[first] = functools.partial(self._open, first, results, known)
            if results.first_error is not None and self._stops_at_error:
                self._note_failure(batch.first + results.first + results.first_error)
            batch.done = results.first + results.count
            self._wake()
        if results.seconds:
            batch.seconds = results.seconds
        return batch.done

    def _open(self, first: int, results: Results, known: int) -> Segment:
        """Rebuild results, but for the first `known` ones."""
        column = results.column
        if results.are_numbers:
            return Segment(first, column[known:] if known else column, [])
        values: list[Any] = []
        failures: list[int] = []
        data, loads = results.data, _payload.loads_result
        start = max(column[known - 1], ~column[known - 1]) if known else 0
        for end in column[known:]:
            stop = end if end >= 0 else ~end
            pickled, start = data[start:stop], stop
            error: Exception
            try:
                if end >= 0:
                    values.append(loads(pickled))
                    continue
                error = decode_error(pickled, name_task(self._fn, self._options))
            except _payload.RebuildFailed as failed:
                error = make_rebuild_error(pickled, failed.__cause__, self._fn, self._options)
                error.__cause__ = failed.__cause__
            failures.append(len(values))
            values.append(_with_note(error, first + len(values)))
        return Segment(first, values, failures)

    # --- batches that end early ---

    def _see_death(self, batch: _Batch, death: Death, lease: Lease[Worker]) -> None:
        self._supervisor.dispatcher.forget_bereaved(lease)
        self._supervisor.notify()
        is_closing = self._supervisor.dispatcher.closed and death.by_pool
        if lease.verdict not in (None, Verdict.TIMED_OUT) or (lease.verdict is None and is_closing):
            raise make_stop_error(death, lease, self._fn, self._options, self._supervisor.name)
        if death.last_task_id != lease.task_id:
            self._waiting.appendleft(batch)  # it was not picked up
            return
        if death.journal is not None:
            self._take(batch, death.journal)
        if not death.has_begun and batch.size > 1:
            self._split(batch)
        elif lease.verdict is not None and lease.condemned_item in (None, batch.done):
            self._blame(batch, make_stop_error(death, lease, self._fn, self._options, self._supervisor.name))
        elif batch.attempt <= self._options.retries:
            self._give_rest_back(batch, batch.done + 1)
            self._waiting.appendleft(batch.cut(batch.done, batch.done + 1, batch.attempt + 1))
        else:
            self._blame(batch, make_death_error(death, self._fn, self._options))

    def _see_interruption(self, batch: _Batch, interruption: Interruption, lease: Lease[Worker]) -> None:
        error = make_stop_error(interruption, lease, self._fn, self._options, self._supervisor.name)
        if lease.verdict is not Verdict.TIMED_OUT:
            raise error
        if lease.condemned_item is None and batch.size > 1:
            self._split(batch)
        else:
            self._blame(batch, error)

    def _split(self, batch: _Batch) -> None:
        self._waiting.extendleft(batch.cut(at, at + 1) for at in reversed(range(batch.size)))

    def _give_rest_back(self, batch: _Batch, start: int) -> None:
        if start < batch.size and batch.first + start < self._failed_at:
            self._waiting.appendleft(batch.cut(start))

    def _blame(self, batch: _Batch, error: Exception) -> None:
        """Let the item fail that ran, and give the rest back."""
        number = batch.first + batch.done
        self._output[number] = lambda: Segment(number, [_with_note(error, number)], [0])
        if self._stops_at_error:
            self._note_failure(number)
        self._give_rest_back(batch, batch.done + 1)

    def _note_failure(self, number: float) -> None:
        if number < self._failed_at:
            self._failed_at = number
            self._waiting = deque(each for each in self._waiting if each.first < number)

    # --- asynchronous sources ---

    async def _feed(self, source: FedSource) -> None:
        """Await the source's items, as far as there is room."""
        try:
            rested = time.monotonic()
            while not source.is_ended and self._failed_at == math.inf:
                if self._find_room() < 1:
                    await self._changed()
                elif await source.next_row():
                    self._wake()
                else:
                    source.is_ended = True
                if time.monotonic() - rested > _LONGEST_FEED:
                    await checkpoint()
                    rested = time.monotonic()
        except Exception as error:
            source.error = error
            source.is_ended = True
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


def _with_note(error: Exception, number: int) -> Exception:
    error.add_note(f"This was item {number}, counted from 0.")
    return error
