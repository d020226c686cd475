"""B: every way to give up a call stops its work, and the worker lives on if it can."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import psutil
import pytest

import large
import tasks
from conftest import RunScript, environment, is_gone, let_ctrl_c_through, wait_until_gone
from cpupool import CpuPool, PoolClosed, PoolFull, QueueTimeout, TaskTimeout, WorkerDied, _large, current_task
from cpupool._worker import State

pytestmark = pytest.mark.anyio

SOFT: list[Callable[[], object]] = [
    tasks.spin_forever,
    tasks.match_catastrophically,
    tasks.sleep_long,
    tasks.wait_in_asyncio,
    tasks.wait_for_lock,
    tasks.run_program,
]
HARD: list[Callable[[], object]] = [tasks.hold_gil_forever, tasks.block_signals_and_sleep, tasks.swallow_interrupts]


def name_of(fn: object) -> str:
    return getattr(fn, "__name__", "")


# --- B1: timeout ---


@pytest.mark.parametrize("fn", SOFT, ids=name_of)
async def test_b1_a_timeout_interrupts_the_task_and_its_worker_lives_on(fn: Callable[[], object]) -> None:
    async with CpuPool(1, grace=60) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(TaskTimeout) as caught:
            await pool.options(timeout=0.1).run(fn)
        error = caught.value
        assert isinstance(error, TimeoutError)
        assert error.timeout == 0.1
        assert 0.1 <= error.ran < 5
        assert 0 <= error.queued < 5
        assert error.stack is not None
        assert f"in {name_of(fn)}" in error.stack
        assert "_child.py" not in error.stack
        assert f"tasks.{name_of(fn)} was stopped after" in str(error)
        assert error.__cause__ is None
        assert await pool.run(tasks.get_pid) == pid


@pytest.mark.parametrize("fn", HARD, ids=name_of)
async def test_b1_what_an_interrupt_does_not_stop_is_killed_after_the_grace(fn: Callable[[], object]) -> None:
    async with CpuPool(1, grace=0.1) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(TaskTimeout) as caught:
            await pool.options(timeout=0.1).run(fn)
        assert is_gone(pid)
        if fn is not tasks.block_signals_and_sleep:
            assert caught.value.stack is not None
            assert f"in {name_of(fn)}" in caught.value.stack
        assert await pool.run(tasks.get_pid) != pid


def test_b1_in_a_plain_thread() -> None:
    with CpuPool(1, grace=60) as pool:
        pid = pool.run_sync(tasks.get_pid)
        with pytest.raises(TaskTimeout, match=r"its timeout is 0\.05 s"):
            pool.options(timeout=0.05).run_sync(tasks.spin_forever)
        assert pool.run_sync(tasks.get_pid) == pid


async def test_b1_the_pool_s_own_timeout_is_the_default_and_none_lifts_it() -> None:
    async with CpuPool(1, timeout=0.05) as pool:
        with pytest.raises(TaskTimeout):
            await pool.run(tasks.sleep_long)
        with pytest.raises(TaskTimeout):
            await pool.options(retries=1).run(tasks.sleep_long)
        assert await pool.options(timeout=None).run(tasks.busy, 0.15)


async def test_b1_rebuilding_arguments_and_pickling_the_result_are_part_of_the_task() -> None:
    async with CpuPool(1, grace=60, timeout=0.1) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(TaskTimeout):
            await pool.run(tasks.return_it, tasks.SleepsWhenRebuilt())
        with pytest.raises(TaskTimeout):
            await pool.run(tasks.return_what_sleeps_when_pickled)
        assert await pool.run(tasks.get_pid) == pid


async def test_b1_a_task_may_return_what_it_has_when_it_is_interrupted() -> None:
    async with CpuPool(1, timeout=0.05) as pool:
        assert await pool.run(tasks.return_when_interrupted, [1, 2]) == [1, 2]
        with pytest.raises(TaskTimeout):
            await pool.run(tasks.sleep_long)


async def test_b1_what_a_task_makes_of_the_interrupt_is_shown_as_the_cause() -> None:
    async with CpuPool(1, timeout=0.05) as pool:
        with pytest.raises(TaskTimeout) as caught:
            await pool.run(tasks.raise_when_interrupted)
        assert "TwoArguments: 7: stopped" in str(caught.value.__cause__)
        with pytest.raises(TaskTimeout) as caught:
            await pool.run(tasks.die_when_interrupted)
        assert isinstance(caught.value.__cause__, WorkerDied)
        assert await pool.run(tasks.add, 1, 1) == 2


async def test_b1_a_timeout_is_not_retried(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    async with CpuPool(1, retries=3) as pool:
        with pytest.raises(TaskTimeout):
            await pool.options(timeout=0.1).run(tasks.append_line_and_sleep, str(path))
    assert len(path.read_text().splitlines()) == 1


async def test_b1_a_timeout_of_zero_runs_nothing_and_costs_no_worker(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    async with CpuPool(1, grace=60) as pool:
        pid = await pool.run(tasks.get_pid)
        for _ in range(20):
            with pytest.raises(TaskTimeout):
                await pool.options(timeout=0).run(tasks.append_line_and_sleep, str(path))
        assert await pool.run(tasks.get_pid) == pid


def test_b1_the_group_of_the_task_is_killed_with_it(tmp_path: Path) -> None:
    with CpuPool(1, grace=0.1) as pool:
        path = tmp_path / "grandchild"
        with pytest.raises(TaskTimeout):
            pool.options(timeout=0.3).run_sync(tasks.fork_and_hold_gil, str(path))
        wait_until_gone(int(path.read_text()))


async def test_b1_an_interrupt_in_a_finalizer_is_repeated_until_it_is_felt() -> None:
    async with CpuPool(1, grace=60) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(TaskTimeout):
            await pool.options(timeout=0.1).run(tasks.delete_then_sleep)
        assert await pool.run(tasks.get_pid) == pid


async def test_b1_a_process_forked_by_the_task_does_not_end_it_in_the_pool_s_eyes() -> None:
    async with CpuPool(1, grace=0.1) as pool:
        with pytest.raises(TaskTimeout):
            await pool.options(timeout=0.5).run(tasks.leave_in_fork_then_hold_gil)


async def test_b1_the_stack_of_one_task_is_never_shown_for_another(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with CpuPool(1, grace=60) as pool:
        for _ in range(3):
            async with anyio.create_task_group() as group:
                group.start_soon(pool.run, tasks.report_begin, str(fifo), tasks.spin_forever)
                await anyio.to_thread.run_sync(fifo.read_text)
                group.cancel_scope.cancel()
            with pytest.raises(WorkerDied) as caught:
                await pool.run(tasks.exit_at_once, 3)
            assert caught.value.stack is None


def test_b1_timeouts_hold_while_a_worker_is_being_started(run_script: RunScript) -> None:
    """A large initializer and a main module that takes long to import must not stop the pool's thread."""
    done = run_script(
        """
import contextlib, os, threading, time
import cpupool, tasks

def other():
    with contextlib.suppress(cpupool.CpuPoolError):
        pool.options(queue_timeout=1).run_sync(tasks.spin_forever)

if __name__ == "__mp_main__" and os.path.exists("slow"):
    time.sleep(600)

if __name__ == "__main__":
    pool = cpupool.CpuPool(2, initializer=len, initargs=(bytes(2_000_000),))
    pool.run_sync(tasks.get_pid)
    open("slow", "w").close()
    threading.Thread(target=other, daemon=True).start()
    try:
        pool.options(timeout=0.3, queue_timeout=1).run_sync(tasks.spin_forever)
    except (cpupool.TaskTimeout, cpupool.QueueTimeout) as error:
        print(type(error).__name__)
    pool.close(0)
    print("closed")
""",
        timeout=20,
    )
    assert done.stdout.splitlines()[-1] == "closed", done.stderr


