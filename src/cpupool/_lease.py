"""A call's claim on a worker, and why the supervisor stops a task."""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from ._waiting import Ticket

W = TypeVar("W")


class Verdict(enum.Enum):
    """Why the supervisor stops a task."""

    TIMED_OUT = "timed out"
    GIVEN_UP = "given up"  # by its caller, who is gone
    POOL_CLOSED = "pool closed"


class Lease(Generic[W]):
    """One attempt's claim on a worker: made before it has one, and over when the worker has left it.

    Rules: the call sets `ticket`, and `started` and `deadline` when it sends the task; from `verdict` on, `deadline` is
    the supervisor's.  All times are monotonic.

    Attributes:
        task_id: of the attempt.
        worker: what it holds, or None.
        ticket: what it waits on in the queue, None if it has not waited.
        heir: the lease to which its worker is going, until that is settled.
        is_expired: True when it has waited long enough, and will not be given a worker any more.
        asked: when it began to wait, 0 if it has not.
        started: when the task was sent, 0 before.
        deadline: when the supervisor stops the task: interrupts it, or once it has, kills its worker.
        verdict: why the supervisor has interrupted it, or None.
        interrupted: when that was, or infinite.
    """

    __slots__ = (
        "asked",
        "deadline",
        "heir",
        "interrupted",
        "is_expired",
        "started",
        "task_id",
        "ticket",
        "verdict",
        "worker",
    )

    def __init__(self, task_id: int) -> None:
        self.worker: W | None = None
        self.heir: Lease[W] | None = None
        self.begin(task_id)

    def begin(self, task_id: int) -> None:
        """Begin an attempt, after the worker of the one before has died."""
        self.task_id = task_id
        self.ticket: Ticket | None = None
        self.is_expired = False
        self.asked = 0.0
        self.started = 0.0
        self.deadline = math.inf
        self.interrupted = math.inf
        self.verdict: Verdict | None = None

    @property
    def queued(self) -> float:
        """How long it has waited for its worker, in seconds."""
        return self.started - self.asked if self.asked else 0.0

    @property
    def is_waiting(self) -> bool:
        """True while it is in the queue and wants a worker."""
        return self.ticket is not None and not self.is_expired and self.ticket.is_open
