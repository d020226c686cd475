"""Many items: `map` and `stream`, their order, their failures, and what stays in memory."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import items
import tasks
from conftest import RunScript, wait_until_gone
from cpupool import (
    CpuPool,
    InitializerFailed,
    PoolClosed,
    PoolFull,
    QueueTimeout,
    RemoteError,
    ResultNotPicklable,
    TaskInterrupted,
    TaskNotPicklable,
    TaskTimeout,
    WorkerDied,
)

pytestmark = pytest.mark.anyio

SIZES = [0, 1, 2, 3, 10, 1000, 40_000]


async def take_all(results: AsyncIterator[Any]) -> list[Any]:
    return [value async for value in results]


async def take_into(got: list[Any], results: AsyncIterator[Any]) -> None:
    async for value in results:
        got.append(value)  # noqa: PERF401  # what came before an error counts


async def agen(values: Iterable[Any]) -> AsyncIterator[Any]:
    for value in values:
        yield value


# --- what comes out ---


async def test_results_are_those_of_the_function_in_order() -> None:
    async with CpuPool(2) as pool:
        for size in SIZES:
            assert await pool.map(items.double, range(size)) == list(range(0, 2 * size, 2))
            assert await pool.map(items.to_text, list(range(size))) == list(map(str, range(size)))
            async with pool.stream(items.double, iter(range(size))) as results:
                assert await take_all(results) == list(range(0, 2 * size, 2))
            async with pool.stream(items.double, range(size), ordered=False) as results:
                assert sorted(await take_all(results)) == list(range(0, 2 * size, 2))


@pytest.mark.parametrize("chunksize", [None, 7, 100_000])
async def test_values_keep_their_types_whatever_their_neighbours_are(chunksize: int | None) -> None:
    async with CpuPool(2) as pool:
        for fn, count in ((items.by_kind, 2000), (items.count_down, 4000)):
            got = await pool.map(fn, range(count), chunksize=chunksize)
            assert list(map(repr, got)) == [repr(fn(number)) for number in range(count)]


async def test_large_results_come_whole() -> None:
    async with CpuPool(2) as pool:
        assert await pool.map(items.big, range(40), chunksize=10) == [items.big(number) for number in range(40)]


async def test_a_worker_that_holds_results_back_gives_them_before_a_long_item(tmp_path: Path) -> None:
    """Tiny items share a frame; but what is done arrives soon, though a long item was to travel with it."""
    gate = tasks.Gate(tmp_path)
    fn = functools.partial(items.lurk, *gate.arguments)
    numbers = [*range(1, 500), 0, *range(500, 600)]
    async with CpuPool(1) as pool, pool.stream(fn, numbers, chunksize=1000, ordered=False) as results:
        early = [await anext(results) for _ in range(499)]
        assert early == numbers[:499]
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        await anyio.to_thread.run_sync(gate.open)
        assert await take_all(results) == numbers[499:]


@pytest.mark.parametrize("ordered", [True, False])
async def test_several_iterables_of_all_kinds_end_with_the_shortest(ordered: bool) -> None:
    combinations: list[tuple[Any, ...]] = [
        ([1, 2, 3], range(2)),
        ([1, 2, 3], iter([10, 20, 30]), (5, 6)),
        ("ab", [2, 3, 4]),
        (agen([1, 2, 3]), [4, 5]),
        (agen([1, 2]), agen([4, 5, 6]), range(9)),
        ({1: "", 2: ""}, {3}),
    ]
    expected = [[0, 2], [15, 46], ["aa", "bbb"], [4, 10], [4, 11], [3]]
    async with CpuPool(2) as pool:
        for iterables, values in zip(combinations, expected, strict=True):
            async with pool.stream(items.weigh, *iterables, ordered=ordered) as results:
                got = await take_all(results)
            assert (got if ordered else sorted(got)) == values
        assert await pool.map(items.weigh, agen([3]), [5]) == [15]


async def test_an_empty_source_starts_no_worker() -> None:
    async with contextlib.AsyncExitStack() as stack:
        pool = CpuPool(2)
        stack.push_async_callback(pool.aclose)
        assert await pool.map(items.double, []) == []
        async with pool.stream(items.double, agen([])) as results:
            assert await take_all(results) == []
        assert "0 idle, 0 busy, 0 starting" in repr(pool)


async def test_the_running_item_knows_its_number(tmp_path: Path) -> None:
    async with CpuPool(2) as pool:
        got = await pool.options(label="x").map(items.describe_task, range(100))
        assert got == [(number, number, "x", 1) for number in range(100)]
        assert await pool.map(items.count_task, range(20_000)) == list(range(20_000))
        assert await pool.run(items.describe_task, 5) == (5, None, None, 1)


async def test_arguments_are_checked_at_the_call() -> None:
    pool = CpuPool(1)
    calls: list[Callable[[], Any]] = [
        lambda: pool.stream(items.double),
        lambda: pool.stream(items.double, 5),  # type: ignore[call-overload]
        lambda: pool.stream(5, []),  # type: ignore[call-overload]
        lambda: pool.stream(tasks.coroutine_function, []),
        lambda: pool.stream(items.double, [], chunksize=1.5),  # type: ignore[call-overload]
        lambda: pool.stream(items.double, [], buffersize=True),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="chunksize must be at least 1"):
            await pool.map(items.double, [], chunksize=wrong)
        with pytest.raises(ValueError, match="buffersize must be at least 1"):
            pool.stream(items.double, [], buffersize=wrong)
    with pytest.raises(TaskNotPicklable, match="top level"):
        pool.stream(lambda item: item, [1])
    with pytest.raises(TypeError, match="async with"):
        async for _ in pool.stream(items.double, [1]):
            pass
    with pytest.raises(TypeError, match="on_progress"):
        await pool.map(items.double, [1], on_progress=tasks.coroutine_function)  # type: ignore[arg-type]


async def test_a_stream_that_was_left_says_so() -> None:
    async with CpuPool(1) as pool:
        async with pool.stream(items.double, [1, 2]) as results:
            assert await anext(results) == 2
        with pytest.raises(RuntimeError, match="left"):
            await anext(results)
        with pytest.raises(RuntimeError, match="once"):
            async with results:
                pass


# --- failures ---


async def test_the_first_failure_is_raised_with_its_number_and_stops_the_rest(tmp_path: Path) -> None:
    fn = items.Traced(tmp_path / "trace", items.fail, fatal=(10,))
    async with CpuPool(2) as pool:
        await pool.map(items.work, [0.01] * 10, chunksize=1)  # now both workers have imported all
        with pytest.raises(ValueError, match="no 10") as caught:
            await pool.map(fn, range(100_000), chunksize=20)
        assert caught.value.__notes__ == ["This was item 10, counted from 0."]
        assert "in fail" in str(caught.value.__cause__)  # the worker's traceback, from the item's own first line
        assert "_batches" not in str(caught.value.__cause__)
        begun = fn.begun()
        assert len(begun) < 1000
        assert len(set(begun)) == len(begun)
        assert await pool.map(items.double, range(3)) == [0, 2, 4]


async def test_an_ordered_stream_gives_all_results_before_the_failure() -> None:
    fn = items.Fatal(items.fail, 30)
    async with CpuPool(2) as pool:
        got: list[int] = []
        async with pool.stream(fn, range(100)) as results:
            with pytest.raises(ValueError, match="no 30"):
                await take_into(got, results)
        assert got == list(range(30))


@pytest.mark.parametrize("chunksize", [None, 1, 64])
@pytest.mark.parametrize("value", [int, str], ids=["numbers", "records"])
async def test_failures_are_returned_in_place_and_all_others_run(
    chunksize: int | None, value: Callable[[int], Any], tmp_path: Path
) -> None:
    fn = items.Fatal(items.fail, 0, 5, 6, 63, 64, 199, value=value)
    async with CpuPool(2) as pool:
        got = await pool.map(fn, range(200), return_exceptions=True, chunksize=chunksize)
    for number, each in enumerate(got):
        if number in fn.fatal:
            assert isinstance(each, ValueError)
            assert each.args == (f"no {number}",)
        else:
            assert each == value(number)


async def test_an_exception_that_is_returned_is_a_value() -> None:
    errors = [ValueError(1), KeyError(2)]
    async with CpuPool(1) as pool:
        assert list(map(repr, await pool.map(items.same, errors))) == ["ValueError(1)", "KeyError(2)"]


async def test_what_is_odd_about_an_item_concerns_that_item_alone() -> None:
    class Local:
        pass

    odd: list[tuple[Any, Any, type[Exception]]] = [
        (items.same, threading.Lock(), TaskNotPicklable),
        (items.same, Local(), TaskNotPicklable),
        (items.same, items.BadItem(), TaskNotPicklable),
        (items.same, items.FatalItem(), WorkerDied),
        (items.Fatal(items.return_lambda, 3), 3, ResultNotPicklable),
        (items.Fatal(items.stop_iteration, 3), 3, RemoteError),
        (items.Fatal(items.leave, 3), 3, RemoteError),
        (items.Fatal(items.BadResult, 3), 3, ResultNotPicklable),
    ]
    async with CpuPool(2) as pool:
        for fn, item, error in odd:
            values = [1, 2, item, 4, 5]
            got = await pool.map(fn, values, return_exceptions=True, chunksize=5)
            assert [got[at] for at in (0, 1, 3, 4)] == [1, 2, 4, 5]
            assert type(got[2]) is error
            with pytest.raises(error):
                await pool.map(fn, values, chunksize=2)


async def test_others_run_while_thousands_of_items_cannot_be_pickled() -> None:
    turns = 0
    async with CpuPool(1) as pool, anyio.create_task_group() as group:

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        group.start_soon(count_turns)
        got = await pool.map(items.same, [threading.Lock() for _ in range(1000)], return_exceptions=True)
        group.cancel_scope.cancel()
    assert {type(each) for each in got} == {TaskNotPicklable}
    assert turns > 1000


@pytest.mark.parametrize("value", [int, float, str], ids=["ints", "floats", "records"])
@pytest.mark.parametrize("end", [items.exit_at_once, items.kill_itself], ids=lambda fn: fn.__name__)
async def test_a_crash_blames_the_running_item_and_keeps_what_is_done(
    end: Callable[[Any], Any], value: Callable[[int], Any], tmp_path: Path
) -> None:
    """Also among items so small that their results wait for others to travel with."""
    fn = items.Fatal(end, 0, 500, 501, 1999, value=value)
    async with CpuPool(2) as pool:
        got = await pool.map(fn, range(2000), return_exceptions=True, chunksize=800)
    assert [number for number, each in enumerate(got) if isinstance(each, WorkerDied)] == [0, 500, 501, 1999]
    assert [each for each in got if not isinstance(each, WorkerDied)] == [
        value(number) for number in range(2000) if number not in fn.fatal
    ]


@pytest.mark.parametrize("chunksize", [None, 100])
async def test_no_item_runs_twice_whatever_happens(chunksize: int | None, tmp_path: Path) -> None:
    fatal = (3, 50, 51, 99, 150)
    async with CpuPool(2) as pool:
        for end in (items.exit_at_once, items.kill_itself, items.fail):
            fn = items.Traced(tmp_path / end.__name__, end, fatal)
            got = await pool.map(fn, range(200), return_exceptions=True, chunksize=chunksize)
            assert fn.begun() == list(range(200))
            assert [number for number, each in enumerate(got) if isinstance(each, Exception)] == list(fatal)


async def test_a_worker_killed_from_outside_costs_one_item(tmp_path: Path) -> None:
    fn = items.Traced(tmp_path / "trace", items.same)
    async with CpuPool(2) as pool:
        pids = set(await pool.map(items.pid_of, range(2), chunksize=1))

        def kill(done: int, total: int | None) -> None:
            if pids and 0 < done < 3000:
                os.kill(pids.pop(), signal.SIGKILL)

        got = await pool.map(fn, range(4000), return_exceptions=True, chunksize=50, on_progress=kill)
    died = [number for number, each in enumerate(got) if isinstance(each, WorkerDied)]
    assert len(died) <= 2
    begun = fn.begun()
    assert len(set(begun)) == len(begun)
    assert set(range(4000)) - set(begun) <= set(died)
    assert all(each == number for number, each in enumerate(got) if number not in died)


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_worker_that_dies_when_all_its_items_are_done_is_nobody_s_fault(ordered: bool) -> None:
    fn = items.ExitOnceDone(19)
    async with CpuPool(1) as pool:
        assert await pool.map(fn, range(20), chunksize=20) == list(range(20))
        async with pool.stream(fn, range(60), chunksize=20, ordered=ordered, return_exceptions=True) as results:
            assert await take_all(results) == list(range(60))


async def test_exceptions_that_refuse_causes_and_notes_arrive_all_the_same() -> None:
    async with CpuPool(1) as pool:
        pid = await pool.run(items.pid_of, 0)
        for fn, error in ((items.raise_frozen, items.FrozenError), (items.raise_without_notes, items.NoNotes)):
            got = await pool.map(items.Fatal(fn, 1), range(3), return_exceptions=True)
            assert [type(each) for each in got] == [int, error, int]
            with pytest.raises(error):
                await pool.run(fn, 1)
        assert await pool.run(items.pid_of, 0) == pid


async def test_an_odd_item_among_many_costs_little() -> None:
    """Its batch is halved until it is alone."""
    for odd in (threading.Lock(), items.BadItem()):
        numbers: list[Any] = [*range(3000), odd, *range(3000)]
        async with CpuPool(1) as pool:
            before = pool._supervisor.next_task_id()
            got = await pool.map(items.same, numbers, return_exceptions=True, chunksize=10_000)
            assert isinstance(got.pop(3000), TaskNotPicklable)
            assert got == [*range(3000), *range(3000)]
            assert pool._supervisor.next_task_id() - before < 60


async def test_an_item_whose_worker_died_is_tried_again_if_asked() -> None:
    async with CpuPool(2, retries=1) as pool:
        got = await pool.map(items.die_the_first_time, range(20))
        assert got == [(number, 2 if number % 7 == 3 else 1) for number in range(20)]


# --- time ---


@pytest.mark.parametrize("chunksize", [None, 10])
async def test_each_item_has_its_own_time_and_the_worker_lives_on(chunksize: int | None, tmp_path: Path) -> None:
    fn = items.Traced(tmp_path / "trace", items.spin, fatal=(4, 5, 17))
    async with CpuPool(2, grace=60) as pool:
        pids = set(await pool.map(items.pid_of, range(20), chunksize=1))
        got = await pool.options(timeout=0.2).map(fn, range(20), return_exceptions=True, chunksize=chunksize)
        assert set(await pool.map(items.pid_of, range(20), chunksize=1)) <= pids
    assert fn.begun() == list(range(20))
    for number, each in enumerate(got):
        if number in fn.fatal:
            assert isinstance(each, TaskTimeout)
            assert 0.2 <= each.ran < 1
            assert "in spin" in (each.stack or "")
            assert "_batches" not in (each.stack or "")
        else:
            assert each == number


@pytest.mark.slow
async def test_many_items_may_take_longer_together_than_one_may() -> None:
    async with CpuPool(1) as pool:
        got = await pool.options(timeout=0.3).map(items.work, [0.02] * 40, chunksize=40)
        assert got == [0.02] * 40


async def test_an_item_s_time_begins_when_the_one_before_has_ended_however_it_did() -> None:
    """Also by an error, among items so quick that the clock is rarely looked at."""
    values = [0.0] * 300 + [-0.15, 0.15, -0.15, 0.15]
    async with CpuPool(1) as pool:
        got = await pool.options(timeout=0.25).map(
            items.work_or_fail, values, return_exceptions=True, chunksize=len(values)
        )
    assert [type(each) for each in got[300:]] == [ValueError, float, ValueError, float]


async def test_a_stream_that_was_not_entered_says_so() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(TypeError, match="a stream is a context manager"):
            await anext(pool.stream(abs, [1]))


async def test_an_interrupted_item_has_its_grace_although_the_results_before_it_have_yet_to_be_sent(
    tmp_path: Path,
) -> None:
    """It takes longer than the timeout for them to be read, and again to say what it made of the interrupt."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with CpuPool(1, grace=60) as pool:
        pid = await pool.run(os.getpid)

        async def hold_up_the_loop() -> None:
            await anyio.to_thread.run_sync(fifo.read_text)
            time.sleep(0.5)  # noqa: ASYNC251  # blocks the loop, which is the point

        async with anyio.create_task_group() as group:
            group.start_soon(hold_up_the_loop)
            *before, late = await pool.options(timeout=0.2).map(
                items.fill_or_spin, [*[48_000] * 5, str(fifo)], return_exceptions=True, chunksize=6
            )
        assert before == [bytes(48_000)] * 5
        assert isinstance(late, TaskTimeout)
        assert await pool.run(os.getpid) == pid