# --- B2 ---


async def test_b2_nobody_else_waits_while_a_worker_is_being_stopped(tmp_path: Path) -> None:
    """All 200 calls are done on the other worker before the stubborn one's grace has ended."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with CpuPool(2, grace=60) as pool:
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.report_begin_and_hold_gil, str(fifo))
            pid = int(await anyio.to_thread.run_sync(fifo.read_text))
            group.cancel_scope.cancel()
        for number in range(200):
            assert await pool.run(tasks.add, number) == number
        assert not is_gone(pid)
        os.kill(pid, signal.SIGKILL)


# --- B3: every way to cancel ---


async def _cancel_task(call: Awaitable[Any], begun: Callable[[], Awaitable[object]]) -> None:
    task = asyncio.ensure_future(call)
    await begun()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _wait_for(call: Awaitable[Any], begun: Callable[[], Awaitable[object]]) -> None:
    task = asyncio.ensure_future(begun())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call, 0.2)
    await task


async def _asyncio_timeout(call: Awaitable[Any], begun: Callable[[], Awaitable[object]]) -> None:
    task = asyncio.ensure_future(begun())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await call
    await task


async def _failing_sibling(call: Awaitable[Any], begun: Callable[[], Awaitable[object]]) -> None:
    async def fail_then() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_await(call))
            await begun()
            raise ValueError

    with pytest.raises(ExceptionGroup):
        await fail_then()


async def _await(call: Awaitable[Any]) -> None:
    await call


async def _scope(call: Awaitable[Any], begun: Callable[[], Awaitable[object]]) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(_await, call)
        await begun()
        group.cancel_scope.cancel()


ASYNCIO_WAYS = [_cancel_task, _wait_for, _asyncio_timeout, _failing_sibling]


@pytest.mark.parametrize("way", [*ASYNCIO_WAYS, _scope], ids=lambda way: way.__name__.strip("_"))
async def test_b3_a_cancelled_call_frees_its_worker_and_keeps_it(
    way: Callable[..., Awaitable[None]], anyio_backend_name: str, tmp_path: Path
) -> None:
    if way in ASYNCIO_WAYS and anyio_backend_name != "asyncio":
        pytest.skip("asyncio only")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def begun() -> None:
        await anyio.to_thread.run_sync(fifo.read_text)

    async with CpuPool(1, grace=60) as pool:
        pid = await pool.run(tasks.get_pid)
        for _ in range(5):
            await way(pool.run(tasks.report_begin, str(fifo), tasks.spin_forever), begun)
            assert await pool.run(tasks.get_pid) == pid


async def test_b3_fifty_cancellations_leave_nothing_and_lose_no_worker(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with CpuPool(2, grace=60) as pool:
        pids = {worker.process.pid for worker in pool._supervisor._crew.workers}
        await pool.run(tasks.get_pid)
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            async with anyio.create_task_group() as group:
                group.start_soon(pool.run, tasks.report_begin, str(fifo), tasks.spin_forever)
                await anyio.to_thread.run_sync(fifo.read_text)
                group.cancel_scope.cancel()
        assert await pool.run(tasks.get_pid) in pids
        assert {worker.process.pid for worker in pool._supervisor._crew.workers} == pids
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # a thread of anyio's may still run


async def test_b3_a_cancelled_call_returns_before_the_grace_ends(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with CpuPool(1, grace=60) as pool:
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.report_begin_and_hold_gil, str(fifo))
            pid = int(await anyio.to_thread.run_sync(fifo.read_text))
            group.cancel_scope.cancel()
        assert not is_gone(pid)
        os.kill(pid, signal.SIGKILL)
        assert await pool.run(tasks.get_pid) != pid


async def test_b3_a_cancelled_call_that_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with CpuPool(1, grace=0.05) as pool:
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.report_begin_and_hold_gil, str(fifo))
            pid = int(await anyio.to_thread.run_sync(fifo.read_text))
            group.cancel_scope.cancel()
        assert await pool.run(tasks.get_pid) != pid
        assert is_gone(pid)


async def test_b3_a_queued_call_that_is_cancelled_never_runs(tmp_path: Path) -> None:
    gate, path = tasks.Gate(tmp_path), tmp_path / "runs"
    async with CpuPool(1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        async with anyio.create_task_group() as waiters:
            waiters.start_soon(pool.run, tasks.append_line, str(path))
            await anyio.wait_all_tasks_blocked()
            assert repr(pool).endswith("1 waiting>")
            waiters.cancel_scope.cancel()
        assert repr(pool).endswith("0 waiting>")
        gate.open()
        await pool.run(tasks.add, 1)
    assert not path.exists()


@pytest.mark.parametrize("size", [1_000, 30_000_000])
async def test_b3_a_call_cancelled_while_it_is_sent_does_not_run_and_keeps_its_worker(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 MB do not fit into the socket: the supervisor sends the rest, and the worker throws it away."""
    monkeypatch.setattr(_large, "open_stream", large.refuse_stream)  # or they would not go there
    path = tmp_path / "runs"
    async with CpuPool(1, grace=60) as pool:
        pid = await pool.run(tasks.get_pid)
        os.kill(pid, signal.SIGSTOP)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, large.append_line_with, str(path), bytes(size))
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        (worker,) = pool._supervisor._crew.workers
        while worker.state is not State.RECOVERING:
            await anyio.lowlevel.checkpoint()
        os.kill(pid, signal.SIGCONT)
        assert await pool.run(tasks.get_pid) == pid
    assert not path.exists()


