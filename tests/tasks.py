"""What the tests run in workers.  Every function can be imported, and shakes hands through files where it must wait."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import ctypes
import enum
import http
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import cpupool
from cpupool import _vigil

initialised: list[object] = []
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id")
tenant: contextvars.ContextVar[object] = contextvars.ContextVar("tenant", default="nobody")


def add(a: int, b: int = 0, *, c: int = 0) -> int:
    return a + b + c


def get_pid() -> int:
    return os.getpid()


def initialise(*values: object) -> None:
    initialised.extend(values)


def get_initialised() -> list[object]:
    return list(initialised)


def hold(fifo_in: str, fifo_out: str) -> int:
    """Say "begun" with the pid through one FIFO, then wait for the other to open."""
    with open(fifo_in, "w") as file:
        file.write(f"{os.getpid()}\n")
    with open(fifo_out) as file:
        file.read()
    return os.getpid()


class Gate:
    """Lets a test know that a task has begun, and the task know that it may end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.begun, self.end = folder / "begun", folder / "end"
        os.mkfifo(self.begun)
        os.mkfifo(self.end)

    @property
    def arguments(self) -> tuple[str, str]:
        return str(self.begun), str(self.end)

    def wait_until_begun(self) -> int:
        """Return the task's pid."""
        with open(self.begun) as file:
            return int(file.readline())

    def open(self) -> None:
        self.end.open("w").close()


def die_by_signal(number: int) -> NoReturn:
    os.kill(os.getpid(), number)
    time.sleep(60)
    raise AssertionError("still alive")


def exit_at_once(status: int) -> NoReturn:
    os._exit(status)


def abort() -> NoReturn:
    os.abort()


def segfault() -> None:
    ctypes.string_at(0)


def close_all_descriptors() -> None:
    os.closerange(3, 4096)
    time.sleep(60)


def append_line_and_die(path: str) -> None:
    append_line(path)
    os.kill(os.getpid(), signal.SIGKILL)


