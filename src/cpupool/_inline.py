"""What a pool without workers has in the place of its parts: its calls run at once, in the caller's own thread.

Function, arguments, results and errors go through pickle all the same, so what does not travel fails here too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio

from . import _payload, _roles
from ._call import Call, check_function, count_failure
from ._calls import async_waits
from ._child import run_finalizer
from ._context import carrying, in_context, skip_own_frames
from ._current import Task, set_current_task, set_reporter
from ._errors import (
    STAGE_ARGUMENTS,
    STAGE_TASK,
    InitializerFailed,
    PoolClosed,
    TaskTimeout,
    decode_error,
    describe_callable,
    encode_error,
    encode_unpicklable,
)
from ._outcomes import load_value, name_task
from ._pool import CpuPool
from ._reports import dump_report
from ._segments import Segment, make_failure
from ._sources import FedSource, count_all, open_source
from ._statistics import SUBMITTED, Statistics, Tally
from ._waiting import BlockingWaits, running_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._map import FlowOptions
    from ._parcels import Parcel
    from ._settings import CallOptions, Settings
    from ._stream import Segments
    from ._supervisor import Health
    from ._waiting import Tasks, Ticket, Waits


class InlinePool(CpuPool):
    """A `CpuPool` without workers, for tests and debuggers: each call runs at once, where it is made.

    It takes the same arguments, has the same calls and raises the same errors.  Function, arguments, results and
    exceptions still go through pickle; the initializer runs before the first call; `current_task`, `in_worker` and
    `report` work, and a task must not use a pool.  So breakpoints, coverage and mocks reach what otherwise runs in
    another process.

    What needs such a process it cannot do.  The event loop stands still during a call, and a task cannot run one of its
    own while it does.  A task cannot be stopped: one that took longer than its `timeout` fails with `TaskTimeout` when
    it is done.  A crash is the program's own.  One task runs at a time, whatever thread it comes from, so nothing
    queues, and `queue_timeout`, `max_pending` and `retries` mean nothing.
    """

    def _set_up(self) -> None:
        self._inline = InlineSupervisor(self.settings)
        self._supervisor = self._inline  # type: ignore[assignment]  # it plays its part,
        self._dispatcher = self._inline  # type: ignore[assignment]  # and the dispatcher's

    def _make_call(
        self,
        fn: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        options: CallOptions,
        *,
        is_copy: bool = False,  # noqa: ARG002  # it always does
    ) -> Call:
        return InlineCall(fn, args, kwargs, options, is_copy=True)

    def _open_flow(
        self, fn: Callable[..., Any], iterables: tuple[Any, ...], options: CallOptions, flow_options: FlowOptions
    ) -> Segments:
        return InlineFlow(self._inline, fn, iterables, options, flow_options)


class InlineSupervisor:
    """What a pool without workers asks and tells its supervisor and its dispatcher.

    Attributes:
        closed: True once no new call is taken.
        is_running: True from the initializer to the finalizer.
    """

    def __init__(self, settings: Settings) -> None:
        self.max_workers = settings.max_workers or 1
        self.closed = False
        self.is_running = False
        self.is_closing = False
        self._settings = settings
        self._close_at = float("inf")
        self._tasks = 0
        self._tally_lock = threading.Lock()
        self.tally = Tally(self._tally_lock)
        self.dispatcher = self  # it plays both parts
        self._lock = threading.RLock()  # the initializer, the finalizer and tasks run one at a time

    @property
    def health(self) -> Health:
        return "broken" if self.closed else "ready"

    def counts(self) -> tuple[int, int, int, int]:
        return 0, 0, 0, 0

    def statistics(self) -> Statistics:
        """Return what was counted; there are no workers."""
        with self._tally_lock:
            counted: dict[str, Any] = self.tally.read()
        return Statistics(self._settings.name, (), self.max_workers, idle=0, busy=0, starting=0, pending=0, **counted)

    @contextlib.contextmanager
    def task(self, label: str | None, item: int | None) -> Iterator[None]:
        """Be a worker that runs a task, in the block."""
        with self._lock:
            self.begin()
            self._tasks += 1
            set_current_task(Task(self._tasks, label, 1, item))
            try:
                with self._as_worker():
                    yield
            finally:
                set_current_task(None)

    def begin(self) -> None:
        """Be open, and have run the initializer.

        Raises:
            PoolClosed, InitializerFailed: that cannot be.
            RuntimeError: a task asks.
        """
        _roles.refuse_pool_here()
        with self._lock:
            self.closed = self.closed or time.monotonic() >= self._close_at
            if self.closed:
                raise PoolClosed(self._settings.name)
            if not self.is_running:
                self._initialize()
                self.is_running = True

    def _initialize(self) -> None:
        initializer = self._settings.initializer
        if initializer is None:
            return
        try:
            with self._as_worker():
                initializer(*self._settings.initargs)  # not pickled: there may be locks among them
        except BaseException as error:
            if is_for_the_program(error):
                raise
            name = describe_callable(initializer)
            raise InitializerFailed(name, os.getpid()) from decode_error(encode_error(error, STAGE_TASK), name)

    @contextlib.contextmanager
    def _as_worker(self) -> Iterator[None]:
        before = {name: os.environ.get(name) for name in self._settings.env or ()}
        os.environ.update(self._settings.env or {})
        try:
            with _roles.playing_worker():
                yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    # --- what a pool tells its supervisor and its dispatcher ---

    def want_all(self, ticket: Ticket) -> None:
        try:
            self.begin()
        except Exception as error:
            ticket.settle(error=error)
        else:
            ticket.settle()

    def run(self) -> None:
        """Nothing has to be started."""

    notify = refuse_in_its_thread = hurry = run

    def dump_stacks(self, ticket: Ticket, pid: int | None) -> None:  # noqa: ARG002
        ticket.settle({})

    def interrupt(self, ticket: Ticket, pid: int) -> None:  # noqa: ARG002
        ticket.settle(False)

    def post(self, order: Callable[..., object], *args: object) -> None:
        order(*args)

    def close(self) -> None:
        self.closed = True

    def close_by(self, deadline: float) -> None:
        self._close_at = min(self._close_at, deadline)

    def stop(self, deadline: float, ticket: Ticket) -> None:  # noqa: ARG002
        self.stop_soon()
        ticket.settle()

    def end_share(self, number: int) -> None:
        """Nobody has mapped it."""

    def stop_soon(self) -> None:
        self.closed = True
        with self._lock:
            is_first, self.is_running = self.is_running, False
            if is_first and self._settings.finalizer is not None:
                run_finalizer(self._settings.finalizer)


class InlineCall(Call):
    """A call that runs here and now."""

    _ran = 0.0  # seconds

    async def complete(self, supervisor: Any, waits: Waits) -> Any:
        """Run it here, and return its value or raise its error; it counts in the pool's statistics."""
        has_run = False
        try:
            supervisor.tally.note(SUBMITTED)
            supervisor.tally.tidy()
            if not isinstance(waits, BlockingWaits):
                await _pause()  # so that others have their turns, and a loop of calls can be cancelled
            has_run = True
            return self.run_here(supervisor)
        except BaseException as error:
            count_failure(error, supervisor.tally, has_run=has_run)
            raise

    def run_here(self, supervisor: InlineSupervisor, item: int | None = None) -> Any:
        """Run it, and return its value or raise its error, both as they would arrive."""
        options, dumps, began = self._options, self._options.serializer.dumps, time.monotonic()
        with supervisor.task(options.label, item):
            if options.on_start is not None:
                options.on_start()
            set_reporter(lambda value: self._pass_on(dump_report(value, dumps)))
            try:
                packed = self._run_packed()
            finally:
                set_reporter(None)
        value = load_value(packed if isinstance(packed, bytes) else packed.to_bytes(), self._fn, options)
        overhead = self._packing + time.monotonic() - began - self._ran
        supervisor.tally.note(("succeeded", 1, (0.0, self._ran, overhead)))
        return value

    def _pass_on(self, report: bytes) -> None:
        if self._options.on_report is not None:
            self._options.on_report(_payload.loads(report))

    def _run_packed(self) -> bytes | Parcel:
        """Do as a worker does: return the packed result, or raise the error as it would arrive."""
        options, name, result = self._options, name_task(self._fn, self._options), None
        stage, began = STAGE_ARGUMENTS, time.monotonic()
        try:
            packed = self._packed
            fn, args, kwargs = _payload.loads(packed) if isinstance(packed, bytes) else packed.rebuild()
            with carrying(options.carriers, name, 0.0, options.serializer.dumps) as context:
                stage, began = STAGE_TASK, time.monotonic()
                result = in_context(context, fn)(*args, **kwargs)
                self._ran = time.monotonic() - began
        except BaseException as error:
            if is_for_the_program(error):
                raise
            self._check_time(began)
            trace = skip_own_frames(error.__traceback__, __file__)  # from the task's own first line
            arrived = decode_error(
                encode_error(error.with_traceback(trace), stage, dumps=options.serializer.dumps), name
            )
            raise arrived.with_traceback(trace)  # noqa: B904  # it has its cause
        self._check_time(began)
        try:
            return _payload.pack_result(result, options.serializer)
        except BaseException as error:
            raise decode_error(encode_unpicklable(error, result), name)  # noqa: B904  # likewise

    def _check_time(self, began: float) -> None:
        timeout, ran = self._options.timeout, time.monotonic() - began
        if timeout is not None and ran > timeout:
            raise TaskTimeout(name_task(self._fn, self._options), timeout, 0.0, ran, None)