@pytest.mark.slow
async def test_items_that_fail_in_the_moment_of_their_timeout_have_one_outcome_each() -> None:
    async with CpuPool(2, grace=60) as pool:
        for chunksize in (1, 20):
            lengths = [0.004 + (number % 40 - 20) * 0.00005 for number in range(600)]
            got = await pool.options(timeout=0.004).map(
                items.fail_after, lengths, return_exceptions=True, chunksize=chunksize
            )
            assert {type(each) for each in got} == {ValueError, TaskTimeout}
            assert len(got) == 600


async def test_an_item_that_no_interrupt_stops_is_killed_alone() -> None:
    async with CpuPool(1, grace=0.1) as pool:
        fn = items.Fatal(items.hold_gil, 2)
        got = await pool.options(timeout=0.2).map(fn, range(5), return_exceptions=True, chunksize=5)
        assert [type(each) for each in got] == [int, int, TaskTimeout, int, int]


async def test_what_an_item_makes_of_its_interrupt() -> None:
    async with CpuPool(1) as pool:
        options = pool.options(timeout=0.1)
        fn: Callable[[int], Any] = items.Fatal(items.swallow_interrupt, 1)
        assert await options.map(fn, range(3), chunksize=3) == [0, "caught", 2]
        fn = items.Fatal(items.fail_when_interrupted, 1)
        got = await options.map(fn, range(3), return_exceptions=True, chunksize=3)
        assert [type(each) for each in got] == [int, TaskTimeout, int]
        assert "made of it" in str(got[1].__cause__)


