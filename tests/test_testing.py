"""`cpupool.testing`: pools for tests of applications (row D8)."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest

import cpupool
import items
import offloaded
import reporting
import tasks
from conftest import environment
from cpupool import (
    CpuPool,
    InitializerFailed,
    PoolClosed,
    RemoteError,
    ResultNotPicklable,
    TaskNotPicklable,
    TaskTimeout,
)
from cpupool.testing import InlinePool

anyio_mark = pytest.mark.anyio


# --- one pool is like the other ---


@pytest.fixture(params=[CpuPool, InlinePool])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@anyio_mark
async def test_d8_calls_give_the_same(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "initialised", [])
    async with make(1, initializer=tasks.initialise, initargs=("a", "b")) as pool:
        assert await pool.run(tasks.add, 1, 2, c=3) == 6
        assert await pool.run(tasks.get_initialised) == ["a", "b"]
        assert (await pool.options(label="mine").run(tasks.describe_task))[1:] == ("mine", 1)
        assert await pool.map(items.weigh, range(5), [10] * 4) == [0, 10, 20, 30]
        async with pool.stream(items.to_text, numbers(), ordered=False) as results:
            assert sorted([each async for each in results]) == ["0", "1", "2"]
        assert await pool.prepare(tasks.add, 1, 2).run() == 3
        assert pool.is_started
        seen: list[int] = []
        assert await pool.options(on_report=seen.append).run(reporting.report_all, [1, 2]) == 2
        assert seen[-1] == 2
        assert await pool.options(on_start=lambda: seen.append(7)).run(tasks.add, 1) == 1
        assert seen[-1] == 7
        with pool.as_executor() as executor:
            assert executor.submit(tasks.add, 40, 2).result() == 42
    assert pool.is_closed


async def numbers() -> AsyncIterator[int]:
    for number in range(3):
        yield number


@anyio_mark
async def test_d8_errors_are_the_same(make: Any) -> None:
    async with make(1) as pool:
        with pytest.raises(ValueError, match="no thing") as caught:
            await pool.run(items.fail, "thing")
        assert "in fail" in str(caught.value.__cause__), "the remote traceback"
        with pytest.raises(TaskNotPicklable):
            await pool.run(lambda: 1)
        with pytest.raises(TaskNotPicklable, match="could not be rebuilt in the worker"):
            await pool.run(tasks.add, items.BadItem())
        with pytest.raises(ResultNotPicklable):
            await pool.run(tasks.return_lambda)
        with pytest.raises(ResultNotPicklable):
            await pool.run(items.BadResult, 1)
        with pytest.raises(RemoteError, match="SystemExit"):
            await pool.run(sys.exit, 3)
        with pytest.raises(TypeError, match=r"pool\.map\(\) takes a function"):
            await pool.map(5, [1])
        with pytest.raises(ValueError, match="no 1") as caught:
            await pool.map(items.fail, [1])
        assert caught.value.__notes__ == ["This was item 0, counted from 0."]
        got = await pool.map(items.fail_at_one, range(3), return_exceptions=True)
        assert [type(each) for each in got] == [int, ValueError, int]
        with pytest.raises(TaskTimeout):
            await pool.options(timeout=0.05).run(time.sleep, 0.1)
    with pytest.raises(PoolClosed):
        await pool.run(tasks.add, 1)
    with pytest.raises(InitializerFailed) as failed:
        async with make(1, initializer=items.fail, initargs=("model",)):
            pass
    assert str(failed.value.__cause__) == "no model"


async def slowly() -> AsyncIterator[int]:
    for number in range(6):
        if number % 3 == 0:
            await anyio.sleep(0.1)
        yield number


@anyio_mark
async def test_d8_a_wait_that_is_cancelled_loses_nothing(make: Any) -> None:
    """`on_progress` cancels waits too."""
    async with make(1) as pool:
        assert await pool.map(items.same, slowly(), on_progress=lambda *_: None) == list(range(6))
        got: list[int] = []
        async with pool.stream(items.same, slowly()) as results:
            while len(got) < 6:
                with anyio.move_on_after(0.03):
                    got.append(await anext(results))
        assert got == list(range(6))


@anyio_mark
async def test_d8_a_loop_of_calls_can_be_cancelled(make: Any) -> None:
    async with make(1) as pool:
        with anyio.move_on_after(0.1) as scope:
            while True:
                await pool.run(tasks.add, 1)
        assert scope.cancelled_caught


@anyio_mark
async def test_d8_offload_works_and_a_task_must_not_use_a_pool(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make(1) as pool:
        monkeypatch.setattr(offloaded, "pool", pool)
        assert (await offloaded.nested(4))[1:] == (4, "nested")
        with pytest.raises(RuntimeError, match="a worker must not use a pool"):
            await pool.run(tasks.use_a_pool)


@anyio_mark
async def test_d8_what_a_closed_pool_says_is_no_item_s_failure(make: Any) -> None:
    pool = make(1)
    await pool.aclose()
    with pytest.raises(PoolClosed) as caught:
        await pool.map(items.same, [1], return_exceptions=True)
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(TaskNotPicklable):
        await make(1).map(lambda: 1, [])


@anyio_mark
async def test_d8_settings_hold(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "initialised", [])
    lock = multiprocessing.get_context("spawn").Lock()
    async with make(1, env={"MINE": "1"}, initializer=tasks.initialise, initargs=(lock,)) as pool:
        assert await pool.run(os.getenv, "MINE") == "1"
        assert os.getenv("MINE") is None
        assert await pool.map(tasks.get_item, range(3)) == [0, 1, 2]
        with pytest.raises(TaskTimeout):
            await pool.options(timeout=0.05).run(items.fail_after, 0.2)
        with pytest.raises(ValueError, match="report"):
            await pool.run(reporting.report_all, [bytes(100_000)])
        assert await pool.run(cpupool.in_worker)
        assert not cpupool.in_worker()
        pool.close_soon(0)
        with pytest.raises(PoolClosed):
            await call_for_ever(pool)
    with pytest.raises(InitializerFailed):
        async with make(1, initializer=sys.exit, initargs=(3,)):
            pass


async def call_for_ever(pool: CpuPool) -> None:
    while True:
        await pool.run(tasks.add, 1)


def test_threads_take_turns() -> None:
    seen: list[object] = []

    def label_of(number: int) -> str | None:
        return pool.options(label=str(number)).run_sync(tasks.nap_and_describe)

    with InlinePool(initializer=seen.append, initargs=("initialized",)) as pool, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(label_of, range(8)))
    assert seen == ["initialized"]
    assert found == [str(number) for number in range(8)]


def test_it_runs_here_and_now(inline_pool: InlinePool) -> None:
    assert inline_pool.run_sync(tasks.get_pid) == os.getpid()
    assert inline_pool.run_sync(threading.get_ident) == threading.get_ident()
    given = [1, 2]
    assert inline_pool.run_sync(items.same, given) == given
    assert inline_pool.run_sync(items.same, given) is not given, "it went through pickle"
    assert "inline_pool" in repr(inline_pool)
    assert inline_pool.health == "ready"
    with pytest.raises(ValueError, match="max_workers"):
        InlinePool(0)


def test_a_breakpoint_that_is_left_ends_the_program_s_call_too(inline_pool: InlinePool) -> None:
    import bdb

    with pytest.raises(bdb.BdbQuit):
        inline_pool.run_sync(tasks.raise_exception, bdb.BdbQuit)
    with pytest.raises(KeyboardInterrupt):
        inline_pool.run_sync(tasks.raise_exception, KeyboardInterrupt)


def test_an_error_is_found_where_it_was_raised(inline_pool: InlinePool) -> None:
    """By `pytest --pdb`: the last frame is the task's."""
    with pytest.raises(ValueError, match="no thing") as caught:
        inline_pool.run_sync(items.fail, "thing")
    assert caught.traceback[-1].name == "fail"


