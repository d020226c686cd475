"""`cpupool.jobs`: work that nobody waits for."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
import traceback
import weakref
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

import items
import reporting
import tasks
from cpupool import (
    CpuPool,
    InitializerFailed,
    PoolBroken,
    PoolClosed,
    PoolFull,
    PoolNotStarted,
    ResultNotPicklable,
    TaskNotPicklable,
    TaskTimeout,
    WorkerDied,
)
from cpupool.jobs import Job, JobCancelled, JobExpired, JobNotFound, Jobs, JobsFull, JobsNotStarted, JobState
from cpupool.testing import InlinePool

anyio_mark = pytest.mark.anyio


async def see_begun(gate: tasks.Gate) -> int:
    return await anyio.to_thread.run_sync(gate.wait_until_begun)


@anyio_mark
async def test_a_job_runs_and_its_result_stays() -> None:
    before = datetime.now(UTC)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        job = jobs.submit(tasks.add, 40, c=2)
        assert (job.state, job.result, job.started_at, job.ended_at) == (JobState.QUEUED, None, None, None)
        assert not job.is_done
        assert await jobs.wait(job) == 42
        assert jobs.get(job.id) is job
    assert (job.state, job.result, job.error, job.is_done) == (JobState.SUCCEEDED, 42, None, True)
    assert job.started_at is not None
    assert job.ended_at is not None
    assert before <= job.created_at <= job.started_at <= job.ended_at <= datetime.now(UTC)
    assert job.created_at.utcoffset() == timedelta(0)


@anyio_mark
async def test_nobody_can_guess_an_id() -> None:
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        ids = [jobs.submit(tasks.add, 1).id for _ in range(100)]
        assert len(set(ids)) == 100
        assert min(map(len, ids)) >= 22  # 128 bits
        assert all(id_.isascii() and "/" not in id_ for id_ in ids)
        assert all(id_ not in repr(jobs.get(id_)) for id_ in ids)  # it may stand in a log
        assert "(add) queued" in repr(jobs.get(ids[-1]))
        assert await jobs.wait(jobs.get(ids[-1])) == 1


@anyio_mark
async def test_a_job_goes_from_state_to_state_and_its_events_tell(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        first = jobs.submit(tasks.hold, *gate.arguments)
        heard = tmp_path / "heard"
        second = jobs.submit(reporting.report_until_seen, str(heard))
        await see_begun(gate)
        while first.state is not JobState.RUNNING:
            await anyio.lowlevel.checkpoint()
        assert (second.state, second.started_at) == (JobState.QUEUED, None)
        gate.open()
        seen = []
        async for each in jobs.events(second):
            seen.append((each.state.value, each.progress))
            if each.progress == "here":
                heard.touch()
        assert seen == [("queued", None), ("running", None), ("running", "here"), ("succeeded", "here")]
        assert [each.state async for each in jobs.events(second)] == [JobState.SUCCEEDED]


@anyio_mark
async def test_who_watches_may_look_away() -> None:
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        job = jobs.submit(tasks.spin_forever)
        watching = jobs.events(job)
        assert await anext(watching) is job
        assert (await anext(watching)).state is JobState.RUNNING
        for _ in range(2):
            with anyio.move_on_after(0.01) as scope:
                await anext(watching)
            assert scope.cancelled_caught
        jobs.cancel(job)
        assert (await anext(watching)).state is JobState.CANCELLED
        with pytest.raises(StopAsyncIteration):
            await anext(watching)


@anyio_mark
@pytest.mark.parametrize(
    ("fn", "argument", "kind"),
    [
        (items.fail, "such thing", ValueError),
        (tasks.exit_at_once, 3, WorkerDied),
        (items.return_lambda, 1, ResultNotPicklable),
    ],
)
async def test_a_job_fails_with_its_own_error(
    fn: Any, argument: object, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        job = jobs.submit(fn, argument)
        with pytest.raises(kind):
            await jobs.wait(job)
        assert (job.state, type(job.error)) == (JobState.FAILED, kind)
        assert await jobs.wait(jobs.submit(tasks.add, 1)) == 1
    (record,) = [each for each in caplog.records if each.name == "cpupool" and each.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is job.error
    assert job.name in record.getMessage()


@anyio_mark
@pytest.mark.parametrize(
    "error", [PoolFull(3, 0.05), PoolClosed("theirs"), TaskTimeout("task", 1.0, 0.0, 1.0, None), PoolBroken("why")]
)
async def test_what_the_work_itself_raises_is_no_word_about_the_pool(error: Exception, tmp_path: Path) -> None:
    """Even an error that looks like one of this pool."""
    path = tmp_path / "runs"
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        job = jobs.submit(tasks.append_line_and_raise, str(path), error)
        queued = jobs.submit(tasks.add, 1)
        with pytest.raises(type(error)):
            await jobs.wait(job)
        assert job.state is JobState.FAILED
        assert await jobs.wait(queued) == 1
        assert len(await anyio.Path(path).read_text()) > 0
        assert (await anyio.Path(path).read_text()).count("\n") == 1


@anyio_mark
async def test_a_pool_that_cannot_start_fails_its_jobs(tmp_path: Path) -> None:
    flaky = tasks.Flaky(tmp_path)
    async with CpuPool(1, initializer=flaky) as pool:
        jobs = Jobs(pool)
        flaky.flag.touch()
        with pytest.raises(WorkerDied):
            await jobs.wait(jobs.submit(tasks.exit_at_once, 3))
        job = jobs.submit(tasks.add, 1)
        with pytest.raises((InitializerFailed, PoolBroken)):
            await jobs.wait(job)
        assert job.state is JobState.FAILED


@anyio_mark
@pytest.mark.parametrize("end", ["error", "timeout", "result"])
async def test_a_job_that_has_ended_keeps_no_argument(end: str, caplog: pytest.LogCaptureFixture) -> None:
    """Only its result; not in the traceback of its error either."""
    caplog.set_level(logging.CRITICAL, "cpupool")
    async with CpuPool(1) as pool:
        jobs = Jobs(pool.options(timeout=0.1) if end == "timeout" else pool)
        argument = tasks.Weak()
        fn: Any = {"error": items.fail, "timeout": items.spin, "result": tasks.get_item}[end]
        job = jobs.submit(fn, argument)
        dead = weakref.ref(argument)
        del argument
        async for _ in jobs.events(job):
            pass
        assert dead() is None
        if job.error is not None:
            assert job.error.__traceback__ is None
            frames = {frame.f_code.co_name for frame, _ in traceback.walk_tb(job.error.__traceback__)}
            assert not frames & {"_run", "run", "complete"}, "they hold the pickled call"


@anyio_mark
async def test_each_who_waits_gets_an_error_as_if_alone() -> None:
    lengths = set()
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        job = jobs.submit(items.fail, "such thing")
        for _ in range(3):
            with pytest.raises(ValueError, match="no such thing") as caught:
                await jobs.wait(job)
            lengths.add(len(caught.traceback))
    assert len(lengths) == 1


@anyio_mark
async def test_arguments_are_those_of_the_moment(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        running = jobs.submit(tasks.hold, *gate.arguments)
        values = [1, 2, 3]
        job = jobs.submit(sum, values)
        values.clear()
        await see_begun(gate)
        gate.open()
        await jobs.wait(running)
        assert await jobs.wait(job) == 6


@anyio_mark
async def test_a_job_that_is_tried_again_begins_anew(tmp_path: Path) -> None:
    async with CpuPool(1) as pool:
        jobs = Jobs(pool.options(retries=1))
        job = jobs.submit(reporting.report_and_die_the_first_time, str(tmp_path / "died"))
        seen = [(each.state, each.progress) async for each in jobs.events(job)]
    assert seen[-1] == (JobState.SUCCEEDED, None)
    assert (JobState.RUNNING, "first") in seen


@anyio_mark
async def test_a_job_that_takes_too_long_is_timed_out() -> None:
    async with CpuPool(1) as pool:
        jobs = Jobs(pool.options(timeout=0.1))
        job = jobs.submit(tasks.spin_forever)
        with pytest.raises(TaskTimeout):
            await jobs.wait(job)
        assert job.state is JobState.TIMED_OUT


@anyio_mark
async def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        pid = await pool.run(tasks.get_pid)
        running = jobs.submit(tasks.say_so_and_write_in_finally, str(gate.begun), str(tmp_path / "cleaned"))
        queued = jobs.submit(tasks.append_line, str(tmp_path / "ran"))
        assert int(await anyio.Path(gate.begun).read_text()) == pid
        assert jobs.cancel(queued)
        assert jobs.cancel(running)
        assert not jobs.cancel(running)
        for job in (queued, running):
            assert (job.state, job.is_done, job.result, job.error) == (JobState.CANCELLED, True, None, None)
            assert job.ended_at is not None
            with pytest.raises(JobCancelled):
                await jobs.wait(job)
        assert (queued.started_at, running.started_at is None) == (None, False)
        assert await pool.run(tasks.get_pid) == pid, "the worker lives on"
        assert (tmp_path / "cleaned").exists(), "it was interrupted"
        assert not (tmp_path / "ran").exists()
        done = jobs.submit(tasks.add, 1)
        await jobs.wait(done)
        assert not jobs.cancel(done)
        assert done.state is JobState.SUCCEEDED


@anyio_mark
async def test_a_job_that_is_cancelled_as_a_worker_comes_stays_cancelled(tmp_path: Path) -> None:
    """The worker is there, and the job's task has not noticed; nor that it is cancelled."""
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool, anyio.create_task_group() as group:
        jobs = Jobs(pool)
        seen: list[JobState] = []

        async def hold_then_cancel() -> None:
            await pool.run(tasks.hold, *gate.arguments)
            jobs.cancel(job)

        async def watch() -> None:
            seen.extend([each.state async for each in jobs.events(job)])

        group.start_soon(hold_then_cancel)
        await see_begun(gate)
        job = jobs.submit(tasks.spin_forever)
        group.start_soon(watch)
        while "1 waiting" not in repr(pool):
            await anyio.lowlevel.checkpoint()
        gate.open()
        assert await jobs.wait(jobs.submit(tasks.add, 1)) == 1
        assert seen == [JobState.QUEUED, JobState.CANCELLED]
        assert (job.state, job.started_at) == (JobState.CANCELLED, None)


