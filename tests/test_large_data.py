"""Large values cross to a worker and back, the event loop goes on meanwhile, and nothing of them is left."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import psutil
import pytest

import cpupool
import large
import tasks
from conftest import RunScript
from cpupool import (
    CpuPool,
    PoolBroken,
    PoolClosed,
    PoolFull,
    QueueTimeout,
    ResultNotPicklable,
    TaskNotPicklable,
    TaskTimeout,
    WorkerDied,
    _apart,
    _large,
    _parcels,
    _payload,
)
from cpupool._calls import async_waits

np = pytest.importorskip("numpy")

pytestmark = pytest.mark.anyio

MILLION = 1_000_000


@pytest.fixture(params=["streams", pytest.param("frames", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How large values travel: through streams, or, where no descriptor is left, with their frames."""
    if request.param == "streams":
        return {}
    monkeypatch.setattr(_large, "open_stream", large.refuse_stream)
    return {"initializer": large.use_no_streams}


# --- what arrives ---


async def test_whatever_is_large_arrives_as_it_was_and_can_be_written(way: dict[str, Any]) -> None:
    values = (
        b"b" * MILLION,
        bytearray(b"a" * MILLION),
        memoryview(b"m" * MILLION),
        memoryview(bytearray(MILLION)),
        "t" * MILLION,
        "é" * 3 * MILLION,
        np.ones(MILLION),
        np.ones((1000, 1000), order="F"),
    )
    wanted = [
        ("bytes", MILLION, False),
        ("bytearray", MILLION, True),
        ("memoryview", MILLION, False),
        ("memoryview", MILLION, True),
        ("str", MILLION, False),
        ("str", 6 * MILLION, False),
        ("ndarray", 8 * MILLION, True),
        ("ndarray", 8 * MILLION, True),
    ]
    async with CpuPool(1, **way) as pool:
        assert await pool.run(large.describe, *values) == wanted
        for value, (kind, nbytes, can_be_written) in zip(values, wanted, strict=True):
            found = await pool.run(large.echo, value)
            assert large.describe(found) == [(kind, nbytes, can_be_written)]
            assert np.array_equal(found, value) if kind == "ndarray" else found == value
        assert await pool.run(large.describe, b"small", np.ones(3)) == [("bytes", 5, False), ("ndarray", 24, True)]


async def test_frames_and_tables_travel() -> None:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"a": np.arange(300_000), "b": np.arange(300_000.0), "c": ["x", "y", "z"] * 100_000})
    table = pyarrow.table({"a": np.arange(300_000), "b": [str(number) for number in range(300_000)]})
    async with CpuPool(1) as pool:
        found_frame, found_table = await pool.run(large.echo, frame, table)
        assert found_frame.equals(frame)
        assert found_table.equals(table)
        found_frame.loc[0, "b"] = 5.0  # it can be changed


async def test_what_arrives_is_private(way: dict[str, Any]) -> None:
    """A task may change its arguments, and the caller the result, without anybody else seeing it."""
    array = np.zeros(MILLION)
    async with CpuPool(1, **way) as pool:
        first = await pool.run(large.overwrite, array)
        assert array.sum() == 0
        assert first.sum() == 7 * MILLION
        first[:] = 1
        second = await pool.run(large.overwrite, array)
        assert (first.sum(), second.sum()) == (MILLION, 7 * MILLION)


async def test_arguments_that_a_task_keeps_are_not_changed_by_the_next_call() -> None:
    async with CpuPool(1) as pool:
        for number in range(1, 4):
            assert await pool.run(large.keep, np.full(MILLION, number)) == number
        assert await pool.run(large.kept_totals) == [MILLION, 2 * MILLION, 3 * MILLION]


async def test_results_that_the_caller_keeps_are_not_changed_by_the_next_call() -> None:
    async with CpuPool(1) as pool:
        kept = [await pool.run(large.make_array, MILLION, number) for number in range(5)]
        kept += await pool.map(partial(large.make_array, MILLION), range(5, 10))
    assert [array[-1] for array in kept] == list(range(10))


async def test_many_results_may_be_kept() -> None:
    """They hold no descriptors: more of them than a process may have open are no problem."""
    async with CpuPool(1) as pool:
        await pool.run(large.make_array, 40_000, 0)  # the event loop watches with one of its own from now on
        before = len(os.listdir("/proc/self/fd"))
        kept = [await pool.run(large.make_array, 40_000, number) for number in range(50)]
        kept += await pool.map(partial(large.make_array, 40_000), range(50))
        assert len(os.listdir("/proc/self/fd")) == before
    assert sum(array[0] for array in kept) == 2 * sum(range(50))


