"""A pool's own life: settings, birth of workers, closing, and what happens afterwards."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

import cpupool
import tasks
from conftest import RunScript, wait_until_gone
from cpupool import CpuPool, InitializerFailed, PoolBroken, PoolClosed, WorkerDied

pytestmark = pytest.mark.anyio


# --- bad input gets a clear error at the call ---


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be at least 1, not 0"),
        ({"max_workers": -3}, ValueError, "max_workers must be at least 1, not -3"),
        ({"max_workers": "four"}, TypeError, "max_workers must be an int, not 'four'"),
        ({"max_workers": 2.0}, TypeError, "max_workers must be an int, not 2.0"),
        ({"max_workers": True}, TypeError, "max_workers must be an int, not True"),
        ({"mp_context": "thread"}, ValueError, "mp_context must be one of fork, spawn, forkserver on this system"),
        ({"mp_context": 3}, TypeError, "mp_context must be the name of a start method"),
        ({"initializer": "load"}, TypeError, "initializer must be callable"),
        ({"initargs": [1]}, TypeError, "initargs must be a tuple"),
        ({"grace": -1}, ValueError, "grace must not be negative"),
        ({"drain": float("nan")}, ValueError, "drain must not be negative"),
        ({"start_timeout": "5"}, TypeError, "start_timeout must be a number of seconds"),
        ({"retries": -1}, ValueError, "retries must be at least 0"),
        ({"name": ""}, TypeError, "name must be a string"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        CpuPool(**settings)
    assert message in str(caught.value)


def test_settings_are_one_frozen_record() -> None:
    pool = CpuPool(3, name="mine")
    assert (pool.settings.max_workers, pool.settings.name, pool.max_workers) == (3, "mine", 3)
    with pytest.raises(AttributeError):
        pool.settings.name = "other"  # type: ignore[misc]


async def test_run_sync_in_an_event_loop_is_refused() -> None:
    pool = CpuPool(1)
    for call in (lambda: pool.run_sync(tasks.add, 1), pool.close, pool.__enter__):
        with pytest.raises(RuntimeError, match=r"would block the (asyncio|trio) event loop that runs in this thread"):
            call()
    assert not pool._supervisor.is_running


async def test_a_call_after_close_is_refused() -> None:
    async with CpuPool(1, name="mine") as pool:
        assert await pool.run(tasks.add, 1) == 1
    with pytest.raises(PoolClosed, match="mine is closed and takes no more calls"):
        await pool.run(tasks.add, 1)
    with pytest.raises(PoolClosed):
        await pool.warm_up()
    assert pool.is_closed
    assert "closed" in repr(pool)


async def test_a_pool_that_is_entered_again_starts_anew() -> None:
    """As an application does that is started for each of its tests."""
    pool = CpuPool(1)
    view = pool.options(label="mine")
    pids = set()
    for _ in range(3):
        async with pool:
            pids.add(await view.run(tasks.get_pid))
        assert pool.is_closed
    await pool.aclose()
    assert len(pids) == 3


async def test_a_pool_whose_start_has_failed_or_was_given_up_may_be_entered_again_at_once(tmp_path: Path) -> None:
    flaky = tasks.Flaky(tmp_path)
    flaky.flag.touch()
    pool = CpuPool(1, initializer=flaky)
    for _ in range(2):
        with pytest.raises(InitializerFailed):
            await pool.__aenter__()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await pool.__aenter__()
    flaky.flag.unlink()
    async with pool:
        assert await pool.run(tasks.add, 1) == 1


async def test_entering_a_pool_that_others_use_does_not_stop_them_when_it_fails(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with anyio.create_task_group() as group:
        pool = CpuPool(1)
        group.start_soon(pool.run, tasks.hold_and_return_much, *gate.arguments, 1)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await pool.__aenter__()
        await anyio.to_thread.run_sync(gate.open)
    assert not pool.is_closed
    await pool.aclose()


async def test_a_pool_that_is_still_closing_cannot_be_entered(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with anyio.create_task_group() as group, CpuPool(1) as pool:
        group.start_soon(pool.run, tasks.hold_and_return_much, *gate.arguments, 1)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        group.start_soon(pool.aclose)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(PoolClosed):
            await pool.__aenter__()
        await anyio.to_thread.run_sync(gate.open)


def test_closing_a_pool_that_was_never_used_starts_nothing() -> None:
    pool = CpuPool(1)
    pool.close()
    with pytest.raises(PoolClosed):
        pool.run_sync(tasks.add, 1)


# --- birth ---


async def test_warm_up_starts_all_workers() -> None:
    pool = CpuPool(3)
    await pool.warm_up()
    assert "3 idle, 0 busy, 0 starting" in repr(pool)
    await pool.warm_up()
    assert len(pool._supervisor._crew.workers) == 3
    await pool.aclose()


def test_a_ready_made_context_is_used() -> None:
    with CpuPool(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.run_sync(tasks.add, 1, 1) == 2


def test_initargs_may_hold_what_only_travels_while_a_process_starts(start_method: str) -> None:
    context = multiprocessing.get_context(start_method)
    lock = context.Lock()
    with CpuPool(1, mp_context=context, initializer=tasks.initialise, initargs=(lock,)) as pool:
        assert pool.run_sync(tasks.acquire_initialised_lock) is True
    assert not lock.acquire(block=False), "the worker holds the very same lock"


async def test_the_initializer_s_own_error_arrives(start_method: str) -> None:
    """Everybody who waits gets it, each an exception of its own, and no storm of processes follows."""
    pool = CpuPool(
        2, mp_context=start_method, initializer=tasks.raise_exception, initargs=(tasks.TwoArguments, 1, "no model")
    )
    errors: list[InitializerFailed] = []

    async def call() -> None:
        with pytest.raises(InitializerFailed) as caught:
            await pool.run(tasks.add, 1)
        errors.append(caught.value)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(call)
    assert len({id(error) for error in errors}) == 3
    assert isinstance(errors[0].__cause__, tasks.TwoArguments)
    assert errors[0].initializer == "tasks.raise_exception"
    assert "raised TwoArguments: 1: no model" in str(errors[0])
    with pytest.raises(InitializerFailed):
        await pool.warm_up()
    assert next(pool._supervisor._births._starter._numbers) <= 6  # processes started, at most two a failure
    await pool.aclose()


async def test_initargs_that_cannot_be_rebuilt_are_an_error_of_the_initializer() -> None:
    pool = CpuPool(1, initializer=tasks.initialise, initargs=(tasks.RefusesToUnpickle(),))
    with pytest.raises(InitializerFailed, match="refuses to be rebuilt"):
        await pool.run(tasks.add, 1)
    await pool.aclose()


async def test_an_initializer_that_cannot_be_pickled_is_reported() -> None:
    pool = CpuPool(1, initializer=eval("lambda: None"))
    with pytest.raises(PoolBroken, match="no worker could be started") as caught:
        await pool.run(tasks.add, 1)
    assert caught.value.cause is caught.value.__cause__ is not None
    await pool.aclose()


async def test_an_initializer_that_kills_its_worker_is_reported() -> None:
    cases: list[tuple[Callable[..., object], tuple[int, ...], str]] = [
        (tasks.exit_at_once, (3,), "exited with status 3"),
        (tasks.die_by_signal, (signal.SIGKILL,), "was killed by SIGKILL"),
        (tasks.segfault, (), "in segfault"),
    ]
    for initializer, initargs, how in cases:
        pool = CpuPool(1, initializer=initializer, initargs=initargs)
        with pytest.raises(InitializerFailed) as caught:
            await pool.run(tasks.add, 1)
        assert how in str(caught.value)
        await pool.aclose()


async def test_an_initializer_that_hangs_is_killed_after_start_timeout(tmp_path: Path) -> None:
    pool = CpuPool(1, initializer=tasks.write_pid_and_sleep, initargs=(str(tmp_path / "pid"),), start_timeout=1)
    with pytest.raises(InitializerFailed, match="write_pid_and_sleep had not ended 1 s after the worker's") as caught:
        await pool.run(tasks.add, 1)
    assert re.search(r'tasks\.py", line \d+ in write_pid_and_sleep', str(caught.value)), "it says where it is"
    wait_until_gone(int((tmp_path / "pid").read_text()))
    await pool.aclose()


async def test_a_worker_killed_while_it_starts_is_replaced(tmp_path: Path) -> None:
    """Somebody else's SIGKILL is no fault of the initializer."""
    path = tmp_path / "pids"
    pool = CpuPool(1, initializer=tasks.die_the_first_time, initargs=(str(path),))
    assert await pool.run(tasks.add, 1) == 1
    assert len(path.read_text().split()) == 2
    await pool.aclose()


