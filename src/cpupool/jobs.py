"""Background jobs: work that nobody waits for, under an id by which its state and its result can be asked for later.

    jobs = Jobs(pool)
    job = jobs.submit(fn, 1, x="a")

For a web application that answers "202 Accepted" at once; `cpupool.starlette.routes` and `cpupool.fastapi.routes` have
the endpoints for the rest.  The jobs live in this process's memory: they are gone when it ends, and another server
process knows nothing of them.  What must survive a restart, be seen from several processes or run on other machines
needs a task queue (Celery, Dramatiq, arq, Temporal).

Rules: jobs change on one event loop only, in plain steps between two awaits; threads go there (`_on_loop`).  A job ends
once, in `Jobs._end`; its task may learn of that later.

Theory of operation: as many jobs as the pool has workers are with the pool, each in a task of its own; the others wait
here, in order, and have no task.  So a thousand jobs do not stand in the pool's queue before everybody else's calls.
When the pool is closed, or the event loop ends, so do all jobs.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import anyio
import anyio.from_thread

from . import CpuPool, CpuPoolView, PoolClosed, RemoteTraceback, TaskTimeout
from ._job import Job, JobCancelled, JobEvents, JobExpired, JobNotFound, JobsFull, JobsNotStarted, JobState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from . import PreparedCall

__all__ = ["Job", "JobCancelled", "JobExpired", "JobNotFound", "JobState", "Jobs", "JobsFull", "JobsNotStarted"]

P = ParamSpec("P")
T = TypeVar("T")

_logger = logging.getLogger("cpupool")

_EXPIRED_IDS = 10_000  # how many of them are remembered, to tell them from ids that never were
_GUESSED_RUN_TIME = 1.0  # seconds; before any job has ended


class Jobs:
    """Runs jobs in a pool, and remembers them for a while.

    Make one where the pool is made.  It needs no end of its own: its jobs end with the pool, or with the event loop.
    Submit on one event loop, the server's, or in threads that this has started (a FastAPI endpoint made with `def`).

    Args:
        pool: the pool, which has to be entered before the first job; or a view, for jobs with other options than its
            calls have: `Jobs(pool.options(timeout=600))`.  Jobs wait as long as it takes: its `queue_timeout` and
            `max_pending` do not concern them, nor its `on_report` and `on_start`.
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
        self._loop: object = None  # the event loop, or trio's token
        self._jobs: dict[str, Job] = {}
        self._queued: dict[Job, tuple[PreparedCall[object], Context]] = {}  # in order
        self._active: dict[Job, Callable[[], object]] = {}  # those that are with the pool, and what cancels them
        self._ended: deque[tuple[float, Job]] = deque()  # when they are to be forgotten, in this order
        self._expired: dict[str, None] = {}  # ids, in the same order
        self._is_forgetting = False  # there is a task for it
        self._cancel_forgetting: Callable[[], object] = int
        self._run_times: deque[float] = deque(maxlen=32)  # seconds
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself may forget them

    def submit(self, fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> Job:
        """Have `fn(*args, **kwargs)` run in a worker, some time, and return at once.

        The function and its arguments are pickled here and now.

        Raises:
            TypeError: `fn` is not a plain function.
            TaskNotPicklable: the function or an argument cannot be sent.
            JobsFull: too many jobs have not ended.
            JobsNotStarted, PoolClosed: the pool is not open.
            RuntimeError: there is no event loop here, or it is not that of the other jobs.
        """
        job = Job(self, getattr(fn, "__qualname__", type(fn).__qualname__))
        calls = self._calls.options(queue_timeout=None, background=True, on_start=job._start, on_report=job._report)
        call: PreparedCall[object] = calls.prepare(fn, *args, **kwargs)
        _on_loop("submit", self._take, job, call)
        return job

    def _take(self, job: Job, call: PreparedCall[object]) -> None:
        if self.pool.is_closed:
            raise PoolClosed(self.pool.settings.name)
        if not self.pool.is_started:
            raise JobsNotStarted(self.pool.settings.name)
        self._settle_on(_running_loop())
        self._forget_old()
        if len(self._jobs) >= self.max_jobs:
            if not self._ended:
                raise JobsFull(len(self._jobs), self._time_per_job())
            self._forget_first()
        self._jobs[job.id] = job
        self._queued[job] = call, copy_context()
        self._start_next()

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
        if job is None:
            raise (JobExpired if job_id in self._expired else JobNotFound)(job_id)
        return job

    def cancel(self, job: Job) -> bool:
        """Stop a job, as a call of the pool that is cancelled; False if it has ended before.

        The task may go on for the pool's `grace`; the job is over at once.

        Raises:
            ValueError: it is not one of these jobs.
            RuntimeError: there is no event loop here, or it is not that of the job.
        """
        if getattr(job, "jobs", None) is not self:
            raise ValueError(f"{job!r} is not one of these jobs; for an id, write jobs.cancel(jobs.get(job_id))")
        was_in_time: bool = _on_loop("cancel", self._cancel, job)
        return was_in_time

    def _cancel(self, job: Job) -> bool:
        if job.is_done:
            return False
        self._settle_on(_running_loop())
        if not self._end(job, JobState.CANCELLED):
            return False
        self._queued.pop(job, None)
        cancel = self._active.pop(job, None)
        if cancel is not None:
            cancel()
        self._start_next()
        self._forget_later()
        return True

    async def wait(self, job: Job) -> Any:
        """Wait until the job has ended, and return its result.

        Raises:
            Exception: the job's own error.
            PoolClosed: the pool was closed before it had ended.
            JobCancelled: it was cancelled.

        Cancellation: the job goes on.
        """
        async for _ in self.events(job):
            pass
        if job.error is not None:
            raise job.error.with_traceback(None)  # or it would grow with each who waits
        if job.state is JobState.CANCELLED:
            raise JobCancelled(job.id)
        return job.result

    def events(self, job: Job) -> AsyncIterator[Job]:
        """Return an asynchronous iterator: over the job now, whenever it has changed, and last when it has ended.

        Changes that come faster than they are taken are left out.

        Raises:
            RuntimeError: the job belongs to another event loop.

        Cancellation: the job goes on; so may the iteration.
        """
        if not job.is_done:
            self._settle_on(_running_loop())
        return JobEvents(job)

    # --- the work ---

    def _settle_on(self, loop: object) -> None:
        """Belong to this event loop from now on."""
        if loop is self._loop:
            return
        unfinished = [*self._active, *self._queued]
        if self._loop is not None and _call_soon(self._loop, int):  # it is still open
            if unfinished:
                raise RuntimeError(
                    "these jobs belong to another event loop, which still runs; make a Jobs for each event loop"
                )
            _call_soon(self._loop, self._cancel_forgetting)
        else:
            for task in self._tasks:  # they will never run again, and their calls hold workers
                coroutine = task.get_coro()
                if coroutine is not None:
                    coroutine.close()
        self._loop, self._is_forgetting = loop, False
        self._tasks.clear()
        self._active.clear()
        self._queued.clear()
        for job in unfinished:
            job._has_changed = None  # those who wait there wait for ever
            self._end(job, JobState.CANCELLED)

    def _start_next(self) -> None:
        while self._queued and len(self._active) < self.pool.max_workers:
            job = next(iter(self._queued))
            call, context = self._queued.pop(job)
            self._active[job] = self._spawn(context, partial(self._leave, job), self._run, job, call)

    def _spawn(
        self,
        context: Context,
        leave: Callable[[], None],
        function: Callable[..., Coroutine[Any, Any, None]],
        *args: Any,
    ) -> Callable[[], object]:
        """Run `function(*args)` in a task of its own, and `leave()` when that is over; return what cancels it.

        Not in a scope of anyio's: that would keep the task, and the worker, if the event loop is closed before its end.
        """
        if isinstance(self._loop, asyncio.AbstractEventLoop):
            task = self._loop.create_task(function(*args), context=context)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: leave())
            return task.cancel
        import trio

        scope = trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    await trio.lowlevel.checkpoint_if_cancelled()
                    await function(*args)
            finally:
                leave()

        trio.lowlevel.spawn_system_task(run, context=context)
        return scope.cancel

    def _leave(self, job: Job) -> None:
        """Go on when the task of a job is over."""
        if self._active.pop(job, None) is None:
            return  # it was cancelled
        if job.is_done:
            self._start_next()
            self._forget_later()
        else:  # somebody else has cancelled it
            self._cancel_with_all_queued(job, "the event loop has ended")

    async def _run(self, job: Job, call: PreparedCall[object]) -> None:
        try:
            result = await call.run()
        except Exception as error:
            self._fail(job, error)
            _drop_frames(error)
        else:
            self._end(job, JobState.SUCCEEDED, result=result)

    def _fail(self, job: Job, error: Exception) -> None:
        is_ours = not isinstance(error.__cause__, RemoteTraceback)  # else the work itself has raised it
        if is_ours and isinstance(error, PoolClosed):
            self._cancel_with_all_queued(job, "the pool was closed", error)
            return
        state = JobState.TIMED_OUT if is_ours and isinstance(error, TaskTimeout) else JobState.FAILED
        if not self._end(job, state, error=error):
            return
        with suppress(Exception):  # a filter or a handler of somebody's
            if state is JobState.TIMED_OUT:
                _logger.warning("%r: %s", job, error)
            else:
                _logger.error("%r", job, exc_info=error)

    def _cancel_with_all_queued(self, job: Job, why: str, error: Exception | None = None) -> None:
        unfinished = [job, *self._queued]
        self._queued.clear()
        ended = sum(self._end(each, JobState.CANCELLED, error=error) for each in unfinished)
        if ended:
            with suppress(Exception):
                _logger.warning("background jobs cancelled because %s: %d", why, ended)

    def _end(self, job: Job, state: JobState, *, result: object = None, error: Exception | None = None) -> bool:
        """End a job; False if it has ended before: it was cancelled."""
        if not job._end(state, result=result, error=error):
            return False
        if job.started_at is not None and job.ended_at is not None and state is not JobState.CANCELLED:
            self._run_times.append((job.ended_at - job.started_at).total_seconds())
        self._ended.append((time.monotonic() + self.ttl, job))
        return True

    # --- forgetting ---

    def _forget_later(self) -> None:
        if self._ended and not self._is_forgetting:
            self._is_forgetting = True
            self._cancel_forgetting = self._spawn(Context(), self._stop_forgetting, self._forget_in_time)

    async def _forget_in_time(self) -> None:
        while self._ended:
            await anyio.sleep(max(self._ended[0][0] - time.monotonic(), 0))
            self._forget_old()

    def _stop_forgetting(self) -> None:
        self._is_forgetting = False

    def _forget_old(self) -> None:
        while self._ended and self._ended[0][0] <= time.monotonic():
            self._forget_first()

    def _forget_first(self) -> None:
        _, job = self._ended.popleft()
        self._expired[job.id] = None  # first: a thread may ask
        del self._jobs[job.id]
        if len(self._expired) > _EXPIRED_IDS:
            del self._expired[next(iter(self._expired))]