async def test_large_items_and_results_of_map_and_stream(way: dict[str, Any]) -> None:
    arrays = [np.full(60_000, number) for number in range(12)]
    texts = ["é" * (2 * MILLION), "short", b"b" * MILLION]
    async with CpuPool(2, **way) as pool:
        assert [each[0] for each in await pool.map(large.echo, arrays)] == list(range(12))
        assert await pool.map(large.echo, texts) == texts
        assert await pool.map(large.length, texts, chunksize=3) == [2 * MILLION, 5, MILLION]
        async with pool.stream(large.echo, iter(arrays), ordered=False) as results:
            assert sorted([each[0] async for each in results]) == list(range(12))
        mixed = await pool.map(large.make_array, [10, MILLION, 20, 30, MILLION], chunksize=5)
        assert [len(each) for each in mixed] == [10, MILLION, 20, 30, MILLION]
        dicts = await pool.map(large.make_dicts, [3, 30_000, 5])
        assert [len(each) for each in dicts] == [3, 30_000, 5]


async def test_a_function_with_a_large_argument_bound_to_it(way: dict[str, Any]) -> None:
    async with CpuPool(2, **way) as pool:
        add = partial(np.add, np.ones(100_000))
        assert [each[0] for each in await pool.map(add, range(6))] == [1, 2, 3, 4, 5, 6]
        assert len(await pool.run(partial(large.echo, b"x" * MILLION))) == MILLION
        assert [len(each[0]) for each in await pool.map(partial(large.echo, "x" * MILLION), ["a", "y" * MILLION])] == [
            MILLION,
            MILLION,
        ]


async def test_a_stream_that_is_left_while_a_large_result_is_rebuilt_loses_nothing() -> None:
    async with CpuPool(1) as pool, pool.stream(large.make_array, [2 * MILLION] * 3) as results:
        found: list[Any] = []
        for patience in itertools.count(1):  # milliseconds: what is left is begun again
            with anyio.move_on_after(patience / 1000):
                found.append(await anext(results))
            if len(found) == 3:
                break
        assert [len(each) for each in found] == [2 * MILLION] * 3


async def test_by_cloudpickle() -> None:
    pytest.importorskip("cloudpickle")
    array = np.ones(MILLION)
    async with CpuPool(1, serializer="cloudpickle") as pool:
        assert await pool.run(lambda: array.sum() + 1) == MILLION + 1
        assert (await pool.run(lambda view: array * len(view), memoryview(b"ab")))[0] == 2
        assert [len(each) for each in await pool.map(lambda size: np.ones(size) + 1, [5, MILLION])] == [5, MILLION]


def test_from_threads_and_through_executors() -> None:
    array = np.ones(MILLION)
    with CpuPool(2) as pool:
        assert pool.run_sync(large.total, array) == MILLION
        assert pool.run_sync(large.overwrite, array).sum() == 7 * MILLION
        with pool.as_executor() as executor:
            assert executor.submit(large.total, array).result() == MILLION
            assert [len(each) for each in executor.map(large.make_array, [MILLION, 3])] == [MILLION, 3]


def test_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPUPOOL_MODE", "inline")
    array = np.zeros(MILLION)
    with CpuPool(1) as pool:
        assert pool.run_sync(large.overwrite, array).sum() == 7 * MILLION
        assert array.sum() == 0
        assert pool.run_sync(large.length, "é" * 3 * MILLION) == 3 * MILLION
        with pool.share(np.ones(MILLION)) as shared:
            assert pool.run_sync(large.get_total, shared) == MILLION
        with pytest.raises(ResultNotPicklable, match="cannot be rebuilt here"):
            pool.run_sync(large.return_what_does_not_come_back, MILLION)


async def test_a_prepared_call_has_the_arguments_of_the_moment() -> None:
    array, text = np.ones(MILLION), bytearray(b"x" * MILLION)
    async with CpuPool(2) as pool:
        prepared = pool.prepare(large.echo, array, text)
        array[:] = 0
        text.clear()
        results: list[Any] = []

        async def run() -> None:
            results.append(await prepared.run())

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(run)
        assert [(found.sum(), len(again)) for found, again in results] == [(MILLION, MILLION)] * 4


async def test_a_retry_sends_large_arguments_again(tmp_path: Path) -> None:
    async with CpuPool(1) as pool:
        path = str(tmp_path / "died")
        retrying = pool.options(retries=1)
        assert len(await retrying.run(large.echo_after_a_death, path, np.ones(MILLION))) == MILLION


# --- errors ---


async def test_errors_of_calls_with_large_arguments(way: dict[str, Any]) -> None:
    array = np.ones(MILLION)
    async with CpuPool(1, **way) as pool:
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                await pool.run(large.raise_with, array)
            with pytest.raises(WorkerDied):
                await pool.run(large.die_with, array)
            with pytest.raises(TaskTimeout):
                await pool.options(timeout=0.05).run(large.spin_with, array)
            with pytest.raises(TaskNotPicklable, match="argument 2"):
                await pool.run(large.echo, array, lambda: None)
            with pytest.raises(TaskNotPicklable, match="argument 1"):
                await pool.run(large.echo, large.RefusesAtTheEnd())
            with pytest.raises(ResultNotPicklable, match="returned tuple"):
                await pool.run(large.echo_with_lambda, array)
            with pytest.raises(ResultNotPicklable, match="cannot be rebuilt here"):
                await pool.run(large.return_what_does_not_come_back, MILLION)
        assert await pool.run(large.total, array) == MILLION


