"""One call on its way: checked, pickled, run by a worker, and turned back into a value or an error.

`complete` repeats `_attempt` until one has an outcome.  An attempt takes a lease on a worker from the dispatcher,
exchanges frames with the worker in the caller's own task or thread (`Worker.exchange`) and gives it back.

Rules: the lease knows at any moment whether there is a worker to give back.  Giving up a call for whatever reason
(cancellation, Ctrl-C, a coroutine that is garbage-collected) is one `except BaseException` in `_attempt`; it takes no
lock and waits for nothing: the supervisor does the rest behind the caller's back.
"""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _payload
from ._errors import (
    PoolClosed,
    QueueTimeout,
    RemoteTraceback,
    ResultNotPicklable,
    TaskTimeout,
    WorkerDied,
    decode_error,
    decode_traceback,
    describe_callable,
)
from ._frames import Kind, encode_call
from ._lease import Lease, Verdict
from ._worker import Death, WorkerGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._frames import Frame
    from ._settings import CallOptions
    from ._supervisor import Supervisor
    from ._waiting import Waits
    from ._worker import Worker

_ASYNC_CODE = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass(frozen=True, slots=True)
class Interruption:
    """How an interrupted task ended: where it was, and the traceback of the error that it made of it, if any."""

    stack: str | None
    traceback: str | None


