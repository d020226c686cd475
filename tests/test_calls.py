"""End to end: a call crosses to a worker and its outcome comes back, on every event loop and from threads."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

import cpupool
import tasks
from cpupool import CpuPool, CpuPoolView, PoolFull, TaskNotPicklable, TaskTimeout

pytestmark = pytest.mark.anyio


async def test_run_returns_what_the_function_returns() -> None:
    async with CpuPool(1) as pool:
        assert await pool.run(tasks.add, 1, 2, c=3) == 6
        assert await pool.run(tasks.get_pid) != os.getpid()


async def test_run_starts_workers_by_itself() -> None:
    pool = CpuPool(1)
    assert await pool.run(tasks.add, 1, 2) == 3
    await pool.aclose()


async def test_all_start_methods(start_method: str) -> None:
    async with CpuPool(1, mp_context=start_method, initializer=tasks.initialise, initargs=(1, "two")) as pool:
        assert await pool.run(tasks.add, 1, 2) == 3
        assert await pool.run(tasks.get_initialised) == [1, "two"]


def test_run_sync_from_threads() -> None:
    with CpuPool(2) as pool, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda n: pool.run_sync(tasks.add, n, 1), range(200))) == list(range(1, 201))


async def test_gathered_calls_come_back_in_their_own_places() -> None:
    results: dict[int, int] = {}

    async with CpuPool(2) as pool, anyio.create_task_group() as group:

        async def call(number: int) -> None:
            results[number] = await pool.run(tasks.add, number, 1)

        for number in range(300):
            group.start_soon(call, number)
    assert results == {number: number + 1 for number in range(300)}


def test_one_pool_serves_several_loops_and_threads_at_once() -> None:
    """The pool belongs to the process: loops share it, at once and one after another."""
    pool = CpuPool(2)
    barrier = threading.Barrier(4)

    async def many() -> list[int]:
        return await asyncio.gather(*(pool.run(tasks.add, n) for n in range(100)))

    def with_loop() -> list[int]:
        barrier.wait()
        return asyncio.run(many())

    def without_loop() -> list[int]:
        barrier.wait()
        return [pool.run_sync(tasks.add, n) for n in range(100)]

    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(target) for target in (with_loop, without_loop, with_loop, without_loop)]
        assert all(future.result() == list(range(100)) for future in futures)
    assert asyncio.run(many()) == list(range(100))
    pool.close()


@pytest.mark.parametrize("size", [0, 100_000, 5_000_000])
async def test_large_arguments_and_results(size: int) -> None:
    """Larger than the socket's buffer: sent and received in pieces."""
    data = os.urandom(size)
    async with CpuPool(1) as pool:
        assert await pool.run(bytes.__add__, data, b"end") == data + b"end"


def test_large_data_from_a_thread() -> None:
    with CpuPool(1) as pool:
        assert len(pool.run_sync(bytes.__add__, bytes(3_000_000), b"end")) == 3_000_003