async def test_an_item_whose_result_fails_half_way_leaves_nothing_for_the_next() -> None:
    async with CpuPool(1) as pool:
        found: list[Any] = await pool.map(
            large.make_array_that_may_not_pickle, [True, False, True, False], return_exceptions=True
        )
    assert [type(each) for each in found[::2]] == [ResultNotPicklable] * 2
    assert [each.data.sum() for each in found[1::2]] == [0, 0]


async def test_a_map_of_a_large_function_can_be_given_up_before_it_begins() -> None:
    async with CpuPool(1) as pool:
        with anyio.move_on_after(0.02) as scope:
            await pool.map(partial(large.echo, large.make_dicts(200_000)), [1])
        assert scope.cancelled_caught
        with pytest.raises(TaskNotPicklable):
            await pool.map(partial(large.echo, large.RefusesAtTheEnd()), [1])
        assert await pool.map(tasks.add, [1, 2]) == [1, 2]


@pytest.mark.slow
def test_whatever_timeout_sockets_have_by_default(run_script: RunScript) -> None:
    done = run_script("""
import socket, time, cpupool, large, numpy
socket.setdefaulttimeout(0.2)

if __name__ == "__main__":
    with cpupool.CpuPool(1) as pool:
        print(pool.run_sync(large.total, numpy.ones(1_000_000)))
        time.sleep(0.5)
        print(pool.run_sync(large.sleep_when_unpickled, large.SleepsFirst(), numpy.ones(3_000_000)))
        print(len(pool.run_sync(large.make_array, 1_000_000)))
""")
    assert (done.stdout, done.stderr) == ("1000000.0\n3000000.0\n1000000\n", "")


async def test_the_item_that_does_not_pickle_is_blamed_among_large_ones() -> None:
    items = [large.make_dicts(30_000), large.RefusesAtTheEnd(), large.make_dicts(2)]
    async with CpuPool(2) as pool:
        found = await pool.map(large.echo, items, return_exceptions=True)
    assert [type(each) for each in found] == [list, TaskNotPicklable, list]


# --- the event loop ---


@pytest.mark.parametrize(
    "how", ["run", "map", *(pytest.param(each, marks=pytest.mark.slow) for each in ("stream", "partial"))]
)
@pytest.mark.parametrize("what", ["many small", "one large", "text"])
def test_the_loop_goes_on_while_large_values_are_packed_and_unpacked(
    what: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For how long it stands still is measured in benchmarks/large_data.py; here, that none of it is done there."""
    on_loop: list[str] = []

    def note(name: str) -> None:
        function = getattr(_payload, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            is_small = name == "loads_result" and _large.is_light(args[0])
            if "most" not in kwargs and not is_small and asyncio._get_running_loop() is not None:
                on_loop.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(_payload, name, noting)

    for name in ("loads_result", "pack_call", "pack_items", "pack_function"):
        note(name)
    values = {"many small": large.make_dicts(100_000), "one large": np.ones(8 * MILLION), "text": "é" * 8 * MILLION}
    value: Any = values[what]

    async def main() -> None:
        async with CpuPool(1) as pool:
            if how == "run":
                found = await pool.run(large.echo, value)
            elif how == "map":
                (found,) = await pool.map(large.echo, [value])
            elif how == "partial":
                ((found, _),) = await pool.map(partial(large.echo, value), [1])
            else:
                async with pool.stream(large.echo, [value]) as results:
                    found = await anext(results)
            assert len(found) == len(value)

    asyncio.run(main())
    assert on_loop == []


async def test_pickling_that_is_given_up_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In search of an argument that is to blame, say."""
    explained: list[Any] = []
    monkeypatch.setattr(_payload, "explain", lambda *args: explained.append(args))
    value = large.make_dicts(200_000)
    async with CpuPool(1) as pool:
        with anyio.move_on_after(0.02) as scope:
            await pool.run(large.length, value)
        assert scope.cancelled_caught
        with anyio.fail_after(10):
            while _apart._threads:
                await anyio.sleep(0.001)
    assert explained == []


@pytest.mark.filterwarnings("ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning")
async def test_what_sends_a_large_argument_ends_with_its_call() -> None:
    """Though a process that was forked meanwhile has a copy of each descriptor, and somebody keeps the error."""
    kept: list[BaseException] = []

    def senders() -> list[threading.Thread]:
        return [each for each in threading.enumerate() if each.name == "cpupool-sender"]

    async with CpuPool(1, grace=0.1) as pool:
        pid = await pool.run(tasks.get_pid)
        (worker,) = pool._supervisor._crew.workers
        os.kill(pid, signal.SIGSTOP)

        async def call() -> None:
            try:
                await pool.run(large.total, np.ones(6 * MILLION))
            except BaseException as error:
                kept.append(error)
                raise

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            with anyio.fail_after(10):
                while not worker.in_call:
                    await anyio.sleep(0.001)
            assert len(senders()) == 1
            async with CpuPool(1, mp_context="fork") as other:
                assert await other.run(tasks.add, 1, 2) == 3
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True), anyio.fail_after(10):
                    while senders():
                        await anyio.sleep(0.001)
    assert kept