async def test_interrupts_that_a_stopped_worker_could_not_take_come_as_one(tmp_path: Path) -> None:
    """Were each kept, their handlers would begin on top of each other when it goes on, and fill the signal stack."""
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1, grace=60) as pool:
        pid = await pool.run(tasks.get_pid)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.hold_and_return_much, *gate.arguments, 100)
            await anyio.to_thread.run_sync(gate.wait_until_begun)
            os.kill(pid, signal.SIGSTOP)
            (worker,) = pool._supervisor._crew.workers
            for _ in range(100):
                worker.process.send_interrupt()
            os.kill(pid, signal.SIGCONT)
            await anyio.to_thread.run_sync(gate.open, abandon_on_cancel=True)
        assert await pool.run(tasks.get_pid) == pid


async def test_b3_an_answer_in_many_pieces_that_nobody_waits_for_is_thrown_away(tmp_path: Path) -> None:
    """It is cancelled after the first pieces: what is left of them must not become part of the next answer."""
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1, grace=60, initializer=large.use_no_streams) as pool:
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.hold_and_return_much, *gate.arguments, 50_000_000)
            pid = await anyio.to_thread.run_sync(gate.wait_until_begun)
            gate.open()
            (worker,) = pool._supervisor._crew.workers
            while worker._decoder.missing < 1_000_000:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        assert worker._decoder.missing > 0
        assert await pool.run(tasks.get_pid) == pid
        assert await pool.run(tasks.add, 2, 2) == 4


