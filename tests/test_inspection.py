"""Looking into a running program from outside: `python -m cpupool stacks PID` and `doctor PID`."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cpupool
import tasks
from conftest import environment
from cpupool import CpuPool, _door

PROGRAM = """
import sys, cpupool, tasks

if __name__ == "__main__":
    with cpupool.CpuPool(2, name="images") as pool:
        pool.run_sync(tasks.add, 1)
        pool.options(label="thumbnail").run_sync(tasks.hold, *sys.argv[1:])
"""


def command_line(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cpupool", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(**env),
        timeout=60,
        check=False,
    )


@pytest.fixture
def runtime(tmp_path: Path) -> str:
    (tmp_path / "runtime").mkdir()
    return str(tmp_path / "runtime")


@pytest.fixture
def program(tmp_path: Path, runtime: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A program with a busy worker; gives its process, and the worker's process id."""
    gate = tasks.Gate(tmp_path / "gate")
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    env = environment(CPUPOOL_INSPECT="1", XDG_RUNTIME_DIR=runtime)
    with subprocess.Popen([sys.executable, str(script), *gate.arguments], env=env) as process:
        try:
            yield process, gate.wait_until_begun()
        finally:
            if process.poll() is None:
                gate.open()
                assert process.wait(20) == 0


def test_the_stacks_of_a_running_program(program: tuple[subprocess.Popen[bytes], int], runtime: str) -> None:
    process, worker = program
    done = command_line("stacks", process.pid, XDG_RUNTIME_DIR=runtime)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"images: worker {worker} runs thumbnail, for ")
    assert "in hold" in done.stdout


def test_the_doctor_looks_at_a_running_program(program: tuple[subprocess.Popen[bytes], int], runtime: str) -> None:
    process, worker = program
    done = command_line("doctor", process.pid, XDG_RUNTIME_DIR=runtime)
    assert (done.returncode, done.stderr) == (0, "")
    found = dict(line.split(maxsplit=1) for line in done.stdout.replace("worker ", "worker-").splitlines())
    assert found["pool"] == "images"
    assert found["workers"] == "1 busy, 1 idle, 0 starting; 2 at most"
    assert found["tasks"].startswith("2 submitted, 1 succeeded, 0 failed")
    assert found[f"worker-{worker}"].startswith("busy with thumbnail for ")


def test_the_doctor_agrees_with_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPUPOOL_MAX_WORKERS", raising=False)
    done = command_line("doctor")
    (workers,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("workers ")]
    assert int(workers) == CpuPool().statistics().max_workers


def test_only_this_user_can_come_in(program: tuple[subprocess.Popen[bytes], int], runtime: str) -> None:
    process, _ = program
    folder = Path(runtime) / "cpupool"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == [f"{process.pid}.socket"], "and no worker has one"


def test_a_killed_program_leaves_a_socket_that_harms_nobody(
    program: tuple[subprocess.Popen[bytes], int], runtime: str
) -> None:
    process, _ = program
    process.kill()
    process.wait()
    done = command_line("stacks", process.pid, XDG_RUNTIME_DIR=runtime)
    assert (done.returncode, done.stderr) == (
        1,
        f"cpupool: there is no program with process id {process.pid} any more\n",
    )


def test_a_program_that_has_not_opted_in(runtime: str) -> None:
    done = command_line("stacks", os.getpid(), XDG_RUNTIME_DIR=runtime)
    assert done.returncode == 1
    assert "start it with CPUPOOL_INSPECT=1, or let it call cpupool.allow_inspection()" in done.stderr
    assert "there is no program with process id 4194305" in command_line("stacks", 4_194_305).stderr
    assert command_line("stacks").returncode == 2


@pytest.fixture
def door(runtime: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    yield Path(runtime) / "cpupool"
    _door._close()


def test_a_program_opts_in_by_a_call(door: Path) -> None:
    cpupool.allow_inspection()
    cpupool.allow_inspection()
    assert command_line("stacks", os.getpid()).stdout == f"no pool runs in process {os.getpid()}\n"
    with CpuPool(1, name="images"):
        assert command_line("stacks", os.getpid()).stdout == "no worker is busy (images)\n"
    _door._close()
    assert list(door.iterdir()) == []


def test_a_folder_that_others_may_enter_is_refused(door: Path) -> None:
    door.mkdir(mode=0o755)
    door.chmod(0o755)
    with pytest.raises(PermissionError, match="nobody else may enter"):
        cpupool.allow_inspection()
    door.rmdir()
    door.symlink_to("/tmp")
    with pytest.raises(PermissionError):
        cpupool.allow_inspection()
    assert "nobody else may enter" in command_line("stacks", os.getpid()).stderr
    door.unlink()


def test_nonsense_and_silence_keep_nobody_from_asking(door: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_door, "_LONGEST_QUESTION", 0.2)
    cpupool.allow_inspection()
    path = str(door / f"{os.getpid()}.socket")
    for nonsense in (b"", b"\n", b"nonsense\n", b"[1]\n", b"x" * 100_000):
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(path)
            try:
                channel.sendall(nonsense)
                channel.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it has hung up
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(path)
        assert command_line("doctor", os.getpid()).returncode == 0


def test_what_the_environment_asks_for_never_stops_a_program(runtime: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import cpupool\nif __name__ == '__main__':\n    print(cpupool.run_sync(abs, -1))\n")
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "cpupool").mkdir(mode=0o755)
    for folder in (str(tmp_path / "missing"), str(tmp_path / "open")):
        env = environment(CPUPOOL_INSPECT="1", XDG_RUNTIME_DIR=folder)
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=False)
        assert done.stdout == "1\n"
        assert ("cannot be looked into" in done.stderr) is (folder != str(tmp_path / "missing"))
    assert runtime


def test_who_asks_need_not_have_the_program_s_environment(program: tuple[subprocess.Popen[bytes], int]) -> None:
    """A service has no XDG_RUNTIME_DIR, a login shell has."""
    process, _ = program
    env = environment(CPUPOOL_INSPECT="1")
    env.pop("XDG_RUNTIME_DIR", None)
    code = "import cpupool, sys; cpupool.run_sync(abs, 1); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        done = command_line("doctor", other.pid, XDG_RUNTIME_DIR="/nonexistent")
        assert (done.returncode, done.stderr) == (0, "")
        other.communicate()
    assert process.poll() is None


def test_a_forked_child_leaves_the_door_to_its_parent(door: Path) -> None:
    cpupool.allow_inspection()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if _door._door is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert command_line("stacks", os.getpid()).returncode == 0
    assert [path.name for path in door.iterdir()] == [f"{os.getpid()}.socket"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
