"""Behaviours C4 to C6, C8 and C12 to C14: workers are born well, replaced in time, and leave when they may."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math
import multiprocessing.spawn
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

import cpupool
import tasks
from conftest import RunScript, environment, is_gone, wait_until_gone
from cpupool import CpuPool, InitializerFailed, PoolBroken, WorkerDied
from cpupool._births import _vary
from cpupool._memory import OomWitness

pytestmark = pytest.mark.anyio


async def until(condition: Any, seconds: float = 10) -> None:
    """Wait for what nobody announces: the end of a process, or what the pool's thread does behind everybody's back."""
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.002)


def workers_of(pool: CpuPool) -> set[int]:
    return {worker.process.pid for worker in set(pool._supervisor._crew.workers)}


# --- birth ---


async def test_warm_up_starts_all_workers_at_the_same_time(start_method: str, tmp_path: Path) -> None:
    """Each initializer waits for the others: one after the other they would never end."""
    async with CpuPool(3, mp_context=start_method, initializer=tasks.meet, initargs=(str(tmp_path), 3)):
        assert len(os.listdir(tmp_path)) == 3


async def test_env_is_the_workers_only(start_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of their environment is the program's, as it is when they start, not when a fork server did."""
    monkeypatch.setenv("CPUPOOL_TEST_LATE", "set after the fork server was started")
    monkeypatch.setenv("CPUPOOL_TEST_BOTH", "program")
    names = ("CPUPOOL_TEST_LATE", "CPUPOOL_TEST_BOTH", "CPUPOOL_TEST_OWN", "CPUPOOL_TEST_GONE")
    monkeypatch.setenv("CPUPOOL_TEST_GONE", "")
    monkeypatch.delenv("CPUPOOL_TEST_GONE")
    env = {"CPUPOOL_TEST_BOTH": "worker", "CPUPOOL_TEST_OWN": "a=b\nc"}
    async with CpuPool(1, mp_context=start_method, env=env) as pool:
        found = await pool.run(tasks.get_environment, names)
    assert found == {
        "CPUPOOL_TEST_LATE": "set after the fork server was started",
        "CPUPOOL_TEST_BOTH": "worker",
        "CPUPOOL_TEST_OWN": "a=b\nc",
        "CPUPOOL_TEST_GONE": None,
    }
    assert "CPUPOOL_TEST_OWN" not in os.environ


async def test_the_user_s_thread_limits_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    for variable in ("OMP_NUM_THREADS", "BLIS_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    async with CpuPool(1, env={"OMP_NUM_THREADS": "7"}) as pool:
        names = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS")
        assert list((await pool.run(tasks.get_environment, names)).values()) == [
            "5",
            "7",
            None,
        ], "other libraries follow OMP_NUM_THREADS, unless they are told more"
    async with CpuPool(1) as pool:
        found = list((await pool.run(tasks.get_environment, names)).values())
        assert found == ["5", *[str(cpupool.suggest_workers())] * 2]


@pytest.mark.parametrize(
    ("env", "kind", "message"),
    [
        (["A=1"], TypeError, "env must be a mapping"),
        ({"A": 1}, TypeError, "env must map strings to strings, not 'A' to 1"),
        ({"A=B": "1"}, ValueError, "no environment variable can be that"),
        ({"A": "\0"}, ValueError, "no environment variable can be that"),
    ],
)
def test_a_bad_env_is_refused(env: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        CpuPool(env=env)


# --- preload ---


@pytest.fixture
def module_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


async def test_preloaded_modules_are_imported_once_for_all_workers(module_folder: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    (module_folder / "preloaded.py").write_text(f"""
import os
with open({str(pids)!r}, "a") as file:
    file.write(f"{{os.getpid()}}\\n")
limit = os.environ["OMP_NUM_THREADS"]
""")
    async with CpuPool(2, preload=["preloaded"], env={"OMP_NUM_THREADS": "3"}, max_tasks_per_child=1) as pool:
        server = int(pids.read_text())
        assert server not in {os.getpid(), *workers_of(pool)}
        for _ in range(4):
            assert await pool.run(tasks.get_attribute, "preloaded", "limit") == "3", "set before the import"
        assert pids.read_text() == f"{server}\n"
    wait_until_gone(server, seconds=1)


@pytest.mark.parametrize("form", ["file", "module"])
def test_the_main_module_can_be_preloaded(form: str, run_script: RunScript, tmp_path: Path) -> None:
    """It is imported once, in the server, and not again in each worker."""
    (tmp_path / "program.py").write_text("""
import os, sys
import cpupool

with open("imports", "a") as file:
    file.write(f"{__name__} {sys.argv[1:]}\\n")

def double(number):
    return 2 * number

if __name__ == "__main__":
    with cpupool.CpuPool(2, preload=("__main__", "json"), max_tasks_per_child=1) as pool:
        print([pool.run_sync(double, number) for number in range(4)])
""")
    arguments = ["program.py"] if form == "file" else ["-m", "program"]
    done = run_script(
        f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, *{arguments!r}, 'argument']))"
    )
    assert (done.stdout, done.stderr) == ("[0, 2, 4, 6]\n", "")
    assert (tmp_path / "imports").read_text() == "__main__ ['argument']\n__mp_main__ ['argument']\n"


def test_a_preloaded_main_module_without_a_guard_is_one_clear_error(run_script: RunScript) -> None:
    done = run_script("""
import cpupool
with cpupool.CpuPool(2, preload=("__main__",)) as pool:
    pool.run_sync(abs, -1)
""")
    assert done.returncode == 1
    assert "if __name__ == '__main__':" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(("cpupool.PoolBroken", "if", "so that importing", "    "))