@pytest.mark.slow
async def test_b5_an_item_that_ends_in_the_moment_of_its_timeout_has_one_outcome(anyio_backend_name: str) -> None:
    """And the next one never feels the interrupt."""
    seconds = 0.01
    async with CpuPool(2, grace=60) as pool:
        pids = set(await pool.map(items.pid_of, range(50), chunksize=1))
        lengths = [seconds + (number % 100 - 50) * 0.00002 if number % 2 else 0.0 for number in range(2000)]
        got = await pool.options(timeout=seconds).map(items.work, lengths, return_exceptions=True, chunksize=20)
        assert {type(each) for each in got} == {float, TaskTimeout}, got
        assert set(await pool.map(items.pid_of, range(50), chunksize=1)) <= pids
    stalled = [each for each in got[::2] if each != 0.0]  # the machine may not run a worker for so long
    assert len(stalled) < 20
    assert all(isinstance(each, TaskTimeout) and each.ran >= seconds for each in stalled)
    late = [each for each in got[1::2] if isinstance(each, TaskTimeout)]
    assert 20 < len(late) < 980
    assert all(isinstance(each, TaskTimeout) or each == length for each, length in zip(got, lengths, strict=True))


# --- giving it up ---


@pytest.mark.parametrize("way", ["map", "stream", "async source"])
async def test_cancelling_stops_what_runs_and_the_workers_live_on(way: str, tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    fn = functools.partial(items.lurk, *gate.arguments)
    async with CpuPool(2, grace=60) as pool:
        pids = set(await pool.map(items.pid_of, range(20), chunksize=1))
        async with anyio.create_task_group() as group:

            async def call() -> None:
                if way == "map":
                    await pool.map(fn, range(100))
                else:
                    async with pool.stream(fn, agen(range(100)) if way == "async source" else range(100)) as results:
                        await take_all(results)

            group.start_soon(call)
            assert await anyio.to_thread.run_sync(gate.wait_until_begun) in pids
            group.cancel_scope.cancel()
        assert set(await pool.map(items.pid_of, range(20), chunksize=1)) <= pids


async def test_leaving_the_block_early_stops_the_work_and_closes_the_sources() -> None:
    closed = []

    def numbers() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.append("plain")

    async def more() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            await anyio.lowlevel.checkpoint()
            closed.append("async")

    async with CpuPool(2) as pool:
        async with pool.stream(items.double, numbers()) as results:
            assert [await anext(results) for _ in range(3)] == [0, 2, 4]
        async with pool.stream(items.weigh, more(), numbers()) as results:
            assert [await anext(results) for _ in range(3)] == [0, 1, 2]
        with contextlib.suppress(KeyError):
            async with pool.stream(items.double, numbers()) as results:
                await anext(results)
                raise KeyError
        assert closed == ["plain", "async", "plain", "plain"]
        with anyio.fail_after(10):
            while "0 busy, 0 starting, 0 waiting" not in repr(pool):
                await anyio.sleep(0.001)  # the supervisor wins the workers back behind our back


async def test_a_file_that_was_given_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("a\nb\n")
    with path.open() as file:
        async with CpuPool(1) as pool:
            assert await pool.map(str.strip, file) == ["a", "b"]
        assert not file.closed


async def test_a_source_that_uses_a_stream_itself_and_is_left_early() -> None:
    """The generator's blocks are left in the task that has entered them."""
    async with CpuPool(2) as pool:

        async def first() -> AsyncIterator[int]:
            async with pool.stream(items.double, itertools.count()) as results:
                async for value in results:
                    yield value

        for _ in range(3):
            async with pool.stream(items.double, first(), buffersize=8) as results:
                assert [await anext(results) for _ in range(3)] == [0, 4, 8]


def test_a_generator_around_a_stream_that_is_left_early_harms_nobody() -> None:
    """Asyncio closes such a generator in another task; trio does not allow it."""

    async def squares(pool: CpuPool) -> AsyncIterator[int]:
        async with pool.stream(items.double, itertools.count()) as results:
            async for value in results:
                yield value

    async def main() -> None:
        async with CpuPool(2) as pool:
            for _ in range(3):
                async for value in squares(pool):
                    if value == 10:
                        break
                gc.collect()
                await asyncio.sleep(0.01)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            assert await pool.map(items.double, range(3)) == [0, 2, 4]

    asyncio.run(main())


async def test_all_sources_are_closed_though_one_does_not_want_to_be() -> None:
    closed = []

    def stubborn() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            raise LookupError("in close")

    def numbers() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.append("plain")

    async with CpuPool(1) as pool:
        with pytest.raises(LookupError, match="in close"):
            async with pool.stream(items.weigh, stubborn(), numbers()) as results:
                await anext(results)
    assert closed == ["plain"]


async def test_two_tasks_cannot_wait_for_the_same_stream() -> None:
    async with CpuPool(1) as pool, pool.stream(items.work, [0.1] * 3) as results, anyio.create_task_group() as group:
        got: list[Any] = []
        group.start_soon(take_into, got, results)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="another task"):
            await anext(results)
        group.cancel_scope.cancel()


