"""Behaviours C1, C3, C7, C9, C10 and C15: how workers and their program begin and end, in programs of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from conftest import START_METHODS, RunScript, environment, is_gone, wait_until_gone

GUARD = "if __name__ == '__main__':"

# --- C1: the parent is killed ---

BUSY_PARENT = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

def begin(path, name):
    with open(path, "w") as fifo:
        fifo.write("begun")
    getattr(tasks, name)()

def use_pool():
    pool.run_sync(tasks.get_pid)
    if state != "idle":
        threading.Thread(target=pool.run_sync, args=(begin, fifo, state), daemon=True).start()

if __name__ == "__main__":
    method, state, fifo = sys.argv[1:]
    pool = cpupool.CpuPool(2, mp_context=method)
    starter = threading.Thread(target=use_pool)  # a thread that has ended when its workers are needed
    starter.start()
    starter.join()
    if state == "idle":
        open(fifo, "w").close()
    time.sleep(3600)
"""


@pytest.mark.parametrize("state", ["idle", "spin_forever", "hold_gil_forever", "block_signals_and_sleep"])
@pytest.mark.parametrize("method", START_METHODS)
def test_c1_nothing_outlives_a_killed_parent(method: str, state: str, tmp_path: Path) -> None:
    fifo, script = tmp_path / "fifo", tmp_path / "script.py"
    os.mkfifo(fifo)
    script.write_text(BUSY_PARENT)
    command = [sys.executable, str(script), method, state, str(fifo)]
    with subprocess.Popen(command, env=environment()) as parent:
        fifo.read_text()  # the handshake: the task runs
        descendants = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
        assert len(descendants) >= 1
        parent.kill()
        wait_until_gone(*descendants, seconds=1)


BEGINNING_PARENT = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

method, state, path = sys.argv[1:]
if __name__ != "__main__" and state == "importing":
    tasks.write_pid_and_sleep(path)
if __name__ == "__main__":
    settings = {"mp_context": method}
    if state == "initializing":
        settings |= {"initializer": tasks.write_pid_and_sleep, "initargs": (path,)}
    if state == "preloading":
        settings |= {"preload": ("hanging",)}
    pool = cpupool.CpuPool(2, **settings)
    pool.run_sync(tasks.start_child_and_spin, path)
"""


@pytest.mark.parametrize(
    ("method", "state"),
    [
        ("forkserver", "preloading"),
        *((method, "importing") for method in ("forkserver", "spawn")),
        *((method, state) for method in START_METHODS for state in ("initializing", "child of a task")),
    ],
)
def test_c1_nothing_outlives_a_parent_killed_at_the_beginning(method: str, state: str, tmp_path: Path) -> None:
    path, script = tmp_path / "pid", tmp_path / "script.py"
    script.write_text(BEGINNING_PARENT)
    (tmp_path / "hanging.py").write_text(f"import tasks; tasks.write_pid_and_sleep({str(path)!r})")
    command = [sys.executable, str(script), method, state, str(path)]
    with subprocess.Popen(command, env=environment()) as parent:
        deadline = time.monotonic() + 20
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        descendants = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
        assert int(path.read_text()) in descendants
        parent.kill()
        wait_until_gone(*descendants, seconds=1)


def _marked(mark: str) -> list[int]:
    """Return the processes that have inherited an environment with this mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        "mp_context='forkserver'",
        pytest.param("mp_context='spawn'", marks=pytest.mark.slow),
        pytest.param("preload=('json.tool',)", marks=pytest.mark.slow),
    ],
)
def test_c1_nothing_outlives_a_parent_killed_at_any_moment_of_its_start(settings: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import cpupool, tasks
if __name__ == "__main__":
    pool = cpupool.CpuPool(2, {settings})
    print("begins", flush=True)
    with pool:
        tasks.sleep_long()
""")
    for number in range(12):
        mark = f"CPUPOOL_TEST_MARK={os.getpid()}-{number}"
        command = [sys.executable, str(script)]
        with subprocess.Popen(
            command,
            env=environment(CPUPOOL_TEST_MARK=mark.partition("=")[2]),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # who loses its parent in the first instant may say so
        ) as parent:
            assert parent.stdout is not None
            parent.stdout.readline()
            time.sleep(number * 0.012)  # to spread the kills over the start
            parent.kill()
        deadline = time.monotonic() + 1
        while _marked(mark):
            assert time.monotonic() < deadline, f"left behind after {number * 12} ms: {_marked(mark)}"
            time.sleep(0.01)


# --- C3: the program just ends ---


@pytest.mark.parametrize("method", START_METHODS)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_c3_a_program_that_never_closes_its_pool_ends_by_itself(
    method: str, busy: bool, run_script: RunScript, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = run_script(
        """
import contextlib, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

def begin(path):
    open(path, "w").close()
    tasks.spin_forever()

def call(pool, path):
    with contextlib.suppress(cpupool.PoolClosed):
        pool.run_sync(begin, path)

if __name__ == "__main__":
    method, busy, fifo = sys.argv[1:]
    pool = cpupool.CpuPool(2, mp_context=method)
    assert pool.run_sync(tasks.add, 1) == 1
    if busy == "True":
        threading.Thread(target=call, args=(pool, fifo), daemon=True).start()
        open(fifo).close()
    print(time.monotonic())
""",
        method,
        str(busy),
        str(fifo),
    )
    ended = time.monotonic()
    assert done.returncode == 0
    assert done.stderr == ""
    assert ended - float(done.stdout) < 2


@pytest.mark.parametrize("method", START_METHODS)
def test_a_daemonic_process_may_have_a_pool(method: str, run_script: RunScript) -> None:
    """As the servers of hypercorn are; multiprocessing would forbid it."""
    done = run_script(
        """
import multiprocessing, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

def serve(method, connection):
    with cpupool.CpuPool(1, mp_context=method) as pool:
        connection.send(pool.run_sync(tasks.get_pid))
    connection.send(multiprocessing.current_process().daemon)

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(sys.argv[1], theirs), daemon=True)
    process.start()
    print(ours.recv() > 0, ours.recv())
    process.join()
