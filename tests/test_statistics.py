"""`pool.statistics()`: what is counted, what is said of each worker, and that every task ends up in one counter."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import random
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.lowlevel
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cpupool.testing
import items
import tasks
from cpupool import CpuPool, Histogram, Statistics
from cpupool._statistics import BUCKETS, Tally

pytestmark = pytest.mark.anyio

ENDS = ("succeeded", "failed", "timed_out", "cancelled", "died", "refused")


def ends(statistics: Statistics) -> dict[str, int]:
    """Return the counters of ends that are not 0."""
    return {name: count for name in ENDS if (count := getattr(statistics, name))}


async def quiet(pool: CpuPool) -> Statistics:
    """Wait until nothing runs or waits, and all that was submitted is counted as ended."""
    with anyio.fail_after(20):
        while True:
            found = pool.statistics()
            if not found.busy and not found.pending and sum(ends(found).values()) == found.submitted:
                return found
            await anyio.sleep(0.001)


async def wait_until_one_waits(pool: CpuPool) -> None:
    with anyio.fail_after(10):
        while pool.statistics().pending != 1:
            await anyio.lowlevel.checkpoint()


# --- counters ---


async def test_each_end_of_a_call_has_its_counter(tmp_path: Path) -> None:
    async with CpuPool(1, grace=0.2) as pool:
        await pool.run(tasks.add, 1)
        with pytest.raises(ZeroDivisionError):
            await pool.run(tasks.raise_exception, ZeroDivisionError)
        with pytest.raises(cpupool.ResultNotPicklable):
            await pool.run(tasks.return_lambda)
        with pytest.raises(cpupool.TaskTimeout):
            await pool.options(timeout=0.05).run(tasks.sleep_long)
        with pytest.raises(cpupool.WorkerDied):
            await pool.run(tasks.exit_at_once, 3)
        gate = tasks.Gate(tmp_path / "gate")
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.hold, *gate.arguments)
            await anyio.to_thread.run_sync(gate.wait_until_begun)
            with pytest.raises(cpupool.QueueTimeout):
                await pool.options(queue_timeout=0).run(tasks.add, 1)
            group.cancel_scope.cancel()
        found = await quiet(pool)
        assert ends(found) == {
            "succeeded": 1,
            "failed": 2,
            "timed_out": 1,
            "died": 1,
            "refused": 1,
            "cancelled": 1,
        }
        assert found.submitted == 7
        assert (found.workers_started, found.workers_died, found.recycled, found.retried) == (2, 1, 0, 0)
        with pytest.raises(cpupool.TaskNotPicklable):
            await pool.run(lambda: 1)
        assert pool.statistics().submitted == 7, "it could not be submitted"
    after = pool.statistics()
    assert ends(after) == ends(found)
    assert after.workers == ()
    assert (after.idle, after.busy, after.starting, after.pending) == (0, 0, 0, 0)


async def test_calls_that_are_not_taken_are_refused(tmp_path: Path) -> None:
    pool = CpuPool(1, max_pending=1)
    gate = tasks.Gate(tmp_path / "gate")
    async with pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        group.start_soon(pool.run, tasks.add, 1)
        await wait_until_one_waits(pool)
        with pytest.raises(cpupool.PoolFull):
            await pool.run(tasks.add, 2)
        found = pool.statistics()
        assert (found.submitted, found.refused, found.pending, found.busy) == (3, 1, 1, 1)
        gate.open()
    with pytest.raises(cpupool.PoolClosed):
        await pool.run(tasks.add, 1)
    assert ends(pool.statistics()) == {"succeeded": 2, "refused": 2}


async def test_a_task_that_the_end_of_the_pool_stops_is_cancelled() -> None:
    pool = CpuPool(1)
    async with anyio.create_task_group() as group:

        async def run() -> None:
            with pytest.raises(cpupool.PoolClosed):
                await pool.run(tasks.sleep_long)

        group.start_soon(run)
        with anyio.fail_after(10):
            while not pool.statistics().busy:
                await anyio.sleep(0.001)
        await pool.aclose(drain=0)
    assert ends(pool.statistics()) == {"cancelled": 1}


async def test_retries_and_those_that_are_recycled(tmp_path: Path) -> None:
    async with CpuPool(1, retries=2, max_tasks_per_child=1) as pool:
        assert await pool.run(tasks.die_unless_attempt, 2, str(tmp_path / "log")) == 2
        await pool.run(tasks.add, 1)
        with anyio.fail_after(20):
            while (found := pool.statistics()).recycled < 2:
                await anyio.sleep(0.001)
        assert (found.retried, found.workers_died, found.succeeded, found.submitted) == (1, 1, 2, 2)


async def test_items_are_counted_one_by_one(tmp_path: Path) -> None:
    async with CpuPool(2) as pool:
        assert len(await pool.map(tasks.add, range(1000))) == 1000
        found = await quiet(pool)
        assert (found.submitted, found.succeeded) == (1000, 1000)
        assert found.run_time.count == found.queue_wait.count == found.overhead.count == 1000
        assert sum(worker.tasks_done for worker in found.workers) == 1000
        results = await pool.map(items.return_or_raise, [1, KeyError(), 2, KeyError(), "x"], return_exceptions=True)
        assert len(results) == 5
        found = await quiet(pool)
        assert (found.submitted, found.succeeded, found.failed) == (1005, 1003, 2)
        results = await pool.options(timeout=0.2).map(
            items.sleep_or_die, [0.0, 60.0, 0.0, -1.0, 0.0], return_exceptions=True
        )
        found = await quiet(pool)
        assert (found.submitted, found.succeeded, found.timed_out, found.died) == (1010, 1006, 1, 1)
        with pytest.raises(KeyError):
            await pool.options(retries=0).map(items.return_or_raise, [KeyError(), *range(50)], chunksize=5)
        found = await quiet(pool)
        assert found.failed == 3


async def test_a_stream_that_is_left_counts_what_it_has_taken() -> None:
    async def endless() -> AsyncIterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    async with CpuPool(2) as pool:
        async with pool.stream(tasks.add, endless()) as results:
            async for value in results:
                if value == 300:
                    break
        found = await quiet(pool)
        assert found.succeeded > 300
        assert found.submitted == found.succeeded + found.cancelled


async def test_nothing_is_lost_when_anything_happens() -> None:
    """Whatever becomes of calls, and whoever gives them up, each is counted once."""
    chance = random.Random(4)
    kinds = [
        (tasks.add, 1),
        (tasks.raise_exception, KeyError),
        (tasks.busy, 0.01),
        (tasks.sleep_long,),
        (tasks.exit_at_once, 1),
    ]
    calls = 0
    async with CpuPool(2, grace=0.1, queue_timeout=2) as pool:

        async def call() -> None:
            nonlocal calls
            calls += 1
            with anyio.move_on_after(chance.random() * 0.1):
                with pytest.raises(BaseException):  # noqa: B017, PT011, PT012
                    await pool.options(timeout=0.05).run(*chance.choice(kinds))  # type: ignore[arg-type]
                    raise ArithmeticError

        for _ in range(10):
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(call)
        found = await quiet(pool)
        assert found.submitted == calls == 200
        assert len(ends(found)) >= 4
    assert sum(ends(pool.statistics()).values()) == 200


def test_a_call_may_be_given_up_where_no_lock_may_be_taken() -> None:
    """Its coroutine may be closed by a garbage collection, in the middle of anything."""

    async def main() -> None:
        async with CpuPool(1) as pool:
            coroutine = pool.run(tasks.sleep_long)
            coroutine.send(None)
            with pool._dispatcher._lock:
                coroutine.close()
            found = await quiet(pool)
            assert ends(found) == {"cancelled": 1}

    asyncio.run(main())


def test_threads_count_together() -> None:
    with CpuPool(2) as pool:

        def call() -> None:
            for number in range(100):
                pool.run_sync(tasks.add, number)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = pool.statistics()
        assert (found.submitted, found.succeeded, found.run_time.count) == (400, 400, 400)
        assert sum(worker.tasks_done for worker in found.workers) == 400


async def test_prepared_calls_executors_and_views_count_too() -> None:
    async with CpuPool(1) as pool:
        prepared = pool.prepare(tasks.add, 1)
        await prepared.run()
        await prepared.run()
        with pool.as_executor() as executor:
            assert await anyio.to_thread.run_sync(executor.submit(tasks.add, 1).result) == 1
        await pool.options(label="x").run(tasks.add, 1)
        assert ends(pool.statistics()) == {"succeeded": 4}


async def test_waiting_for_room_is_pending_too(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path / "gate")
    async with CpuPool(2, max_inflight_bytes=100) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        group.start_soon(pool.run, tasks.add, 1)
        await wait_until_one_waits(pool)
        gate.open()
        found = await quiet(pool)
        assert ends(found) == {"succeeded": 2}


def test_a_pool_without_workers_counts_as_well() -> None:
    with cpupool.testing.InlinePool() as pool:
        pool.run_sync(tasks.add, 1)
        with pytest.raises(KeyError):
            pool.run_sync(tasks.raise_exception, KeyError)
        found = pool.statistics()
        assert (ends(found), found.submitted, found.workers) == ({"succeeded": 1, "failed": 1}, 2, ())
        assert found.run_time.count == 1
    anyio.run(_use_inline_flow)


async def _use_inline_flow() -> None:
    async with cpupool.testing.InlinePool() as pool:
        await pool.map(items.return_or_raise, [1, KeyError()], return_exceptions=True)
        assert ends(pool.statistics()) == {"succeeded": 1, "failed": 1}


async def test_negative_results_of_a_slow_batch_are_no_failures() -> None:
    """The pool looks at the journal several times while it runs."""
    async with CpuPool(2) as pool:
        await pool.map(items.work_and_negate, [0.01] * 80, chunksize=40)
        assert ends(await quiet(pool)) == {"succeeded": 80}


async def test_what_is_counted_later_does_not_pile_up() -> None:
    async with CpuPool(1) as pool:
        for _ in range(20):
            await pool.map(tasks.add, [1])
            with anyio.move_on_after(0.001):
                await pool.run(tasks.sleep_long)
        await pool.run(tasks.add, 1)
        assert len(pool._supervisor.tally._notes) < 2 * 64


async def test_what_is_counted_of_many_calls_at_once_does_not_pile_up() -> None:
    """Else the next call, and with it the event loop, would add all that up: 0.1 s after 100,000 calls."""
    async with CpuPool(1) as pool:
        async with anyio.create_task_group() as group:
            for number in range(1_000):
                group.start_soon(pool.run, abs, number)
        assert len(pool._supervisor.tally._notes) < 2 * 64
        assert ends(pool.statistics()) == {"succeeded": 1_000}


async def test_what_a_task_raises_itself_is_its_failure() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(cpupool.PoolFull):
            await pool.run(tasks.raise_exception, cpupool.PoolFull, 1, 1.0)
        assert ends(pool.statistics()) == {"failed": 1}


async def test_tasks_that_time_out_have_times_too() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(cpupool.TaskTimeout):
            await pool.options(timeout=0.2).run(tasks.sleep_long)
        found = pool.statistics()
        assert (found.run_time.count, found.queue_wait.count) == (1, 1)
        assert found.run_time.sum >= 0.2


async def test_every_worker_that_was_started_ends_once(tmp_path: Path) -> None:
    """Also one that is killed because it leaves too slowly; and one that a cancelled call has used up is told of."""
    kinds: list[str] = []
    pool = CpuPool(1, max_tasks_per_child=1, finalizer=tasks.sleep_long, grace=0.1)
    pool.on_event(lambda event: kinds.append(event.kind))
    async with pool:
        for _ in range(3):
            await pool.run(tasks.add, 1)
        gate = tasks.Gate(tmp_path)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.hold, *gate.arguments)
            await anyio.to_thread.run_sync(gate.wait_until_begun)
            group.cancel_scope.cancel()
        found = pool.statistics()
        with anyio.fail_after(20):
            while kinds.count("worker_recycled") < 4 or [worker.state for worker in found.workers] != ["idle"]:
                await anyio.sleep(0.001)
                found = pool.statistics()
        assert (found.recycled, found.workers_died) == (4, 0)
        assert found.workers_started == 5
    assert "worker_died" not in kinds


async def test_a_failed_initializer_is_a_death() -> None:
    pool = CpuPool(1, initializer=tasks.raise_exception, initargs=(KeyError,))
    with pytest.raises(cpupool.InitializerFailed):
        await pool.run(tasks.add, 1)
    with anyio.fail_after(10):
        while pool.statistics().workers:
            await anyio.sleep(0.001)
    found = pool.statistics()
    assert (found.workers_started, found.workers_died, found.refused) == (1, 1, 1)
    await pool.aclose()


# --- times ---


async def test_d6_times_are_told_apart(tmp_path: Path) -> None:
    async with CpuPool(1) as pool:
        await pool.run(tasks.add, 1)
        before = pool.statistics()
        assert before.queue_wait.sum == 0
        assert before.run_time.sum < 1
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, time.sleep, 0.3)
            group.start_soon(pool.run, time.sleep, 0.1)
        found = pool.statistics()
        run, wait = found.run_time - before.run_time, found.queue_wait - before.queue_wait
        assert run.count == wait.count == 2
        assert 0.4 <= run.sum < 5
        assert 0.09 <= wait.sum < 5, "one of them has waited for the other"
        assert run.quantile(1) >= 0.3
        assert found.overhead.sum < run.sum + wait.sum, "they are in neither twice"
        await pool.map(time.sleep, [0.01] * 20)
        items_only = pool.statistics().run_time - found.run_time
        assert items_only.count == 20
        assert 0.01 <= items_only.mean < 1
        assert items_only.quantile(0.5) >= 0.025, "a bound above what they took"


async def test_pickling_is_overhead() -> None:
    async with CpuPool(1) as pool:
        await pool.run(tasks.return_it, 1)
        before = pool.statistics()
        began = time.monotonic()
        await pool.run(tasks.return_it, [{"number": number} for number in range(200_000)])
        took = time.monotonic() - began
        found = pool.statistics()
        overhead = found.overhead - before.overhead
        assert 0.5 * took < overhead.sum <= took


@given(st.lists(st.floats(0, 1000), max_size=50), st.floats(0, 1))
def test_a_histogram_brackets_what_it_has_seen(values: list[float], share: float) -> None:
    tally = Tally(threading.Lock())
    for value in values:
        tally.note((None, 1, (0.0, value, 0.0)))
    found = tally.read()["run_time"]
    assert found.count == len(values)
    assert found.sum == pytest.approx(sum(values))
    assert found.bounds == BUCKETS
    wanted = sorted(values)[max(math.ceil(share * len(values)), 1) - 1] if values else 0.0
    quantile = found.quantile(share)
    assert quantile >= wanted
    below = max((bound for bound in BUCKETS if bound < quantile), default=0.0)
    assert not values or wanted > below or wanted == below == 0.0


def test_a_quantile_needs_a_share() -> None:
    empty = Histogram(BUCKETS, (0,) * (len(BUCKETS) + 1), 0.0)
    assert (empty.quantile(0.5), empty.mean, empty.count) == (0.0, 0.0, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        empty.quantile(99)


# --- workers ---


async def test_what_is_said_of_each_worker(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path / "gate")
    async with CpuPool(2, name="images") as pool:
        await pool.run(tasks.busy, 0.3)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.options(label="thumbnail").run, tasks.hold, *gate.arguments)
            pid = await anyio.to_thread.run_sync(gate.wait_until_begun)
            found = pool.statistics()
            gate.open()
    assert (found.name, found.max_workers, found.idle, found.busy, found.starting) == ("images", 2, 1, 1, 0)
    assert [worker.state for worker in found.workers if worker.pid == pid] == ["busy"]
    for worker in found.workers:
        assert worker.pid != os.getpid()
        assert worker.resident_bytes is not None
        assert 2**20 < worker.resident_bytes < 2**30
        assert worker.cpu_seconds is not None
        assert worker.cpu_share == pytest.approx(worker.cpu_seconds / worker.age)
        assert 0 < worker.age < 60
        assert 0 <= worker.last_seen <= worker.age
        if worker.state == "busy":
            assert worker.task == "thumbnail"
            assert 0 < worker.seconds < 10
        else:
            assert (worker.task, worker.seconds) == (None, 0.0)
    assert sum(worker.tasks_done for worker in found.workers) == 1
    assert max(worker.cpu_seconds or 0 for worker in found.workers) >= 0.2
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.busy = 3  # type: ignore[misc]


async def test_a_function_without_a_label_is_named(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path / "gate")
    async with CpuPool(1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        (worker,) = pool.statistics().workers
        assert worker.task == "tasks.hold"
        assert psutil.Process(worker.pid).is_running()
        gate.open()


@pytest.mark.slow
async def test_workers_that_start_and_that_stop_a_task() -> None:
    pool = CpuPool(1, initializer=time.sleep, initargs=(0.3,), grace=2)
    async with anyio.create_task_group() as group:
        group.start_soon(pool.warm_up)
        with anyio.fail_after(10):
            while not (found := pool.statistics()).workers:
                await anyio.sleep(0.001)
    assert (found.starting, found.idle, found.busy) == (1, 0, 0)
    assert found.workers[0].state == "starting"
    async with pool:
        with anyio.move_on_after(0.2):
            await pool.run(tasks.swallow_interrupts)
        with anyio.fail_after(1):
            while (found := pool.statistics()).workers[0].state != "stopping":
                await anyio.sleep(0.001)
        assert found.busy == 1


def test_a_pool_that_was_never_used_has_statistics() -> None:
    found = CpuPool(3).statistics()
    assert (found.workers, found.max_workers, found.submitted, found.run_time.count) == ((), 3, 0, 0)


def test_while_everything_changes() -> None:
    """Any thread may ask, at any time."""
    failures: list[BaseException] = []
    with CpuPool(2, max_tasks_per_child=3) as pool:
        is_over = threading.Event()

        def ask() -> None:
            try:
                while not is_over.is_set():
                    found = pool.statistics()
                    assert found.idle + found.busy + found.starting <= len(found.workers)
                    assert sum(ends(found).values()) <= found.submitted
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        for number in range(60):
            pool.run_sync(tasks.add, number)
        is_over.set()
        thread.join()
    assert not failures