def append_line(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")


def describe_signals() -> dict[str, Any]:
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return {
        "blocked": int(fields["SigBlk"], 16),
        "ignored": int(fields["SigIgn"], 16),
        "handlers": [
            number.name
            for number in signal.valid_signals()
            if isinstance(number, signal.Signals) and callable(signal.getsignal(number))
        ],
        "wakeup_fd": signal.set_wakeup_fd(-1),
        "group": os.getpgid(0),
    }


def read_pool_clock() -> float:
    return _vigil._open_pool_clock()()


def list_sockets() -> list[str]:
    """Return the inode names of the sockets that this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found.append(target)
    return found


def get_environment(names: tuple[str, ...]) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def loaded_modules() -> set[str]:
    return set(sys.modules)


def spin_forever() -> None:
    while True:
        pass


def hold_gil_forever() -> None:
    import collections
    import itertools

    collections.deque(itertools.repeat(0), maxlen=0)


def block_signals_and_sleep() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(3600)


def run_threads_and_processes() -> tuple[int, int]:
    """Use multiprocessing and threads in a task: workers are not daemonic."""
    import multiprocessing

    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(21 * 2))
    thread.start()
    thread.join()
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        mapped = pool.map(abs, [-1, -2])
        pool.close()
        pool.join()
    return results[0], sum(mapped)


def use_pool_in_worker() -> None:
    cpupool.CpuPool(1).run_sync(abs, -1)


def print_everywhere() -> None:
    import subprocess

    print("from print")
    print("from print to stderr", file=sys.stderr)
    libc = ctypes.CDLL(None)
    libc.puts(b"from puts")
    subprocess.run(["echo", "from echo"], check=True)
    print(f"stdin: {sys.stdin.read()!r} {os.read(0, 10)!r}")


def fork_grandchild(in_c: bool) -> int:
    """Start a grandchild that has inherited everything; one forked in C has run none of Python's hooks."""
    pid: int = ctypes.CDLL(None).fork() if in_c else os.fork()
    if pid == 0:
        while True:
            signal.pause()
    return pid


def fork_and_die(path: str, in_c: bool) -> None:
    Path(path).write_text(str(fork_grandchild(in_c)))
    os.kill(os.getpid(), signal.SIGKILL)


class RefusesToUnpickle:
    """Pickles well, with a large body, and raises when it is rebuilt."""

    def __init__(self, size: int = 0) -> None:
        self.body = b"x" * size

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise ValueError("refuses to be rebuilt")


def return_refusing() -> RefusesToUnpickle:
    return RefusesToUnpickle()


def return_lambda() -> object:
    return lambda: None


def return_lock() -> object:
    return threading.Lock()


def return_open_file() -> object:
    return open(os.devnull)


def return_generator() -> Iterator[int]:
    return iter(number for number in range(3))


async def coroutine_function(number: int) -> int:
    return number


async def async_generator_function(number: int) -> Any:
    yield number


class AsyncCallable:
    async def __call__(self, number: int) -> int:
        return number


# --- exceptions that default pickling breaks or garbles ---


class TwoArguments(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class FormatsItsArgument(Exception):
    """Rebuilt by calling it with `args`, its text would be formatted twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no such thing as {name}")


class NoArguments(Exception):
    def __init__(self) -> None:
        super().__init__("always the same")


class DecodeErrorOfOurs(UnicodeDecodeError):
    def __init__(self, position: int) -> None:
        super().__init__("utf-8", b"\xff" * 10, position, position + 1, "ours")


class HoldsALock(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class BrokenStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class ExitsOnPickling(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit(3)


def raise_local_class() -> NoReturn:
    class Local(Exception):
        pass

    raise Local("of a local class")


def raise_exception(kind: type[BaseException], *args: object, **kwargs: object) -> NoReturn:
    raise kind(*args, **kwargs)


def raise_group() -> NoReturn:
    raise ExceptionGroup("several", [ValueError("one"), TwoArguments(2, "two")])


def raise_from() -> NoReturn:
    try:
        raise KeyError("first")
    except KeyError as error:
        raise ValueError("second") from error


def raise_with_note() -> NoReturn:
    error = TwoArguments(1, "noted")
    error.add_note("a note")
    raise error


def acquire_initialised_lock() -> bool:
    lock: Any = initialised[0]
    acquired: bool = lock.acquire(block=False)
    return acquired


def write_pid_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(3600)


def die_the_first_time_and_describe(path: str) -> int:
    """Return which attempt it was."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os._exit(3)
    task = cpupool.current_task()
    assert task is not None
    return task.attempt


def die_the_first_time(path: str) -> None:
    append_line(path)
    if len(Path(path).read_text().split()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def leave_a_thread_that_never_ends() -> int:
    threading.Thread(target=time.sleep, args=(3600,)).start()
    return os.getpid()


def register_exit_handler(path: str) -> None:
    import atexit

    atexit.register(Path(path).write_text, "left")


def require_file(path: str) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(path)


class RaisesWhenRebuilt:
    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        return raise_exception, (self.kind,)


def return_what_raises_when_rebuilt(kind: type[BaseException]) -> RaisesWhenRebuilt:
    return RaisesWhenRebuilt(kind)


def die_soon() -> None:
    """Be killed at a moment that may be just before, or just after, the answer is read."""
    threading.Timer(0.0002, os.kill, (os.getpid(), signal.SIGKILL)).start()


def delete_stdout() -> int:
    del sys.stdout
    return os.getpid()


# --- tasks that are stopped ---


def match_catastrophically() -> None:
    import re

    re.match(r"(a+)+$", "a" * 40 + "b")


def sleep_long() -> None:
    time.sleep(3600)


def wait_in_asyncio() -> None:
    import asyncio

    asyncio.run(asyncio.sleep(3600))


def wait_for_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def run_program() -> None:
    import subprocess

    subprocess.run(["sleep", "3600"], check=True)


def swallow_interrupts() -> None:
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            continue


class SleepsWhenRebuilt:
    def __reduce__(self) -> Any:
        return time.sleep, (3600,)


def return_what_sleeps_when_pickled() -> Any:
    return SleepsWhenPickled()


class SleepsWhenPickled:
    def __reduce__(self) -> Any:
        time.sleep(3600)
        return int, ()


def report_begin(fifo: str, fn: Any, *args: Any) -> Any:
    """Write the pid into a FIFO, which waits for a reader, then run `fn`."""
    with open(fifo, "w") as file:
        file.write(f"{os.getpid()}\n")
    return fn(*args)


def report_begin_and_hold_gil(fifo: str) -> None:
    """Hold the GIL for ever, also if the interrupt comes just before."""
    try:
        report_begin(fifo, hold_gil_forever)
    except cpupool.TaskInterrupted:
        hold_gil_forever()


def say_so_and_write_in_finally(fifo: str, path: str) -> None:
    try:
        Path(fifo).write_text(str(os.getpid()))
        while True:
            pass
    finally:
        Path(path).write_text("finally")


def write_in_finally(path: str) -> None:
    try:
        time.sleep(3600)
    finally:
        Path(path).write_text("finally")


def return_when_interrupted(value: object) -> object:
    try:
        time.sleep(3600)
    except cpupool.TaskInterrupted:
        pass
    return value


def return_it(value: object) -> object:
    return value


def raise_when_interrupted() -> None:
    try:
        time.sleep(3600)
    except BaseException as error:
        raise TwoArguments(7, "stopped") from error


def die_when_interrupted() -> None:
    try:
        time.sleep(3600)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def busy(seconds: float) -> int:
    """Use the CPU for so long, counted in CPU time, so that it ends near its deadline."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return os.getpid()


def describe_task() -> tuple[int, str | None, int]:
    task = cpupool.current_task()
    assert task is not None
    return task.id, task.label, task.attempt


def die_unless_attempt(number: int, path: str) -> int:
    task = cpupool.current_task()
    assert task is not None
    append_line(path)
    if task.attempt < number:
        os.kill(os.getpid(), signal.SIGKILL)
    return task.attempt


def describe_task_in_thread() -> int:
    attempts: list[int] = []
    thread = threading.Thread(target=lambda: attempts.append(describe_task()[2]))
    thread.start()
    thread.join()
    return attempts[0]


def append_line_and_sleep(path: str) -> None:
    append_line(path)
    time.sleep(3600)


def append_line_and_raise(path: str, error: Exception) -> NoReturn:
    append_line(path)
    raise error


def append_text(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def fork_and_hold_gil(path: str) -> None:
    Path(path).write_text(str(fork_grandchild(False)))
    hold_gil_forever()


def hold_and_return_much(fifo_in: str, fifo_out: str, size: int) -> bytes:
    hold(fifo_in, fifo_out)
    return bytes(size)


def fail_or_spin(fail: bool) -> None:
    if fail:
        raise ValueError("asked to fail")
    spin_forever()


def spin_unless_first(number: int) -> int:
    if number:
        spin_forever()
    return number


def sleep_and_print(seconds: float, number: int) -> None:
    time.sleep(seconds)
    print(number)


class SpinsWhenDeleted:
    def __del__(self) -> None:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass


def delete_then_sleep() -> None:
    """Be in `__del__` at the moment of the interrupt, where Python ignores what is raised."""
    SpinsWhenDeleted()
    time.sleep(3600)


def leave_in_fork_then_hold_gil() -> None:
    """Fork a process that leaves the task by an exception, as if it were the worker."""
    if os.fork() == 0:
        os.close(2)
        raise SystemExit(0)
    os.wait()
    hold_gil_forever()


def die_while_closing(fifo: str, path: str) -> int:
    task = cpupool.current_task()
    assert task is not None
    if task.attempt == 1:
        report_begin(fifo, hold, fifo + ".in", path)
        os.kill(os.getpid(), signal.SIGKILL)
    return task.attempt


class Weak:
    """Can be pickled, and referred to weakly."""


def refuse(argument: object) -> None:
    raise ValueError("refused")


class CancelsWhenPickled:
    def __reduce__(self) -> Any:
        import asyncio

        raise asyncio.CancelledError


def import_and_spin(folder: str, name: str) -> None:
    sys.path.insert(0, folder)
    __import__(name)
    spin_forever()


def get_attribute(module: str, name: str) -> object:
    return getattr(sys.modules[module], name)


def meet(barrier_folder: str, number: int) -> None:
    """Return when as many processes have come here."""
    folder = Path(barrier_folder)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < number:
        time.sleep(0.001)


def meet_and_fail(folder: str, number: int) -> NoReturn:
    meet(folder, number)
    raise ValueError("no model")


class Flaky:
    """An initializer that notes each run, and fails while its flag is there."""

    def __init__(self, folder: Path) -> None:
        self.flag, self._runs = folder / "flag", folder / "runs"

    def __call__(self) -> None:
        append_line(str(self._runs))
        if self.flag.exists():
            raise FileNotFoundError("no model")

    def count_runs(self) -> int:
        return len(self._runs.read_text().split())


def wait_unless_first(count: str, fifo: str) -> None:
    """An initializer that holds up all workers but the first."""
    append_line(count)
    if len(Path(count).read_text().split()) > 1:
        open(fifo).close()


leaked: list[bytearray] = []


def leak(size: int) -> int:
    leaked.append(bytearray(size))
    return os.getpid()


def hold_memory(size: int) -> None:
    memory = bytearray(size)
    spin_forever()
    memory.clear()


def start_child_and_spin(path: str) -> None:
    child = subprocess.Popen(["sleep", "3600"])
    with open(path, "w") as file:
        file.write(str(child.pid))
    spin_forever()


def log_something() -> int:
    logging.getLogger("tests").warning("from the worker")
    return os.getpid()


class Finalizer:
    """Notes that it ran, with the process's id."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __call__(self) -> None:
        append_line(self.path)


def finalize_badly() -> NoReturn:
    raise ValueError("the finalizer failed")


def mixed(kind: int, number: int) -> int:
    """For the chaos test: short and long, quiet and talkative, in C and in Python, failing and not."""
    if kind == 0:
        return number
    if kind == 1:
        busy(0.01)
    elif kind == 2:
        time.sleep(number % 100 / 1000)
    elif kind == 3:
        return len(bytes(200_000)) and number
    elif kind == 4:
        raise LookupError(number)
    elif kind == 5:
        collections.deque(itertools.repeat(0, 200_000), maxlen=0)
    return number


def get_preloaded_pid() -> int:
    pid: int = sys.modules["preloaded"].pid
    return pid


def start_child(path: str) -> None:
    Path(path).write_text(str(subprocess.Popen(["sleep", "3600"]).pid))


def leave_daemon(path: str) -> None:
    has_left, leaves = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(leaves)
        time.sleep(3600)
        os._exit(0)
    os.close(leaves)
    os.read(has_left, 1)  # it comes back when the daemon has left the worker's process group
    os.close(has_left)
    Path(path).write_text(str(pid))


def sleep_half_a_second() -> None:
    time.sleep(0.5)


def swallow_interrupts_for(seconds: float, path: str) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(cpupool.TaskInterrupted):
            time.sleep(max(end - time.monotonic(), 0))
    Path(path).write_text(str(time.monotonic()))


def leak_and_spin(size: int, fifo: str) -> None:
    leak(size)
    report_begin(fifo, spin_forever)


def grow_when_interrupted(size: int, path: str) -> None:
    try:
        spin_forever()
    except cpupool.TaskInterrupted:
        Path(path).write_text(str(os.getpid()))
        leak(size)
        time.sleep(3600)


def initialize_slowly(count: str) -> None:
    """An initializer that takes the second worker longer."""
    append_line(count)
    if len(Path(count).read_text().split()) > 1:
        time.sleep(0.7)


def press_ctrl_c_after(fifo: str) -> None:
    """In a thread of a test's program: interrupt it when somebody has written there."""
    with open(fifo) as file:
        file.read()
    os.kill(os.getpid(), signal.SIGINT)


def use_a_pool() -> int:
    with cpupool.CpuPool(1) as pool:
        return pool.run_sync(add, 1)


def get_item(_: object) -> int | None:
    task = cpupool.current_task()
    return None if task is None else task.item


def nap_and_describe() -> str | None:
    time.sleep(0.01)
    task = cpupool.current_task()
    return None if task is None else task.label


def log(name: str, level: int, message: str, *args: object) -> int:
    logging.getLogger(name).log(level, message, *args)
    return os.getpid()


def log_exception(name: str) -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        logging.getLogger(name).exception("failed")


def log_with_extra(name: str) -> None:
    logging.getLogger(name).warning("more", extra={"request": 5, "lock": threading.Lock()})


def enabled(name: str, level: int) -> bool:
    return logging.getLogger(name).isEnabledFor(level)


def flood_log(name: str, count: int) -> None:
    logger = logging.getLogger(name)
    for number in range(count):
        logger.warning("number %d of a flood", number)


def log_and_die(name: str) -> NoReturn:
    logging.getLogger(name).warning("the end")
    os._exit(1)


def write_stderr(text: str) -> None:
    sys.stderr.write(text)


def write_stderr_and_die(text: str) -> NoReturn:
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(1)


def read_context(new: object = None) -> tuple[str | None, object]:
    """Return the context variables; then set one, which must not be seen by the next task."""
    found = request_id.get(None), tenant.get()
    if new is not None:
        tenant.set(new)
    return found


def read_context_and_fail() -> NoReturn:
    raise LookupError(str(read_context()))


def start_span(name: str) -> tuple[str, str]:
    """Return the trace id and the parent's span id, as a task sees them; and record a span, which goes nowhere."""
    from opentelemetry import trace

    current = trace.get_current_span().get_span_context()
    with trace.get_tracer("task").start_as_current_span(name):
        return format(current.trace_id, "032x"), format(current.span_id, "016x")


def count_in_prometheus() -> str | None:
    """Use a metric, as an application's own code does in a worker."""
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("images", "Images.", registry=registry).inc()
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR")


class Level(enum.IntEnum):
    WARNING = 30


class Kind(enum.StrEnum):
    OF_TEXT = "a kind"


def log_awkwardly(name: str) -> None:
    logger = logging.getLogger(name)
    logger.warning("many", extra={f"extra{number}": "x" * 10_000 for number in range(20)})
    logger.warning("\N{GRINNING FACE}" * 30_000, extra={"more": "\N{GRINNING FACE}" * 30_000}, stack_info=True)
    extra = {"extra": RefusesToUnpickle(), "code": http.HTTPStatus.NOT_FOUND, "kind": Kind.OF_TEXT}
    logger.log(Level.WARNING, "no way back", extra=extra)
    logger.warning({"event": "hello", "user": 1})


def log_many(name: str, count: int, size: int) -> None:
    for _ in range(count):
        logging.getLogger(name).warning("x" * size)


def fork_and_speak() -> None:
    pid = os.fork()
    if pid == 0:
        print("an orphan speaks", file=sys.stderr, flush=True)
        logging.getLogger("orphan").warning("and logs")
        os._exit(0)
    os.waitpid(pid, 0)