class Oddity(BaseException):
    """No `Exception`."""


async def test_whatever_a_source_raises_arrives_as_itself_and_alone() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise Oddity

    def cancelled() -> Iterator[int]:
        yield 1
        future: concurrent.futures.Future[int] = concurrent.futures.Future()
        future.cancel()
        yield future.result()

    async def abroken() -> AsyncIterator[int]:
        yield 1
        raise Oddity

    async with CpuPool(2) as pool:
        for make, error in ((broken, Oddity), (cancelled, concurrent.futures.CancelledError), (abroken, Oddity)):
            with pytest.raises(error):
                await pool.map(items.double, make())
            async with pool.stream(items.double, make()) as results:
                assert await anext(results) == 2
                with pytest.raises(error):
                    await take_all(results)


def test_a_source_whose_own_future_was_cancelled_cancels_nobody() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        yield await future

    async def main() -> None:
        async with CpuPool(1) as pool:
            with pytest.raises(asyncio.CancelledError) as caught:
                await pool.map(items.double, source())
            assert "scope" not in str(caught.value)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0

    asyncio.run(main())


class WithoutLength:
    def __len__(self) -> int:
        raise TypeError("it has none")

    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])


class OnlyNext:
    """An asynchronous iterator as `async for` takes it, and no more."""

    def __init__(self) -> None:
        self.left = 2

    async def __anext__(self) -> int:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return self.left


