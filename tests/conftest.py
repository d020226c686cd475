"""What every test gets: the event loops to run on, and a check that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis  # noqa: F401  # it looks for what it needs among what can be collected: see _little_to_collect
import psutil
import pytest
import uvloop

from cpupool import CpuPool

TESTS = Path(__file__).parent

# Where programs of tests put temporary files: multiprocessing's fork server leaves a folder when its program is killed.
TEMPORARY = tempfile.TemporaryDirectory(prefix="cpupool-")
START_METHODS = ["forkserver", "spawn", "fork"]

# CPython warns when a process with threads forks.  The pool's own thread makes every user of "fork" one; they asked.
IGNORE_FORK_WARNING = pytest.mark.filterwarnings("ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning")


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return request.param


# Where the way of a call differs between event loops.  Elsewhere uvloop, which waits as asyncio does, comes with the
# slow tests; and where it is about the workers, trio too.
EACH_LOOP_AT_ONCE = {"test_calls", "test_adversity", "test_offload"}
ONE_LOOP_AT_ONCE = {
    *("test_context", "test_events", "test_large_data", "test_lives", "test_one_bad_call", "test_prometheus"),
    "test_statistics",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        backend: tuple[str, dict[str, Any]] = getattr(callspec, "params", {}).get("anyio_backend") or ("", {})
        library, options = backend
        if options.get("use_uvloop") and item.path.stem not in EACH_LOOP_AT_ONCE:
            item.add_marker(pytest.mark.slow)
        if library == "trio" and item.path.stem in ONE_LOOP_AT_ONCE:
            item.add_marker(pytest.mark.slow)


RunLoop = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[pytest.param(asyncio.run, id="asyncio"), pytest.param(uvloop.run, id="uvloop")])
def run(request: pytest.FixtureRequest) -> RunLoop:
    """Run a coroutine as a program does, on each implementation of asyncio's event loop."""
    run: RunLoop = request.param
    return run


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    """A pool with one worker."""
    with CpuPool(1) as pool:
        yield pool


@contextlib.contextmanager
def alarms(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Call this signal handler whenever a timer fires, which the caller sets, and stops here."""
    before = signal.signal(signal.SIGALRM, handle)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=[pytest.param(method, marks=IGNORE_FORK_WARNING) for method in START_METHODS])
def start_method(request: pytest.FixtureRequest) -> str:
    method: str = request.param
    return method


@pytest.fixture(scope="session", autouse=True)
def _helpers_of_others() -> None:
    """Start what multiprocessing and libuv keep for the life of the program: no test is to blame for it."""
    uvloop.new_event_loop().close()
    forkserver.ensure_running()
    process = multiprocessing.get_context("forkserver").Process(target=int)
    process.start()
    process.join()
    process.close()


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect(_helpers_of_others: None) -> None:
    """Spare the garbage collection after each test what was there before: it would take as long as most tests do."""
    gc.collect()
    gc.freeze()


def _census() -> dict[str, set[str]]:
    """Return everything a test might leave behind, by kind."""
    children = psutil.Process().children(recursive=True)
    descriptors = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptors.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return {
        "process": {f"{child.pid} {_command(child)}" for child in children},
        # trio keeps the threads of its cache for some seconds, for the next who needs one
        "thread": {f"{each.name} {each.ident}" for each in threading.enumerate() if not each.name.startswith("Trio")},
        "descriptor": descriptors,
        "shared memory": set(os.listdir("/dev/shm")),
    }


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.status()
    except psutil.NoSuchProcess:
        return "gone"


@pytest.fixture(autouse=True)
def _nothing_left_behind(_helpers_of_others: None) -> Iterator[None]:
    before = _census()
    yield
    deadline = time.monotonic() + 5
    while True:
        gc.collect()
        after = _census()
        left = {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind]}
        if not left:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {left}")
        time.sleep(0.01)  # the end of a process cannot be waited for from here


def is_gone(pid: int) -> bool:
    """Return True if the process has ended; it may not have been reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(*pids: int, seconds: float = 10) -> None:
    """Wait for processes that are not our children, and so cannot be waited for."""
    deadline = time.monotonic() + seconds
    while not all(is_gone(pid) for pid in pids):
        if time.monotonic() > deadline:
            pytest.fail(f"still alive after {seconds} s: {[pid for pid in pids if not is_gone(pid)]}")
        time.sleep(0.001)


def let_ctrl_c_through() -> None:
    """Programs that a shell runs in the background ignore Ctrl-C, and so would all that these tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


RunScript = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """Run Python source as a program of its own: `run_script(source, *arguments)`."""

    def run(
        source: str, *arguments: str, timeout: float = 60, stdin: str | None = ""
    ) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "script.py"
        path.write_text(source)
        command = [sys.executable, "-W", "error", str(path), *arguments]
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            env=environment(),
            check=False,
            preexec_fn=let_ctrl_c_through,
        )

    return run


def environment(**changes: str) -> dict[str, str]:
    """Return the environment for a program of a test: this one, with the test helpers importable.

    Output is buffered and bytecode kept, as users have it, whatever is set for the tests themselves.
    """
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    unusual = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
    environ = {name: value for name, value in os.environ.items() if name not in unusual}
    return {**environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": TEMPORARY.name, **changes}