def test_what_is_preloaded_is_shared_by_the_workers(module_folder: Path) -> None:
    (module_folder / "big.py").write_text("data = bytearray(100_000_000)")
    with CpuPool(2, preload=("big",)) as pool:
        for pid in workers_of(pool):
            memory = psutil.Process(pid).memory_full_info()
            assert memory.rss > 100_000_000
            assert memory.uss < 50_000_000, "most of it belongs to no worker alone"


async def test_a_module_that_cannot_be_preloaded_is_named(module_folder: Path) -> None:
    (module_folder / "broken.py").write_text("import no_such_module")
    pool = CpuPool(1, preload=("json", "broken"))
    with pytest.raises(
        PoolBroken, match=r"'broken', which is to be preloaded.*No module named 'no_such_module'"
    ) as caught:
        await pool.warm_up()
    assert isinstance(caught.value.cause.__cause__, ModuleNotFoundError)  # type: ignore[union-attr]
    await pool.aclose()


def test_a_fork_server_that_cannot_be_set_up_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    get_preparation_data = multiprocessing.spawn.get_preparation_data
    monkeypatch.setattr(
        multiprocessing.spawn, "get_preparation_data", lambda name: get_preparation_data(name) | {"dir": "/no/folder"}
    )
    pool = CpuPool(1)
    with pytest.raises(PoolBroken, match=r"it cannot be set up \(FileNotFoundError"):
        pool.run_sync(tasks.add, 1)
    pool.close()


async def test_a_preload_that_ends_the_server_is_reported(module_folder: Path) -> None:
    (module_folder / "leaving.py").write_text("import os; os._exit(3)")
    pool = CpuPool(1, preload=("leaving",))
    with pytest.raises(PoolBroken, match="exited with status 3 while it imported leaving"):
        await pool.run(tasks.add, 1)
    await pool.aclose()


