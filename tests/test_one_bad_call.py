"""Behaviours A1 to A12: one bad call never hurts another."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

import cpupool
import tasks
from conftest import RunScript, wait_until_gone
from cpupool import CpuPool, RemoteError, ResultNotPicklable, TaskNotPicklable, WorkerDied

pytestmark = pytest.mark.anyio

DEATHS: list[tuple[Callable[..., Any], tuple[int, ...], tuple[int | None, int | None]]] = [
    (tasks.die_by_signal, (signal.SIGKILL,), (None, signal.SIGKILL)),
    (tasks.abort, (), (None, signal.SIGABRT)),
    (tasks.exit_at_once, (7,), (7, None)),
    (tasks.segfault, (), (None, signal.SIGSEGV)),
]


async def _outcomes(pool: CpuPool, calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    outcomes: list[Any] = [None] * len(calls)

    async def call(index: int) -> None:
        fn, args = calls[index]
        try:
            outcomes[index] = await pool.run(fn, *args)
        except Exception as error:
            outcomes[index] = error

    async with anyio.create_task_group() as group:
        for index in range(len(calls)):
            group.start_soon(call, index)
    return outcomes


async def test_a1_a_dying_worker_fails_only_its_own_call() -> None:
    """Two workers, twelve calls, one of each death among them: eight results."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(tasks.add, (number,)) for number in range(8)]
    for index, (fn, args, _) in enumerate(DEATHS):
        calls.insert(3 * index, (fn, args))
    async with CpuPool(2) as pool:
        outcomes = await _outcomes(pool, calls)
        assert await pool.run(tasks.add, 1, 1) == 2
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == list(range(8))
    deaths = [outcome for outcome in outcomes if isinstance(outcome, WorkerDied)]
    assert [(death.exitcode, death.signal) for death in deaths] == [facts for _, _, facts in DEATHS]


async def test_a1_the_error_says_who_died_how_and_where(start_method: str) -> None:
    async with CpuPool(1, mp_context=start_method) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(WorkerDied) as caught:
            await pool.run(tasks.segfault)
    error = caught.value
    assert (error.pid, error.exitcode, error.signal, error.task) == (pid, None, signal.SIGSEGV, "tasks.segfault")
    assert "Segmentation fault" in (error.stack or "")
    assert "in segfault" in (error.stack or "")
    assert "_child.py" not in (error.stack or ""), "the worker's own frames say nothing to the user"
    assert str(error).startswith(f"worker {pid} was killed by SIGSEGV while it ran tasks.segfault")


