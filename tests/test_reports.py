"""What a running task reports is seen by whoever awaits it (row D3)."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

import cpupool
import reporting
import tasks
from cpupool import CpuPool, TaskTimeout, WorkerDied, _payload, _reports
from cpupool._status import STATUS_PAGE_SIZE

pytestmark = pytest.mark.anyio


async def test_d3_reports_are_seen_while_the_task_runs() -> None:
    seen: list[Any] = []
    async with CpuPool(1) as pool:
        with anyio.fail_after(20):
            with anyio.CancelScope() as scope:

                def on_report(value: Any) -> None:
                    seen.append(value)
                    scope.cancel()

                await pool.options(on_report=on_report).run(reporting.report_then, {"done": 3}, tasks.spin_forever)
            assert await pool.run(tasks.add, 1) == 1
    assert seen == [{"done": 3}]


async def test_d3_the_last_report_is_seen_before_the_result_and_others_may_be_left_out() -> None:
    seen: list[int] = []
    async with CpuPool(1) as pool:
        assert await pool.options(on_report=seen.append).run(reporting.report_all, list(range(100_000))) == 100_000
    assert seen[-1] == 99_999
    assert seen == sorted(set(seen))
    assert len(seen) < 1000


@pytest.mark.parametrize("size", [1, 60_000])
async def test_d3_a_task_that_reports_without_a_pause_is_heard_all_the_same(size: int) -> None:
    """Its reports are overwritten while they are read."""
    seen: list[int] = []
    async with CpuPool(1) as pool:
        view = pool.options(on_report=lambda value: seen.append(value[0]))
        last = await view.run(reporting.report_for, 1.0, size)
    assert len(seen) >= 5
    assert seen == sorted(seen)
    assert seen[-1] == last


@pytest.mark.parametrize("how", ["run_sync", "map", "stream"])
async def test_d3_reports_are_seen_by_threads_and_in_maps_too(how: str, tmp_path: Path) -> None:
    path = tmp_path / "seen"

    def on_report(value: str) -> None:
        path.write_text(value)

    async with CpuPool(1) as pool:
        view = pool.options(timeout=20, on_report=on_report)
        if how == "run_sync":
            await anyio.to_thread.run_sync(view.run_sync, reporting.report_until_seen, str(path))
        elif how == "map":
            await view.map(reporting.report_until_seen, [str(path)] * 3)
        else:
            async with view.stream(reporting.report_until_seen, [str(path)]) as results:
                assert [each async for each in results] == [None]
    assert path.read_text() == "here"


async def test_a_report_that_cannot_be_rebuilt_costs_nobody_a_result(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[object] = []
    async with CpuPool(1) as pool:
        assert await pool.options(on_report=seen.append).run(reporting.report_vanishing) == "result"
    assert seen == []
    assert "a task's report cannot be rebuilt here: SystemExit: 3" in caplog.text


@pytest.mark.parametrize("end", ["error", "timeout", "death"])
async def test_d3_the_last_report_is_seen_however_the_task_ends(end: str) -> None:
    seen: list[object] = []
    async with CpuPool(1) as pool:
        view = pool.options(timeout=0.2, on_report=seen.append)
        if end == "error":
            with pytest.raises(ZeroDivisionError):
                await view.run(reporting.report_then, end, divmod, 1, 0)
        elif end == "timeout":
            with pytest.raises(TaskTimeout):
                await view.run(reporting.report_then, end, tasks.spin_forever)
        else:
            with pytest.raises(WorkerDied):
                await view.run(reporting.report_then, end, tasks.exit_at_once, 3)
    assert seen == [end]


async def test_what_a_task_has_reported_is_not_taken_for_the_next_one_s() -> None:
    seen: list[int] = []
    async with CpuPool(1) as pool:
        await pool.run(reporting.report_all, [1, 2])  # nobody asks
        view = pool.options(on_report=seen.append)
        await view.run(tasks.add, 1)
        assert seen == []
        await view.run(reporting.report_all, [3])
        await view.run(tasks.add, 1)
    assert seen == [3]


async def test_what_on_report_raises_ends_the_call_and_stops_the_task() -> None:
    def refuse(value: object) -> None:
        raise LookupError(value)

    async with CpuPool(1) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(LookupError, match="7"):
            await pool.options(on_report=refuse).run(reporting.report_then, 7, tasks.spin_forever)
        assert await pool.run(tasks.get_pid) == pid


async def test_items_of_a_map_report_too() -> None:
    seen: list[int] = []
    async with CpuPool(2) as pool:
        assert await pool.options(on_report=seen.append).map(reporting.report_item, range(1000)) == list(range(1000))
        assert set(seen) <= set(range(1000))
        assert seen
        seen.clear()
        async with pool.options(on_report=seen.append).stream(reporting.report_item, [5]) as results:
            assert [each async for each in results] == [5]
        assert seen == [5]


async def test_threads_of_a_task_may_report() -> None:
    seen: list[list[int]] = []
    async with CpuPool(1) as pool:
        await pool.options(on_report=seen.append).run(reporting.report_from_threads)
    assert seen
    assert all(len(set(each)) == 1 and len(each) == 1000 for each in seen)


async def test_what_cannot_be_reported_is_the_task_s_error() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(ValueError, match=r"this bytes takes 100,\d+ bytes pickled, and 65,528 is the most"):
            await pool.run(reporting.report_all, [bytes(100_000)])
        with pytest.raises(Exception, match="lambda"):
            await pool.run(reporting.report_lambda)
        assert await pool.run(reporting.report_all, [bytes(65_000)]) == 1


def test_where_no_task_runs_a_report_does_nothing() -> None:
    cpupool.report(object())
    seen: list[int] = []
    with CpuPool(1) as pool:
        assert pool.options(on_report=seen.append).run_sync(reporting.report_all, [1, 2]) == 2
    assert seen == [2]


def test_on_report_and_on_start_must_be_plain_functions() -> None:
    async def nobody_awaits_it(value: object) -> None: ...

    for name in ("on_report", "on_start"):
        for wrong in (5, nobody_awaits_it):
            with pytest.raises(TypeError, match=f"{name} must be a function made with 'def', or None"):
                CpuPool(1).options(**{name: wrong})  # type: ignore[arg-type]


# --- on_start ---


async def test_a_call_starts_when_a_worker_is_there_for_it(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    started: list[str] = []
    async with CpuPool(1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.options(on_start=lambda: started.append("first")).run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        group.start_soon(pool.options(on_start=lambda: started.append("second")).run, tasks.add, 1)
        while "1 waiting" not in repr(pool):
            await anyio.lowlevel.checkpoint()
        assert started == ["first"]
        gate.open()
    assert started == ["first", "second"]


async def test_each_attempt_and_each_batch_starts(tmp_path: Path) -> None:
    started: list[int] = []
    async with CpuPool(1) as pool:
        view = pool.options(retries=1, on_start=lambda: started.append(1))
        await view.run(tasks.die_the_first_time, str(tmp_path / "died"))
        assert len(started) == 2
        await view.options(retries=0).map(tasks.add, range(3), chunksize=1)
        assert len(started) == 5


async def test_what_on_start_raises_ends_the_call_which_does_not_run(tmp_path: Path) -> None:
    def refuse() -> None:
        raise LookupError("not now")

    async with CpuPool(1) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(LookupError, match="not now"):
            await pool.options(on_start=refuse).run(tasks.append_line, str(tmp_path / "ran"))
        assert await pool.run(tasks.get_pid) == pid
    assert not (tmp_path / "ran").exists()


async def test_a_process_that_a_task_has_forked_reports_nothing() -> None:
    seen: list[str] = []
    async with CpuPool(1) as pool:
        await pool.options(on_report=seen.append).run(reporting.report_in_a_fork)
    assert seen == ["parent"]


@pytest.mark.slow
def test_a_report_is_read_whole_while_it_is_being_written(tmp_path: Path) -> None:
    """By another thread, which reads as the pool does, from the file."""
    fd = os.memfd_create("test")
    os.truncate(fd, _reports.REPORTS_END)
    page = memoryview(mmap.mmap(fd, STATUS_PAGE_SIZE)).cast("Q")
    reporter = _reports.Reporter(page, fd, _payload.dumps)
    is_over = threading.Event()

    def write() -> None:
        chosen = random.Random(5)
        while not is_over.is_set():
            reporter([chosen.randrange(256)] * chosen.randrange(1, 2000))

    def read_cell(index: int) -> int:
        return int.from_bytes(os.pread(fd, 8, 8 * index), "little")

    thread = threading.Thread(target=write)
    thread.start()
    seen, count = 0, 0
    deadline = time.monotonic() + 20
    while count < 500 and time.monotonic() < deadline:
        found = _reports.read_report(read_cell, lambda size, offset: os.pread(fd, size, offset), seen)
        if found is not None:
            seen = found[0]
            assert len(set(_payload.loads(found[1]))) == 1
            count += 1
    is_over.set()
    thread.join()
    os.close(fd)
    assert count == 500