@anyio_mark
async def test_a_job_that_was_cancelled_in_time_never_runs(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        running = jobs.submit(tasks.hold, *gate.arguments)
        queued = jobs.submit(tasks.append_line, str(tmp_path / "ran"))
        await see_begun(gate)
        jobs.cancel(queued)
        assert not jobs._queued, "its arguments take no more memory"
        gate.open()
        await jobs.wait(running)
        await jobs.wait(jobs.submit(tasks.add, 1))
    assert not (tmp_path / "ran").exists()


@anyio_mark
async def test_a_job_that_is_cancelled_at_once_does_not_run(tmp_path: Path) -> None:
    """Though a worker is idle."""
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        for _ in range(10):
            jobs.cancel(jobs.submit(tasks.append_line, str(tmp_path / "ran")))
        assert await jobs.wait(jobs.submit(tasks.add, 1)) == 1
    assert not (tmp_path / "ran").exists()


@anyio_mark
async def test_a_filter_of_the_log_that_fails_costs_no_job(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise LookupError("no such name")

    logger = logging.getLogger("cpupool")
    logger.addFilter(refuse)
    try:
        async with CpuPool(1) as pool:
            jobs = Jobs(pool, max_jobs=2)
            failing = jobs.submit(items.fail, "such thing")
            other = jobs.submit(tasks.add, 1)
            with pytest.raises(ValueError, match="no such thing"):
                await jobs.wait(failing)
            assert await jobs.wait(other) == 1
            assert await jobs.wait(jobs.submit(tasks.add, 2)) == 2  # there is room again
    finally:
        logger.removeFilter(refuse)


def test_a_task_that_is_cancelled_before_its_first_step_leaves_its_place() -> None:
    async def work() -> object:
        job = jobs.submit(tasks.add, 1)
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()
        with pytest.raises(JobCancelled):
            await jobs.wait(job)
        return await jobs.wait(jobs.submit(tasks.add, 40, 2))

    with CpuPool(1) as pool:
        jobs = Jobs(pool)
        assert asyncio.run(work()) == 42


@anyio_mark
async def test_whoever_waits_may_leave_and_the_job_goes_on(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        job = jobs.submit(tasks.hold, *gate.arguments)
        pid = await see_begun(gate)
        with anyio.move_on_after(0.01) as scope:
            await jobs.wait(job)
        assert scope.cancelled_caught
        gate.open()
        assert await jobs.wait(job) == pid


# --- bounds ---


@anyio_mark
async def test_those_that_ended_first_make_room_and_what_has_not_ended_is_never_forgotten(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool, max_jobs=3)
        done = [jobs.submit(tasks.add, number) for number in range(3)]
        for each in done:
            await jobs.wait(each)
        held = jobs.submit(tasks.hold, *gate.arguments)
        with pytest.raises(JobExpired, match="has ended, and been forgotten"):
            jobs.get(done[0].id)
        assert jobs.get(done[1].id) is done[1]
        waiting = [jobs.submit(tasks.add, number) for number in range(2)]
        for each in done:
            with pytest.raises(JobExpired):
                jobs.get(each.id)
        with pytest.raises(JobsFull, match=r"3 jobs have not ended \(max_jobs\)") as caught:
            jobs.submit(tasks.add, 1)
        assert isinstance(caught.value, PoolFull)
        assert 0 < caught.value.retry_after < 0.5, "those before took no time"
        await see_begun(gate)
        gate.open()
        for each in (held, *waiting):
            await jobs.wait(each)
        assert await jobs.wait(jobs.submit(tasks.add, 5)) == 5


@anyio_mark
async def test_a_job_is_forgotten_after_its_time() -> None:
    """Its result takes no more memory then, whether somebody asks or not."""
    async with CpuPool(1) as pool:
        jobs = Jobs(pool, ttl=0.1)
        for _ in range(2):
            job = jobs.submit(tasks.add, 1)
            await jobs.wait(job)
            ended = time.monotonic()
            assert jobs.get(job.id).result == 1
            await_forgotten = weakref.ref(job)
            job_id = job.id
            del job
            with anyio.fail_after(10):
                while await_forgotten() is not None:
                    gc.collect()
                    await anyio.lowlevel.checkpoint()
            assert time.monotonic() - ended > 0.09
            with pytest.raises(JobExpired):
                jobs.get(job_id)
    for unknown in ("", "nonsense", "x" * 22):
        with pytest.raises(JobNotFound) as caught:
            jobs.get(unknown)
        assert type(caught.value) is JobNotFound


@anyio_mark
async def test_what_is_remembered_of_expired_jobs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpupool.jobs._EXPIRED_IDS", 2)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool, ttl=0)
        done = [jobs.submit(tasks.add, number) for number in range(4)]
        for each in done:
            await jobs.wait(each)
        while jobs._jobs:
            await anyio.lowlevel.checkpoint()
        with pytest.raises(JobNotFound) as caught:
            jobs.get(done[0].id)
        assert type(caught.value) is JobNotFound
        with pytest.raises(JobExpired):
            jobs.get(done[2].id)


@anyio_mark
async def test_jobs_do_not_stand_before_other_calls_nor_take_their_places(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1, max_pending=1, queue_timeout=0) as pool:
        jobs = Jobs(pool)
        held = jobs.submit(tasks.hold, *gate.arguments)
        path = str(tmp_path / "order")
        rest = [jobs.submit(tasks.append_text, path, "job ") for _ in range(20)]
        await see_begun(gate)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.options(queue_timeout=None).run, tasks.append_text, path, "call ")
            while "1 waiting" not in repr(pool):
                await anyio.lowlevel.checkpoint()
            gate.open()
        for each in (held, *rest):
            await jobs.wait(each)
        order = await anyio.Path(path).read_text()
    assert order.split().index("call") <= 1


@anyio_mark
async def test_a_job_has_its_place_while_others_fill_the_pool_s_queue(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    path = str(tmp_path / "order")
    async with CpuPool(1, max_pending=2) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await see_begun(gate)
        group.start_soon(pool.run, tasks.append_text, path, "first ")
        while "1 waiting" not in repr(pool):
            await anyio.lowlevel.checkpoint()
        jobs = Jobs(pool)
        job = jobs.submit(tasks.append_text, path, "job ")
        while "2 waiting" not in repr(pool):
            await anyio.lowlevel.checkpoint()
        health: list[str] = [pool.health]
        group.start_soon(pool.run, tasks.append_text, path, "second ")
        while "3 waiting" not in repr(pool):
            await anyio.lowlevel.checkpoint()
        assert [*health, pool.health] == ["ready", "degraded"]
        with pytest.raises(PoolFull):
            await pool.run(tasks.add, 1)
        late = Jobs(pool).submit(tasks.append_text, path, "late ")
        gate.open()
        await jobs.wait(job)
        await jobs.wait(late)
    assert await anyio.Path(path).read_text() == "first job second late "


# --- where it comes from, and the end ---

caller: ContextVar[str] = ContextVar("caller")


@anyio_mark
@pytest.mark.parametrize("in_thread", [False, True])
async def test_what_a_job_logs_is_logged_in_the_context_in_which_it_was_submitted(
    in_thread: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Logs are told apart by it; whichever job has made room for this one."""
    seen: list[str] = []

    def note_caller(record: logging.LogRecord) -> bool:
        seen.append(caller.get())
        return True

    caplog.handler.addFilter(note_caller)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        submitted = []
        for number in range(5):
            caller.set(str(number))
            if in_thread:
                submitted.append(await anyio.to_thread.run_sync(jobs.submit, items.fail, "such thing"))
            else:
                submitted.append(jobs.submit(items.fail, "such thing"))
        for each in submitted:
            with pytest.raises(ValueError, match="no such thing"):
                await jobs.wait(each)
    caplog.handler.removeFilter(note_caller)
    assert seen == ["0", "1", "2", "3", "4"]


@anyio_mark
async def test_a_thread_of_the_event_loop_may_submit_and_cancel() -> None:
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        job = await anyio.to_thread.run_sync(jobs.submit, tasks.spin_forever)
        assert await anyio.to_thread.run_sync(jobs.cancel, job)
        done = await anyio.to_thread.run_sync(jobs.submit, tasks.add, 1)
        assert await jobs.wait(done) == 1


def test_without_an_event_loop_it_is_refused() -> None:
    with CpuPool(1) as pool, pytest.raises(RuntimeError, match=r"jobs.submit\(\) needs an event loop"):
        Jobs(pool).submit(tasks.add, 1)


@anyio_mark
async def test_a_pool_that_nobody_has_started_is_refused() -> None:
    """Nobody would close it when the server stops."""
    pool = CpuPool(1, name="of jobs")
    jobs = Jobs(pool)
    with pytest.raises(JobsNotStarted) as caught:
        jobs.submit(tasks.add, 1)
    assert isinstance(caught.value, PoolNotStarted)
    for cure in ("'of jobs'", "with TestClient(app) as client", "install(app, pool, name='jobs'", "async with pool"):
        assert cure in str(caught.value)
    async with pool:
        assert await jobs.wait(jobs.submit(tasks.add, 1)) == 1


@anyio_mark
async def test_what_cannot_be_a_job_is_refused() -> None:
    async def work() -> None: ...

    pool = CpuPool(1)
    jobs = Jobs(pool)
    wrongs: list[Any] = [work, work(), 5, tasks.AsyncCallable()]
    for wrong in wrongs:
        with pytest.raises(TypeError, match=r"'def'|takes a function"):
            jobs.submit(wrong)
    for fn, argument in ((lambda _: None, 1), (tasks.return_it, threading.Lock())):
        with pytest.raises(TaskNotPicklable):
            jobs.submit(fn, argument)
    for not_ours in ("an id", 5):
        with pytest.raises(ValueError, match=r"is not one of these jobs; for an id, write jobs.cancel"):
            jobs.cancel(not_ours)  # type: ignore[arg-type]
    for arguments in ({"max_jobs": 0}, {"max_jobs": True}, {"ttl": -1}, {"ttl": float("nan")}, {"max_jobs": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            Jobs(pool, **arguments)
    with pytest.raises(TypeError, match="Jobs takes a CpuPool, or a view of one, not 5"):
        Jobs(5)  # type: ignore[arg-type]
    async with pool:
        job = jobs.submit(tasks.add, 1)
        with pytest.raises(ValueError, match="is not one of these jobs"):
            Jobs(pool).cancel(job)
    with pytest.raises(PoolClosed):
        jobs.submit(tasks.add, 1)


@anyio_mark
async def test_when_the_pool_closes_its_jobs_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        running = jobs.submit(tasks.report_begin, str(gate.begun), tasks.spin_forever)
        queued = [jobs.submit(tasks.append_line, str(tmp_path / "ran")) for _ in range(5)]
        await anyio.Path(gate.begun).read_text()
        await pool.aclose(0)
        for each in (running, *queued):
            with pytest.raises(PoolClosed):
                await jobs.wait(each)
            assert each.state is JobState.CANCELLED
    assert not (tmp_path / "ran").exists()
    assert "background jobs cancelled because the pool was closed: 6" in caplog.text


@anyio_mark
async def test_a_pool_that_drains_lets_a_job_end(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1, drain=20) as pool:
        jobs = Jobs(pool)
        job = jobs.submit(tasks.hold, *gate.arguments)
        pid = await see_begun(gate)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.aclose)
            gate.open()
            assert await jobs.wait(job) == pid


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_when_the_event_loop_ends_its_jobs_end_and_the_next_loop_starts_anew(backend: str) -> None:
    pool = CpuPool(1)
    jobs = Jobs(pool)

    async def leave() -> list[Job]:
        left = [jobs.submit(tasks.spin_forever) for _ in range(3)]
        async for each in jobs.events(left[0]):
            if each.state is JobState.RUNNING:
                break
        return left

    async def work() -> object:
        return await jobs.wait(jobs.submit(tasks.add, 40, 2))

    with pool:
        for _ in range(2):
            left = anyio.run(leave, backend=backend)
            assert {each.state for each in left} == {JobState.CANCELLED}
            assert anyio.run(work, backend=backend) == 42


def test_an_event_loop_that_is_closed_as_it_is_leaves_its_jobs_cancelled() -> None:
    """Its tasks never run again."""

    async def submit(times: int) -> list[Job]:
        return [jobs.submit(tasks.spin_forever) for _ in range(times)]

    async def work() -> object:
        with pytest.raises(JobCancelled):
            await jobs.wait(left[1])
        return await jobs.wait(jobs.submit(tasks.add, 40, 2))

    with CpuPool(1) as pool:
        jobs = Jobs(pool)
        loop = asyncio.new_event_loop()
        left = loop.run_until_complete(submit(2))
        with contextlib.suppress(TimeoutError):
            loop.run_until_complete(asyncio.wait_for(asyncio.shield(loop.create_task(jobs.wait(left[0]))), 0))
        left_tasks = asyncio.all_tasks(loop)
        for task in left_tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio would say that it was destroyed
        loop.close()
        assert asyncio.run(work()) == 42
        assert {each.state for each in left} == {JobState.CANCELLED}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_jobs_of_one_event_loop_are_not_taken_by_another(backend: str) -> None:
    refused: list[int] = []
    job: Job

    async def other() -> None:
        with pytest.raises(RuntimeError, match="these jobs belong to another event loop, which still runs"):
            jobs.submit(tasks.add, 1)
        with pytest.raises(RuntimeError, match="these jobs belong to another event loop, which still runs"):
            jobs.cancel(job)
        with pytest.raises(RuntimeError, match="these jobs belong to another event loop, which still runs"):
            await jobs.wait(job)
        refused.append(1)

    async def first() -> None:
        nonlocal job
        ended = jobs.submit(tasks.add, 1)
        await jobs.wait(ended)
        job = jobs.submit(tasks.spin_forever)
        await anyio.to_thread.run_sync(lambda: anyio.run(other, backend=backend))
        with anyio.fail_after(10):
            while ended.id in jobs._jobs:  # it is forgotten all the same
                await anyio.lowlevel.checkpoint()
        jobs.cancel(job)
        await jobs.wait(jobs.submit(tasks.add, 1))

    with CpuPool(1) as pool:
        jobs = Jobs(pool, ttl=0.5)
        anyio.run(first, backend=backend)
        anyio.run(first, backend=backend)
    assert len(refused) == 2


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_event_loops_may_take_turns(backend: str) -> None:
    async def work(number: int) -> tuple[str, object]:
        job = jobs.submit(tasks.add, number)
        return job.id, await jobs.wait(job)

    with (
        CpuPool(1) as pool,
        anyio.from_thread.start_blocking_portal(backend) as one,
        anyio.from_thread.start_blocking_portal(backend) as other,
    ):
        jobs = Jobs(pool, ttl=0.05)
        ids = []
        for number in range(10):
            job_id, result = (one, other)[number % 2].call(work, number)
            ids.append(job_id)
            assert result == number
        deadline = time.monotonic() + 10
        while jobs._jobs:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for each in ids:
            with pytest.raises(JobExpired):
                jobs.get(each)


def test_a_loop_with_eager_tasks() -> None:
    if not hasattr(asyncio, "eager_task_factory"):
        pytest.skip("CPython 3.12")

    async def work() -> object:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
        async with CpuPool(1) as pool:
            jobs = Jobs(pool)
            return [await jobs.wait(each) for each in [jobs.submit(tasks.add, number) for number in range(5)]]

    assert asyncio.run(work()) == list(range(5))


@anyio_mark
async def test_with_a_pool_without_workers() -> None:
    async with InlinePool() as pool:
        jobs = Jobs(pool)
        job = jobs.submit(reporting.report_all, [1, 2])
        assert job.state is JobState.QUEUED
        assert await jobs.wait(job) == 2
        assert (job.progress, job.started_at is None) == (2, False)
        failing = jobs.submit(tasks.raise_exception, PoolFull, 1, 0.1)
        with pytest.raises(PoolFull):
            await jobs.wait(failing)


@anyio_mark
async def test_with_a_fixture_of_the_plugin(inline_pool: CpuPool) -> None:
    jobs = Jobs(inline_pool)
    assert await jobs.wait(jobs.submit(tasks.add, 40, 2)) == 42