def test_a_finalizer_that_fails_says_so_and_is_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    with InlinePool(finalizer=functools.partial(items.fail, "end")) as pool:
        pool.run_sync(tasks.add, 1)
    assert pool.is_closed
    assert "ValueError: no end" in capfd.readouterr().err


def test_the_finalizer_runs_once_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "end"
    with InlinePool(finalizer=functools.partial(tasks.append_text, str(path), "end\n")) as pool:
        pool.run_sync(tasks.add, 1)
    pool.close()
    assert path.read_text() == "end\n"
    InlinePool(finalizer=functools.partial(tasks.append_text, str(path), "end\n")).close()  # it had not begun
    assert path.read_text() == "end\n"


def test_the_environment_makes_every_pool_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPUPOOL_MODE", "inline")
    with CpuPool(3, name="mine") as pool:
        assert isinstance(pool, InlinePool)
        assert pool.run_sync(tasks.get_pid) == os.getpid()
        assert pool.settings.name == "mine"
    with CpuPool.from_env() as pool:
        assert pool.run_sync(tasks.get_pid) == os.getpid()
    with cpupool.PoolExecutor(1) as executor:
        assert executor.submit(tasks.get_pid).result() == os.getpid()
    monkeypatch.setenv("CPUPOOL_MODE", "threads")
    with pytest.raises(ValueError, match="CPUPOOL_MODE is 'threads'; it can be 'inline' or 'processes'"):
        CpuPool(1)
    monkeypatch.setenv("CPUPOOL_MODE", "processes")
    assert not isinstance(CpuPool(1), InlinePool)


