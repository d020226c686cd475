"""`cpupool.testing`: pools for tests of applications (row D8)."""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import cpupool
import items
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

anyio = pytest.mark.anyio


# --- one pool is like the other ---


@pytest.fixture(params=[CpuPool, InlinePool])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@anyio
async def test_d8_calls_give_the_same(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "initialised", [])
    async with make(1, initializer=tasks.initialise, initargs=("a", "b")) as pool:
        assert await pool.run(tasks.add, 1, 2, c=3) == 6
        assert await pool.run(tasks.get_initialised) == ["a", "b"]
        assert (await pool.options(label="mine").run(tasks.describe_task))[1:] == ("mine", 1)
        assert await pool.map(items.weigh, range(5), [10] * 4) == [0, 10, 20, 30]
        async with pool.stream(items.to_text, numbers(), ordered=False) as results:
            assert sorted([each async for each in results]) == ["0", "1", "2"]
        seen: list[int] = []
        assert await pool.options(on_report=seen.append).run(reporting.report_all, [1, 2]) == 2
        assert seen[-1] == 2
        with pool.as_executor() as executor:
            assert executor.submit(tasks.add, 40, 2).result() == 42
    assert pool.is_closed


async def numbers() -> AsyncIterator[int]:
    for number in range(3):
        yield number


@anyio
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
"""


def test_the_fixtures_work_in_somebody_else_s_tests(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PLUGIN_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert "1 error" in done.stdout, done.stdout
    assert "5 passed" in done.stdout
    assert "pools that the test has started and not closed: <CpuPool 'kept'" in done.stdout


def test_a_plain_asyncio_program_may_use_it() -> None:
    async def main() -> int:
        async with InlinePool() as pool:
            return await pool.run(tasks.add, 1, 2)

    assert asyncio.run(main()) == 3
    assert pickle.loads(pickle.dumps(PoolClosed("x"))).name == "x"
