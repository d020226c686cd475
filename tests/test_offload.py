"""`@offload`: functions and methods that are awaited here and plain in a worker; and progress bars."""

from __future__ import annotations

import asyncio
import inspect
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tqdm
from rich.console import Console
from rich.progress import Progress

import items
import offloaded
from conftest import RunScript
from cpupool import CpuPool, TaskTimeout, WorkerDied, offload, progress

pytestmark = pytest.mark.anyio


async def test_an_offloaded_function_runs_in_a_worker_of_its_pool() -> None:
    async with CpuPool(1) as pool:
        offloaded.pool = pool
        pid = await pool.run(items.pid_of, None)
        assert await offloaded.where(1, two="b") == (pid, 1, "b")


async def test_it_has_the_parameters_the_name_and_the_text_of_the_plain_one() -> None:
    assert inspect.signature(offloaded.where) == inspect.signature(offloaded.where.__wrapped__)  # type: ignore[attr-defined]
    assert inspect.iscoroutinefunction(offloaded.where) or sys.version_info < (3, 12)
    assert asyncio.iscoroutinefunction(offloaded.where)
    assert offloaded.where.__doc__ == "Say where it runs."
    assert offloaded.where.__wrapped__(1, two="b")[1:] == (1, "b")  # type: ignore[attr-defined]


async def test_it_travels_by_its_name_and_is_plain_in_a_worker() -> None:
    assert pickle.loads(pickle.dumps(offloaded.where)) is offloaded.where
    async with CpuPool(1) as pool:
        offloaded.pool = pool
        pid = await pool.run(items.pid_of, None)
        assert await pool.map(offloaded.where, [1, 2]) == [(pid, 1, ""), (pid, 2, "")]
        assert await offloaded.nested(3) == (pid, 3, "nested")


async def test_methods_of_objects_that_can_be_pickled() -> None:
    async with CpuPool(1) as pool:
        offloaded.pool = pool
        scale = offloaded.Scale(3)
        assert await scale.apply(14) == 42
        assert await offloaded.Scale.parse("7") == 7
        assert await offloaded.Scale.make(5) == (5, "Scale")
        assert await scale.apply_privately(2) == 6
        with pytest.raises(WorkerDied, match=r"offloaded\.Scale\.die"):
            await scale.die()


async def test_its_options_hold() -> None:
    async with CpuPool(1, grace=0.1) as pool:
        offloaded.pool = pool
        with pytest.raises(TaskTimeout, match="a spin"):
            await offloaded.spin()
        with pytest.raises(WorkerDied):
            await offloaded.die()


def test_without_a_pool_it_is_the_default_one(run_script: RunScript) -> None:
    done = run_script(
        """
import asyncio, os
import cpupool

@cpupool.offload()
def pid():
    return os.getpid()

async def main():
    return await pid(), await cpupool.run(os.getpid)

if __name__ == "__main__":
    cpupool.configure_default(max_workers=1)
    first, second = asyncio.run(main())
    print(first == second != os.getpid())
"""
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_wrong_uses_are_refused_where_they_stand() -> None:
    async def coroutine_function() -> None: ...

    with pytest.raises(TypeError, match="parentheses"):
        offload(items.double)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parentheses"):
        offload(items.Note._make)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parentheses"):
        offload(lambda: None)()  # type: ignore[arg-type, call-arg, return-value]
    with pytest.raises(ValueError, match="timeout"):
        offload(timeout=-1)
    with pytest.raises(TypeError, match="async def"):
        offload()(coroutine_function)
    with pytest.raises(TypeError, match="pool must be"):
        offload("pool")  # type: ignore[arg-type]


# --- progress bars ---


def _run_map(make_bar: Callable[[], Any]) -> None:
    async def main() -> None:
        async with CpuPool(1) as pool:
            with make_bar() as on_progress:
                await pool.map(items.double, range(500), on_progress=on_progress)

    asyncio.run(main())


def test_rich_shows_how_far_a_map_has_come() -> None:
    text = io.StringIO()
    with Progress(console=Console(file=text, force_terminal=True)) as shown:
        _run_map(lambda: progress.rich_bar("doubling", progress=shown))
    assert "doubling" in text.getvalue()
    assert "100%" in text.getvalue()


def test_rich_shows_a_bar_of_its_own_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    _run_map(lambda: progress.rich_bar("doubling"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "500/500" in err


def test_tqdm_shows_how_far_a_map_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # or a thread of its own stays
    text = io.StringIO()
    _run_map(lambda: progress.tqdm_bar("doubling", file=text))
    assert "doubling: 100%" in text.getvalue()
    assert "500/500" in text.getvalue()