# --- B4 ---


async def test_b4_finally_ran_and_the_initializer_did_not_run_again(tmp_path: Path) -> None:
    runs, cleaned = tmp_path / "initializers", tmp_path / "cleaned"
    async with CpuPool(1, grace=60, initializer=tasks.append_line, initargs=(str(runs),)) as pool:
        with pytest.raises(TaskTimeout):
            await pool.options(timeout=0.1).run(tasks.write_in_finally, str(cleaned))
        assert cleaned.read_text() == "finally"
        assert await pool.run(tasks.get_pid) == int(runs.read_text())


async def test_b4_an_import_is_not_broken_off(tmp_path: Path) -> None:
    """It would leave `part` in `sys.modules`, and the next import of `whole` would never bind it there."""
    package = tmp_path / "whole"
    package.mkdir()
    (package / "part.py").touch()
    (package / "__init__.py").write_text("""
import os, signal
from whole import part
reader, writer = os.pipe()
os.set_blocking(writer, False)
before = signal.set_wakeup_fd(writer)
os.read(reader, 1)  # ends when an interrupt has come
signal.set_wakeup_fd(before)
os.close(reader)
os.close(writer)
value = "complete"
""")
    async with CpuPool(1, grace=60) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(TaskTimeout):
            await pool.options(timeout=0.05).run(tasks.import_and_spin, str(tmp_path), "whole")
        assert await pool.run(tasks.get_attribute, "whole", "value") == "complete"
        assert await pool.run(tasks.get_pid) == pid


# --- B5 ---


async def _race(pool: CpuPool, calls: int) -> dict[str, int]:
    """Run calls whose timeout is their run time, each followed by one that must never feel an interrupt.

    The run times are spread over the millisecond in which the supervisor wakes up: that is as exact as it can.
    """
    outcomes = {"value": 0, "timeout": 0}
    pids = {worker.process.pid for worker in pool._supervisor._crew.workers}
    for number in range(calls):
        timeout = 0.0005 + number % 7 * 0.0001
        try:
            assert await pool.options(timeout=timeout).run(tasks.busy, timeout + number % 11 * 0.0001) in pids
            outcomes["value"] += 1
        except TaskTimeout:
            outcomes["timeout"] += 1
        assert await pool.run(tasks.add, number, 1) == number + 1
    assert {worker.process.pid for worker in pool._supervisor._crew.workers} == pids
    return outcomes


async def test_b5_result_and_interrupt_race_for_one_outcome() -> None:
    async with CpuPool(1, grace=60) as pool:
        outcomes = await _race(pool, 300)
    assert sum(outcomes.values()) == 300


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_b5_thousands_of_calls_race_with_their_timeouts() -> None:
    async with CpuPool(2, grace=60) as pool:
        outcomes = []

        async def race() -> None:
            outcomes.append(await _race(pool, 3000))

        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(race)
    for each in outcomes:
        assert sum(each.values()) == 3000
        assert min(each.values()) > 100, "both must happen for the race to be one"


async def test_b5_cancellations_race_with_results() -> None:
    """The calls after a cancelled one are undisturbed, whichever moment it was cancelled in."""
    async with CpuPool(1, grace=60) as pool:
        pid = await pool.run(tasks.get_pid)
        for number in range(200):
            with anyio.move_on_after(0.0001 + number % 20 * 0.0001):
                await pool.run(tasks.busy, 0.001)
            assert await pool.run(tasks.add, number, 1) == number + 1
        assert await pool.run(tasks.get_pid) == pid


# --- B6, B7: the queue ---


async def test_b6_a_call_that_no_worker_takes_in_time_has_not_run(tmp_path: Path) -> None:
    gate, path = tasks.Gate(tmp_path), tmp_path / "runs"
    async with CpuPool(1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        with pytest.raises(QueueTimeout) as caught:
            await pool.options(queue_timeout=0.05, label="a small thing").run(tasks.append_line, str(path))
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.queue_timeout == 0.05
        assert 0.05 <= caught.value.queued < 5
        assert "a small thing was not run: no worker came free within its queue_timeout of 0.05 s" in str(caught.value)
        with pytest.raises(QueueTimeout):
            await pool.options(queue_timeout=0).run(tasks.append_line, str(path))
        with pytest.raises(QueueTimeout):
            await anyio.to_thread.run_sync(pool.options(queue_timeout=0.05).run_sync, tasks.append_line, str(path))
        gate.open()
    assert not path.exists()


async def test_b6_waiting_does_not_count_as_running(tmp_path: Path) -> None:
    """The second call waits longer than its timeout, and still has all of it."""
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)

        async def second() -> None:
            with pytest.raises(TaskTimeout) as caught:
                await pool.options(timeout=0.1).run(tasks.sleep_long)
            assert caught.value.queued >= 0.2
            assert caught.value.ran >= 0.1

        group.start_soon(second)
        await anyio.sleep(0.2)  # the time it waits is what is tested
        gate.open()


