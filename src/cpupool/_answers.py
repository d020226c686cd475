"""What a client is told when a call has failed: by error, and without a word of what went on inside."""

from __future__ import annotations

from typing import NamedTuple

from . import InitializerFailed, PoolBroken, PoolClosed, PoolFull, QueueTimeout, TaskStopped, TaskTimeout, WorkerDied
from .jobs import JobCancelled, JobExpired, JobNotFound


class Answer(NamedTuple):
    """An answer to an error.

    Attributes:
        status: of a response.
        text: what it says.
        code: with which a websocket is closed.
    """

    status: int
    text: str
    code: int


_BUSY = "The server is busy. Try again later."
_UNAVAILABLE = "The service is not available."
FAILED = "The work failed."
TOO_LONG = "The work took too long and was stopped."
CANCELLED = "The work was cancelled."

ANSWERS: dict[type[Exception], Answer] = {
    PoolFull: Answer(503, _BUSY, 1013),
    QueueTimeout: Answer(503, _BUSY, 1013),
    TaskTimeout: Answer(504, TOO_LONG, 1011),
    TaskStopped: Answer(503, CANCELLED, 1011),
    PoolClosed: Answer(503, _UNAVAILABLE, 1012),
    PoolBroken: Answer(503, _UNAVAILABLE, 1011),
    InitializerFailed: Answer(503, _UNAVAILABLE, 1011),
    WorkerDied: Answer(500, FAILED, 1011),
    JobExpired: Answer(410, "The job has ended, and its result has been removed.", 1008),
    JobNotFound: Answer(404, "There is no such job.", 1008),
    JobCancelled: Answer(409, CANCELLED, 1011),
}


def answer_to(error: Exception) -> Answer:
    """Return the answer to one of those errors."""
    return next(answer for kind, answer in ANSWERS.items() if isinstance(error, kind))
