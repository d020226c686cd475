"""One background job: what is known of it, what it can become, and the errors that go with it."""

from __future__ import annotations

import enum
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio

from . import CpuPoolError, PoolFull, PoolNotStarted

if TYPE_CHECKING:
    from .jobs import Jobs


class JobState(enum.StrEnum):
    """What has become of a job so far."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


_UNFINISHED = frozenset({JobState.QUEUED, JobState.RUNNING})


class Job:
    """One job, as it stands now; `Jobs.submit` makes it.

    Attributes:
        id: how it is asked for; nobody can guess it.
        jobs: those that it belongs to.
        name: of the function that it runs.
        state: what has become of it so far.
        progress: what it has passed to `cpupool.report` last, or None.
        created_at: when it was submitted; this and the other times are aware, in UTC.
        started_at: when a worker took it; None while it waits.
        ended_at: None until it is done.
        result: what it has returned; None before, and if it has not succeeded.
        error: the exception it has ended with, or None; whoever waits for the job gets this one.
        version: how often it has changed.
    """

    def __init__(self, jobs: Jobs, name: str) -> None:
        self.id: str = secrets.token_urlsafe(16)
        self.jobs = jobs
        self.name = name
        self.state: JobState = JobState.QUEUED
        self.progress: Any = None
        self.created_at: datetime = datetime.now(UTC)
        self.started_at: datetime | None = None
        self.ended_at: datetime | None = None
        self.result: Any = None
        self.error: Exception | None = None
        self.version: int = 0
        self._has_changed: anyio.Event | None = None  # somebody waits for it

    def __repr__(self) -> str:
        return f"<Job {self.id[:6]}... ({self.name}) {self.state}>"  # whoever has the whole id can ask for its result

    @property
    def is_done(self) -> bool:
        """True once it has ended, in whatever way."""
        return self.state not in _UNFINISHED

    def _change(self, **values: Any) -> bool:
        """Set attributes; False if it is done already: it was cancelled, and its work does not know that yet."""
        if self.is_done:
            return False
        for name, value in values.items():
            setattr(self, name, value)
        self.version += 1
        if self._has_changed is not None:
            self._has_changed.set()
            self._has_changed = None
        return True

    def _start(self) -> None:
        """A worker has it; again, if it is tried again."""
        self._change(state=JobState.RUNNING, started_at=datetime.now(UTC), progress=None)

    def _report(self, value: object) -> None:
        self._change(progress=value)

    def _end(self, state: JobState, *, result: object = None, error: Exception | None = None) -> bool:
        return self._change(result=result, error=error, ended_at=datetime.now(UTC), state=state)  # a thread may look


class JobEvents:
    """Iterates over a job's changes; not a generator, which a cancellation would end, and which has to be closed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._version = -1
        self._is_over = False

    def __aiter__(self) -> JobEvents:
        return self

    async def __anext__(self) -> Job:
        if self._is_over:
            raise StopAsyncIteration
        job = self._job
        if self._version == job.version:
            if job._has_changed is None:
                job._has_changed = anyio.Event()
            await job._has_changed.wait()
        self._version, self._is_over = job.version, job.is_done
        return job


class _JobError(CpuPoolError):
    """What concerns one job."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id


class JobNotFound(_JobError, LookupError):
    """There is, and was, no job of this id here.

    Attributes:
        job_id: the id.
    """

    def __str__(self) -> str:
        return f"there is no job {self.job_id!r} here; only the server process that has taken a job knows of it"


class JobExpired(JobNotFound):
    """There was such a job; it ended more than `ttl` seconds ago, or had to make room for newer ones.

    The last 10,000 of them are told from ids that never were.
    """

    def __str__(self) -> str:
        return f"the job {self.job_id!r} has ended, and been forgotten (ttl, max_jobs)"


class JobCancelled(_JobError):
    """The job was cancelled, or the event loop ended before it had.

    Attributes:
        job_id: its id.
    """

    def __str__(self) -> str:
        return f"the job {self.job_id!r} was cancelled"


class JobsFull(PoolFull):
    """There are `max_jobs` jobs that have not ended; this one was not taken.

    Attributes:
        pending: how many jobs have not ended.
        retry_after: seconds after which one of them will have ended, as estimated from those before.
    """

    def __str__(self) -> str:
        return f"{self.pending} jobs have not ended (max_jobs). Try again in about {self.retry_after:.3g} s."


class JobsNotStarted(PoolNotStarted):
    """The pool of these jobs was not started, so nobody seems to care for its end, and theirs.

    Attributes:
        name: the pool's name.
    """

    def __str__(self) -> str:
        return (
            f"the pool {self.name!r}, in which these jobs are to run, was not started. (1) In a test, let the "
            "application's lifespan run: 'with TestClient(app) as client', not 'client = TestClient(app)'. (2) Give "
            "the application each of its pools: cpupool.fastapi.install(app, pool, name='jobs', "
            "health='/health/jobs'), or lifespan=cpupool.starlette.lifespan(pool). (3) Elsewhere, write "
            "'async with pool: ...' around it."
        )