async def test_b6_an_idle_worker_is_taken_even_with_no_time_to_wait() -> None:
    async with CpuPool(1, queue_timeout=0) as pool:
        for _ in range(100):
            assert await pool.run(tasks.add, 1, 1) == 2


async def test_b6_a_cold_pool_grows_even_for_calls_that_do_not_wait() -> None:
    pool = CpuPool(1)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(pool.aclose)
        for _ in range(10_000):
            with contextlib.suppress(QueueTimeout):
                assert await pool.options(queue_timeout=0).run(tasks.add, 1, 1) == 2
                return
            await anyio.sleep(0.01)
    pytest.fail("no worker was started")


async def test_b7_one_more_than_max_pending_is_refused_at_once(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    results: list[int] = []
    async with CpuPool(1, max_pending=4) as pool:
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.hold, *gate.arguments)
            await anyio.to_thread.run_sync(gate.wait_until_begun)

            async def call(number: int) -> None:
                results.append(await pool.run(tasks.add, number))

            for number in range(4):
                group.start_soon(call, number)
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                with pytest.raises(PoolFull) as caught:
                    await pool.run(tasks.add, 1)
                assert caught.value.pending == 4
                assert 0 < caught.value.retry_after < 600
            with pytest.raises(PoolFull):
                await anyio.to_thread.run_sync(pool.run_sync, tasks.add, 1)
            gate.open()
        assert sorted(results) == [0, 1, 2, 3]
        assert await pool.run(tasks.add, 1) == 1