async def test_a_preload_that_hangs_is_killed_after_start_timeout(module_folder: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (module_folder / "hanging.py").write_text(f"import tasks; tasks.write_pid_and_sleep({str(pid)!r})")
    pool = CpuPool(1, preload=("hanging",), start_timeout=1)
    with pytest.raises(PoolBroken, match="took longer than start_timeout"):
        await pool.run(tasks.add, 1)
    wait_until_gone(int(pid.read_text()))
    await pool.aclose()


@pytest.mark.slow
async def test_a_preload_that_hangs_is_killed_though_nobody_waits_any_more(module_folder: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (module_folder / "hanging.py").write_text(f"import tasks; tasks.write_pid_and_sleep({str(pid)!r})")
    pool = CpuPool(1, preload=("hanging",), start_timeout=1)
    with anyio.move_on_after(0.5):
        await pool.run(tasks.add, 1)
    await until(pid.exists)
    pool._dispatcher._wanted = 0  # as after idle workers have left
    await anyio.to_thread.run_sync(wait_until_gone, int(pid.read_text()))
    supervisor = next(each for each in threading.enumerate() if each.name == "CpuPool-supervisor")
    status = Path(f"/proc/self/task/{supervisor.native_id}/status")

    def count_switches() -> list[str]:
        return [line for line in status.read_text().splitlines() if "ctxt_switches" in line]

    await anyio.sleep(0.1)
    before = count_switches()
    await anyio.sleep(0.3)
    assert count_switches() == before, "the pool's thread sleeps"
    await pool.aclose()


async def test_closing_does_not_wait_for_a_preload(module_folder: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (module_folder / "hanging.py").write_text(f"import tasks; tasks.write_pid_and_sleep({str(pid)!r})")
    pool = CpuPool(1, preload=("hanging",))
    async with anyio.create_task_group() as group:

        async def call() -> None:
            with pytest.raises(cpupool.PoolClosed):
                await pool.run(tasks.add, 1)

        group.start_soon(call)
        await until(pid.exists)
        with anyio.fail_after(2):
            await pool.aclose(0)


async def test_a_killed_fork_server_is_started_again(module_folder: Path) -> None:
    (module_folder / "preloaded.py").write_text("import os; pid = os.getpid()")
    async with CpuPool(1, preload=("preloaded",)) as pool:
        server = await pool.run(tasks.get_preloaded_pid)
        os.kill(server, signal.SIGKILL)
        wait_until_gone(server)
        with pytest.raises(WorkerDied):
            await pool.run(tasks.exit_at_once, 1)
        assert await pool.run(tasks.get_preloaded_pid) != server


def test_a_fork_leaves_the_fork_server_to_the_parent(run_script: RunScript) -> None:
    done = run_script("""
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

if __name__ == "__main__":
    pool = cpupool.CpuPool(1, preload=("json",), max_tasks_per_child=1)
    before = pool.run_sync(tasks.get_pid)
    child = os.fork()
    if child == 0:
        assert pool.run_sync(tasks.get_pid) != before
        pool.close()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    print(pool.run_sync(tasks.add, 1), pool.run_sync(tasks.add, 2))
    pool.close()
""")
    assert (done.stdout, done.stderr, done.returncode) == ("1 2\n", "", 0)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"preload": "numpy"}, TypeError, "preload must be a tuple of module names"),
        ({"preload": ("no module",)}, TypeError, "preload must hold full names of modules"),
        ({"preload": ("json",), "mp_context": "spawn"}, ValueError, "preload needs the start method 'forkserver'"),
    ],
)
def test_a_bad_preload_is_refused(settings: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        CpuPool(**settings)


def test_ctrl_c_does_not_reach_the_fork_server(run_script: RunScript, tmp_path: Path) -> None:
    """It comes while the server still imports; the terminal sends it to the program's whole group."""
    (tmp_path / "slow.py").write_text("import pathlib, time; pathlib.Path('begun').touch(); time.sleep(0.5)")
    done = run_script("""
import os, pathlib, signal, sys, threading, time
import cpupool

def press():
    while not pathlib.Path("begun").exists():
        time.sleep(0.001)
    os.killpg(0, signal.SIGINT)

if __name__ == "__main__":
    os.setpgid(0, 0)
    pool = cpupool.CpuPool(1, preload=("slow",))
    threading.Thread(target=press).start()
    try:
        pool.run_sync(abs, -1)
    except KeyboardInterrupt:
        print("interrupted")
    print(pool.run_sync(abs, -1))
""")
    assert (done.stdout, done.stderr) == ("interrupted\n1\n", "")


def test_a_start_may_take_any_time(module_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    (module_folder / "noting.py").write_text(f"import tasks, time; tasks.append_line({str(path)!r}); time.sleep(0.2)")
    with CpuPool(1, preload=("noting",), start_timeout=math.inf) as pool:
        assert pool.run_sync(tasks.add, 1) == 1
    assert len(path.read_text().split()) == 1


def test_what_preloaded_modules_set_in_the_environment_stays(module_folder: Path) -> None:
    (module_folder / "setting.py").write_text("import os; os.environ['CPUPOOL_TEST_SET'] = 'by the module'")
    with CpuPool(1, preload=("setting",), env={"CPUPOOL_TEST_ENV": "by the pool"}) as pool:
        names = ("CPUPOOL_TEST_SET", "CPUPOOL_TEST_ENV", "OMP_NUM_THREADS")
        found = pool.run_sync(tasks.get_environment, names)
    assert list(found.values())[:2] == ["by the module", "by the pool"]
    assert found["OMP_NUM_THREADS"] is not None


def test_changes_of_the_program_s_environment_reach_later_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPUPOOL_TEST_GOES", "soon")
    monkeypatch.delenv("CPUPOOL_TEST_COMES", raising=False)
    names = ("CPUPOOL_TEST_GOES", "CPUPOOL_TEST_COMES")
    with CpuPool(1, max_tasks_per_child=1) as pool:
        assert list(pool.run_sync(tasks.get_environment, names).values()) == ["soon", None]
        monkeypatch.delenv("CPUPOOL_TEST_GOES")
        monkeypatch.setenv("CPUPOOL_TEST_COMES", "later")
        pool.run_sync(tasks.add, 1)  # its worker may have started before
        assert list(pool.run_sync(tasks.get_environment, names).values()) == [None, "later"]


def test_preloaded_modules_that_block_signals_hang_nobody(module_folder: Path) -> None:
    """The server learns by SIGCHLD how a worker ended."""
    (module_folder / "blocking.py").write_text("""
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
""")
    with CpuPool(1, preload=("blocking",)) as pool:
        with pytest.raises(WorkerDied, match="exited with status 7"):
            pool.run_sync(tasks.exit_at_once, 7)
        assert pool.run_sync(tasks.describe_signals)["blocked"] == 0


def test_what_preloaded_modules_started_ends_with_the_pool(module_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    (module_folder / "starting.py").write_text(f"""
import pathlib, subprocess
pathlib.Path({str(path)!r}).write_text(str(subprocess.Popen(["sleep", "3600"]).pid))
""")
    with CpuPool(1, preload=("starting",)):
        child = int(path.read_text())
    wait_until_gone(child, seconds=2)


def test_what_a_task_started_ends_with_its_worker_even_in_peace(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with CpuPool(1) as pool:
        pool.run_sync(tasks.start_child, str(path))
    wait_until_gone(int(path.read_text()), seconds=2)


@pytest.mark.slow
def test_a_stopped_fork_server_is_replaced_and_timeouts_hold_afterwards() -> None:
    with CpuPool(2) as pool:
        server = pool._supervisor._births._starter.server
        assert server is not None
        assert server._process is not None
        os.kill(server._process.pid, signal.SIGSTOP)
        with pytest.raises(WorkerDied) as caught:
            pool.run_sync(tasks.exit_at_once, 7)
        assert (caught.value.exitcode, caught.value.oom) == (None, None), "nobody could learn it"
        assert pool.run_sync(tasks.add, 1) == 1
        with pytest.raises(cpupool.TaskTimeout):
            pool.options(timeout=0.1).run_sync(tasks.sleep_long)


def test_a_fork_server_killed_while_it_imports_is_started_again(module_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    (module_folder / "dying.py").write_text(f"import tasks; tasks.die_the_first_time({str(path)!r})")
    with CpuPool(1, preload=("dying",)) as pool:
        assert pool.run_sync(tasks.add, 1) == 1
    assert len(path.read_text().split()) == 2


def test_a_daemon_that_a_task_left_does_not_keep_the_fork_server(tmp_path: Path) -> None:
    script, path = tmp_path / "script.py", tmp_path / "pid"
    script.write_text("""
import sys
import cpupool, tasks
if __name__ == "__main__":
    pool = cpupool.CpuPool(1, preload=("json",))
    pool.run_sync(tasks.leave_daemon, sys.argv[1])
    print("left", flush=True)
    tasks.sleep_long()
""")
    command = [sys.executable, str(script), str(path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        daemon = int(path.read_text())
        descendants = psutil.Process(parent.pid).children(recursive=True)
        # multiprocessing's resource tracker serves all processes of a program, and outlives the last
        mortal = [each.pid for each in descendants if "resource_tracker" not in " ".join(each.cmdline())]
        assert len(mortal) == 3, "server, worker and daemon"
        try:
            parent.kill()
            wait_until_gone(*(set(mortal) - {daemon}), seconds=1)
            assert not is_gone(daemon)
        finally:
            os.kill(daemon, signal.SIGKILL)


def test_a_daemon_whose_parent_ends_first_can_start_workers(tmp_path: Path) -> None:
    """Its temporary folder is its own: the parent removes the one they had."""
    fifo, script = tmp_path / "fifo", tmp_path / "daemon.py"
    os.mkfifo(fifo)
    script.write_text("""
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks
if __name__ == "__main__":
    pool = cpupool.CpuPool(1)
    pool.run_sync(tasks.add, 1)
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)  # the end of the parent
        answer = pool.run_sync(tasks.add, 20, 1)
        pool.close()
        with open(sys.argv[1], "w") as fifo:
            fifo.write(str(answer))
        os._exit(0)
""")
    with subprocess.Popen([sys.executable, str(script), str(fifo)], env=environment()):
        assert fifo.read_text() == "21"


def test_a_forked_child_that_just_exits_leaves_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    folder, script = tmp_path / "t", tmp_path / "script.py"
    folder.mkdir()
    script.write_text("""
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks
if __name__ == "__main__":
    with cpupool.CpuPool(1) as pool:
        child = os.fork()
        if child == 0:
            assert pool.run_sync(tasks.add, 1) == 1
            pool.close()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert pool.run_sync(tasks.add, 1) == 1
""")
    subprocess.run([sys.executable, str(script)], env=environment(TMPDIR=str(folder)), check=True)
    assert os.listdir(folder) == []


# --- finalizer ---


async def test_the_finalizer_runs_in_each_worker_that_leaves_in_peace(start_method: str, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with CpuPool(2, mp_context=start_method, finalizer=tasks.Finalizer(path)) as pool:
        pids = workers_of(pool)
        assert not path.exists()
    assert set(map(int, path.read_text().split())) == pids


def test_an_error_of_the_finalizer_is_printed_and_exit_handlers_run(run_script: RunScript, tmp_path: Path) -> None:
    done = run_script("""
import sys
import cpupool, tasks
if __name__ == "__main__":
    with cpupool.CpuPool(1, finalizer=tasks.finalize_badly) as pool:
        pool.run_sync(tasks.register_exit_handler, sys.argv[1])
""", str(tmp_path / "left"))  # fmt: skip
    assert done.stderr.endswith("ValueError: the finalizer failed\n")
    assert (tmp_path / "left").read_text() == "left"


async def test_a_finalizer_has_the_time_of_the_grace() -> None:
    pool = CpuPool(1, finalizer=tasks.sleep_long, grace=0.3)
    assert await pool.run(tasks.add, 1) == 1
    start = time.monotonic()
    await pool.aclose()
    assert 0.3 <= time.monotonic() - start < 2


# --- C4: the breaker ---


async def test_c4_the_breaker_opens_and_closes(tmp_path: Path) -> None:
    flaky = tasks.Flaky(tmp_path)
    flaky.flag.touch()
    pool = CpuPool(2, initializer=flaky)
    refused: list[PoolBroken] = []
    failures = 0
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        start = time.monotonic()
        try:
            await pool.run(tasks.add, 1)
        except InitializerFailed as error:
            failures += isinstance(error.__cause__, FileNotFoundError)
        except PoolBroken as error:
            assert time.monotonic() - start < 0.1, "at once"
            refused.append(error)
            await anyio.sleep(0.01)
    assert failures >= 3
    assert flaky.count_runs() <= 2 * failures, "as many processes as tries"
    assert failures <= 6, "0.1 + 0.2 + 0.4 + 0.8 s lie between them"
    assert isinstance(refused[0].cause, InitializerFailed)
    assert re.match(
        r"\d starts of a worker in a row have failed; the next try is in 0\.\d s\..*no model", str(refused[0])
    )
    flaky.flag.unlink()
    with anyio.fail_after(10):
        while True:
            with contextlib.suppress(PoolBroken):
                assert await pool.run(tasks.add, 1) == 1
                break
            await anyio.sleep(0.05)
    assert pool._supervisor._births._failures == 0
    await pool.aclose()


async def test_c4_workers_that_fail_together_count_as_one_failure(tmp_path: Path) -> None:
    """Or the first failure of a large pool would open the breaker, for half a minute."""
    pool = CpuPool(6, initializer=tasks.meet_and_fail, initargs=(str(tmp_path), 6))
    with pytest.raises(InitializerFailed):
        await pool.warm_up()
    await until(lambda: not workers_of(pool))
    assert pool._supervisor._births._failures == 1
    await pool.aclose()


async def test_c4_an_open_breaker_refuses_a_warm_up_too(tmp_path: Path) -> None:
    flaky = tasks.Flaky(tmp_path)
    flaky.flag.touch()
    pool = CpuPool(1, initializer=flaky)
    for _ in range(3):
        with pytest.raises(InitializerFailed):
            await pool.warm_up()
    with pytest.raises(PoolBroken, match="3 starts of a worker in a row have failed"):
        await pool.warm_up()
    await pool.aclose()


async def test_c4_workers_that_are_left_serve_while_others_cannot_start(tmp_path: Path) -> None:
    flaky = tasks.Flaky(tmp_path)
    async with CpuPool(2, initializer=flaky) as pool:
        flaky.flag.touch()
        with pytest.raises(WorkerDied):
            await pool.run(tasks.exit_at_once, 1)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            assert await pool.run(tasks.add, 1) == 1
        assert flaky.count_runs() <= 2 + 4, "0.1 + 0.2 + 0.4 s lie between them"


async def test_c4_when_the_last_worker_dies_behind_an_open_breaker_nobody_waits(tmp_path: Path) -> None:
    flaky = tasks.Flaky(tmp_path)
    async with CpuPool(2, initializer=flaky) as pool:
        flaky.flag.touch()
        with pytest.raises(WorkerDied):
            await pool.run(tasks.exit_at_once, 1)
        births = pool._supervisor._births
        while births._failures < 4:
            async with anyio.create_task_group() as group:  # two at once, so that the second worker is missed
                for _ in range(2):
                    group.start_soon(pool.run, tasks.busy, 0.001)
        with pytest.raises(WorkerDied):
            await pool.run(tasks.exit_at_once, 1)
        start = time.monotonic()
        with pytest.raises(PoolBroken):
            await pool.run(tasks.add, 1)
        assert time.monotonic() - start < 0.5


def test_c4_the_pause_between_tries_is_bounded_however_long_it_lasts() -> None:
    births = CpuPool(1)._supervisor._births
    for _ in range(2000):
        births._put_off(lambda: PoolBroken("x"))
    assert 29 < births._again_at - time.monotonic() <= 30


def test_c4_a_worker_too_large_for_any_task_is_reported_as_such() -> None:
    pool = CpuPool(1, initializer=tasks.leak, initargs=(200_000_000,), hard_memory_per_child=100_000_000)
    with pytest.raises(PoolBroken, match="before its first task, more than hard_memory_per_child"):
        pool.run_sync(tasks.add, 1)
    pool.close()


# --- C5: replacement ---


@pytest.mark.parametrize("limit", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
async def test_c5_no_call_is_lost_when_workers_are_replaced(limit: int, tmp_path: Path) -> None:
    left = tmp_path / "left"
    numbers: list[int] = []
    pids: collections.Counter[int] = collections.Counter()
    async with CpuPool(2, max_tasks_per_child=limit, finalizer=tasks.Finalizer(left)) as pool:

        async def call(number: int) -> None:
            pids[await pool.run(tasks.get_pid)] += 1
            numbers.append(number)

        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(call, number)
    assert sorted(numbers) == list(range(200))
    assert max(pids.values()) == limit
    assert set(pids) <= set(map(int, left.read_text().split())), "each has left in peace"


async def test_c5_the_successor_is_ready_before_the_last_task_ends(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    async with CpuPool(1, max_tasks_per_child=1) as pool, anyio.create_task_group() as group:
        group.start_soon(pool.run, tasks.hold, *gate.arguments)
        old = await anyio.to_thread.run_sync(gate.wait_until_begun)
        await until(lambda: "1 idle, 1 busy, 0 starting" in repr(pool))
        (successor,) = workers_of(pool) - {old}
        pids: list[int] = []

        async def call() -> None:
            pids.append(await pool.run(tasks.get_pid))

        group.start_soon(call)
        await until(lambda: "1 waiting" in repr(pool))
        assert pids == [], "one task at a time: max_workers is 1"
        gate.open()
        await until(lambda: pids == [successor])


async def test_c5_a_worker_that_is_given_up_in_its_last_task_is_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with CpuPool(1, max_tasks_per_child=1, grace=60) as pool:
        (old,) = workers_of(pool)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.report_begin, str(fifo), tasks.spin_forever)
            await anyio.to_thread.run_sync(fifo.read_text)
            group.cancel_scope.cancel()
        assert await pool.run(tasks.get_pid) != old


def test_c5_limits_vary_a_little_and_never_upwards() -> None:
    drawn = [_vary(100) for _ in range(1000)]
    assert set(drawn) <= set(range(90, 101))
    assert len(set(drawn)) > 5
    assert {_vary(9) for _ in range(100)} == {9}
    assert _vary(None) is None


async def test_c5_a_leak_is_bounded_and_no_call_fails() -> None:
    """20 MB a task, 60 tasks: 1.2 GB, were it not for the limit."""
    most = 0
    pids = set()
    async with CpuPool(2, max_memory_per_child=150_000_000) as pool:
        for _ in range(60):
            pids.add(await pool.run(tasks.leak, 20_000_000))
            most = max(most, sum(_resident(pid) for pid in workers_of(pool)))
    assert len(pids) >= 6
    assert most < 700_000_000


def _resident(pid: int) -> int:
    try:
        resident: int = psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0
    return resident


async def test_c5_a_worker_that_is_too_large_serves_until_its_successor_is_ready(tmp_path: Path) -> None:
    count, fifo = tmp_path / "count", tmp_path / "fifo"
    os.mkfifo(fifo)
    pool = CpuPool(
        1, max_memory_per_child=100_000_000, initializer=tasks.wait_unless_first, initargs=(str(count), str(fifo))
    )
    async with pool:
        old = await pool.run(tasks.leak, 150_000_000)
        await until(lambda: "1 starting" in repr(pool))
        for _ in range(10):
            assert await pool.run(tasks.get_pid) == old
        fifo.open("w").close()
        await until(lambda: workers_of(pool).isdisjoint({old}))
        assert await pool.run(tasks.get_pid) != old


async def test_c5_a_worker_stays_while_its_successor_cannot_start(tmp_path: Path) -> None:
    """Nor does anybody who waits hear of it: the old worker serves."""
    flaky = tasks.Flaky(tmp_path)
    async with CpuPool(1, max_memory_per_child=100_000_000, initializer=flaky) as pool:
        flaky.flag.touch()
        old = await pool.run(tasks.leak, 150_000_000)
        births = pool._supervisor._births
        with anyio.fail_after(10):
            while births._failures < 2:
                async with anyio.create_task_group() as group:
                    for _ in range(3):
                        group.start_soon(pool.run, tasks.busy, 0.001)
        assert await pool.run(tasks.get_pid) == old
        flaky.flag.unlink()
        await until(lambda: workers_of(pool).isdisjoint({old}))
        assert await pool.run(tasks.get_pid) != old


@pytest.mark.slow
def test_c5_workers_that_leave_slowly_do_not_pile_up() -> None:
    with CpuPool(2, max_tasks_per_child=1, finalizer=tasks.sleep_half_a_second, grace=5) as pool:
        most = 0
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            pool.run_sync(tasks.add, 1)
            most = max(most, len(workers_of(pool)))
        assert most <= 3 * 2


async def test_c5_a_task_that_was_given_up_counts_until_it_has_ended(tmp_path: Path) -> None:
    """Its successor is ready, but one task at a time is what `max_workers=1` says."""
    times = tmp_path / "times"
    async with CpuPool(1, max_tasks_per_child=1, grace=60) as pool:
        with anyio.move_on_after(0.2):
            await pool.run(tasks.swallow_interrupts_for, 0.8, str(times))
        begun = await pool.run(time.monotonic)
    assert float(times.read_text()) <= begun


async def test_c5_a_worker_that_grew_in_a_task_given_up_is_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with CpuPool(1, max_memory_per_child=100_000_000, grace=60) as pool:
        (old,) = workers_of(pool)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.leak_and_spin, 150_000_000, str(fifo))
            await anyio.to_thread.run_sync(fifo.read_text)
            group.cancel_scope.cancel()
        await until(lambda: workers_of(pool).isdisjoint({old}))


def test_c5_a_limit_below_what_every_worker_holds_is_pointed_out_once(caplog: pytest.LogCaptureFixture) -> None:
    with CpuPool(1, max_memory_per_child=1_000_000) as pool:
        for _ in range(3):
            pool.run_sync(tasks.add, 1)
    (record,) = [record for record in caplog.records if record.name == "cpupool"]
    assert "before its first task, more than max_memory_per_child allows" in record.getMessage()


# --- C6: memory that a task must not have ---


async def test_c6_a_task_that_takes_too_much_memory_fails_alone(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    limit = 150_000_000
    async with CpuPool(2, hard_memory_per_child=limit) as pool, anyio.create_task_group() as group:
        other: list[int] = []

        async def call_other() -> None:
            other.append(await pool.run(tasks.hold, *gate.arguments))

        group.start_soon(call_other)
        await anyio.to_thread.run_sync(gate.wait_until_begun)
        with pytest.raises(WorkerDied, match="more than hard_memory_per_child") as caught:
            await pool.run(tasks.hold_memory, 300_000_000)
        error = caught.value
        assert (error.oom, error.signal, error.limit) == (True, signal.SIGKILL, limit)
        assert error.resident is not None
        assert error.resident > limit
        assert await pool.run(tasks.add, 1) == 1
        gate.open()
    assert len(other) == 1


async def test_c6_the_limit_holds_for_a_task_that_was_given_up(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    async with CpuPool(1, hard_memory_per_child=150_000_000, grace=60) as pool:
        with anyio.move_on_after(0.3):
            await pool.run(tasks.grow_when_interrupted, 300_000_000, str(path))
        await until(lambda: path.exists() and path.read_text())
        await anyio.to_thread.run_sync(wait_until_gone, int(path.read_text()))
        assert await pool.run(tasks.add, 1) == 1


def test_c6_kills_counted_long_ago_explain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, now = [3], [100.0]
    monkeypatch.setattr("cpupool._memory.count_oom_kills", lambda: counts[0])
    witness = OomWitness()
    monkeypatch.setattr("cpupool._memory.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    witness.look()
    assert witness.was_oom_kill() is False
    counts[0] = 5
    witness.look()
    assert [witness.was_oom_kill() for _ in range(3)] == [True, True, False], "two were killed at once"
    counts[0] = 6
    witness.look()
    now[0] += 2
    assert witness.was_oom_kill() is False


async def test_c6_memory_is_looked_at_only_while_a_task_runs() -> None:
    async with CpuPool(1, hard_memory_per_child=10**9) as pool:
        assert await pool.run(tasks.add, 1) == 1
        guard = pool._supervisor._memory_guard
        await until(lambda: guard.next_deadline() == float("inf"))
        sampled = guard._sampled
        await anyio.sleep(0.2)
        assert guard._sampled == sampled


async def test_c6_a_kill_from_outside_is_not_taken_for_a_want_of_memory() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(WorkerDied) as caught:
            await pool.run(tasks.die_by_signal, signal.SIGKILL)
        assert caught.value.oom is not True
        with pytest.raises(WorkerDied) as caught:
            await pool.run(tasks.exit_at_once, 1)
        assert caught.value.oom is False


def _own_memory_group() -> Path | None:
    """Return the folder of this process's group in a version 1 memory hierarchy that may be divided further."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder = Path("/sys/fs/cgroup/memory") / path.lstrip("/")
        if "memory" in controllers.split(",") and os.access(folder, os.W_OK):
            return folder
    return None


def test_c6_a_kill_by_the_kernel_for_want_of_memory_is_told_from_others(run_script: RunScript) -> None:
    own = _own_memory_group()
    if own is None:
        pytest.skip("no memory cgroup that can be divided")
    group = own / f"cpupool-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no memory cgroup that can be divided")
    try:
        (group / "memory.limit_in_bytes").write_text("200000000")
        with contextlib.suppress(OSError):
            (group / "memory.memsw.limit_in_bytes").write_text("200000000")
        done = run_script(
            """
import os, signal, sys
from pathlib import Path
import cpupool, tasks

if __name__ == "__main__":
    (Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
    with cpupool.CpuPool(1) as pool:
        for function, argument in [
            (tasks.die_by_signal, signal.SIGKILL),
            (tasks.hold_memory, 400_000_000),
            (tasks.die_by_signal, signal.SIGKILL),
        ]:
            try:
                pool.run_sync(function, argument)
            except cpupool.WorkerDied as error:
                print(error.oom, error.signal, "for want of memory" in str(error))
    (Path(sys.argv[1]).parent / "cgroup.procs").write_text(str(os.getpid()))
""",
            str(group),
        )
        assert done.stderr == ""
        assert done.stdout == "False 9 False\nTrue 9 True\nFalse 9 False\n"
    finally:
        for _ in range(500):
            try:
                group.rmdir()
                break
            except OSError:  # its last processes are being reaped, the resource tracker among them
                for pid in (group / "cgroup.procs").read_text().split():
                    with contextlib.suppress(OSError):
                        (own / "cgroup.procs").write_text(pid)
                time.sleep(0.01)


# --- idle workers ---


async def test_idle_workers_leave_down_to_the_least_and_come_back_on_demand(tmp_path: Path) -> None:
    left = tmp_path / "left"
    (tmp_path / "meeting").mkdir()
    async with CpuPool(4, idle_timeout=0.3, min_workers=1, finalizer=tasks.Finalizer(left)) as pool:
        assert "4 idle" in repr(pool)
        await until(lambda: len(workers_of(pool)) == 1)
        assert len(left.read_text().split()) == 3
        await anyio.sleep(0.5)
        assert "1 idle" in repr(pool), "it stays"
        assert pool._supervisor._next_surplus() == float("inf"), "and nothing wakes up for it"
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(pool.run, tasks.meet, str(tmp_path / "meeting"), 4)
        assert len(workers_of(pool)) == 4


def test_a_warm_up_keeps_idle_workers(tmp_path: Path) -> None:
    """The first to be ready has nothing to do for longer than the timeout, until the last is ready."""
    with CpuPool(2, idle_timeout=0.2, initializer=tasks.initialize_slowly, initargs=(str(tmp_path / "count"),)) as pool:
        assert "2 idle" in repr(pool)


def test_a_pool_that_has_shrunk_can_be_warmed_up_again() -> None:
    async def use() -> None:
        async with CpuPool(3, idle_timeout=0.2, min_workers=1) as pool:
            await until(lambda: len(workers_of(pool)) == 1)
            with anyio.fail_after(10):
                await pool.warm_up()
            assert "3 idle" in repr(pool)

    asyncio.run(use())


def test_waiting_for_idle_workers_costs_nothing_while_they_are_busy() -> None:
    with CpuPool(1, idle_timeout=0) as pool:
        before = time.process_time()
        pool.run_sync(time.sleep, 0.5)
        assert time.process_time() - before < 0.25


async def test_a_busy_worker_is_not_idle() -> None:
    async with CpuPool(1, idle_timeout=0.1) as pool:
        pid = await pool.run(tasks.get_pid)
        for _ in range(20):
            await anyio.sleep(0.02)
            assert await pool.run(tasks.get_pid) == pid
        await until(lambda: not workers_of(pool))
        assert await pool.run(tasks.get_pid) != pid


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_workers": 2, "min_workers": 3}, "min_workers is 3, more than max_workers \\(2\\)"),
        ({"min_workers": -1}, "min_workers must be at least 0"),
        ({"idle_timeout": -1}, "idle_timeout must not be negative"),
        ({"max_memory_per_child": 0}, "max_memory_per_child must be at least 1"),
        ({"max_memory_per_child": 2, "hard_memory_per_child": 1}, "more than hard_memory_per_child"),
        ({"serializer": "json"}, "serializer must be one of 'pickle', 'cloudpickle', not 'json'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CpuPool(**settings)


def test_a_size_is_an_int() -> None:
    with pytest.raises(TypeError, match=r"max_memory_per_child must be an int, a number of bytes.*; write 200000000"):
        CpuPool(max_memory_per_child=2e8)  # type: ignore[arg-type]


# --- C8 ---


@pytest.mark.slow
def test_c8_threads_that_hold_locks_do_not_keep_workers_from_starting(run_script: RunScript) -> None:
    """200 starts while the program's threads log as fast as they can; warnings are errors in this script."""
    done = run_script("""
import logging, sys, threading
import cpupool, tasks

logging.basicConfig(stream=open("/dev/null", "w"))

def log():
    while not ended:
        logging.getLogger("server").warning("a request")

if __name__ == "__main__":
    ended = []
    threads = [threading.Thread(target=log) for _ in range(2)]
    for thread in threads:
        thread.start()
    with cpupool.CpuPool(2, max_tasks_per_child=1) as pool:
        pids = {pool.run_sync(tasks.log_something) for _ in range(200)}
    ended.append(True)
    print(len(pids))
""", timeout=110)  # fmt: skip
    assert done.stdout == "200\n"
    assert set(done.stderr.splitlines()) <= {"from the worker"}


# --- C12: no shared memory, no semaphores ---


def test_c12_it_works_without_semaphores(run_script: RunScript) -> None:
    done = run_script("""
import multiprocessing.synchronize, _multiprocessing

class NoSemLock:
    def __init__(self, *args):
        raise OSError(38, "Function not implemented")

_multiprocessing.SemLock = multiprocessing.synchronize._multiprocessing.SemLock = NoSemLock
import cpupool, tasks

if __name__ == "__main__":
    for method in ("forkserver", "spawn"):
        with cpupool.CpuPool(2, mp_context=method) as pool:
            print(pool.run_sync(tasks.add, 1, 1), len(pool.run_sync(bytes, 3_000_000)))
""")
    assert (done.stdout, done.stderr) == ("2 3000000\n2 3000000\n", "")


@pytest.mark.parametrize("form", ["tiny", "read-only"])
def test_c12_it_works_with_hardly_any_shared_memory(form: str, run_script: RunScript) -> None:
    """In a mount namespace of the script's own."""
    done = run_script(
        """
import ctypes, os, sys
import cpupool, large, tasks

def mount(source, target, kind, flags, data):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, target, kind, flags, data):
        raise OSError(ctypes.get_errno(), "mount")

if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_RDONLY = 0x20000, 0x4000, 1 << 18, 1
    try:
        if libc.unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
        if sys.argv[1] == "tiny":
            mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=1m")
        else:
            mount(b"tmpfs", b"/dev/shm", b"tmpfs", MS_RDONLY, b"size=1m")
    except OSError as error:
        sys.exit(f"not allowed: {error}")
    data = b"x" * 3_000_000
    for method in ("forkserver", "spawn"):
        pool = cpupool.CpuPool(2, mp_context=method, initializer=large.keep_all, initargs=(memoryview(data),))
        with pool, pool.share(data) as shared:
            print(pool.run_sync(tasks.add, 1, 1), len(pool.run_sync(bytes, 3_000_000)), pool.run_sync(len, data))
            print(pool.run_sync(large.get_and_describe, shared))
""",
        form,
    )
    if "not allowed" in done.stderr:
        pytest.skip("no mount namespace here")
    assert (done.stdout, done.stderr) == (2 * "2 3000000 3000000\n('memoryview', 3000000, False)\n", "")


# --- C14 ---


def test_c14_one_pool_serves_thirty_event_loops() -> None:
    async def use(number: int) -> list[int]:
        return list(await asyncio.gather(*(pool.run(tasks.add, number, each) for each in range(5))))

    with CpuPool(2) as pool:
        workers = workers_of(pool)
        for number in range(30):
            assert asyncio.run(use(number)) == [number + each for each in range(5)]
        assert workers_of(pool) == workers


# --- cloudpickle ---


async def test_cloudpickle_sends_what_has_no_name() -> None:
    factor = 3

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    class LocalError(Exception):
        pass

    def fail() -> None:
        raise LocalError("closure")

    def initialize(value: int) -> None:
        tasks.initialised.append(value * factor)

    async with CpuPool(1, serializer="cloudpickle", initializer=initialize, initargs=(4,)) as pool:
        assert await pool.run(lambda number: number * factor, 2) == 6
        result = await pool.run(lambda: Local(factor))
        assert type(result) is Local
        assert result.value == 3
        assert (await pool.run(lambda: lambda: factor))() == 3
        assert await pool.run(tasks.get_initialised) == [12]
        with pytest.raises(LocalError, match="closure"):
            await pool.run(fail)
        with pytest.raises(cpupool.TaskNotPicklable, match="argument 1"):
            await pool.run(tasks.return_it, (each for each in "abc"))


def test_cloudpickle_leaves_to_the_main_module_what_workers_import(run_script: RunScript) -> None:
    """Else each call would bring globals of its own along, and not see what the initializer has set."""
    done = run_script("""
import cpupool

words = set()

def load(text):
    words.update(text.split())

def is_known(word):
    return word in words

class Word:
    pass

if __name__ == "__main__":
    with cpupool.CpuPool(1, serializer="cloudpickle", initializer=load, initargs=("red green",)) as pool:
        print(pool.run_sync(is_known, "green"), pool.run_sync(lambda: is_known("red")))
        print(type(pool.run_sync(Word)) is Word)
""")
    assert (done.stdout, done.stderr) == ("True True\nTrue\n", "")


def test_cloudpickle_sends_an_initializer_s_own_exception() -> None:
    class LocalError(Exception):
        pass

    def fail() -> None:
        raise LocalError("no model")

    pool = CpuPool(1, serializer="cloudpickle", initializer=fail)
    with pytest.raises(InitializerFailed) as caught:
        pool.run_sync(tasks.add, 1)
    assert type(caught.value.__cause__) is LocalError
    pool.close()


def test_cloudpickle_sends_functions_of_a_program_without_a_file(run_script: RunScript) -> None:
    source = """
import cpupool
def double(number):
    return 2 * number
if __name__ == "__main__":
    with cpupool.CpuPool(1, serializer="cloudpickle") as pool:
        print(pool.run_sync(double, 21))
"""
    done = run_script(f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {source!r}]))")
    assert (done.stdout, done.stderr) == ("42\n", "")


async def test_cloudpickle_starts_workers_with_locks_too() -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    pool = CpuPool(1, mp_context=context, serializer="cloudpickle", initializer=tasks.initialise, initargs=(lock,))
    async with pool:
        assert await pool.run(tasks.acquire_initialised_lock) is True
    assert not lock.acquire(block=False)


def test_a_missing_serializer_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'cpupool\[cloudpickle\]'"):
        CpuPool(serializer="cloudpickle")


async def test_the_advice_for_a_lambda_names_cloudpickle() -> None:
    async with CpuPool(1) as pool:
        with pytest.raises(cpupool.TaskNotPicklable, match="serializer='cloudpickle'"):
            await pool.run(lambda: None)
