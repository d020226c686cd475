"""What a pool without workers has in the place of its parts: its calls run at once, in the caller's own thread.

Function, arguments, results and errors go through pickle all the same, so what does not travel fails here too.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import checkpoint

from . import _payload
from ._call import Call, check_function
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
from ._segments import Segment, make_failure
from ._sources import FedSource, open_source

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._map import FlowOptions
    from ._settings import CallOptions, Settings
    from ._stream import Segments
    from ._supervisor import Health
    from ._waiting import Ticket, Waits


class InlinePool(CpuPool):
    """A `CpuPool` without workers, for tests and debuggers: each call runs at once, where it is made.

    It takes the same arguments, has the same calls and raises the same errors.  Function, arguments, results and
    exceptions still go through pickle; the initializer runs before the first call; `current_task` and `report` work.
    So breakpoints, coverage and mocks reach what otherwise runs in another process.

    What needs such a process it cannot do.  The event loop stands still during a call.  A task cannot be stopped: one
    that took longer than its `timeout` raises `TaskTimeout` when it is done.  A crash is the program's own.  One task
    runs at a time, so nothing waits, and `queue_timeout`, `max_pending` and `retries` mean nothing.
    """

    def _set_up(self) -> None:
        self._inline = InlineSupervisor(self.settings)
        self._supervisor = self._inline  # type: ignore[assignment]  # it plays its part,
        self._dispatcher = self._inline  # type: ignore[assignment]  # and the dispatcher's

    def _make_call(
        self, fn: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object], options: CallOptions
    ) -> Call:
        return InlineCall(fn, args, kwargs, options)

    def _open_flow(
        self, fn: Callable[..., Any], iterables: tuple[Any, ...], options: CallOptions, flow_options: FlowOptions
    ) -> Segments:
        return InlineFlow(self._inline, fn, iterables, options, flow_options)


class InlineSupervisor:
    """What a pool without workers asks and tells its supervisor and its dispatcher."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tasks = 0
        self.max_workers = settings.max_workers or 1
        self.closed = False
        self.is_running = False  # from the initializer to the finalizer

    @property
    def health(self) -> Health:
        return "broken" if self.closed else "ready"

    def counts(self) -> tuple[int, int, int, int]:
        return 0, 0, 0, 0

    def begin_task(self) -> int:
        """Return the number of a new task; runs the initializer before the first."""
        if self.closed:
            raise PoolClosed(self._settings.name)
        if not self.is_running:
            self._initialize()
        self._tasks += 1
        return self._tasks

    def _initialize(self) -> None:
        settings = self._settings
        dumps = _payload.get_dumps(settings.serializer)
        initializer, initargs = _payload.loads(dumps((settings.initializer, settings.initargs)))
        if initializer is not None:
            try:
                initializer(*initargs)
            except Exception as error:
                name = describe_callable(settings.initializer)
                raise InitializerFailed(name, 0) from decode_error(encode_error(error, STAGE_TASK), name)
        self.is_running = True

    def want_all(self, ticket: Ticket) -> None:
        try:
            if self.closed:
                raise PoolClosed(self._settings.name)
            if not self.is_running:
                self._initialize()
        except Exception as error:
            ticket.settle(error=error)
        else:
            ticket.settle()

    def run(self) -> None:
        """Nothing has to be started."""

    notify = refuse_in_its_thread = run

    def post(self, order: Callable[..., object], *args: object) -> None:
        order(*args)

    def close(self) -> None:
        self.closed = True

    def stop(self, deadline: float, ticket: Ticket) -> None:  # noqa: ARG002
        self.stop_soon()
        ticket.settle()

    def stop_soon(self) -> None:
        self.closed = True
        if self.is_running:
            self.is_running = False
            if self._settings.finalizer is not None:
                self._settings.finalizer()

    def close_by(self, deadline: float) -> None:
        """Nothing runs that would have to be stopped."""

    def hurry(self) -> None:
        """Nothing runs that would have to be stopped."""


class InlineCall(Call):
    """A call that runs here and now."""

    async def complete(self, supervisor: Any, waits: Waits) -> Any:  # noqa: ARG002
        """Run it, and return its value or raise its error."""
        return self.run_here(supervisor)

    def run_here(self, supervisor: InlineSupervisor) -> Any:
        """Run it, and return its value or raise its error, both as they would arrive."""
        fn, options, began = self._fn, self._options, time.monotonic()
        pickled = self._run_pickled(supervisor.begin_task())
        took = time.monotonic() - began
        if options.timeout is not None and took > options.timeout:
            raise TaskTimeout(name_task(fn, options), options.timeout, 0.0, took, None)
        return load_value(pickled, fn, options)

    def _run_pickled(self, task_id: int) -> bytes:
        """Do as a worker does: return the pickled result, or raise the error as it would arrive."""
        options, name, result = self._options, name_task(self._fn, self._options), None
        stage, on_report = STAGE_ARGUMENTS, options.on_report
        if on_report is not None:
            set_reporter(lambda value: on_report(_payload.loads(options.dumps(value))))
        set_current_task(Task(task_id, options.label, 1))
        try:
            fn, args, kwargs = _payload.loads(self._body)
            stage = STAGE_TASK
            result = fn(*args, **kwargs)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or _is_debugger_s(error):
                raise
            if stage is STAGE_TASK and error.__traceback__ is not None:
                error = error.with_traceback(error.__traceback__.tb_next)  # from the task's own first line
            raise decode_error(encode_error(error, stage, dumps=options.dumps), name)  # noqa: B904  # it has its cause
        finally:
            set_current_task(None)
            set_reporter(None)
        try:
            return options.dumps(result)
        except BaseException as error:
            raise decode_error(encode_unpicklable(error, result), name)  # noqa: B904  # it has its cause


def _is_debugger_s(error: BaseException) -> bool:
    """Return True for what a debugger raises where its user wants to leave."""
    bdb = sys.modules.get("bdb")
    return bdb is not None and isinstance(error, bdb.BdbQuit)


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
        self._supervisor = supervisor
        self._fn = fn
        self._options = options
        self._source = open_source(iterables)
        self._number = 0
        self.was_entered = False
        self._error: BaseException | None = None

    @property
    def total(self) -> int | None:
        """How many items there are in all, None while that is not known."""
        if self._source.is_ended:
            return self._number + self._source.held
        left = self._source.left
        return None if left is None else self._number + left

    async def __aenter__(self) -> InlineFlow:
        if self.was_entered:
            raise RuntimeError("a stream can be entered only once; make a new one: pool.stream(...)")
        self.was_entered = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.fail(RuntimeError("the block of this stream was left"))
        if isinstance(self._source, FedSource):
            await self._source.aclose()
        self._source.close()

    async def next_segment(self) -> Segment | None:
        """Run the next item; None at the end."""
        await checkpoint()
        if self._error is not None:
            raise self._error
        if isinstance(self._source, FedSource):
            self._source.is_ended = not await self._source.next_row()
        columns = self._source.take(1)
        if columns is None:
            if self._source.error is not None:
                raise self._source.error
            return None
        number, self._number = self._number, self._number + 1
        try:
            call = InlineCall(self._fn, tuple(column[0] for column in columns), {}, self._options)
            return Segment(number, [call.run_here(self._supervisor)], [])
        except Exception as error:
            return make_failure(number, error)

    def consume(self) -> None:
        """Nobody waits for room."""

    def fail(self, error: BaseException) -> BaseException:
        """End it all, unless that was done before, and return the error."""
        self._error = self._error or error
        return error