class GivesOnlyNext:
    def __aiter__(self) -> OnlyNext:
        return OnlyNext()


async def test_sources_need_no_more_than_for_needs() -> None:
    async with CpuPool(1) as pool:
        assert await pool.map(items.double, WithoutLength()) == [2, 4]
        assert await pool.map(items.double, GivesOnlyNext()) == [2, 0]  # type: ignore[call-overload]


async def test_the_source_s_own_error_arrives_as_itself() -> None:
    def broken() -> Iterator[int]:
        yield from range(10)
        raise LookupError("the source")

    async def abroken() -> AsyncIterator[int]:
        for number in range(10):
            yield number
        raise LookupError("the source")

    async with CpuPool(2) as pool:
        for make in (broken, abroken):
            for ordered in (True, False):
                got: list[Any] = []
                async with pool.stream(items.double, make(), ordered=ordered, return_exceptions=True) as results:
                    with pytest.raises(LookupError, match="the source"):
                        await take_into(got, results)
                assert sorted(got) == list(range(0, 20, 2))
            with pytest.raises(LookupError, match="the source"):
                await pool.map(items.double, make(), return_exceptions=True)


# --- memory and pace ---


@pytest.mark.parametrize("buffersize", [1, 2, 10, None])
@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_an_endless_source_is_taken_from_only_as_results_are(buffersize: int | None, kind: str) -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            yield taken
            taken += 1

    async def aendless() -> AsyncIterator[int]:
        for number in endless():
            yield number

    source = endless() if kind == "plain" else aendless()
    async with CpuPool(2) as pool, pool.stream(items.to_text, source, buffersize=buffersize) as results:
        for number in range(2000 if buffersize is None else 50):
            assert await anext(results) == str(number)
            assert taken - number <= (200_000 if buffersize is None else buffersize)