async def test_calls_with_large_arguments_can_be_cancelled_at_any_time() -> None:
    """While they are pickled, copied, run, and unpickled; no worker is lost, and no thread left."""
    values = [large.make_dicts(20_000), np.ones(4 * MILLION), b"x" * 10 * MILLION]
    async with CpuPool(2) as pool:
        for number in range(60):
            with anyio.move_on_after(number * 0.0007):
                await pool.run(large.echo, values[number % 3])
        assert len(await pool.run(large.echo, values[0])) == 20_000
        assert await pool.run(large.total, values[1]) == 4 * MILLION


async def test_work_apart_learns_that_nobody_waits_for_it_any_more() -> None:
    ended = threading.Event()

    def job(is_wanted: Callable[[], bool]) -> None:
        while is_wanted():
            time.sleep(0)
        ended.set()

    with anyio.move_on_after(0.01):
        await _apart.run_apart(job, async_waits())
    assert await anyio.to_thread.run_sync(ended.wait, 10)


async def test_a_worker_that_stops_in_the_middle_of_a_large_call_holds_nobody_up(way: dict[str, Any]) -> None:
    """It can take nothing; the event loop goes on, and killing it ends the call at once."""
    async with CpuPool(1, **way) as pool:
        pid = await pool.run(tasks.get_pid)
        (worker,) = pool._supervisor._crew.workers
        picked_up = worker.process.last_task_id()
        failed: list[float] = []

        async def call() -> None:
            with pytest.raises(WorkerDied):
                await pool.run(large.spin_with, np.ones(50 * MILLION // 8))
            failed.append(time.monotonic())

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            with anyio.fail_after(10):
                while worker.process.last_task_id() == picked_up:
                    await anyio.lowlevel.checkpoint()
            os.kill(pid, signal.SIGSTOP)
            longest, started = 0.0, time.monotonic()
            while time.monotonic() - started < 0.3:
                before = time.monotonic()
                await anyio.sleep(0.001)
                longest = max(longest, time.monotonic() - before)
            assert not failed
            assert longest < 0.25
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
        assert failed[0] - killed < 1
        assert await pool.run(large.total, np.ones(MILLION)) == MILLION


async def test_a_large_call_that_a_worker_never_picked_up_goes_to_another(way: dict[str, Any]) -> None:
    async with CpuPool(1, **way) as pool:
        pid = await pool.run(tasks.get_pid)
        os.kill(pid, signal.SIGSTOP)
        totals: list[float] = []

        async def call() -> None:
            totals.append(await pool.run(large.total, np.ones(5 * MILLION)))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            (worker,) = pool._supervisor._crew.workers
            with anyio.fail_after(10):
                while not worker.in_call:
                    await anyio.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
        assert totals == [5 * MILLION]


async def test_a_call_that_is_cancelled_while_it_is_sent_to_a_stopped_worker(way: dict[str, Any]) -> None:
    async with CpuPool(1, grace=0.1, **way) as pool:
        pid = await pool.run(tasks.get_pid)
        os.kill(pid, signal.SIGSTOP)
        (worker,) = pool._supervisor._crew.workers
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, large.total, np.ones(50 * MILLION // 8))
            with anyio.fail_after(10):
                while not worker.in_call:
                    await anyio.sleep(0.001)
            group.cancel_scope.cancel()
        assert await pool.run(large.total, np.ones(MILLION)) == MILLION  # by another worker


async def test_the_collector_is_on_again_and_what_the_program_froze_stays_frozen() -> None:
    async with CpuPool(1) as pool:
        assert len(await pool.run(large.make_dicts, 60_000)) == 60_000
        assert gc.isenabled()
        gc.disable()
        try:
            assert len(await pool.run(large.make_dicts, 60_000)) == 60_000
            assert not gc.isenabled()
        finally:
            gc.enable()
        frozen = gc.get_freeze_count()
        gc.freeze()
        try:
            assert len(await pool.run(large.make_dicts, 60_000)) == 60_000
            assert gc.get_freeze_count() > frozen
        finally:
            assert gc.isenabled()


# --- memory ---


async def test_large_calls_leave_no_descriptor_and_no_thread() -> None:
    async with CpuPool(1) as pool:
        await pool.run(large.echo, np.ones(10))
        before = await pool.run(large.count_descriptors), large.count_descriptors(), set(threading.enumerate())
        for value in (np.ones(MILLION), b"x" * 10 * MILLION, large.make_dicts(50_000)):
            for _ in range(3):
                await pool.run(large.echo, value)
        assert await pool.run(large.count_descriptors) == before[0]
        with anyio.fail_after(10):
            while large.count_descriptors() != before[1] or set(threading.enumerate()) - before[2]:
                await anyio.sleep(0.001)  # a thread says goodbye after its last work


async def test_nothing_is_left_of_calls_that_died_or_were_given_up() -> None:
    array = np.ones(MILLION)
    async with CpuPool(2) as pool:
        for _ in range(10):
            with pytest.raises(WorkerDied):
                await pool.run(large.die_with, array)
            with anyio.move_on_after(0.002):
                await pool.run(large.spin_with, array)
        gc.collect()
        with anyio.fail_after(10):
            while any(thread.name.startswith("cpupool-") for thread in threading.enumerate()):
                await anyio.sleep(0.005)


@pytest.mark.slow
async def test_a_thousand_calls_leave_memory_and_descriptors_as_they_were() -> None:
    array = np.ones(10 * 2**20 // 8)
    async with CpuPool(1) as pool:
        for _ in range(30):
            await pool.run(large.echo, array)

        async def weigh() -> tuple[int, int, int]:
            gc.collect()
            return large.resident(), await pool.run(large.resident), len(os.listdir("/proc/self/fd"))

        before = await weigh()
        for _ in range(1000):
            await pool.run(large.echo, array)
        after = await weigh()
    assert after[0] - before[0] < 30 * 2**20
    assert after[1] - before[1] < 30 * 2**20
    assert after[2] <= before[2]


def test_large_initargs_travel_once_and_are_private() -> None:
    array = np.zeros(2 * MILLION)
    with CpuPool(2, initializer=large.keep_all, initargs=(array, memoryview(b"x"))) as pool:
        assert large.count_memory_files() == 1  # for both
        with pool.as_executor() as executor:
            futures = [executor.submit(large.add_to_first_kept) for _ in range(20)]
            assert max(future.result() for future in futures) <= 20
        assert array[0] == 0
        for process in psutil.Process().children(recursive=True):
            if process.pid in {worker.process.pid for worker in pool._supervisor._crew.workers}:
                process.kill()
        assert pool.run_sync(large.add_to_first_kept) == 1  # in a new one
        assert large.count_memory_files() == 1
    assert large.count_memory_files() == 0


def test_large_initargs_without_files_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with CpuPool(1, initializer=large.keep_all, initargs=(np.zeros(MILLION), b"x" * MILLION)) as pool:
        assert pool.run_sync(large.add_to_first_kept) == 1


# --- sharing ---


async def test_a_shared_array_is_read_by_many_calls_and_copied_by_none() -> None:
    array = np.ones(MILLION)
    async with CpuPool(2) as pool:
        with pool.share(array) as shared:
            assert isinstance(shared, cpupool.Shared)
            assert shared.nbytes >= array.nbytes
            assert await pool.map(partial(large.get_total_and_add, shared), range(10)) == [
                MILLION + number for number in range(10)
            ]
            assert await pool.run(large.get_and_describe, shared) == ("ndarray", 8 * MILLION, False)
            with pytest.raises(ValueError, match="read-only"):
                await pool.run(large.overwrite_shared, shared)
            assert await pool.run(large.count_files_with, shared) == 1
            assert large.count_memory_files() == 1
        with anyio.fail_after(10):
            while await pool.run(large.count_memory_files) or large.count_memory_files():
                await anyio.sleep(0.005)


async def test_async_with_shares_too() -> None:
    async with CpuPool(1) as pool, pool.share(np.ones(MILLION)) as shared:
        assert await pool.run(large.get_total, shared) == MILLION


async def test_the_arrays_of_a_share_can_be_given_to_calls_themselves() -> None:
    async with CpuPool(1) as pool:
        with pool.share({"a": np.arange(MILLION), "b": np.ones(MILLION)}) as shared:
            found = shared.get()
            assert await pool.run(large.describe, found["a"]) == [("ndarray", 8 * MILLION, False)]
            assert await pool.run(large.total, found["b"]) == MILLION
            part = found["a"][500_000:600_000]
            assert await pool.run(large.total, part) == part.sum()
            every_other = found["a"][::2]  # not one block: it is copied
            assert await pool.run(large.total, every_other) == every_other.sum()
            assert await pool.run(large.count_memory_files) == 1
            del found, part, every_other


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"x" * MILLION, "memoryview"),
        (bytearray(b"x" * MILLION), "memoryview"),
        (b"", "memoryview"),
        (b"abc", "memoryview"),
    ],
)
async def test_bytes_are_shared_as_a_view(value: bytes | bytearray, kind: str) -> None:
    async with CpuPool(1) as pool:
        with pool.share(value) as shared:
            assert await pool.run(large.get_and_describe, shared) == (kind, len(value), False)
            assert bytes(shared.get()) == value


async def test_frames_dicts_and_anything_else_can_be_shared() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(300_000), "b": np.arange(300_000.0)})
    async with CpuPool(1) as pool:
        with pool.share(frame) as of_frame, pool.share(large.make_dicts(20_000)) as of_dicts:
            assert await pool.run(large.get_shape, of_frame) == (300_000, 2)
            assert await pool.run(large.get_length, of_dicts) == 20_000
            assert of_frame.get().equals(frame)


