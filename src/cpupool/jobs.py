"""Background jobs: work that nobody waits for, under an id by which its state and its result can be asked for later.

    jobs = Jobs(pool)
    job = jobs.submit(fn, 1, x="a")

For a web application that answers "202 Accepted" at once; `cpupool.starlette.routes` and `cpupool.fastapi.routes` have
the endpoints for the rest.  The jobs live in this process's memory: they are gone when it ends, and another server
process knows nothing of them.  What must survive a restart, be seen from several processes or run on other machines
needs a task queue (Celery, Dramatiq, arq, Temporal).

Rules: everything happens on the event loop on which jobs are submitted, in plain steps between two awaits; threads go
there (`_on_loop`).  A job changes its state in `Job._change` alone, and ends once, in `Jobs._end`.

Theory of operation: as many jobs as the pool has workers are with the pool, each in a task of its own; the others wait
here, in order, and have no task.  So a thousand jobs do not stand in the pool's queue before everybody else's calls,
and do not fill it (`max_pending`).  When the pool is closed, or the event loop ends, so do all jobs.
"""

from __future__ import annotations

import asyncio
import enum
import inspect
import logging
import secrets
import sys
import time
from collections import deque
from contextvars import Context, copy_context
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import anyio
import anyio.from_thread

from . import CpuPool, CpuPoolError, CpuPoolView, PoolClosed, PoolFull, TaskTimeout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import TypeAlias

    Work: TypeAlias = Callable[[CpuPoolView], Awaitable[object]]

__all__ = ["Job", "JobCancelled", "JobExpired", "JobNotFound", "JobState", "Jobs", "JobsFull"]

P = ParamSpec("P")
T = TypeVar("T")

_logger = logging.getLogger("cpupool")

_EXPIRED_IDS = 10_000  # how many of them are remembered, to tell them from ids that never were
_GUESSED_RUN_TIME = 1.0  # seconds; before any job has ended


class JobState(enum.StrEnum):
    """What has become of a job so far."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


_FINAL = frozenset(JobState) - {JobState.QUEUED, JobState.RUNNING}


class JobNotFound(CpuPoolError, LookupError):
    """There is, and was, no job of this id here."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"there is no job {self.job_id!r} here; only the server process that has taken a job knows of it"


class JobExpired(JobNotFound):
    """There was such a job; it ended more than `ttl` seconds ago, or had to make room for newer ones."""

    def __str__(self) -> str:
        return f"the job {self.job_id!r} has ended, and been forgotten (ttl, max_jobs)"


