"""What becomes of a task: its value or its error, made of what the worker has answered or how it died."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _payload
from ._errors import (
    PoolClosed,
    RemoteTraceback,
    ResultNotPicklable,
    TaskStopped,
    TaskTimeout,
    WorkerDied,
    decode_traceback,
    describe_callable,
)
from ._frames import Kind
from ._lease import Lease, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._frames import Frame
    from ._settings import CallOptions
    from ._worker import Death, Worker


@dataclass(frozen=True, slots=True)
class Interruption:
    """How an interrupted task ended: where it was, and the traceback of the error that it made of it, if any."""

    stack: str | None
    traceback: str | None


def read_interruption(reply: Frame, worker: Worker) -> Frame | Interruption:
    """Look what became of an interrupt: it has ended the task, or came too late, or the task returned all the same."""
    stack = worker.process.take_stack()
    if reply.kind is not Kind.INTERRUPTED:
        return reply
    return Interruption(stack, decode_traceback(reply.body) if reply.body else None)


def name_task(fn: Callable[..., object], options: CallOptions) -> str:
    """Return what errors call a task."""
    return describe_callable(fn) if options.label is None else options.label


def name_task_of(lease: Lease[Any] | None) -> str | None:
    """Return what the task is called that runs under a lease; None without one."""
    return None if lease is None or lease.fn is None or lease.options is None else name_task(lease.fn, lease.options)


def load_value(
    pickled: memoryview | bytes, fn: Callable[..., object], options: CallOptions, received: Sequence[Any] = ()
) -> Any:
    """Rebuild what a task has returned, or raise `ResultNotPicklable`."""
    try:
        return _payload.loads_result(pickled, received)
    except _payload.RebuildFailed as failed:
        raise make_rebuild_error(pickled, failed, fn, options)  # noqa: B904  # it has its cause


def make_rebuild_error(
    pickled: memoryview | bytes, failed: _payload.RebuildFailed, fn: Callable[..., object], options: CallOptions
) -> ResultNotPicklable:
    """Say why what a task has returned cannot be rebuilt."""
    cause = failed.__cause__
    reason = f"it was pickled in the worker but cannot be rebuilt here: {type(cause).__name__}: {cause}"
    result_type = _payload.first_type(pickled) or "a value"
    error = ResultNotPicklable(name_task(fn, options), result_type, reason)
    error.__cause__ = cause
    return error


def make_stop_error(
    outcome: Interruption | Death, lease: Lease[Worker], fn: Callable[..., object], options: CallOptions, pool: str
) -> Exception:
    """Say why the pool has stopped a task."""
    error: Exception
    if lease.verdict is Verdict.TIMED_OUT:
        ran = lease.interrupted - (lease.item_started or lease.started)
        error = TaskTimeout(name_task(fn, options), options.timeout or 0.0, lease.queued, ran, outcome.stack)
    elif lease.verdict is Verdict.INTERRUPTED:
        error = TaskStopped(name_task(fn, options), lease.interrupted - lease.started, outcome.stack)
    else:
        error = PoolClosed(pool)
    if isinstance(outcome, Interruption):
        error.__cause__ = None if outcome.traceback is None else RemoteTraceback(outcome.traceback)
    elif not outcome.by_pool:
        error.__cause__ = make_death_error(outcome, fn, options)
    return error


def make_death_error(death: Death, fn: Callable[..., object], options: CallOptions) -> WorkerDied:
    """Say how the worker of a task has died."""
    facts = (death.pid, death.exitcode, death.signal, death.oom, name_task(fn, options), death.crash_stack)
    resident, limit = death.excess or (None, None)
    return WorkerDied(*facts, resident, limit, death.last_words)