async def test_b7_a_cancelled_waiter_leaves_room_for_another(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1, max_pending=1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        for _ in range(3):
            async with anyio.create_task_group() as waiters:
                waiters.start_soon(pool.run, tasks.add, 1)
                await anyio.wait_all_tasks_blocked()
                waiters.cancel_scope.cancel()
            with pytest.raises(QueueTimeout):
                await pool.options(queue_timeout=0.01).run(tasks.add, 1)
        gate.open()


async def test_b7_a_pool_that_is_still_starting_takes_as_many() -> None:
    pool = CpuPool(1, max_pending=4)
    outcomes: list[object] = []

    async def call() -> None:
        try:
            outcomes.append(await pool.run(tasks.add, 1))
        except PoolFull as error:
            outcomes.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(call)
    await pool.aclose()
    assert isinstance(outcomes[0], PoolFull)
    assert outcomes[1:] == [1] * 5


def test_waiting_is_fair_among_threads_and_loops(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    order: list[int] = []
    path = tmp_path / "order"

    def in_a_thread(number: int) -> None:
        pool.run_sync(tasks.append_text, str(path), f"{number}\n")

    def in_a_loop(number: int) -> None:
        asyncio.run(pool.run(tasks.append_text, str(path), f"{number}\n"))

    with CpuPool(1) as pool:
        threads = [threading.Thread(target=pool.run_sync, args=(tasks.hold, *gate.arguments))]
        threads[0].start()
        gate.wait_until_begun()
        for number in range(12):
            threads.append(threading.Thread(target=in_a_loop if number % 2 else in_a_thread, args=(number,)))
            threads[-1].start()
            while f"{number + 1} waiting" not in repr(pool):
                time.sleep(0.001)
        gate.open()
        for thread in threads:
            thread.join()
    order = [int(line) for line in path.read_text().splitlines()]
    assert order == list(range(12))


# --- B9 ---


async def test_b9_a_timeout_holds_while_the_loop_is_blocked(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with CpuPool(1, grace=0.2) as pool, anyio.create_task_group() as group:
        outcomes: list[TaskTimeout] = []

        async def call() -> None:
            with pytest.raises(TaskTimeout) as caught:
                await pool.options(timeout=0.3).run(tasks.report_begin, str(fifo), tasks.spin_forever)
            outcomes.append(caught.value)

        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        pid = int(fifo.read_text())  # blocks the loop, as all that follows
        process = psutil.Process(pid)
        deadline = time.monotonic() + 20
        while process.status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline
        used = process.cpu_times()
        end = time.monotonic() + 0.5  # longer than the grace: its answer is there, so it is not killed for our slowness
        while time.monotonic() < end:
            pass
        assert process.cpu_times() == used
        await anyio.lowlevel.checkpoint()
    assert 0.3 <= outcomes[0].ran < 5
    assert outcomes[0].stack is not None
    assert not pool._supervisor._crew.workers


async def test_b9_a_worker_that_answered_while_the_loop_was_blocked_is_not_killed() -> None:
    async with CpuPool(1, grace=0.05) as pool:
        pid = await pool.run(tasks.get_pid)

        async def call() -> None:
            with pytest.raises(TaskTimeout):
                await pool.options(timeout=0.05).run(tasks.spin_forever)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            time.sleep(0.4)  # noqa: ASYNC251  # blocks the loop beyond timeout and grace, which is the point
        assert await pool.run(tasks.get_pid) == pid


# --- options ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timeout": -1}, ValueError, "timeout must not be negative, not -1"),
        ({"timeout": "5"}, TypeError, "timeout must be a number of seconds, not '5'"),
        ({"timeout": math.nan}, ValueError, "timeout must not be negative, not nan"),
        ({"timeout": 10**400}, ValueError, "timeout is too large; for no limit, use None"),
        ({"queue_timeout": True}, TypeError, "queue_timeout must be a number of seconds, not True"),
        ({"retries": -1}, ValueError, "retries must be at least 0, not -1"),
        ({"retries": None}, TypeError, "retries must be an int, not None"),
        ({"label": 3}, TypeError, "label must be a string or None, not 3"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CpuPool(1).options(**options)


async def test_a_view_of_a_view_keeps_what_it_does_not_change() -> None:
    async with CpuPool(1, timeout=30) as pool:
        view = pool.options(label="one").options(timeout=0.05)
        with pytest.raises(TaskTimeout, match=r"^one was stopped"):
            await view.run(tasks.sleep_long)
        assert "label='one'" in repr(view)
        assert await view.options(timeout=None).run(tasks.describe_task) == (
            (await pool.options(label="one").run(tasks.describe_task))[0] - 1,
            "one",
            1,
        )


async def test_current_task_knows_label_and_attempt(tmp_path: Path) -> None:
    assert current_task() is None
    path = tmp_path / "runs"
    async with CpuPool(1) as pool:
        first, label, attempt = await pool.run(tasks.describe_task)
        assert (label, attempt) == (None, 1)
        second, label, _ = await pool.options(label="größer").run(tasks.describe_task)
        assert label == "größer"
        assert second > first
        assert await pool.run(tasks.describe_task_in_thread) == 1
        assert await pool.options(retries=2).run(tasks.die_unless_attempt, 3, str(path)) == 3
        assert len(set(path.read_text().splitlines())) == 3
        with pytest.raises(WorkerDied, match="while it ran doomed"):
            await pool.options(retries=1, label="doomed").run(tasks.die_unless_attempt, 3, str(path))


@pytest.mark.parametrize(
    "error",
    [
        TaskTimeout("f", 1.0, 0.5, 1.25, "Stack"),
        QueueTimeout("f", 1.0, 1.5),
        PoolFull(4, 0.25),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_errors_pickle_with_their_facts(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy), copy.args) == (str(error), vars(error), error.args)


# --- the supervisor sleeps ---


def _context_switches(pid: int) -> int:
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
        total += sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)
    return total


@pytest.mark.slow
def test_an_idle_pool_does_not_wake_up() -> None:
    with CpuPool(4, timeout=60, queue_timeout=60) as pool:
        for _ in range(20):
            pool.run_sync(tasks.add, 1)
        workers = [worker.process.pid for worker in pool._supervisor._crew.workers]
        supervisor = next(each for each in threading.enumerate() if each.name.endswith("supervisor"))
        status = Path(f"/proc/self/task/{supervisor.native_id}/status")

        def switches() -> list[int]:
            own = [int(line.split()[1]) for line in status.read_text().splitlines() if "ctxt_switches" in line]
            return [sum(own), *map(_context_switches, workers)]

        time.sleep(0.2)  # all that was begun comes to rest
        before = switches()
        time.sleep(5)  # the time in which nothing must happen
        assert switches() == before


IMPATIENT = {
    "thread": """
import sys, cpupool, tasks
if __name__ == "__main__":
    with cpupool.CpuPool(1, grace=60) as pool:
        try:
            pool.run_sync(tasks.report_begin, sys.argv[1], tasks.hold_gil_forever)
        except KeyboardInterrupt:
            print("closing", flush=True)
            raise
""",
    "asyncio": """
import asyncio, sys, cpupool, tasks
async def main():
    async with cpupool.CpuPool(1, grace=60) as pool:
        try:
            await pool.run(tasks.report_begin, sys.argv[1], tasks.hold_gil_forever)
        except asyncio.CancelledError:
            print("closing", flush=True)
            raise
if __name__ == "__main__":
    asyncio.run(main())
""",
}


@pytest.mark.parametrize("form", IMPATIENT)
def test_c2_a_second_ctrl_c_does_not_wait_for_the_grace(form: str, tmp_path: Path) -> None:
    fifo, script = tmp_path / "fifo", tmp_path / "script.py"
    os.mkfifo(fifo)
    script.write_text(IMPATIENT[form])
    command = [sys.executable, str(script), str(fifo)]
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=let_ctrl_c_through,  # noqa: PLW1509  # this test has no other threads
    ) as program:
        fifo.read_text()
        program.send_signal(signal.SIGINT)
        assert program.stdout is not None
        assert program.stdout.readline() == "closing\n"
        time.sleep(0.1)  # from there into the closing it is a few microseconds
        program.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, err = program.communicate(timeout=20)
        assert time.monotonic() - start < 2
    assert program.returncode == -signal.SIGINT
    assert err.splitlines()[-1] == "KeyboardInterrupt"


# --- drain ---


async def test_drain_lets_running_and_waiting_calls_finish(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    results: list[int] = []
    pool = CpuPool(1, drain=60)
    async with anyio.create_task_group() as group:

        async def call(*args: Any) -> None:
            results.append(await pool.run(*args))

        group.start_soon(call, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        group.start_soon(call, tasks.add, 1)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(pool.aclose)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(PoolClosed):
            await pool.run(tasks.add, 2)
        gate.open()
    assert results[1:] == [1]
    await pool.aclose()


async def test_a_retry_during_the_drain_belongs_to_an_accepted_call(tmp_path: Path) -> None:
    fifo, end = tmp_path / "fifo", tmp_path / "end"
    for path in (fifo, end, tmp_path / "fifo.in"):
        os.mkfifo(path)
    pool = CpuPool(1, retries=1, drain=60)
    attempts: list[int] = []
    async with anyio.create_task_group() as group:

        async def call() -> None:
            attempts.append(await pool.run(tasks.die_while_closing, str(fifo), str(end)))

        group.start_soon(call)
        await anyio.to_thread.run_sync(fifo.read_text)
        await anyio.to_thread.run_sync((tmp_path / "fifo.in").read_text)
        group.start_soon(pool.aclose)
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(end.write_text, "")
    assert attempts == [2]


@pytest.mark.parametrize("fn", [tasks.spin_forever, tasks.hold_gil_forever], ids=name_of)
async def test_after_the_drain_tasks_are_interrupted_then_killed(fn: Callable[[], object], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pool = CpuPool(1, grace=0.2)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as group:
        errors = []

        async def call(*args: Any) -> None:
            with pytest.raises(PoolClosed) as caught:
                await pool.run(*args)
            errors.append(caught.value)

        group.start_soon(call, tasks.report_begin, str(fifo), fn)
        pid = int(await anyio.to_thread.run_sync(fifo.read_text))
        group.start_soon(call, tasks.add, 1)
        group.start_soon(tick)
        await anyio.wait_all_tasks_blocked()
        start = time.monotonic()
        await pool.aclose(drain=0.2)
        assert 0.2 <= time.monotonic() - start < 0.2 + 0.2 + 1
        assert ticks >= 5
        assert is_gone(pid)
        group.cancel_scope.cancel()
    assert len(errors) == 2


async def test_a_second_shorter_close_wins(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pool = CpuPool(1, grace=0.2)
    async with anyio.create_task_group() as group:

        async def call() -> None:
            with pytest.raises(PoolClosed):
                await pool.run(tasks.report_begin, str(fifo), tasks.spin_forever)

        group.start_soon(call)
        await anyio.to_thread.run_sync(fifo.read_text)
        for drain in (600, 0.1, 300):
            group.start_soon(pool.aclose, drain)
        await anyio.to_thread.run_sync(pool.close, 600)
    assert not pool._supervisor._crew.workers


async def test_a_task_that_is_interrupted_by_the_close_keeps_its_grace_for_cleaning_up(tmp_path: Path) -> None:
    path = tmp_path / "cleaned"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pool = CpuPool(1, grace=60)
    async with anyio.create_task_group() as group:

        async def call() -> None:
            with pytest.raises(PoolClosed):
                await pool.run(tasks.say_so_and_write_in_finally, str(fifo), str(path))

        group.start_soon(call)
        await anyio.to_thread.run_sync(fifo.read_text)
        await pool.aclose(0)
    assert path.read_text() == "finally"


async def test_leaving_the_block_by_cancellation_does_not_drain(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with anyio.create_task_group() as others:
        pool = CpuPool(1, drain=600)

        async def call() -> None:
            with pytest.raises(PoolClosed):
                await pool.run(tasks.report_begin, str(fifo), tasks.spin_forever)

        with anyio.CancelScope() as scope:
            async with pool:
                others.start_soon(call)
                await anyio.to_thread.run_sync(fifo.read_text)
                scope.cancel()
                await anyio.sleep_forever()


# --- the program's end, and Ctrl-C ---


@pytest.mark.parametrize("fn", ["spin_forever", "hold_gil_forever"])
@pytest.mark.parametrize("how", ["thread", "asyncio"])
def test_c2_ctrl_c_ends_a_script_with_one_keyboard_interrupt(
    how: str, fn: str, run_script: RunScript, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = run_script(
        """
import asyncio, os, signal, sys, threading, time
import cpupool, tasks

def interrupt():
    global start
    with open(sys.argv[3]) as fifo:
        print(fifo.read().strip(), flush=True)
    start = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

async def main(pool, *args):
    async with pool:
        sleeper = asyncio.create_task(pool.run(tasks.sleep_long))
        await pool.run(*args)

if __name__ == "__main__":
    pool = cpupool.CpuPool(2, drain=60)
    threading.Thread(target=interrupt).start()
    args = tasks.report_begin, sys.argv[3], getattr(tasks, sys.argv[2])
    try:
        if sys.argv[1] == "asyncio":
            asyncio.run(main(pool, *args))
        else:
            with pool:
                threading.Thread(target=pool.run_sync, args=(tasks.return_when_interrupted, 1)).start()
                pool.run_sync(*args)
    finally:
        print("ended in time" if time.monotonic() - start < 2 else "late")
""",
        how,
        fn,
        str(fifo),
    )
    pid, *rest = done.stdout.splitlines()
    assert rest == ["ended in time"]
    assert done.stderr.count("KeyboardInterrupt") - done.stderr.count("raise KeyboardInterrupt()") == 1
    assert "Process " not in done.stderr
    assert done.returncode in (1, -2, 130)
    wait_until_gone(int(pid))


def test_c2_a_ctrl_c_that_does_not_wake_the_main_thread_is_still_seen(run_script: RunScript, tmp_path: Path) -> None:
    """As when it comes between Python's last look for signals and the system call that blocks.

    Here another thread gets the signal, because the main thread blocks it; so the call of that one is not broken off.
    """
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = run_script(
        """
import os, signal, sys, threading
import cpupool, tasks

if __name__ == "__main__":
    with cpupool.CpuPool(1) as pool:
        threading.Thread(target=tasks.press_ctrl_c_after, args=(sys.argv[1],)).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            pool.run_sync(tasks.report_begin, sys.argv[1], tasks.spin_forever)
        except KeyboardInterrupt:
            print("interrupted")
""",
        str(fifo),
        timeout=20,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


@pytest.mark.parametrize("fn", ["spin_forever", "hold_gil_forever"])
def test_the_program_s_end_stops_what_still_runs(fn: str, run_script: RunScript, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    start = time.monotonic()
    done = run_script(
        """
import contextlib, sys, threading
import cpupool, tasks

def call():
    with contextlib.suppress(cpupool.PoolClosed):
        cpupool.run_sync(tasks.report_begin, sys.argv[2], getattr(tasks, sys.argv[1]))

if __name__ == "__main__":
    threading.Thread(target=call, daemon=True).start()
    with open(sys.argv[2]) as fifo:
        print(fifo.read())
""",
        fn,
        str(fifo),
    )
    assert time.monotonic() - start < 4
    assert (done.stderr, done.returncode) == ("", 0)
    wait_until_gone(int(done.stdout))


def test_exceptions_from_a_signal_handler_lose_no_worker_and_no_call(run_script: RunScript) -> None:
    """A handler raises at thousands of random moments in the main thread; the other threads' calls go on."""
    done = run_script("""
import random, signal, threading, time, warnings
import cpupool, tasks

warnings.simplefilter("ignore", RuntimeWarning)  # a coroutine may be abandoned before it begins

class Raised(Exception):
    pass

def handler(*_):
    raise Raised

def call(number):
    assert pool.run_sync(tasks.add, number, 1) == number + 1

def call_until_the_end():
    number = 0
    while time.monotonic() < end:
        call(number)
        number += 1
    fine.append(number)

def get_pids():
    return {worker.process.pid for worker in pool._supervisor._crew.workers}

if __name__ == "__main__":
    signal.signal(signal.SIGALRM, handler)
    fine, raised = [], 0
    with cpupool.CpuPool(2, grace=60) as pool:
        pids = get_pids()
        end = time.monotonic() + 3
        threads = [threading.Thread(target=call_until_the_end) for _ in range(3)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 6e-4))
                    for number in range(20):
                        call(number)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Raised:
                raised += 1
        for thread in threads:
            thread.join()
        assert len(fine) == 3
        assert raised > 500, raised
        call(1)
        assert get_pids() == pids
        while "2 idle, 0 busy, 0 starting, 0 waiting" not in repr(pool):
            time.sleep(0.001)
    print("fine")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)


async def test_a_worker_whose_last_call_was_cancelled_is_replaced_too(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pids: list[int] = []
    async with CpuPool(1, grace=60, max_tasks_per_child=1) as pool:
        for _ in range(3):
            async with anyio.create_task_group() as group:
                group.start_soon(pool.run, tasks.report_begin, str(fifo), tasks.spin_forever)
                pids.append(int(await anyio.to_thread.run_sync(fifo.read_text)))
                group.cancel_scope.cancel()
        pids.append(await pool.run(tasks.get_pid))
    assert len(set(pids)) == 4