class JobCancelled(CpuPoolError):
    """The job was cancelled, and has no result."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

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


class Job:
    """One job, as it stands now.

    Attributes:
        id: how it is asked for; nobody can guess it.
        state: what has become of it so far.
        progress: what it has passed to `cpupool.report` last, or None.
        created_at: when it was submitted; this and the other times are aware, in UTC.
        started_at: when a worker took it; None while it waits.
        ended_at: None until it is done.
        result: what it has returned; None before, and if it has not succeeded.
        error: the exception it has ended with, or None.
        version: how often it has changed.
    """

    def __init__(self) -> None:
        self.id: str = secrets.token_urlsafe(16)
        self.state: JobState = JobState.QUEUED
        self.progress: Any = None
        self.created_at: datetime = datetime.now(UTC)
        self.started_at: datetime | None = None
        self.ended_at: datetime | None = None
        self.result: Any = None
        self.error: Exception | None = None
        self.version: int = 0
        self._scope = anyio.CancelScope()
        self._has_changed = anyio.Event()
        self._expires = float("inf")

    def __repr__(self) -> str:
        return f"<Job {self.id[:6]}... {self.state}>"  # whoever has the whole id can ask for its result

    @property
    def is_done(self) -> bool:
        """True once it has ended, in whatever way."""
        return self.state in _FINAL

    def _change(self, **values: Any) -> None:
        if self.is_done:
            return  # it was cancelled, and does not know it yet
        for name, value in values.items():
            setattr(self, name, value)
        self.version += 1
        has_changed, self._has_changed = self._has_changed, anyio.Event()
        has_changed.set()


class Jobs:
    """Runs jobs in a pool, and remembers them for a while.

    Make one where the pool is made; it needs no end of its own.  Submit on one event loop, the server's, or in threads
    that this has started (a FastAPI endpoint made with `def`).

    Args:
        pool: the pool; or a view, for jobs with other options than its calls have: `Jobs(pool.options(timeout=600))`.
            Jobs wait as long as it takes: its `queue_timeout` and `max_pending` do not concern them; its `on_report`
            and `on_start` neither.
        max_jobs: how many jobs are remembered, with their results.  When there are so many, those that ended first are
            forgotten early; if none has ended, `JobsFull` is raised.
        ttl: seconds for which a job is remembered after its end.

    Raises:
        TypeError, ValueError: an argument is not what it can be.
    """

    def __init__(self, pool: CpuPool | CpuPoolView, max_jobs: int = 1000, ttl: float = 3600.0) -> None:
        given: object = pool
        if not isinstance(given, (CpuPool, CpuPoolView)):
            raise TypeError(f"Jobs takes a CpuPool, or a view of one, not {given!r}")
        if isinstance(max_jobs, bool) or not isinstance(max_jobs, int) or max_jobs < 1:
            raise ValueError(f"max_jobs must be a whole number of at least 1, not {max_jobs!r}")
        if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not ttl >= 0:
            raise ValueError(f"ttl must be seconds, 0 or more, not {ttl!r}")
        self.pool: CpuPool = pool.pool if isinstance(pool, CpuPoolView) else pool
        self.max_jobs = max_jobs
        self.ttl = ttl
        self._calls = pool
        self._jobs: dict[str, Job] = {}
        self._queued: dict[Job, tuple[Work, Context]] = {}  # in order
        self._active = 0  # how many are with the pool
        self._ended: deque[Job] = deque()  # those that are remembered, in the order of their ends
        self._expired: dict[str, None] = {}  # ids, in the same order
        self._run_times: deque[float] = deque(maxlen=32)  # seconds
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself may forget them

    def submit(self, fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> Job:
        """Have `fn(*args, **kwargs)` run in a worker, some time, and return at once.

        The function and its arguments are pickled when its turn comes; what goes wrong then is the job's error, and in
        the log.

        Raises:
            TypeError: `fn` is not a plain function.
            JobsFull: too many jobs have not ended.
            PoolClosed: the pool is closed.
            RuntimeError: there is no event loop here.
        """
        given: object = fn
        if not callable(given) or inspect.iscoroutinefunction(given):
            if inspect.iscoroutine(given):
                given.close()  # or Python would warn that it was never awaited
            raise TypeError(f"jobs.submit() takes a function made with 'def', and its arguments, not {given!r}")
        return _on_loop("submit", self._take, lambda pool: pool.run(fn, *args, **kwargs))

    def _take(self, work: Work) -> Job:
        if self.pool.is_closed:
            raise PoolClosed(self.pool.settings.name)
        self._forget_old()
        if len(self._jobs) >= self.max_jobs:
            if not self._ended:
                raise JobsFull(len(self._jobs), self._time_per_job())
            self._forget(self._ended.popleft())
        job = Job()
        self._jobs[job.id] = job
        self._queued[job] = work, copy_context()
        self._start_next()
        return job

    def _time_per_job(self) -> float:
        run_time = sum(self._run_times) / len(self._run_times) if self._run_times else _GUESSED_RUN_TIME
        return run_time / self.pool.max_workers

    def get(self, job_id: str) -> Job:
        """Return the job of this id.

        Raises:
            JobExpired: there was one.
            JobNotFound: there is none.
        """
        job = self._jobs.get(job_id)
        if job is not None and time.monotonic() < job._expires:
            return job
        raise JobNotFound(job_id) if job is None and job_id not in self._expired else JobExpired(job_id)

    def cancel(self, job: Job) -> bool:
        """Stop a job, as a call of the pool that is cancelled; False if it has ended before.

        The task may go on for the pool's `grace`; the job is over at once.
        """
        return _on_loop("cancel", self._cancel, job)

    def _cancel(self, job: Job) -> bool:
        if job.is_done:
            return False
        self._queued.pop(job, None)
        job._scope.cancel()
        self._end(job, JobState.CANCELLED)
        return True

    async def wait(self, job: Job) -> Any:
        """Wait until the job has ended, and return its result.

        Raises:
            Exception: the job's own error.
            JobCancelled: it was cancelled, or the pool closed before its turn came.

        Cancellation: the job goes on.
        """
        async for _ in self.events(job):
            pass
        if job.error is not None:
            raise job.error
        if job.state is JobState.CANCELLED:
            raise JobCancelled(job.id)
        return job.result

    def events(self, job: Job) -> AsyncIterator[Job]:
        """Return an asynchronous iterator: over the job now, whenever it has changed, and last when it has ended.

        Changes that come faster than they are taken are left out.

        Cancellation: the job goes on; so may the iteration.
        """
        return _Events(job)

    # --- the work ---

    def _start_next(self) -> None:
        while self._queued and self._active < self.pool.max_workers:
            job = next(iter(self._queued))
            work, context = self._queued.pop(job)
            self._active += 1
            if _in_trio():
                import trio

                trio.lowlevel.spawn_system_task(self._live, job, work, context=context)
            else:
                task = asyncio.create_task(self._live(job, work), context=context)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _live(self, job: Job, work: Work) -> None:
        try:
            with job._scope:
                await self._run(job, work)
        except BaseException:  # the event loop ends
            self._end(job, JobState.CANCELLED)
            self._cancel_queued()
            raise
        finally:
            self._active -= 1
        self._start_next()

    async def _run(self, job: Job, work: Work) -> None:
        calls = self._calls.options(
            queue_timeout=None,
            on_start=lambda: job._change(state=JobState.RUNNING, started_at=datetime.now(UTC)),
            on_report=lambda value: job._change(progress=value),
        )
        try:
            result = await _call(work, calls)
        except PoolClosed as error:
            self._end(job, JobState.CANCELLED, error=error)
        except TaskTimeout as error:
            self._end(job, JobState.TIMED_OUT, error=error)
            _logger.warning("%r: %s", job, error)
        except Exception as error:
            self._end(job, JobState.FAILED, error=error)
            _logger.error("%r", job, exc_info=error)
        else:
            self._end(job, JobState.SUCCEEDED, result=result)

    def _cancel_queued(self) -> None:
        queued, self._queued = self._queued, {}
        for job in queued:
            self._end(job, JobState.CANCELLED)

    def _end(self, job: Job, state: JobState, *, result: object = None, error: Exception | None = None) -> None:
        if job.is_done:
            return  # it was cancelled
        self._forget_old()
        now = datetime.now(UTC)
        if job.started_at is not None:
            self._run_times.append((now - job.started_at).total_seconds())
        job._expires = time.monotonic() + self.ttl
        self._ended.append(job)
        job._change(state=state, ended_at=now, result=result, error=error)

    # --- forgetting ---

    def _forget_old(self) -> None:
        now = time.monotonic()
        while self._ended and self._ended[0]._expires <= now:
            self._forget(self._ended.popleft())

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]
        self._expired[job.id] = None
        if len(self._expired) > _EXPIRED_IDS:
            del self._expired[next(iter(self._expired))]


class _Events:
    """An asynchronous iterator; not a generator, which a cancellation would end, and which has to be closed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._version = -1
        self._is_over = False

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> Job:
        if self._is_over:
            raise StopAsyncIteration
        if self._version == self._job.version:
            await self._job._has_changed.wait()
        self._version, self._is_over = self._job.version, self._job.is_done
        return self._job


async def _call(work: Work, calls: CpuPoolView) -> object:
    """Make the call, when there is room for it in the pool's queue."""
    while True:
        try:
            return await work(calls)
        except PoolFull as full:
            await anyio.sleep(min(max(full.retry_after, 0.01), 1))


def _on_loop(what: str, function: Callable[..., T], *args: object) -> T:
    """Return `function(*args)`, run on the event loop of this thread, or on that which has started it."""
    if _in_trio() or _in_asyncio():
        return function(*args)
    has_begun = False

    def run() -> T:
        nonlocal has_begun
        has_begun = True
        return function(*args)

    try:
        return anyio.from_thread.run_sync(run)
    except RuntimeError:
        if has_begun:
            raise
        raise RuntimeError(
            f"jobs.{what}() is for a program with an event loop: call it there, or in a thread that was started by "
            "anyio.to_thread or for a 'def' endpoint; elsewhere, pool.as_executor() runs work in the background"
        ) from None


def _in_trio() -> bool:
    lowlevel = getattr(sys.modules.get("trio"), "lowlevel", None)
    return lowlevel is not None and lowlevel.in_trio_run()


def _in_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