async def test_a_dead_worker_is_replaced_and_initialised() -> None:
    async with CpuPool(1, initializer=tasks.initialise, initargs=("state",)) as pool:
        with pytest.raises(WorkerDied):
            await pool.run(tasks.exit_at_once, 1)
        assert await pool.run(tasks.get_initialised) == ["state"]


# --- closing ---


async def test_leaving_the_pool_lets_accepted_calls_finish() -> None:
    """And closes as soon as they have: nobody waits for the drain to run out."""
    results: list[int] = []
    pool = CpuPool(1, drain=3600)
    async with anyio.create_task_group() as group:

        async def call(number: int) -> None:
            results.append(await pool.run(tasks.add, number))

        for number in range(5):
            group.start_soon(call, number)
        await anyio.wait_all_tasks_blocked()
        await pool.aclose()
    assert sorted(results) == list(range(5))


async def test_what_outlives_the_drain_is_killed_and_its_caller_told(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    pool = CpuPool(1)
    outcomes: list[BaseException] = []

    async def call(fn: Any, *args: Any) -> None:
        with pytest.raises(PoolClosed) as caught:
            await pool.run(fn, *args)
        outcomes.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(call, tasks.hold, *gate.arguments)
        pid = await anyio.to_thread.run_sync(gate.wait_until_begun)
        group.start_soon(call, tasks.add, 1)
        await anyio.wait_all_tasks_blocked()
        await pool.aclose(drain=0)
        wait_until_gone(pid)
    assert len(outcomes) == 2


async def test_closing_twice_and_at_once_is_allowed() -> None:
    pool = CpuPool(1)
    assert await pool.run(tasks.add, 1) == 1
    async with anyio.create_task_group() as group:
        group.start_soon(pool.aclose)
        group.start_soon(pool.aclose, 0)
    await pool.aclose()
    with pytest.raises(ValueError, match="drain must not be negative"):
        await pool.aclose(-1)


async def test_a_cancelled_close_still_closes() -> None:
    pool = CpuPool(1)
    pid = await pool.run(tasks.get_pid)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await pool.aclose()
    wait_until_gone(pid)


async def test_an_idle_worker_that_will_not_leave_is_killed() -> None:
    pool = CpuPool(1, grace=0.05)
    pid = await pool.run(tasks.leave_a_thread_that_never_ends)
    await pool.aclose()
    wait_until_gone(pid, seconds=1)


async def test_workers_leave_through_their_exit_handlers(tmp_path: Path, start_method: str) -> None:
    path = tmp_path / "left"
    async with CpuPool(1, mp_context=start_method) as pool:
        await pool.run(tasks.register_exit_handler, str(path))
    assert path.read_text() == "left"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_forgotten_pool_stops_its_workers_and_warns() -> None:
    pool = CpuPool(1, name="forgotten")
    pid = pool.run_sync(tasks.get_pid)
    forgotten = [pool]
    del pool
    with pytest.warns(ResourceWarning, match=r"'forgotten'.*was never closed"):
        forgotten.clear()
    wait_until_gone(pid)


async def test_entering_a_pool_that_cannot_start_leaves_nothing_behind() -> None:
    pool = CpuPool(2, initializer=tasks.raise_exception, initargs=(ValueError, "no"))
    with pytest.raises(InitializerFailed):
        async with pool:
            pytest.fail("entered")
    assert pool.is_closed


def test_a_thread_that_waits_is_told_when_the_pool_closes(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    pool = CpuPool(1)
    outcomes: list[BaseException] = []

    def call() -> None:
        try:
            pool.run_sync(tasks.hold, *gate.arguments)
        except PoolClosed as error:
            outcomes.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    gate.wait_until_begun()
    pool.close(drain=0)
    thread.join()
    assert len(outcomes) == 1


def test_ctrl_c_in_run_sync_stops_the_work(run_script: RunScript, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = run_script(
        """
import os, signal, sys, threading
import cpupool, tasks

def begin(path):
    with open(path, "w") as fifo:
        fifo.write(str(os.getpid()))
    tasks.spin_forever()

def interrupt(path):
    global worker
    with open(path) as fifo:
        worker = int(fifo.read())
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    with cpupool.CpuPool(1) as pool:
        threading.Thread(target=interrupt, args=sys.argv[1:]).start()
        try:
            pool.run_sync(begin, sys.argv[1])
        except KeyboardInterrupt:
            print("interrupted", pool.run_sync(tasks.get_pid) == worker)
""",
        str(fifo),
    )
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted True\n", "", 0)


def test_sigpipe_does_not_end_the_program(run_script: RunScript) -> None:
    """Command-line tools set SIGPIPE to its default; sending to a worker that has hung up must not kill them."""
    done = run_script("""
import os, signal
import cpupool, tasks

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with cpupool.CpuPool(1) as pool:
        os.kill(pool.run_sync(tasks.get_pid), signal.SIGSTOP)  # it can neither read nor exit
        next(iter(pool._supervisor._crew.workers)).hang_up()
        assert pool.run_sync(abs, -1) == 1
    print("alive")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("alive\n", "", 0)


# --- the errors themselves ---


@pytest.mark.parametrize(
    "error",
    [
        PoolClosed("mine"),
        PoolBroken("why", ValueError("cause")),
        InitializerFailed("load", 12),
        WorkerDied(1, None, 9, None, "tasks.add", "stack"),
        cpupool.TaskNotPicklable("task", "argument 1", "reason", "advice"),
        cpupool.ResultNotPicklable("task", "generator", "reason"),
        cpupool.RemoteError("ValueError", "text", "traceback"),
        cpupool.RemoteTraceback("traceback"),
    ],
)
def test_every_error_pickles_with_its_facts(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert {key: str(value) for key, value in vars(copy).items()} == {
        key: str(value) for key, value in vars(error).items()
    }