class Call:
    """A function and its arguments: checked and pickled once, however often it is tried."""

    __slots__ = ("_body", "_fn", "_label", "_options")

    def __init__(
        self, fn: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object], options: CallOptions
    ) -> None:
        code = getattr(fn, "__code__", None)
        if code is None or code.co_flags & _ASYNC_CODE:
            _check_function(fn)
        self._fn = fn
        self._options = options
        self._label = b"" if options.label is None else options.label.encode("utf-8", "backslashreplace")
        self._body = _payload.dumps_call(fn, args, kwargs, options.dumps)

    async def complete(self, supervisor: Supervisor, waits: Waits) -> Any:
        """Have a worker run it, and return its value or raise its error."""
        attempt = 1
        lease: Lease[Worker] = Lease(supervisor.next_task_id())
        while True:
            outcome = await self._attempt(lease, attempt, supervisor, waits)
            if not isinstance(outcome, Death):
                return self._value(outcome, lease, supervisor)
            has_run = outcome.last_task_id == lease.task_id  # else the worker died before it picked the task up
            is_stopped = lease.verdict is not None or (supervisor.dispatcher.closed and outcome.by_pool)
            if is_stopped or (has_run and attempt > self._options.retries):
                supervisor.dispatcher.forget_bereaved(lease)
                supervisor.notify()
                raise self._stopped(outcome, lease, supervisor) if is_stopped else self._died(outcome)
            attempt += has_run
            lease.begin(supervisor.next_task_id())

    async def _attempt(
        self, lease: Lease[Worker], attempt: int, supervisor: Supervisor, waits: Waits
    ) -> Frame | Interruption | Death:
        """Have one worker run the task: returns its answer, or how it died."""
        dispatcher = supervisor.dispatcher
        try:
            if not dispatcher.borrow_idle(lease):
                await self._wait_for_worker(lease, supervisor, waits)
            worker: Worker = lease.worker  # type: ignore[assignment]  # it has one now
            lease.started = time.monotonic()
            if self._options.timeout is not None and lease.verdict is None:  # there may be one, when the pool closes
                lease.deadline = lease.started + self._options.timeout
                supervisor.look_by(lease.deadline)
            if supervisor.sampling_interval is not None:
                supervisor.look_by(lease.started + supervisor.sampling_interval)
            if worker.tasks_left == 1:
                supervisor.post(dispatcher.replace, worker)
            try:
                request = encode_call(lease.task_id, attempt, self._label, self._body)
                reply = await worker.exchange(lease.task_id, request, waits)
            except WorkerGone:
                return await _learn_death(lease, supervisor, waits)
            outcome = reply if lease.verdict is None else _read_interruption(reply, worker)
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

    async def _wait_for_worker(self, lease: Lease[Worker], supervisor: Supervisor, waits: Waits) -> None:
        ticket = lease.ticket = waits.ticket()
        lease.asked = time.monotonic()
        queue_timeout = self._options.queue_timeout
        deadline = math.inf if queue_timeout is None else lease.asked + queue_timeout
        if supervisor.dispatcher.enqueue(lease, deadline):
            return
        supervisor.run()  # after queueing: a start that fails fails the queue
        if queue_timeout is not None:
            supervisor.look_by(deadline)
        await waits.settled(ticket)
        ticket.result()
        if lease.worker is None:
            raise QueueTimeout(self._name(), queue_timeout or 0.0, time.monotonic() - lease.asked)

    # --- outcomes ---

    def _value(self, outcome: Frame | Interruption, lease: Lease[Worker], supervisor: Supervisor) -> Any:
        """Return the value in an answer, or raise the error in it."""
        if isinstance(outcome, Interruption):
            raise self._stopped(outcome, lease, supervisor)
        if outcome.kind is not Kind.RESULT:
            raise decode_error(outcome.body, self._name())
        try:
            return _payload.loads_result(outcome.body)
        except _payload.RebuildFailed as failed:
            error = failed.__cause__
            reason = f"it was pickled in the worker but cannot be rebuilt here: {type(error).__name__}: {error}"
            result_type = _payload.first_type(outcome.body) or "a value"
            raise ResultNotPicklable(self._name(), result_type, reason) from error

    def _stopped(self, outcome: Interruption | Death, lease: Lease[Worker], supervisor: Supervisor) -> Exception:
        """Say why the pool has stopped the task."""
        error: Exception
        if lease.verdict is Verdict.TIMED_OUT:
            ran = lease.interrupted - lease.started
            error = TaskTimeout(self._name(), self._options.timeout or 0.0, lease.queued, ran, outcome.stack)
        else:
            error = PoolClosed(supervisor.name)
        if isinstance(outcome, Interruption):
            error.__cause__ = None if outcome.traceback is None else RemoteTraceback(outcome.traceback)
        elif not outcome.by_pool:
            error.__cause__ = self._died(outcome)
        return error

    def _died(self, death: Death) -> WorkerDied:
        facts = (death.pid, death.exitcode, death.signal, death.oom, self._name(), death.crash_stack)
        return WorkerDied(*facts, *(death.excess or ()))

    def _name(self) -> str:
        return describe_callable(self._fn) if self._options.label is None else self._options.label


def _read_interruption(reply: Frame, worker: Worker) -> Frame | Interruption:
    """Look what became of an interrupt: it has ended the task, or came too late, or the task returned all the same."""
    stack = worker.process.take_stack()
    if reply.kind is not Kind.INTERRUPTED:
        return reply
    return Interruption(stack, decode_traceback(reply.body) if reply.body else None)


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


def _check_function(fn: object) -> None:
    """Raise unless `fn` can be called and returns a value, not something to await."""
    if inspect.iscoroutine(fn):
        fn.close()  # or Python would warn that it was never awaited
        raise TypeError(
            f"pool.run() takes a function and its arguments, not the coroutine {fn.__qualname__}(...). A worker runs "
            f"plain functions: write 'def' instead of 'async def', and pool.run({fn.__name__}, ...)."
        )
    if not callable(fn):
        raise TypeError(f"pool.run() takes a function and its arguments, not {fn!r}; write pool.run(fn, 1), not fn(1)")
    call = type(fn).__call__ if not inspect.isroutine(fn) else fn
    if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in (fn, call)):
        raise TypeError(
            f"{describe_callable(fn)} is an 'async def' function; a worker has no event loop and runs plain functions. "
            "Await it here, or move its CPU-bound part to a function made with 'def' and run that."
        )