""",
        method,
    )
    assert (done.stdout, done.stderr) == ("True True\n", "")


@pytest.mark.parametrize("method", START_METHODS)
def test_c3_what_workers_printed_and_registered_is_not_lost_at_the_end(method: str, run_script: RunScript) -> None:
    done = run_script(
        """
import atexit, ctypes, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool

def register():
    atexit.register(print, "atexit in the worker")
    print("no newline", end="")

if __name__ == "__main__":
    atexit.register(print, "atexit in the program, once")
    cpupool.configure_default(max_workers=1, mp_context=sys.argv[1])
    cpupool.run_sync(register)
""",
        method,
    )
    assert done.stdout == "no newlineatexit in the worker\natexit in the program, once\n"
    assert done.stderr == ""


# --- C7: fork ---


def test_c7_a_forked_child_has_workers_of_its_own(run_script: RunScript) -> None:
    done = run_script("""
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

if __name__ == "__main__":
    own = cpupool.CpuPool(1)
    before = {cpupool.run_sync(tasks.get_pid), own.run_sync(tasks.get_pid)}
    child = os.fork()
    if child == 0:
        mine = {cpupool.run_sync(tasks.get_pid), own.run_sync(tasks.get_pid)}
        assert not mine & before, "the parent's workers were used"
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert own.run_sync(tasks.get_pid) in before, "the child's end took the parent's worker along"
    own.close()
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_c7_a_worker_dies_with_its_parent_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    """The child has copies of the pool's descriptors; were they not closed, the worker would never see the end."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

if __name__ == "__main__":
    pool = cpupool.CpuPool(1)
    worker = pool.run_sync(tasks.get_pid)
    child = os.fork()
    if child == 0:
        time.sleep(3600)
    print(worker, child, flush=True)
    time.sleep(3600)
""")
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker, child = map(int, parent.stdout.readline().split())
        try:
            parent.kill()
            wait_until_gone(worker, seconds=1)
            assert not is_gone(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_c7_a_pool_made_at_import_serves_preforked_servers(run_script: RunScript) -> None:
    """As gunicorn does with `preload`: the application, and its pool, are imported before the servers are forked."""
    done = run_script("""
import multiprocessing, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

pool = cpupool.CpuPool(1)

def serve(queue):
    queue.put(pool.run_sync(tasks.get_pid))

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    servers = [context.Process(target=serve, args=(queue,)) for _ in range(2)]
    for server in servers:
        server.start()
    pids = {queue.get() for _ in servers}
    for server in servers:
        server.join()
        assert server.exitcode == 0
    assert len(pids) == 2, "each server has its own worker"
""")
    assert (done.returncode, done.stderr) == (0, "")


# --- C9: the main module ---

UNGUARDED = {
    "async with": """
import asyncio

async def main():
    async with cpupool.CpuPool(2, **how) as pool:
        await pool.run(abs, -1)

asyncio.run(main())
""",
    "run": """
import asyncio

async def main():
    await cpupool.run(abs, -1)

asyncio.run(main())
""",
    "run_sync": "cpupool.run_sync(abs, -1)",
}


@pytest.mark.parametrize("method", ["forkserver", "spawn", "preload"])
@pytest.mark.parametrize("form", UNGUARDED)
def test_c9_a_missing_guard_is_one_clear_error(form: str, method: str, run_script: RunScript) -> None:
    head = """
import sys, cpupool
print('main runs', file=sys.stderr)
how = {"preload": ("json",)} if sys.argv[1] == "preload" else {"mp_context": sys.argv[1]}
cpupool.configure_default(**how)
"""
    done = run_script(head + UNGUARDED[form], method, timeout=20)
    assert done.returncode == 1
    assert done.stderr.count(GUARD) == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.count("main runs") <= 3, "the program and two workers"
    assert "PoolBroken: the program's main module starts a pool when it is imported" in done.stderr


def test_c9_an_error_in_the_main_module_is_reported_and_ends(run_script: RunScript) -> None:
    done = run_script("""
import sys, cpupool
if __name__ != "__main__":
    raise ImportError("cannot be imported twice")
try:
    cpupool.run_sync(abs, -1)
except cpupool.PoolBroken as error:
    sys.exit(f"PoolBroken: {error}")
""")
    assert done.returncode == 1
    assert "exited with status 1 before it was ready" in done.stderr
    assert "ImportError: cannot be imported twice" in done.stderr


GUARDED = """
import cpupool

def double(number):
    return 2 * number

def main():
    print("main", cpupool.run_sync(abs, -21))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("form", ["file", "module", "package", "-c", "stdin"])
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_c9_guarded_programs_run_main_once(form: str, method: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(GUARDED)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "__main__.py").write_text(GUARDED)
    arguments, stdin = {
        "file": (["program.py"], ""),
        "module": (["-m", "program"], ""),
        "package": (["-m", "package"], ""),
        "-c": (["-c", GUARDED], ""),
        "stdin": (["-"], GUARDED),
    }[form]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("main 21\n", "", 0)


@pytest.mark.parametrize("form", ["-c", "stdin"])
def test_c9_a_function_without_a_module_is_refused_with_advice(form: str, run_script: RunScript) -> None:
    source = GUARDED.replace("abs, -21", "double, 21")
    arguments = ["-c", source] if form == "-c" else ["-"]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=source,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "TaskNotPicklable: __main__.double cannot be sent to a worker" in done.stderr
    assert "given with -c, has none" in done.stderr


APPLICATION = """
import os, signal
import cpupool, tasks
print("imported", flush=True)
pool = cpupool.CpuPool(1)

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await pool.warm_up()
            else:
                await pool.aclose()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = str(await pool.run(tasks.add, 40, 2)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
"""


@pytest.mark.parametrize("form", [["-m", "uvicorn"], ["uvicorn"]], ids=["python -m uvicorn", "uvicorn"])
def test_c9_under_uvicorn(form: list[str], tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(APPLICATION)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = [sys.executable, *form] if form[0] == "-m" else [str(Path(sys.executable).parent / "uvicorn")]
    command = [*program, "application:app", "--port", str(port), "--app-dir", str(tmp_path)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            lines = []
            for line in server.stderr:
                lines.append(line)
                if "running on" in line:
                    break
            assert httpx2.get(f"http://127.0.0.1:{port}/", timeout=20).text == "42", "".join(lines)
        finally:
            server.send_signal(signal.SIGINT)
            out, err = server.communicate(timeout=20)
    assert out.count("imported") == 1, "a worker does not import the application that it does not need"
    assert "Traceback" not in err


# --- C10: a worker's surroundings ---


@pytest.mark.parametrize("method", START_METHODS)
def test_c10_a_worker_starts_clean(method: str, run_script: RunScript) -> None:
    done = run_script(
        """
import json, os, signal, socket, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0))
    listener.set_inheritable(True)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    with cpupool.CpuPool(1, mp_context=sys.argv[1]) as pool:
        facts = pool.run_sync(tasks.describe_signals)
        facts["pid"] = pool.run_sync(tasks.get_pid)
        facts["listens"] = os.readlink(f"/proc/self/fd/{listener.fileno()}") in pool.run_sync(tasks.list_sockets)
    print(json.dumps(facts))