async def test_a_slow_source_does_not_hold_back_what_it_has_given() -> None:
    """The items of a source that pauses are sent at once, though a batch would have room for more."""
    send, receive = anyio.create_memory_object_stream[int](0)
    async with CpuPool(2) as pool, pool.stream(items.double, receive) as results:
        for number in range(100):
            await send.send(number)
            assert await anext(results) == 2 * number
        await send.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(results)
    await receive.aclose()


async def test_a_slow_consumer_of_unordered_results_gets_them_all() -> None:
    async with CpuPool(2) as pool, pool.stream(items.same, range(300), buffersize=5, ordered=False) as results:
        got = []
        async for value in results:
            got.append(value)
            await anyio.lowlevel.checkpoint()
    assert sorted(got) == list(range(300))


@pytest.mark.parametrize(("chunksize", "buffersize"), [(100, 10), (3, 2), (None, 1)])
async def test_a_chunk_that_is_larger_than_the_buffer_is_cut(chunksize: int | None, buffersize: int) -> None:
    async with CpuPool(2) as pool:
        for source in (list(range(50)), agen(range(50))):
            async with pool.stream(items.same, source, chunksize=chunksize, buffersize=buffersize) as results:
                assert await take_all(results) == list(range(50))


@pytest.mark.slow
async def test_large_results_leave_room_for_few() -> None:
    """What waits for a slow consumer is bounded in bytes too; and a batch never needs more room than there is."""
    taken = 0

    def sizes() -> Iterator[int]:
        nonlocal taken
        for taken in range(60):
            yield 5_000_000 + taken

    async with CpuPool(2) as pool:
        for ordered in (True, False):
            async with pool.stream(bytes, sizes(), ordered=ordered) as results:
                got = 0
                async for value in results:
                    got += 1
                    assert len(value) >= 5_000_000
                    assert got < 20 or taken - got <= 12  # 32 MB are 6; at first their size is not known
            assert got == 60
        async with pool.stream(bytes, sizes(), chunksize=20) as results:
            assert len(await take_all(results)) == 60
        async with pool.stream(bytes, [400_000] * 1000) as results:  # as many as fill a batch are more than the room
            assert len(await take_all(results)) == 1000