PLUGIN_TEST = """
import os, pytest, cpupool

def test_inline(inline_pool):
    assert inline_pool.run_sync(os.getpid) == os.getpid()

def test_real(cpu_pool):
    assert cpu_pool.run_sync(os.getpid) != os.getpid()

@pytest.mark.usefixtures("no_worker_left")
def test_clean(cpu_pool):
    cpu_pool.run_sync(abs, 1)
    with cpupool.CpuPool(1) as pool:
        pool.run_sync(abs, 1)

@pytest.mark.usefixtures("no_worker_left")
def test_dirty():
    global kept
    kept = cpupool.CpuPool(1, name="kept")
    kept.run_sync(abs, 1)

def test_what_was_left_was_closed():
    assert kept.is_closed

@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.usefixtures("no_worker_left")
def test_forgetful():
    cpupool.CpuPool(1, name="forgotten").run_sync(abs, 1)

def test_in_any_order(inline_pool, cpu_pool, no_worker_left):
    inline_pool.run_sync(abs, 1)
    cpu_pool.run_sync(abs, 1)

older = cpupool.CpuPool(1)

@pytest.mark.usefixtures("no_worker_left")
def test_uses_an_older_one():
    older.run_sync(abs, 1)

def test_closes_the_shared_one(cpu_pool):
    with cpu_pool:
        pass
    older.close()

def test_needs_the_shared_one(cpu_pool):
    cpu_pool.run_sync(abs, 1)
"""


def test_the_fixtures_work_in_somebody_else_s_tests(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PLUGIN_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert "10 passed, 2 errors" in done.stdout, done.stdout
    for name in ("kept", "forgotten"):
        assert f"the test has left pools open: {name}; use them in a 'with' block" in done.stdout


def test_a_plain_asyncio_program_may_use_it() -> None:
    async def main() -> int:
        async with InlinePool() as pool:
            return await pool.run(tasks.add, 1, 2)

    assert asyncio.run(main()) == 3
    assert pickle.loads(pickle.dumps(PoolClosed("x"))).name == "x"