""",
        method,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    ignored = {number.name for number in signal.Signals if facts["ignored"] >> (number - 1) & 1}
    assert facts["blocked"] == 0
    assert facts["handlers"] == ["SIGURG"], "the interrupt's"
    assert ignored <= {"SIGINT", "SIGPIPE", "SIGXFSZ", "SIGTTIN", "SIGTTOU"}
    assert "SIGINT" in ignored
    assert facts["wakeup_fd"] == -1
    assert facts["group"] == facts["pid"]
    assert facts["listens"] is False


@pytest.mark.parametrize("method", START_METHODS)
def test_c10_a_killed_server_s_port_is_free_at_once(method: str, tmp_path: Path) -> None:
    """Listening sockets are not inherited: not even for the moment in which a worker follows its parent."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import os, socket, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks

if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0))
    listener.set_inheritable(True)
    pool = cpupool.CpuPool(1, mp_context=sys.argv[1])
    os.kill(pool.run_sync(tasks.get_pid), 19)  # a stopped worker: it would keep what it had inherited
    print(listener.getsockname()[1], flush=True)
    time.sleep(3600)
"""
    )
    command = [sys.executable, str(script), method]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        server.kill()
        server.wait()
        with socket.socket() as again:
            again.bind(("127.0.0.1", port))
            again.listen()


@pytest.mark.parametrize("method", START_METHODS)
def test_c10_numerical_libraries_get_the_worker_s_share(method: str, run_script: RunScript) -> None:
    """Set before the user's main module is imported, which is where they decide; what the user set is kept."""
    done = run_script(
        """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import cpupool, tasks
from cpupool._settling import THREAD_LIMIT_VARIABLES

AT_IMPORT = os.environ.get("OMP_NUM_THREADS")

def at_import():
    return AT_IMPORT

if __name__ == "__main__":
    os.environ["MKL_NUM_THREADS"] = "5"
    workers = max(cpupool.usable_cpus() // 2, 1)
    share = str(max(cpupool.usable_cpus() // workers, 1))
    with cpupool.CpuPool(workers, mp_context=sys.argv[1]) as pool:
        found = pool.run_sync(tasks.get_environment, THREAD_LIMIT_VARIABLES)
        assert found == {name: share for name in THREAD_LIMIT_VARIABLES} | {"MKL_NUM_THREADS": "5"}, found
        if sys.argv[1] != "fork":
            assert pool.run_sync(at_import) == share
    assert "OMP_NUM_THREADS" not in os.environ
""",
        method,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- C15: starting workers does not stall the loop ---

TICKER = """
import asyncio, statistics, sys, time
import cpupool

async def main(method, where):
    gaps = []
    pool = cpupool.CpuPool(1, mp_context=method)

    async def tick():
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.0002)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.02)
    usual = statistics.median(gaps)
    gaps.clear()
    if where == "on the loop":  # the control: what the supervisor's thread does, one at a time, done here
        starter = pool._supervisor._births._starter
        starter.prepare()
        if starter.server is not None:
            starter.start_server(starter.server)
            while not starter.server.is_ready:
                starter.server.read_answer()
        processes = [starter() for _ in range(4)]
    else:
        await pool.run(abs, -1)
    await asyncio.sleep(0.02)
    print(max(gaps) - usual)
    ticker.cancel()
    if where == "on the loop":
        for process in processes:
            process.kill()
            while process.poll() is None:
                time.sleep(0.001)
            process.close()
        starter.close()
    await pool.aclose()

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


def _stall(run_script: RunScript, method: str, where: str) -> float:
    done = run_script(TICKER, method, where)
    assert (done.returncode, done.stderr) == (0, "")
    return float(done.stdout)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_c15_the_first_call_does_not_stall_the_loop(method: str, run_script: RunScript) -> None:
    """Other programs stall a loop too, so it is tried again and again; the control is caught every time.

    It takes 1 to 2 ms on a quiet machine, and never more than the 5 ms that CPython lets another thread run on.
    """
    assert any(_stall(run_script, method, "in the thread") < 0.005 for _ in range(30))
    assert all(_stall(run_script, method, "on the loop") > 0.01 for _ in range(3))