async def test_a_share_must_be_open_and_is_opened_once() -> None:
    async with CpuPool(1) as pool:
        share = pool.share(np.ones(MILLION))
        with pytest.raises(ValueError, match=r"with pool\.share"):
            share.get()
        with pytest.raises(TaskNotPicklable, match=r"argument 1 .*with pool\.share"):
            await pool.run(large.get_total, share)
        with share as shared:
            assert await pool.run(large.get_total, shared) == MILLION
        for use in (share.get, lambda: share.nbytes):
            with pytest.raises(ValueError, match=r"with pool\.share"):
                use()
        with pytest.raises(TaskNotPicklable, match=r"argument 1 .*with pool\.share"):
            await pool.run(large.get_total, share)
        with pytest.raises(RuntimeError, match="only once"):
            share.__enter__()
        assert "not open" in repr(share)


async def test_what_cannot_be_pickled_cannot_be_shared() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(Exception, match=r"lambda|pickle"), pool.share(lambda: None):
            pass


async def test_a_call_that_began_before_the_end_of_a_share_goes_on(tmp_path: Path) -> None:
    """Also one that still waits for a worker."""
    gate = tasks.Gate(tmp_path / "gate")
    totals: list[float] = []

    async with CpuPool(1) as pool:

        async def call(fn: Any, *args: Any) -> None:
            totals.append(await pool.run(fn, *args))

        async with anyio.create_task_group() as group:
            async with pool.share(np.ones(MILLION)) as shared:
                group.start_soon(call, large.hold_shared, *gate.arguments, shared)
                await anyio.to_thread.run_sync(gate.wait_until_begun)
                group.start_soon(call, large.get_total, shared)
                with anyio.fail_after(10):
                    while not pool._dispatcher.has_queue:
                        await anyio.sleep(0.001)
            gate.open()
        assert totals == [MILLION, MILLION]
        with anyio.fail_after(10):
            while await pool.run(large.count_memory_files) or large.count_memory_files():
                await anyio.sleep(0.005)