async def test_waiting_is_first_come_first_served(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    order: list[int] = []
    async with CpuPool(1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)

        async def call(number: int) -> None:
            order.append(await pool.run(tasks.add, number))

        for number in range(10):
            group.start_soon(call, number)
            await anyio.wait_all_tasks_blocked()
        gate.open()
    assert order == list(range(10))


async def test_workers_start_only_as_they_are_needed() -> None:
    pool = CpuPool(4)
    for number in range(5):
        await pool.run(tasks.add, number)
    assert "1 idle, 0 busy, 0 starting" in repr(pool)
    await pool.aclose()


async def test_a_cancelled_call_stops_the_work_and_frees_its_place(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool:
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.hold, *gate.arguments)
            pid = await anyio.to_thread.run_sync(gate.wait_until_begun)
            group.cancel_scope.cancel()
        assert await pool.run(tasks.get_pid) == pid


async def test_a_cancelled_waiter_loses_no_worker(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        for _ in range(20):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as waiters:
                    waiters.start_soon(pool.run, tasks.add, 1)
                    await anyio.wait_all_tasks_blocked()
                    scope.cancel()
        gate.open()
        assert await pool.run(tasks.add, 1, 1) == 2


def test_a_loop_that_ends_in_the_middle_of_calls_harms_nobody(tmp_path: Path) -> None:
    """Calls of a loop that is closed without cancelling them: their coroutines are garbage-collected."""
    gate = tasks.Gate(tmp_path)
    pool = CpuPool(1)
    loop = asyncio.new_event_loop()
    running = loop.create_task(pool.run(tasks.hold, *gate.arguments))
    waiting = loop.create_task(pool.run(tasks.add, 1))
    loop.run_until_complete(asyncio.to_thread(gate.wait_until_begun))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    for task in (running, waiting):
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # that it was destroyed is the point
    del running, waiting, task
    gc.collect()
    assert pool.run_sync(tasks.add, 1, 1) == 2
    pool.close()


# --- C3, C7 and the default pool are in test_processes.py ---


async def test_default_pool_is_one_whoever_asks() -> None:
    barrier = threading.Barrier(8)

    def ask() -> CpuPool:
        barrier.wait()
        return cpupool.default_pool()

    with ThreadPoolExecutor(8) as threads:
        pools = {id(future.result()) for future in [threads.submit(ask) for _ in range(8)]}
    assert pools == {id(cpupool.default_pool())}
    assert await cpupool.run(tasks.add, 1, 2) == 3
    await cpupool.default_pool().aclose()


async def test_default_pool_can_be_configured_before_its_first_use_only() -> None:
    cpupool.configure_default(max_workers=1, name="mine")
    try:
        assert await cpupool.run(tasks.add, 1) == 1
        assert cpupool.default_pool().settings.max_workers == 1
        with pytest.raises(RuntimeError, match="exists already"):
            cpupool.configure_default(max_workers=2)
    finally:
        await cpupool.default_pool().aclose()
        cpupool.configure_default()


def test_default_pool_is_made_anew_after_it_was_closed() -> None:
    first = cpupool.default_pool()
    assert cpupool.run_sync(tasks.add, 1) == 1
    first.close()
    assert cpupool.run_sync(tasks.add, 1) == 1
    assert cpupool.default_pool() is not first
    cpupool.default_pool().close()


def test_configure_default_checks_its_settings() -> None:
    with pytest.raises(ValueError, match="max_workers must be at least 1"):
        cpupool.configure_default(max_workers=0)
    with pytest.raises(TypeError, match="max_wokers"):
        cpupool.configure_default(max_wokers=2)


# --- prepared calls ---


async def test_a_prepared_call_runs_later_and_often_with_what_it_was_given() -> None:
    values = [1, 2, 3]
    async with CpuPool(2) as pool:
        prepared = pool.prepare(sum, values)
        values.clear()
        assert await prepared.run() == 6
        assert await anyio.to_thread.run_sync(prepared.run_sync) == 6
        slow = pool.options(timeout=0.1, label="slow one").prepare(tasks.spin_forever)
        with pytest.raises(TaskTimeout, match="slow one"):
            await slow.run()


async def test_runs_of_a_prepared_call_at_once_know_nothing_of_each_other(tmp_path: Path) -> None:
    """Each has attempts of its own."""
    path = tmp_path / "died"
    seen = []
    async with CpuPool(2) as pool, anyio.create_task_group() as group:
        prepared = pool.options(retries=1).prepare(tasks.die_the_first_time_and_describe, str(path))

        async def run() -> None:
            seen.append(await prepared.run())

        for _ in range(4):
            group.start_soon(run)
    assert sorted(seen) == [1, 1, 1, 2]
    async with CpuPool(1) as pool:
        path.unlink()
        prepared = pool.options(retries=1).prepare(tasks.die_the_first_time_and_describe, str(path))
        assert [await prepared.run() for _ in range(2)] == [2, 1]


def test_what_cannot_be_sent_is_known_when_it_is_prepared() -> None:
    pool = CpuPool(1)
    with pytest.raises(TaskNotPicklable):
        pool.prepare(lambda: None)
    with pytest.raises(TypeError, match="async def"):
        pool.prepare(tasks.AsyncCallable(), 1)
    assert not pool.is_started


async def test_a_call_in_the_background_is_neither_refused_nor_counted(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    results = []
    async with CpuPool(1, max_pending=1) as pool, anyio.create_task_group() as group:
        background = pool.options(background=True)

        async def run(calls: CpuPool | CpuPoolView, number: int) -> None:
            results.append(await calls.run(tasks.add, number))

        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        all_calls: list[CpuPool | CpuPoolView] = [background, background, pool, background]
        for number, calls in enumerate(all_calls):
            group.start_soon(run, calls, number)
            while f"{number + 1} waiting" not in repr(pool):
                await anyio.lowlevel.checkpoint()
        with pytest.raises(PoolFull) as caught:
            await pool.run(tasks.add, 1)
        assert caught.value.pending == 1
        gate.open()
    assert results == [0, 1, 2, 3]
    with pytest.raises(TypeError, match="background must be True or False"):
        pool.options(background=1)  # type: ignore[arg-type]


def test_a_pool_is_started_from_its_first_use_to_its_end() -> None:
    pool = CpuPool(1)
    seen = [pool.is_started]
    pool.run_sync(tasks.add, 1)
    seen.append(pool.is_started)
    pool.close()
    assert [*seen, pool.is_started] == [False, True, False]