async def test_a1_a_running_call_is_untouched_by_a_death_beside_it(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    results: list[int] = []
    async with CpuPool(2) as pool, anyio.create_task_group() as group:

        async def hold() -> None:
            results.append(await pool.run(tasks.hold, *gate.arguments))

        group.start_soon(hold)
        pid = await anyio.to_thread.run_sync(gate.wait_until_begun)
        with pytest.raises(WorkerDied):
            await pool.run(tasks.abort)
        gate.open()
    assert results == [pid]


async def test_a1_a_task_that_closes_its_connection_is_a_death_too() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(WorkerDied):
            await pool.run(tasks.close_all_descriptors)
        assert await pool.run(tasks.add, 1) == 1


@pytest.mark.parametrize("in_c", [False, True], ids=["os.fork", "fork in C"])
async def test_a1_a_death_is_noticed_though_a_grandchild_holds_the_connection(in_c: bool, tmp_path: Path) -> None:
    """A forked grandchild has copies of all descriptors, so no end of file would ever come; and it is killed too."""
    async with CpuPool(1) as pool:
        with pytest.raises(WorkerDied):
            await pool.run(tasks.fork_and_die, str(tmp_path / "pid"), in_c)
        grandchild = int((tmp_path / "pid").read_text())
        wait_until_gone(grandchild)


async def _pids(pool: CpuPool) -> list[int]:
    return [worker.process.pid for worker in pool._supervisor._crew.workers]


async def test_a2_what_an_idle_worker_had_started_is_killed_with_it() -> None:
    async with CpuPool(1) as pool:
        grandchild = await pool.run(tasks.fork_grandchild, False)
        os.kill(await pool.run(tasks.get_pid), signal.SIGKILL)
        wait_until_gone(grandchild)


async def test_a3_a_connection_found_closed_sends_the_call_to_another() -> None:
    async with CpuPool(1) as pool:
        pid = await pool.run(tasks.get_pid)
        os.kill(pid, signal.SIGSTOP)  # it can neither read nor exit
        next(iter(pool._supervisor._crew.workers)).hang_up()
        assert await pool.run(tasks.get_pid) != pid


@pytest.mark.parametrize("wait", [False, True], ids=["at once", "after their end"])
async def test_a2_nobody_notices_that_idle_workers_are_killed(start_method: str, wait: bool) -> None:
    async with CpuPool(2, mp_context=start_method) as pool:
        killed = await _pids(pool)
        assert len(killed) == 2
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        if wait:
            wait_until_gone(*killed)
        outcomes = await _outcomes(pool, [(tasks.get_pid, ()) for _ in range(20)])
    assert not set(killed) & set(outcomes)
    assert all(isinstance(outcome, int) for outcome in outcomes)


def test_a3_a_call_whose_worker_dies_before_picking_it_up_goes_to_another() -> None:
    """Stop the worker, so that it cannot read; send; kill it: the call must not fail."""
    with CpuPool(1) as pool:
        pid = pool.run_sync(tasks.get_pid)
        os.kill(pid, signal.SIGSTOP)
        outcome: list[int] = []

        async def call_and_kill() -> None:
            task = asyncio.create_task(pool.run(tasks.get_pid))
            await asyncio.sleep(0)  # the task has sent the call when it first waits
            assert "1 busy" in repr(pool)
            os.kill(pid, signal.SIGKILL)
            outcome.append(await task)

        asyncio.run(call_and_kill())
    assert outcome
    assert outcome[0] != pid


# --- A4 ---


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "text"),
    [
        (ValueError, ("plain",), {}, "plain"),
        (tasks.TwoArguments, (5, "because"), {}, "5: because"),
        (tasks.KeywordOnly, (), {"code": 9}, "code 9"),
        (tasks.FormatsItsArgument, ("x",), {}, "no such thing as x"),
        (tasks.NoArguments, (), {}, "always the same"),
        (tasks.DecodeErrorOfOurs, (3,), {}, "'utf-8' codec can't decode byte 0xff in position 3: ours"),
        (FileNotFoundError, (2, "gone", "file"), {}, "[Errno 2] gone: 'file'"),
        (subprocess.CalledProcessError, (3, "command"), {}, "Command 'command' returned non-zero exit status 3."),
        (KeyError, ("key",), {}, "'key'"),
        (TimeoutError, (), {}, ""),
        (ValueError, ("lone surrogate \udcff",), {}, "lone surrogate \udcff"),
    ],
)
async def test_a4_an_exception_arrives_as_itself(
    kind: type[Exception], args: tuple[Any, ...], kwargs: dict[str, Any], text: str
) -> None:
    async with CpuPool(1) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(kind) as caught:
            await pool.run(tasks.raise_exception, kind, *args, **kwargs)
        assert await pool.run(tasks.get_pid) == pid
    assert type(caught.value) is kind
    assert str(caught.value) == text
    assert isinstance(caught.value.__cause__, cpupool.RemoteTraceback)
    assert "in raise_exception" in str(caught.value.__cause__)
    assert "_child.py" not in str(caught.value.__cause__)
    for name, value in kwargs.items():
        assert getattr(caught.value, name) == value


async def test_a4_attributes_notes_and_groups_are_kept() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(tasks.TwoArguments) as caught:
            await pool.run(tasks.raise_with_note)
        assert (caught.value.code, caught.value.reason, caught.value.__notes__) == (1, "noted", ["a note"])
        with pytest.raises(ExceptionGroup) as group:
            await pool.run(tasks.raise_group)
        assert [str(error) for error in group.value.exceptions] == ["one", "2: two"]
        assert isinstance(group.value.exceptions[1], tasks.TwoArguments)
        with pytest.raises(ValueError, match="second") as chained:
            await pool.run(tasks.raise_from)
        assert "KeyError: 'first'" in str(chained.value.__cause__)


@pytest.mark.parametrize(
    ("fn", "args", "type_name", "text"),
    [
        (tasks.raise_exception, (tasks.HoldsALock,), "tasks.HoldsALock", "holds a lock"),
        (tasks.raise_local_class, (), "tasks.raise_local_class.<locals>.Local", "of a local class"),
        (tasks.raise_exception, (tasks.BrokenStr,), "tasks.BrokenStr", "<its message could not be made>"),
    ],
)
async def test_a4_what_cannot_be_rebuilt_arrives_as_remote_error(
    fn: Callable[..., Any], args: tuple[Any, ...], type_name: str, text: str
) -> None:
    async with CpuPool(1) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(RemoteError) as caught:
            await pool.run(fn, *args)
        assert await pool.run(tasks.get_pid) == pid
    assert (caught.value.type_name, caught.value.text) == (type_name, text)
    assert "Traceback (most recent call last)" in caught.value.traceback


async def test_a5_an_argument_that_cannot_be_rebuilt_fails_only_its_call() -> None:
    async with CpuPool(1) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(TaskNotPicklable, match="ValueError: refuses to be rebuilt") as caught:
            await pool.run(tasks.add, tasks.RefusesToUnpickle(1_000_000))  # type: ignore[arg-type]
        assert "could not be rebuilt in the worker" in caught.value.advice
        assert [await pool.run(tasks.add, number) for number in range(20)] == list(range(20))
        assert await pool.run(tasks.get_pid) == pid