def _drop_frames(error: BaseException | None) -> None:
    """Forget where an error has passed here: the frames hold the call, with its arguments."""
    while error is not None:
        error.with_traceback(None)
        error = error.__cause__ or error.__context__


# --- event loops ---


def _running_loop() -> object:
    """Return the event loop that runs in this thread: asyncio's, or trio's token; None without one."""
    lowlevel = getattr(sys.modules.get("trio"), "lowlevel", None)
    if lowlevel is not None and lowlevel.in_trio_run():
        token: object = lowlevel.current_trio_token()
        return token
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _call_soon(loop: Any, function: Callable[[], object]) -> bool:
    """Call it on an event loop, as `_running_loop` has returned it; False if that is closed."""
    call_soon = loop.call_soon_threadsafe if isinstance(loop, asyncio.AbstractEventLoop) else loop.run_sync_soon
    try:
        call_soon(function)
    except RuntimeError:  # trio's RunFinishedError is one, too
        return False
    return True


def _on_loop(what: str, function: Callable[..., T], *args: object) -> T:
    """Return `function(*args)`, run on the event loop of this thread, or on that which has started it."""
    if _running_loop() is not None:
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
            f"jobs.{what}() needs an event loop: call it there, in a 'def' endpoint, or in a thread that was started "
            "by anyio.to_thread.run_sync (in the place of asyncio.to_thread)"
        ) from None
