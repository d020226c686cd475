"""What programs do to a pool without meaning harm: loops that end, descriptors that run out, forks at bad moments."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import anyio
import pytest

import tasks
from conftest import IGNORE_FORK_WARNING, START_METHODS, RunScript, wait_until_gone
from cpupool import CpuPool, InitializerFailed, RemoteError, ResultNotPicklable, TaskNotPicklable, WorkerDied
from cpupool._lease import Lease


def test_a_waiter_of_a_closed_loop_costs_nobody_else_anything(tmp_path: Path) -> None:
    """Its loop ended in this very thread; its coroutine is collected only when others have had the worker."""
    gate = tasks.Gate(tmp_path)
    pool = CpuPool(1)
    ended = asyncio.new_event_loop()
    running = asyncio.new_event_loop()
    holder = running.create_task(pool.run(tasks.hold, *gate.arguments))
    running.run_until_complete(asyncio.to_thread(gate.wait_until_begun))
    waiter = ended.create_task(pool.run(tasks.add, 1))
    ended.run_until_complete(asyncio.sleep(0))
    ended.close()
    gate.open()
    running.run_until_complete(holder)
    running.run_until_complete(running.shutdown_default_executor())
    running.close()
    waiter._log_destroy_pending = False  # type: ignore[attr-defined]  # that it was destroyed is the point
    del waiter
    gc.collect()
    assert asyncio.run(pool.run(tasks.add, 1, 1)) == 2
    assert "1 idle, 0 busy" in repr(pool)
    pool.close()


def test_a_pool_in_a_reference_cycle_is_collected_wherever_that_happens() -> None:
    for _ in range(5):
        pool = CpuPool(1)
        pid = pool.run_sync(tasks.get_pid)
        cycle: list[object] = [pool]
        cycle.append(cycle)
        del pool, cycle
        with pytest.warns(ResourceWarning, match="never closed"):
            gc.collect()
        wait_until_gone(pid)


@pytest.mark.anyio
async def test_infinite_times_are_no_limit() -> None:
    async with CpuPool(1, start_timeout=float("inf"), drain=float("inf"), grace=1e9) as pool:
        assert await pool.run(tasks.add, 1, 1) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", START_METHODS)
def test_running_out_of_descriptors_is_an_error_and_passes(method: str, run_script: RunScript) -> None:
    """Wherever in the start it happens: the call fails, nothing stays open, and the same pool works afterwards."""
    done = run_script(
        """
import gc, os, resource, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool

def names():
    with os.scandir("/proc/self/fd") as entries:
        own = {entry.name for entry in entries}
    return {name for name in own if os.path.lexists(f"/proc/self/fd/{name}")}

def try_with(free, pool):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.open(os.devnull, os.O_RDONLY) for _ in names()]  # no gap is left below
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 1 + free, hard))
    try:
        return pool.run_sync(abs, -1)
    except cpupool.PoolBroken as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)

if __name__ == "__main__":
    with cpupool.CpuPool(1, mp_context=sys.argv[1]) as pool:
        pool.run_sync(abs, -1)  # what is kept for the life of the program is open now
    before = names()
    outcomes = []
    for free in range(48):
        pool = cpupool.CpuPool(1, mp_context=sys.argv[1])
        outcomes.append(try_with(free, pool))
        assert pool.run_sync(abs, -1) == 1
        pool.close()
        del pool
    assert outcomes[-1] == 1, outcomes
    assert outcomes.count("PoolBroken") > 5, outcomes
    gc.collect()
    left = {os.readlink(f"/proc/self/fd/{name}") for name in names() - before}
    # multiprocessing itself leaks a pipe when it cannot have a second one
    assert not {each for each in left if not each.startswith("pipe:")}, left
""",
        method,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", START_METHODS)
def test_a_program_with_thousands_of_descriptors_can_start_workers(method: str, run_script: RunScript) -> None:
    done = run_script(
        """
import os, resource, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool

if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1500)]
    with cpupool.CpuPool(1, mp_context=sys.argv[1]) as pool:
        assert pool.run_sync(abs, -1) == 1