async def _pause() -> None:
    """Do as anyio's `checkpoint`, which goes by context variables: a call through an executor has its caller's."""
    if running_loop() == "trio":
        import trio

        await trio.lowlevel.checkpoint()
    else:
        import asyncio

        await asyncio.sleep(0)


def is_for_the_program(error: BaseException) -> bool:
    """Return True for Ctrl-C, and for what a debugger raises where its user wants to leave."""
    bdb = sys.modules.get("bdb")
    return isinstance(error, KeyboardInterrupt) or (bdb is not None and isinstance(error, bdb.BdbQuit))


class InlineFlow:
    """Many items, one after another; what `map_items` and `Stream` take their results from."""

    def __init__(
        self,
        supervisor: InlineSupervisor,
        fn: Callable[..., Any],
        iterables: tuple[Any, ...],
        options: CallOptions,
        flow_options: FlowOptions,
    ) -> None:
        flow_options.check()
        check_function(fn, "stream" if flow_options.is_lazy else "map")
        _payload.pack_function(fn, options.serializer)
        self._supervisor = supervisor
        self._fn = fn
        self._options = options
        self._source = open_source(iterables)
        self._number = 0
        self._error: BaseException | None = None
        self._tasks: Tasks | None = None
        self._fed: anyio.Event | None = None  # set when the item is there that is being awaited

    @property
    def was_entered(self) -> bool:
        """True within the block, and after it."""
        return self._tasks is not None

    @property
    def total(self) -> int | None:
        """How many items there are in all, None while that is not known."""
        return count_all(self._source, self._number)

    async def __aenter__(self) -> InlineFlow:
        if self._tasks is not None:
            raise RuntimeError("a stream can be entered only once; make a new one: pool.stream(...)")
        self._supervisor.begin()
        self._tasks = await async_waits().open_tasks()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.fail(RuntimeError("the block of this stream was left"))
        try:
            if self._tasks is not None:
                await self._tasks.stop()
        finally:
            if isinstance(self._source, FedSource):
                await self._source.aclose()
            self._source.close()

    async def next_segment(self) -> Segment | None:
        """Run the next item; None at the end.

        Cancellation: nothing is lost.
        """
        await _pause()
        if self._error is not None:
            raise self._error
        if isinstance(self._source, FedSource) and not self._source.is_ended:
            await self._feed(self._source)
        columns = self._source.take(1)
        if columns is None:
            if self._source.error is not None:
                raise self.fail(self._source.error)
            return None
        number, self._number = self._number, self._number + 1
        tally = self._supervisor.tally
        tally.count("submitted")
        try:
            arguments = tuple(column[0] for column in columns)
            call = InlineCall(self._fn, arguments, {}, self._options, is_copy=True)
            return Segment(number, [call.run_here(self._supervisor, number)], [])
        except PoolClosed:
            tally.count("refused")
            raise
        except Exception as error:
            tally.count("failed" if not isinstance(error, TaskTimeout) else "timed_out")
            if is_for_the_program(error):
                raise
            return make_failure(number, error)
        except BaseException:
            tally.note(("cancelled", 1, None))
            raise

    async def _feed(self, source: FedSource) -> None:
        """Wait for an item in a task of its own: a wait that is cancelled must not end the source."""
        if self._fed is None and self._tasks is not None:
            self._fed = anyio.Event()
            self._tasks.start(self._await_item, source, self._fed)
        if self._fed is not None:
            await self._fed.wait()
            self._fed = None

    async def _await_item(self, source: FedSource, fed: anyio.Event) -> None:
        try:
            source.is_ended = not await source.next_row()
        except Exception as error:
            source.error, source.is_ended = error, True
        finally:
            fed.set()

    def consume(self) -> None:
        """Nobody waits for room."""

    def fail(self, error: BaseException) -> BaseException:
        """End it all, unless that was done before, and return the error."""
        self._error = self._error or error
        return error