@pytest.mark.parametrize(
    ("fn", "type_name"),
    [
        (tasks.return_lambda, "function"),
        (tasks.return_open_file, "_io.TextIOWrapper"),
        (tasks.return_lock, "_thread.lock"),
        (tasks.return_generator, "generator"),
        (tasks.return_refusing, "tasks.RefusesToUnpickle"),
    ],
)
async def test_a6_a_result_that_cannot_come_back_is_named(fn: Callable[..., Any], type_name: str) -> None:
    async with CpuPool(1) as pool:
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(ResultNotPicklable) as caught:
            await pool.run(fn)
        assert await pool.run(tasks.get_pid) == pid
    assert caught.value.result_type == type_name
    assert caught.value.task == f"tasks.{fn.__name__}"


async def test_a7_what_cannot_be_sent_is_named_with_the_cure() -> None:
    def local() -> None: ...

    pool = CpuPool(1)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: pool.run(lambda: None), "the function"),
        (lambda: pool.run(local), "the function"),
        (lambda: pool.run(tasks.add, 1, lambda: None), "argument 2 (a function)"),  # type: ignore[arg-type]
        (lambda: pool.run(tasks.add, 1, c=tasks.return_lock()), "argument 'c' (a lock)"),  # type: ignore[arg-type]
        (lambda: pool.run(sum, (number for number in range(3))), "argument 1 (a generator)"),
    ]
    for call, argument in cases:
        with pytest.raises(TaskNotPicklable) as caught:
            await call()
        assert caught.value.argument == argument
        assert ("top level of a module" if argument == "the function" else "in the worker") in caught.value.advice
    assert not pool._supervisor.is_running, "no worker is used up: none was even started"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, StopIteration])
async def test_a8_what_would_end_or_cancel_the_caller_arrives_as_remote_error(
    kind: type[BaseException], tmp_path: Path
) -> None:
    gate = tasks.Gate(tmp_path)
    held: list[int] = []
    async with CpuPool(2) as pool, anyio.create_task_group() as group:

        async def sibling() -> None:
            held.append(await pool.run(tasks.hold, *gate.arguments))

        group.start_soon(sibling)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        pid = await pool.run(tasks.get_pid)
        with pytest.raises(RemoteError) as caught:
            await pool.run(tasks.raise_exception, kind, 3)
        assert await pool.run(tasks.get_pid) == pid
        gate.open()
    assert caught.value.type_name.endswith(kind.__name__)
    assert len(held) == 1


def test_a8_from_a_thread() -> None:
    with CpuPool(1) as pool:
        for kind in (SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration):
            with pytest.raises(RemoteError):
                pool.run_sync(tasks.raise_exception, kind)
        with pytest.raises(RemoteError):
            pool.run_sync(os.sys.exit, 3)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_a9_output_goes_where_the_program_s_goes(run_script: RunScript, method: str) -> None:
    done = run_script(
        f"""
import cpupool, tasks, warnings
warnings.simplefilter("ignore", DeprecationWarning)
if __name__ == "__main__":
    with cpupool.CpuPool(1, mp_context={method!r}) as pool:
        pool.run_sync(tasks.print_everywhere)
        assert pool.run_sync(tasks.add, 1, 2) == 3
""",
        stdin="not for the workers",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["from echo", "from print", "from puts", "stdin: '' b''"]
    assert done.stderr == "from print to stderr\n"


async def test_a10_a_coroutine_function_is_refused_with_advice() -> None:
    pool = CpuPool(1)
    functions: list[Any] = [
        tasks.coroutine_function,
        tasks.async_generator_function,
        functools.partial(tasks.coroutine_function, 1),
        tasks.AsyncCallable(),
        tasks.AsyncCallable().__call__,
    ]
    for fn in functions:
        with pytest.raises(TypeError, match="'async def' function"):
            await pool.run(fn)
    with pytest.raises(TypeError, match="not the coroutine coroutine_function"):
        await pool.run(tasks.coroutine_function(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not 3; write pool.run\(fn, 1\), not fn\(1\)"):
        await pool.run(tasks.add(1, 2))  # type: ignore[arg-type]
    assert not pool._supervisor.is_running


@pytest.mark.parametrize("retries", [0, 2])
async def test_a11_a_poison_task_runs_once_and_as_often_again_as_was_asked(retries: int, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    async with CpuPool(1, retries=retries) as pool:
        with pytest.raises(WorkerDied):
            await pool.run(tasks.append_line_and_die, str(path))
        with pytest.raises(ValueError, match="not retried"):
            await pool.run(tasks.raise_exception, ValueError, "not retried")
    pids = path.read_text().split()
    assert len(pids) == retries + 1
    assert len(set(pids)) == retries + 1


async def test_a12_a_task_may_start_threads_and_processes(start_method: str) -> None:
    async with CpuPool(1, mp_context=start_method) as pool:
        assert await pool.run(tasks.run_threads_and_processes) == (42, 3)


async def test_a12_a_pool_in_a_worker_is_refused() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(RuntimeError, match="a worker must not use a pool"):
            await pool.run(tasks.use_pool_in_worker)
        assert await pool.run(cpupool.in_worker) is True
    assert cpupool.in_worker() is False