async def test_a_new_worker_gets_what_is_shared() -> None:
    async with CpuPool(1) as pool:
        with pool.share(np.ones(MILLION)) as shared:
            for _ in range(3):
                assert await pool.run(large.get_total, shared) == MILLION
                with pytest.raises(WorkerDied):
                    await pool.run(large.die_with, shared)


async def test_many_shares_in_one_call() -> None:
    async with CpuPool(1) as pool:
        shares = [pool.share(np.full(1000, number)) for number in range(100)]
        shared = [share.__enter__() for share in shares]
        assert await pool.run(large.get_totals, shared) == [1000 * number for number in range(100)]
        for share in shares:
            share.__exit__(None, None, None)


async def test_a_share_without_files_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    async with CpuPool(1) as pool:
        with pool.share(np.ones(MILLION)) as shared:
            assert await pool.run(large.get_total, shared) == MILLION


async def test_a_share_may_be_an_item_or_bound_to_the_function() -> None:
    async with CpuPool(2) as pool:
        with pool.share(np.ones(MILLION)) as shared:
            assert await pool.map(large.get_total, [shared] * 5) == [MILLION] * 5
            assert await pool.run(partial(large.get_total, shared)) == MILLION
            async with pool.stream(large.get_totals, [[shared], [shared, shared]]) as results:
                assert [each async for each in results] == [[MILLION], [MILLION, MILLION]]


@pytest.mark.filterwarnings("ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning")
@pytest.mark.parametrize("size", [10, MILLION])
async def test_a_task_may_return_what_is_shared(start_method: str, size: int) -> None:
    """It comes back as a copy; also from a worker that was forked while the share was open."""
    with CpuPool(1).share(np.ones(size)) as shared:
        async with CpuPool(1, mp_context=start_method) as pool:
            assert (await pool.run(large.get, shared)).sum() == size
            handle = await pool.run(large.echo, shared)
            assert handle.get().sum() == size
            assert "bytes" in repr(handle)
            assert [each.sum() for each in await pool.map(large.get, [shared])] == [size]


async def test_a_share_that_is_cancelled_while_it_is_opened_leaves_nothing() -> None:
    async with CpuPool(1) as pool:
        with anyio.move_on_after(0.001) as scope:
            async with pool.share(np.ones(20 * MILLION)):
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        with anyio.fail_after(10):
            while _apart._threads:
                await anyio.sleep(0.001)
        assert not _parcels._live_shares


async def test_a_worker_that_is_to_leave_is_not_lost_when_a_share_ends() -> None:
    """It holds too much memory, so its successor is there; then it is told that a share has ended."""
    async with CpuPool(1, max_memory_per_child=40_000_000) as pool:
        for _ in range(5):
            with pool.share(np.ones(10)) as shared:
                assert await pool.run(large.get_total_and_leak, shared, 60_000_000) == 10
            with anyio.fail_after(20):
                assert await pool.run(tasks.add, 1, 2) == 3
        with anyio.fail_after(20):
            await pool.aclose()


