"""A call's claim on a worker, and why the supervisor stops a task."""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._settings import CallOptions
    from ._waiting import Ticket

W = TypeVar("W")


class Verdict(enum.Enum):
    """Why the supervisor stops a task."""

    TIMED_OUT = "timed out"
    GIVEN_UP = "given up"  # by its caller, who is gone
    POOL_CLOSED = "pool closed"
    INTERRUPTED = "interrupted"  # by `CpuPool.interrupt`


class _Attempt:
    """What is so at the beginning of each attempt."""

    ticket: Ticket | None = None
    is_expired = False
    is_sent = False
    outcome: Any = None
    asked = 0.0
    started = 0.0
    deadline = math.inf
    interrupted = math.inf
    verdict: Verdict | None = None
    condemned_item: int | None = None
    item_started = 0.0


class Errand(Protocol):
    """A task that is ready to be sent."""

    def encode(self, task_id: int) -> bytes:
        """Return its frame."""
        ...


class Lease(_Attempt, Generic[W]):
    """One attempt's claim on a worker: made before it has one, and over when the worker has left it.

    Rules: the call sets `ticket`, and `started` and `deadline` when it sends the task; from `verdict` on, `deadline` is
    the supervisor's.  All times are monotonic.

    Attributes:
        task_id: of the attempt.
        fn, options: what the call runs, and how.
        owner: the map or stream that has made it, or None.
        is_admitted: True if it need not be asked whether there is room in the queue: its owner has begun to run, or it
            is a call in the background.
        item_timeout: seconds that each item of a batch may run, or None.
        condemned_item: the number of the item that is interrupted, or `BEFORE_FIRST`; None for the whole task.
        item_started: when that item began, 0 without one.
        worker: what it holds, or None.
        weight: how many bytes it is counted with, 0 where nobody counts.
        ticket: what it waits on in the queue, None if it has not waited.
        heir: the lease to which its worker is going, until that is settled.
        is_expired: True when it has waited long enough, and will not be given a worker any more.
        asked: when it began to wait, 0 if it has not.
        errand: what encodes its task, if that may be sent before its caller wakes up; or None.
        is_sent: True if it was; the caller is woken by the answer.
        outcome: what that means, if its worker was given back before the caller wakes up; else None.
        started: when the task was sent, 0 before.
        deadline: when the supervisor stops the task: interrupts it, or once it has, kills its worker.
        verdict: why the supervisor has interrupted it, or None.
        interrupted: when that was, or infinite.
        is_counted: True once the call is counted as ended.
    """

    # What is so at first is not written into each, here and above: most leases never set most of it.
    worker: W | None = None
    heir: Lease[W] | None = None
    errand: Errand | None = None
    fn: Callable[..., object] | None = None
    options: CallOptions | None = None
    item_timeout: float | None = None
    weight = 0
    is_counted = False

    def __init__(self, task_id: int, owner: object = None, *, is_admitted: bool = False) -> None:
        self.task_id = task_id
        self.owner = owner
        self.is_admitted = is_admitted

    def begin_anew(self, task_id: int) -> None:
        """Begin another attempt, after the worker of the one before has died."""
        self.task_id = task_id
        for name in vars(_Attempt):
            vars(self).pop(name, None)

    def pardon(self, deadline: float) -> None:
        """Take a verdict back whose item has ended before it felt the interrupt; the next one has until `deadline`."""
        self.verdict = None
        self.condemned_item = None
        self.item_started = 0.0
        self.interrupted = math.inf
        self.deadline = deadline

    @property
    def queued(self) -> float:
        """How long it has waited for its worker, in seconds."""
        return self.started - self.asked if self.asked else 0.0

    @property
    def is_waiting(self) -> bool:
        """True while it is in the queue and wants a worker."""
        return self.ticket is not None and not self.is_expired and self.ticket.is_open
