"""One call on its way: checked, pickled, run by a worker, and turned back into a value or an error.

`Call.complete` repeats `run_attempt` until one has an outcome.  An attempt takes a lease on a worker from the
dispatcher, exchanges frames with the worker in the caller's own task or thread (`Worker.exchange`) and gives it back.
The lanes of a map make attempts too (`_map`), each with a batch.

Rules: the lease knows at any moment whether there is a worker to give back.  Giving up a call for whatever reason
(cancellation, Ctrl-C, a coroutine that is garbage-collected) is one `except BaseException` in `run_attempt`; it takes
no lock and waits for nothing: the supervisor does the rest behind the caller's back.
"""

from __future__ import annotations

import inspect
import math
import time
from typing import TYPE_CHECKING, Any, Protocol

from . import _payload
from ._errors import QueueTimeout, decode_error, describe_callable
from ._frames import Kind, encode_call
from ._lease import Lease
from ._outcomes import Interruption, load_value, make_death_error, make_stop_error, name_task, read_interruption
from ._reports import ReportingWaits
from ._settings import encode_label
from ._worker import Death, WorkerGone

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._frames import Frame
    from ._settings import CallOptions
    from ._supervisor import Supervisor
    from ._waiting import Waits
    from ._worker import Worker

_ASYNC_CODE = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Errand(Protocol):
    """What a worker can be sent."""

    def exchange(self, worker: Worker, task_id: int, waits: Waits) -> Awaitable[Frame]:
        """Send it to a worker, and wait for the answer; see `Worker.exchange`."""
        ...


class Call:
    """A function and its arguments: checked and pickled once, however often it is tried."""

    __slots__ = ("_attempt", "_body", "_fn", "_label", "_options")

    def __init__(
        self, fn: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object], options: CallOptions
    ) -> None:
        check_function(fn, "run")
        self._fn = fn
        self._options = options
        self._label = encode_label(options)
        self._body = _payload.dumps_call(fn, args, kwargs, options.dumps)
        self._attempt = 1

    async def complete(self, supervisor: Supervisor, waits: Waits) -> Any:
        """Have a worker run it, and return its value or raise its error."""
        lease: Lease[Worker] = Lease(supervisor.next_task_id(), is_admitted=self._options.background)
        while True:
            outcome = await run_attempt(lease, self, self._fn, self._options, supervisor, waits)
            if not isinstance(outcome, Death):
                return self._value(outcome, lease, supervisor)
            has_run = outcome.last_task_id == lease.task_id  # else the worker died before it picked the task up
            is_stopped = lease.verdict is not None or (supervisor.dispatcher.closed and outcome.by_pool)
            if is_stopped or (has_run and self._attempt > self._options.retries):
                supervisor.dispatcher.forget_bereaved(lease)
                supervisor.notify()
                if is_stopped:
                    raise make_stop_error(outcome, lease, self._fn, self._options, supervisor.name)
                raise make_death_error(outcome, self._fn, self._options)
            self._attempt += has_run
            lease.begin(supervisor.next_task_id())

    def exchange(self, worker: Worker, task_id: int, waits: Waits) -> Awaitable[Frame]:
        """Send it to a worker, and wait for the answer."""
        call = encode_call(task_id, self._attempt, self._label, self._body)
        if self._options.on_report is not None:
            return with_reports(
                worker, self._options.on_report, waits, lambda waits: worker.exchange(task_id, call, waits)
            )
        return worker.exchange(task_id, call, waits)

    def _value(self, outcome: Frame | Interruption, lease: Lease[Worker], supervisor: Supervisor) -> Any:
        """Return the value in an answer, or raise the error in it."""
        if isinstance(outcome, Interruption):
            raise make_stop_error(outcome, lease, self._fn, self._options, supervisor.name)
        if outcome.kind is not Kind.RESULT:
            raise decode_error(outcome.body, name_task(self._fn, self._options))
        return load_value(outcome.body, self._fn, self._options)