async def test_no_call_is_refused_because_a_worker_is_told_of_the_end_of_a_share() -> None:
    async with CpuPool(1, max_pending=0) as pool:
        for _ in range(200):
            with pool.share(np.ones(10)) as shared:
                assert await pool.run(large.get_total, shared) == 10
            assert await pool.run(tasks.add, 1, 2) == 3


async def test_too_many_shares_at_once_are_refused_with_the_number() -> None:
    share = CpuPool(1).share
    shares = [share(np.ones(1)).__enter__() for _ in range(251)]
    try:
        async with CpuPool(1) as pool:
            for call in (pool.run(large.get_totals, shares), pool.map(large.get_totals, [shares])):
                with pytest.raises(ValueError, match="no more than 250 shares"):
                    await call
            assert await pool.run(large.get_totals, shares[:250]) == [1] * 250
            assert await pool.run(large.get_totals, shares) == [1] * 251  # the others are known
        with pytest.raises(PoolBroken, match="no more than 250 shares"):
            async with CpuPool(1, initializer=large.keep_all, initargs=tuple(shares)):
                pass
    finally:
        for each in shares:
            each.__exit__(None, None, None)


async def test_a_worker_that_had_no_descriptor_left_gets_a_share_later() -> None:
    async with CpuPool(1) as pool:
        with pool.share(np.ones(MILLION)) as shared:
            await pool.run(large.use_up_descriptors)
            with pytest.raises(TaskNotPicklable, match="too many open files"):
                await pool.run(large.get_total, shared)
            await pool.run(large.give_back_descriptors)
            assert await pool.run(large.get_total, shared) == MILLION


async def test_a_share_serves_two_pools_and_initializers() -> None:
    with CpuPool(1).share(np.ones(MILLION)) as shared:
        for _ in range(2):
            async with CpuPool(1, initializer=large.keep_all, initargs=(shared,)) as pool:
                assert await pool.run(large.get_total, shared) == MILLION
                assert await pool.run(large.first_kept_total) == MILLION


# --- back-pressure ---


async def test_calls_wait_while_too_many_bytes_are_in_flight(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path / "gate")
    array = np.ones(MILLION)  # 8 MB
    done: list[float] = []
    async with CpuPool(2, max_inflight_bytes=10_000_000) as pool:

        async def hold() -> None:
            await pool.run(large.hold_with, *gate.arguments, array)

        async def call() -> None:
            done.append(await pool.run(large.total, array))

        async with anyio.create_task_group() as group:
            group.start_soon(hold)
            await anyio.to_thread.run_sync(gate.wait_until_begun)
            for _ in range(3):
                group.start_soon(call)
            assert await pool.run(tasks.add, 1, 2) == 3 or True
            await anyio.sleep(0.05)
            assert done == []
            assert pool._dispatcher.counts()[3] == 3
            with pytest.raises(QueueTimeout):
                await pool.options(queue_timeout=0.01).run(large.total, array)
            gate.open()
        assert done == [MILLION] * 3
        assert pool._dispatcher._gate is not None
        assert pool._dispatcher._gate.inside == 0


async def test_a_call_that_only_uses_a_share_waits_at_the_gate_like_others(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path / "gate")
    array = np.ones(MILLION)
    totals: list[float] = []
    async with CpuPool(2, max_inflight_bytes=10_000_000) as pool, pool.share(array) as shared:

        async def call(fn: Any, *args: Any) -> None:
            totals.append(await pool.run(fn, *args))

        async with anyio.create_task_group() as group:
            group.start_soon(partial(pool.run, large.hold_with, *gate.arguments, array))
            await anyio.to_thread.run_sync(gate.wait_until_begun)
            group.start_soon(call, large.total, array)
            with anyio.fail_after(10):
                while pool._dispatcher.counts()[3] != 1:
                    await anyio.sleep(0.001)
            group.start_soon(call, large.get_total, shared)
            with anyio.fail_after(10):
                while pool._dispatcher.counts()[3] != 2:
                    await anyio.sleep(0.001)
            gate.open()
        assert totals == [MILLION, MILLION]


async def test_a_first_call_that_is_given_up_while_it_is_pickled_does_not_keep_its_room() -> None:
    pool = CpuPool(1, max_inflight_bytes=1000)  # nobody has started it
    with anyio.move_on_after(0.005) as scope:
        await pool.run(large.length, large.make_dicts(200_000))
    assert scope.cancelled_caught
    with anyio.fail_after(10):
        assert await pool.run(tasks.add, 1, 2) == 3
    await pool.aclose()


async def test_the_function_of_a_map_and_small_pickles_count_too() -> None:
    async with CpuPool(2, max_inflight_bytes=10_000_000) as pool:
        gate = pool._dispatcher._gate
        assert gate is not None
        most = 0
        counted = type(gate).enter

        def enter(self: Any, lease: Any, size: int | None) -> bool:
            nonlocal most
            is_in = counted(self, lease, size)
            most = max(most, self.inside)
            return is_in

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(gate), "enter", enter)
            await pool.map(partial(large.echo, np.ones(500_000)), [1])
            assert 4_000_000 <= most < 4_100_000
            most = 0
            await pool.run(large.echo, np.ones(500_000), b"x" * 200_000)
            assert most >= 4_200_000
            most = 0
            await pool.map(large.length, [[str(number) for number in range(200_000)]])
            assert most == 10_000_000  # as long as it is not known