async def test_an_asynchronous_source_never_stalls_whatever_the_pace_does() -> None:
    async with CpuPool(2) as pool:
        for _ in range(3):
            async with pool.stream(items.work, agen([0.00002] * 10_000)) as results:
                assert len(await take_all(results)) == 10_000


@pytest.mark.slow
async def test_long_items_behind_many_tiny_ones_are_shared_out() -> None:
    """The worker that finds its items long is told to give back those that have not begun."""
    async with CpuPool(2) as pool:
        await pool.map(items.work_here, [0.01] * 4)
        got = await pool.map(items.work_here, [*[0.0] * 50_000, *[0.02] * 100])
    pids = [pid for seconds, pid in got if seconds]
    assert all(pids.count(pid) >= 30 for pid in set(pids))
    assert len(set(pids)) == 2


@pytest.mark.slow
async def test_a_call_does_not_wait_for_the_long_items_behind_many_tiny_ones() -> None:
    async with CpuPool(1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.map, items.work, [*[0.0] * 50_000, *[0.02] * 400])
        for _ in range(5):
            begun = time.perf_counter()
            await pool.run(abs, 1)
            assert time.perf_counter() - begun < 2  # all the long ones take 8
            await anyio.sleep(0.05)
        group.cancel_scope.cancel()