async def run_attempt(
    lease: Lease[Worker],
    errand: Errand,
    fn: Callable[..., object],
    options: CallOptions,
    supervisor: Supervisor,
    waits: Waits,
    tasks: int = 1,
) -> Frame | Interruption | Death:
    """Have one worker run something: returns its answer, or how it died.

    Args:
        lease: a new one, or one that has begun anew.
        errand: what is sent.
        fn: what the call runs.
        options: those of the call.
        supervisor: the pool's.
        waits: the caller's.
        tasks: as how many tasks it counts.

    Raises:
        QueueTimeout, PoolFull, PoolClosed, InitializerFailed, PoolBroken: there is no worker for it.
    """
    dispatcher = supervisor.dispatcher
    try:
        if not dispatcher.borrow_idle(lease):
            await _wait_for_worker(lease, fn, options, supervisor, waits)
        worker: Worker = lease.worker  # type: ignore[assignment]  # it has one now
        if options.on_start is not None:
            options.on_start()
        lease.started = time.monotonic()
        if options.timeout is not None and lease.verdict is None:  # there may be one, when the pool closes
            lease.deadline = lease.started + options.timeout
            supervisor.look_by(lease.deadline)
        if supervisor.sampling_interval is not None:
            supervisor.look_by(lease.started + supervisor.sampling_interval)
        if worker.tasks_left <= tasks:
            supervisor.post(dispatcher.replace, worker)
        try:
            reply = await errand.exchange(worker, lease.task_id, waits)
        except WorkerGone:
            return await _learn_death(lease, supervisor, waits)
        outcome = reply if lease.verdict is None else read_interruption(reply, worker)
        if worker.max_memory is not None and worker.is_too_large:
            supervisor.post(dispatcher.replace, worker)
        if not worker.tasks_left or not dispatcher.give_back(lease):
            dispatcher.retire(lease)
            supervisor.post(supervisor.take_back, lease)
        elif supervisor.idle_timeout is not None:
            supervisor.look_by(time.monotonic() + supervisor.idle_timeout)
    except BaseException:
        _give_up(lease, supervisor)
        raise
    if dispatcher.closed:
        supervisor.notify()  # it may be the last one that the pool waits for
    return outcome


async def with_reports(
    worker: Worker,
    on_report: Callable[[Any], object],
    waits: Waits,
    exchange: Callable[[ReportingWaits], Awaitable[Frame]],
) -> Frame:
    """Pass on what a task reports while its answer is waited for, and last what it has reported before that."""
    process = worker.process
    reporting = ReportingWaits(waits, process.read_report, process.last_report(), on_report)
    try:
        reply = await exchange(reporting)
    except WorkerGone:
        reporting.look()
        raise
    reporting.look()
    return reply


async def _wait_for_worker(
    lease: Lease[Worker], fn: Callable[..., object], options: CallOptions, supervisor: Supervisor, waits: Waits
) -> None:
    ticket = lease.ticket = waits.ticket()
    lease.asked = time.monotonic()
    queue_timeout = options.queue_timeout
    deadline = math.inf if queue_timeout is None else lease.asked + queue_timeout
    if supervisor.dispatcher.enqueue(lease, deadline):
        return
    supervisor.run()  # after queueing: a start that fails fails the queue
    if queue_timeout is not None:
        supervisor.look_by(deadline)
    await waits.settled(ticket)
    ticket.result()
    if lease.worker is None:
        raise QueueTimeout(name_task(fn, options), queue_timeout or 0.0, time.monotonic() - lease.asked)


async def _learn_death(lease: Lease[Worker], supervisor: Supervisor, waits: Waits) -> Death:
    ticket = waits.ticket()
    try:
        supervisor.post(supervisor.bury, lease, ticket)
        await waits.settled(ticket)
    except BaseException:
        ticket.withdraw()
        raise
    death: Death = ticket.result()
    return death


def _give_up(lease: Lease[Worker], supervisor: Supervisor) -> None:
    """Leave an attempt in the middle.  It may run inside a garbage collection: no lock, no waiting."""
    dispatcher, ticket = supervisor.dispatcher, lease.ticket
    if ticket is not None and ticket.withdraw():
        dispatcher.has_withdrawn = True
    elif lease.worker is not None:
        supervisor.post(supervisor.take_back, lease)
    if dispatcher.closed:
        supervisor.notify()  # it may have been the last one that the pool waits for


def check_function(fn: object, method: str) -> None:
    """Raise unless `fn`, given to that method of a pool, can be called and returns a value, not something to await."""
    code = getattr(fn, "__code__", None)
    if code is not None and not code.co_flags & _ASYNC_CODE:
        return
    if inspect.iscoroutine(fn):
        fn.close()  # or Python would warn that it was never awaited
        raise TypeError(
            f"pool.{method}() takes a function and its arguments, not the coroutine {fn.__qualname__}(...). A worker "
            f"runs plain functions: write 'def' instead of 'async def', and pool.{method}({fn.__name__}, ...)."
        )
    if not callable(fn):
        raise TypeError(
            f"pool.{method}() takes a function and its arguments, not {fn!r}; write pool.{method}(fn, 1), not fn(1)"
        )
    call = type(fn).__call__ if not inspect.isroutine(fn) else fn
    if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in (fn, call)):
        raise TypeError(
            f"{describe_callable(fn)} is an 'async def' function; a worker has no event loop and runs plain functions. "
            "Await it here, or move its CPU-bound part to a function made with 'def' and run that."
        )