async def test_with_max_pending_too_many_bytes_are_refused(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path / "gate")
    array = np.ones(MILLION)
    async with CpuPool(2, max_inflight_bytes=10_000_000, max_pending=0) as pool:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(pool.run, large.hold_with, *gate.arguments, array))
            await anyio.to_thread.run_sync(gate.wait_until_begun)
            with pytest.raises(PoolFull):
                await pool.run(large.total, array)
            gate.open()
        assert await pool.run(large.total, array) == MILLION


async def test_one_call_that_is_larger_than_the_limit_goes_alone() -> None:
    async with CpuPool(2, max_inflight_bytes=1000) as pool:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(pool.run, large.total, np.ones(MILLION))
                group.start_soon(pool.run, large.count_items, large.NeedsPieces(100_000))
        assert await pool.map(large.total, [np.ones(100_000)] * 5) == [100_000] * 5
        assert pool._dispatcher._gate is not None
        assert pool._dispatcher._gate.inside == 0


async def test_calls_that_fail_or_are_given_up_do_not_count_any_more(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path / "gate")
    array = np.ones(MILLION)
    async with CpuPool(2, max_inflight_bytes=10_000_000) as pool:
        with pytest.raises(ValueError, match="no"):
            await pool.run(large.raise_with, array)
        with pytest.raises(WorkerDied):
            await pool.run(large.die_with, array)
        async with anyio.create_task_group() as group:
            group.start_soon(partial(pool.run, large.hold_with, *gate.arguments, array))
            await anyio.to_thread.run_sync(gate.wait_until_begun)
            with anyio.move_on_after(0.05) as waiting:
                await pool.run(large.total, array)
            assert waiting.cancelled_caught
            assert await pool.run(tasks.add, 1, 2) == 3  # is not behind the one that has gone
            group.cancel_scope.cancel()
        with anyio.fail_after(10):
            assert await pool.run(large.total, array) == MILLION


async def test_what_waits_for_room_is_told_when_the_pool_closes(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path / "gate")
    array = np.ones(MILLION)
    pool = CpuPool(2, max_inflight_bytes=10_000_000)
    async with anyio.create_task_group() as group:

        async def hold() -> None:
            with pytest.raises(PoolClosed):
                await pool.run(large.hold_with, *gate.arguments, array)

        async def call() -> None:
            with pytest.raises(PoolClosed):
                await pool.run(large.total, array)

        group.start_soon(hold)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        group.start_soon(call)
        with anyio.fail_after(10):
            while pool._dispatcher.counts()[3] != 1:
                await anyio.sleep(0.001)
        await pool.aclose(drain=0)


# --- odd places ---


def test_a_program_that_ends_with_large_calls_under_way(run_script: RunScript) -> None:
    done = run_script("""
import asyncio, cpupool, large, numpy

async def main():
    calls = [asyncio.create_task(pool.run(large.echo, large.make_dicts(100_000))) for _ in range(4)]
    await asyncio.sleep(0.1)

if __name__ == "__main__":
    pool = cpupool.CpuPool(2)
    asyncio.run(main())
    print("end")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("end\n", "", 0)


def test_large_values_after_a_fork(run_script: RunScript) -> None:
    done = run_script("""
import os, warnings, cpupool, large, numpy
warnings.simplefilter("ignore", DeprecationWarning)

if __name__ == "__main__":
    pool = cpupool.CpuPool(1)
    array = numpy.ones(1_000_000)
    print(pool.run_sync(large.total, array), flush=True)
    if (pid := os.fork()) == 0:
        print(pool.run_sync(large.total, array), len(pool.run_sync(large.make_dicts, 100_000)), flush=True)
        pool.close()
        os._exit(0)
    os.waitpid(pid, 0)
    pool.close()
""")
    assert (done.stdout, done.stderr) == ("1000000.0\n1000000.0 100000\n", "")


def test_no_descriptors_left(run_script: RunScript) -> None:
    """A stream needs two; without, what is large follows its frame."""
    done = run_script("""
import os, resource, cpupool, large, numpy

if __name__ == "__main__":
    with cpupool.CpuPool(1) as pool:
        pool.run_sync(large.length, b"")
        files = []
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        try:
            while True:
                files.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        print(pool.run_sync(large.total, numpy.ones(1_000_000)))
        try:
            pool.run_sync(large.make_array, 1_000_000)
        except OSError as error:
            print("too many open files" in str(error))
        for file in files:
            os.close(file)
        print(len(pool.run_sync(large.make_array, 1_000_000)))
""")
    assert (done.stdout, done.stderr) == ("1000000.0\nTrue\n1000000\n", "")
