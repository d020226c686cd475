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


class Sendable(Protocol):
    """A task that is ready to be sent."""

    def encode(self, task_id: int) -> bytes:
        """Return its frame."""
        ...


class Lease(Generic[W]):
    """One attempt's claim on a worker: made before it has one, and over when the worker has left it.

    Rules: the call sets `ticket`; whoever sends the task sets `started` and `deadline`: the call, or on its event loop
    the one that gives it the worker.  From `verdict` on, `deadline` is the supervisor's.  All times are monotonic.

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
        errand: what encodes its task, if whoever gives it a worker may begin to send that; or None.
        is_begun: True if somebody has.
        outcome: what its answer means, once that is here; else None.
        started: when the task was sent, 0 before.
        deadline: when the supervisor stops the task: interrupts it, or once it has, kills its worker.
        verdict: why the supervisor has interrupted it, or None.
        interrupted: when that was, or infinite.
        is_counted: True once the call is counted as ended.
    """

    __slots__ = (
        "asked",
        "condemned_item",
        "deadline",
        "errand",
        "fn",
        "heir",
        "interrupted",
        "is_admitted",
        "is_begun",
        "is_counted",
        "is_expired",
        "item_started",
        "item_timeout",
        "options",
        "outcome",
        "owner",
        "started",
        "task_id",
        "ticket",
        "verdict",
        "weight",
        "worker",
    )

    def __init__(self, task_id: int, owner: object = None, *, is_admitted: bool = False) -> None:
        self.owner = owner
        self.is_admitted = is_admitted
        self.worker: W | None = None
        self.heir: Lease[W] | None = None
        self.errand: Sendable | None = None
        self.fn: Callable[..., object] | None = None
        self.options: CallOptions | None = None
        self.item_timeout: float | None = None
        self.weight = 0
        self.is_counted = False
        self.begin_anew(task_id)

    def begin_anew(self, task_id: int) -> None:
        """Begin an attempt; if it is not the first, the worker of the one before has died."""
        self.task_id = task_id
        self.ticket: Ticket | None = None
        self.is_expired = self.is_begun = False
        self.outcome: Any = None
        self.asked = self.started = self.item_started = 0.0
        self.deadline = self.interrupted = math.inf
        self.verdict: Verdict | None = None
        self.condemned_item: int | None = None

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