""",
        method,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.anyio
async def test_a_failed_replacement_fails_no_call_that_another_worker_can_serve(tmp_path: Path) -> None:
    gate, allowed = tasks.Gate(tmp_path), tmp_path / "allowed"
    allowed.touch()
    pool = CpuPool(2, initializer=tasks.require_file, initargs=(str(allowed),))
    await pool.warm_up()
    results: list[int] = []
    async with anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        allowed.unlink()
        with pytest.raises(WorkerDied):
            await pool.run(tasks.exit_at_once, 1)

        async def call(number: int) -> None:
            results.append(await pool.run(tasks.add, number))

        for number in range(5):
            group.start_soon(call, number)
        with pytest.raises(InitializerFailed):
            await pool.warm_up()
        gate.open()
    assert sorted(results) == list(range(5))
    allowed.touch()
    await pool.warm_up()  # the next try is only put off
    await pool.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, asyncio.CancelledError])
async def test_what_a_rebuilt_object_raises_stays_within_the_call(kind: type[BaseException]) -> None:
    async with CpuPool(1) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(ResultNotPicklable, match=kind.__name__):
            await pool.run(tasks.return_what_raises_when_rebuilt, kind)
        with pytest.raises(RemoteError, match="ExitsOnPickling"):
            await pool.run(tasks.raise_exception, tasks.ExitsOnPickling)
        assert await pool.run(tasks.get_pid) == pid


@IGNORE_FORK_WARNING
def test_a_forked_child_lets_its_parent_s_running_call_alone(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    pool = CpuPool(1)
    loop = asyncio.new_event_loop()
    call = loop.create_task(pool.run(tasks.hold, *gate.arguments))
    loop.run_until_complete(asyncio.to_thread(gate.wait_until_begun))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call.get_coro().close()  # as the child's garbage collection may do
            status = 0 if pool.run_sync(tasks.add, 1, 1) == 2 else 2
            pool.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open()
    assert isinstance(loop.run_until_complete(call), int)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    pool.close()


def test_a_fork_while_workers_start_leaves_a_child_that_can_start_its_own(run_script: RunScript) -> None:
    done = run_script("""
import os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

if __name__ == "__main__":
    pool = cpupool.CpuPool(2)
    first = threading.Thread(target=pool.run_sync, args=(abs, -1))
    first.start()
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if pool.run_sync(tasks.add, 1, 1) == 2 else 2
                pool.close()
            finally:
                os._exit(status)
        children.append(child)
        time.sleep(0.005)  # to spread the forks over the start
    first.join()
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0] * 6, statuses
    pool.close()
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_handler_that_ends_the_program_ends_it_while_a_result_is_rebuilt(run_script: RunScript) -> None:
    """Unlike the result's own `SystemExit`, which is an error of that call."""
    done = run_script("""
import os, signal, sys
import cpupool

class Slow:
    def __getstate__(self):
        return {"state": 1}

    def __setstate__(self, state):
        if not cpupool.in_worker():
            os.kill(os.getpid(), signal.SIGTERM)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    with cpupool.CpuPool(1) as pool:
        pool.run_sync(Slow)
""")
    assert (done.returncode, done.stderr) == (7, "")


def test_an_object_that_pretends_to_have_any_attribute_is_refused() -> None:
    pool = CpuPool(1)
    with pytest.raises(TaskNotPicklable):
        pool.run_sync(Mock())


@pytest.mark.anyio
async def test_a_task_may_take_standard_output_away() -> None:
    async with CpuPool(1) as pool:
        pid = await pool.run(tasks.delete_stdout)
        assert await pool.run(tasks.get_pid) == pid


def test_a_pool_used_by_garbage_collection_in_its_own_thread_says_so() -> None:
    with CpuPool(1) as pool:
        errors: list[BaseException] = []
        done = threading.Event()

        def call_from_the_thread() -> None:
            for call in (lambda: pool.run_sync(tasks.add, 1), pool.close):
                try:
                    call()
                except RuntimeError as error:
                    errors.append(error)

        lease: Lease[Any] = Lease(1)
        pool._supervisor.post(pool._dispatcher.borrow_idle, lease)
        pool._supervisor.post(call_from_the_thread)
        pool._supervisor.post(done.set)
        done.wait()
        assert "own thread" in str(errors[0])
        assert pool._dispatcher.give_back(lease)
    assert len(errors) == 2


@pytest.mark.anyio
async def test_a_worker_that_dies_right_after_its_answer_leaves_nothing_behind() -> None:
    """The check for what is left behind is the assertion."""
    async with CpuPool(1) as pool:
        for _ in range(30):
            for fn in (tasks.die_soon, tasks.get_pid):
                with contextlib.suppress(WorkerDied):  # it may hit one of them
                    await pool.run(fn)
        assert await pool.options(retries=1).run(tasks.add, 1, 1) == 2  # the last of them may die only now


def test_a_task_s_children_die_with_the_program(run_script: RunScript) -> None:
    done = run_script("""
import os, signal
import cpupool, tasks

if __name__ == "__main__":
    pool = cpupool.CpuPool(1)
    print(pool.run_sync(tasks.fork_grandchild, False), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    assert done.returncode == -signal.SIGKILL
    wait_until_gone(int(done.stdout), seconds=1)