async def test_b8_small_calls_wait_for_one_batch_at_most() -> None:
    """While a million items run."""
    waits = []
    async with CpuPool(1) as pool:
        await pool.run(abs, 1)
        async with anyio.create_task_group() as group:

            async def crowd() -> None:
                await pool.map(items.work, [0.002] * 10**6)

            group.start_soon(crowd)
            for _ in range(20):
                begun = time.perf_counter()
                await pool.run(abs, 1)
                waits.append(time.perf_counter() - begun)
            group.cancel_scope.cancel()
    assert sorted(waits)[len(waits) // 2] < 0.5  # a batch aims at 0.03 s; without turns it would be 2,000


async def test_a_batch_of_items_that_turn_out_long_is_cut_short() -> None:
    """A worker gives back what it does not get to in the time of a batch, so that others run it."""
    async with CpuPool(2) as pool:
        quick = [0.0] * 3000
        got = await pool.map(items.work, [*quick, *[0.03] * 30, *quick])
        assert got == [*quick, *[0.03] * 30, *quick]
        pids = await pool.map(items.pid_of, range(10), chunksize=1)
        assert 1 <= len(set(pids)) <= 2


async def test_max_tasks_per_child_counts_items(tmp_path: Path) -> None:
    fn = functools.partial(items.log_pid, str(tmp_path / "pids"))
    async with CpuPool(2, max_tasks_per_child=5) as pool:
        assert await pool.map(fn, range(43)) == list(range(43))
    pids = (tmp_path / "pids").read_text().split()
    assert max(map(pids.count, pids)) <= 5


async def test_progress_is_told_rarely_in_order_and_exactly_at_the_end() -> None:
    said: list[tuple[int, int | None]] = []

    def note(done: int, total: int | None) -> None:
        said.append((done, total))

    async with CpuPool(2) as pool:
        begun = time.monotonic()
        await pool.map(items.work, [0.001] * 200, on_progress=note)
        seconds = time.monotonic() - begun
        assert said[-1] == (200, 200)
        assert said == sorted(set(said))
        assert 2 <= len(said) <= seconds / 0.05 + 2
        said.clear()
        await pool.map(items.double, (number for number in range(7)), on_progress=note)
        assert said[-1] == (7, 7)
        said.clear()
        await pool.map(items.double, [], on_progress=note)
        assert said == [(0, 0)]

        def fail(done: int, total: int | None) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await pool.map(items.double, range(10), on_progress=fail)


# --- with the rest of the pool ---


async def test_several_at_once_on_one_pool_share_it() -> None:
    async with CpuPool(2) as pool:
        results: dict[int, list[Any]] = {}

        async def call(number: int) -> None:
            results[number] = await pool.map(items.weigh, range(2000), [number] * 2000)

        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(call, number)
    assert results == {number: [each * number for each in range(2000)] for number in range(8)}


async def test_closing_lets_a_map_end_but_not_for_longer_than_the_drain() -> None:
    for drain, count in ((60, 100), (0.2, 10**6)):
        async with CpuPool(2, drain=drain) as pool:
            outcome = await _close_in_the_middle_of(pool, [0.01] * count)
            assert outcome == [0.01] * 100 if drain == 60 else isinstance(outcome, PoolClosed)
            with pytest.raises(PoolClosed):
                await pool.map(items.double, [1])


async def _close_in_the_middle_of(pool: CpuPool, seconds: list[float]) -> object:
    outcome: list[object] = []
    begun = anyio.Event()

    async def call() -> None:
        try:
            outcome.append(await pool.map(items.work, seconds, on_progress=lambda _, __: begun.set()))
        except PoolClosed as error:
            outcome.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        await begun.wait()
        await pool.aclose()
    return outcome[0]


async def test_a_full_pool_refuses_a_map_but_not_one_that_has_begun(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1, max_pending=0) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        with pytest.raises(PoolFull):
            await pool.map(items.double, range(10))
        await anyio.to_thread.run_sync(gate.open)
    async with CpuPool(1, max_pending=1, queue_timeout=0.2) as pool:
        async with anyio.create_task_group() as group:
            gate = tasks.Gate(tmp_path / "second")
            group.start_soon(pool.run, tasks.hold, *gate.arguments)
            await anyio.to_thread.run_sync(gate.wait_until_begun)
            with pytest.raises(QueueTimeout):
                await pool.map(items.double, range(10))
            await anyio.to_thread.run_sync(gate.open)
        assert await pool.map(items.work, [0.02] * 40) == [0.02] * 40


@pytest.mark.slow
async def test_a_map_that_has_begun_is_never_refused_nor_refuses_others() -> None:
    """Its lanes wait again and again, behind others, and are no callers of their own."""
    async with CpuPool(1, max_pending=1, queue_timeout=0.3) as pool:
        async with anyio.create_task_group() as group:
            results: list[list[float]] = []

            async def call(seconds: float, count: int) -> None:
                results.append(await pool.map(items.work, [seconds] * count, chunksize=1))

            group.start_soon(call, 0.02, 30)
            group.start_soon(call, 0.02, 30)
            await anyio.sleep(0.1)
            for _ in range(10):
                await pool.options(queue_timeout=None).run(abs, 1)
            await pool.options(queue_timeout=None).run(items.work, 0.5)  # longer than a call may wait
        assert results == [[0.02] * 30] * 2


async def test_nothing_to_do_leaves_nothing_behind() -> None:
    pool = CpuPool(1)
    for _ in range(10):
        assert await pool.map(items.double, []) == []
    assert pool._dispatcher.is_quiet()
    assert not pool._supervisor._orders


async def test_a_pool_that_cannot_start_says_so() -> None:
    async with contextlib.AsyncExitStack() as stack:
        pool = CpuPool(1, initializer=items.fail, initargs=("worker",))
        stack.push_async_callback(pool.aclose)
        with pytest.raises(InitializerFailed):
            await pool.map(items.double, range(10), return_exceptions=True)
        with pytest.raises((InitializerFailed, Exception)):
            async with pool.stream(items.double, range(10)) as results:
                await take_all(results)


async def test_a_lambda_may_be_sent_by_cloudpickle() -> None:
    async with CpuPool(1, serializer="cloudpickle") as pool:
        assert await pool.map(lambda item: item + 1, range(3)) == [1, 2, 3]


@pytest.mark.slow
async def test_nothing_is_kept_of_items_and_results() -> None:
    async with CpuPool(1) as pool:
        for _ in range(3):
            await pool.map(items.to_text, [bytes(10)] * 10_000)
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(3):
            await pool.map(items.to_text, [bytes(10)] * 10_000)
            async with pool.stream(items.double, range(10**6)) as results:
                await anext(results)
        gc.collect()
        assert len(gc.get_objects()) - before < 500


def test_ctrl_c_ends_a_map_at_once(run_script: RunScript, tmp_path: Path) -> None:
    done = run_script(
        """
import asyncio, os, signal
import cpupool, items

async def main():
    async with cpupool.CpuPool(2) as pool:
        await pool.map(items.work, [0.01] * 10**6, on_progress=lambda done, total: os.kill(os.getpid(), signal.SIGINT))

if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        print("interrupted")
"""
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_a_loop_that_ends_in_the_middle_of_a_map_leaves_nothing() -> None:
    """`asyncio.run` cancels what is left; then the same pool serves another loop."""
    with CpuPool(2) as pool:

        async def begin() -> None:
            task = asyncio.create_task(pool.map(items.work, [0.01] * 10**6))
            await asyncio.sleep(0)
            await pool.run(abs, 1)
            assert not task.done()

        async def again() -> list[int]:
            return await pool.map(items.double, range(5))

        asyncio.run(begin())
        assert asyncio.run(again()) == [0, 2, 4, 6, 8]


async def test_an_interrupt_never_reaches_the_program() -> None:
    """`TaskInterrupted` stays in the workers."""
    with contextlib.suppress(TaskTimeout):
        async with CpuPool(1) as pool:
            await pool.options(timeout=0.05).map(items.spin, [1])
    assert not issubclass(TaskInterrupted, Exception)
    wait_until_gone()
