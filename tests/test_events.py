"""What happens to a pool: told to callbacks and to the log, without anybody being held up."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import anyio
import anyio.lowlevel
import pytest

import cpupool
import items
import tasks
from conftest import RunScript
from cpupool import CpuPool, Event
from cpupool._events import EventKind

pytestmark = pytest.mark.anyio


class Listener:
    """Collects events; `next` waits for the next one of a kind."""

    def __init__(self, pool: CpuPool) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.stop = pool.on_event(self.events.put)

    def next(self, *kinds: str) -> Event:
        while True:
            event = self.events.get(timeout=20)
            if event.kind in kinds:
                return event


async def wait_for(listener: Listener, *kinds: str) -> Event:
    return await anyio.to_thread.run_sync(listener.next, *kinds)


# --- events ---


async def test_the_life_of_a_worker(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cpupool")
    pool = CpuPool(1, max_tasks_per_child=2, name="images")
    listener = Listener(pool)
    async with pool:
        started, ready = await wait_for(listener, "worker_started"), await wait_for(listener, "worker_ready")
        assert started.pid == ready.pid == pool.statistics().workers[0].pid
        assert started.pool == "images"
        assert started.time == pytest.approx(time.time(), abs=60)
        assert 0 < (ready.seconds or 0) < 30
        await pool.run(tasks.add, 1)
        await pool.run(tasks.add, 1)
        recycled = await wait_for(listener, "worker_recycled")
        assert recycled.pid == started.pid
        with pytest.raises(cpupool.WorkerDied):
            await pool.options(label="thumbnail").run(tasks.segfault)
        died = await wait_for(listener, "worker_died")
        assert died.pid != started.pid
        assert died.task == "thumbnail"
        assert "tasks.py" in (died.stack or "")
        assert "was killed by SIGSEGV" in died.text or "SIGSEGV" in died.text
    levels = {record.levelname for record in caplog.records if record.getMessage().startswith("images: ")}
    assert levels == {"DEBUG", "INFO"}, "a caller was told of the death"
    assert str(died) in [record.getMessage() for record in caplog.records]


async def test_a_pool_that_closes_tells_of_no_death() -> None:
    pool = CpuPool(2)
    listener = Listener(pool)
    async with pool:
        await pool.run(tasks.add, 1)
    kinds = {listener.events.get_nowait().kind for _ in range(listener.events.qsize())}
    assert kinds == {"worker_started", "worker_ready"}


async def test_an_idle_worker_that_dies_is_told_of() -> None:
    async with CpuPool(1) as pool:
        listener = Listener(pool)
        pid = await pool.run(tasks.get_pid)
        os.kill(pid, signal.SIGKILL)
        died = await wait_for(listener, "worker_died")
        assert (died.pid, died.task, died.level) == (pid, None, logging.WARNING)
        assert "SIGKILL" in died.text


async def test_a_worker_that_the_pool_kills_is_told_of_as_such() -> None:
    async with CpuPool(1, grace=0.05) as pool:
        listener = Listener(pool)
        with pytest.raises(cpupool.TaskTimeout):
            await pool.options(timeout=0.05).run(tasks.hold_gil_forever)
        died = await wait_for(listener, "worker_died")
        assert died.task == "tasks.hold_gil_forever"
        assert "killed by the pool" in died.text


async def test_the_breaker(tmp_path: Path) -> None:
    needed = tmp_path / "needed"
    pool = CpuPool(1, initializer=tasks.require_file, initargs=(str(needed),))
    listener = Listener(pool)
    with anyio.fail_after(30):
        while listener.events.empty() or "breaker_opened" not in {each.kind for each in list(listener.events.queue)}:
            with pytest.raises(cpupool.CpuPoolError):
                await pool.run(tasks.add, 1)
            await anyio.sleep(0.02)
    opened = await wait_for(listener, "breaker_opened")
    assert "require_file" in opened.text
    needed.touch()
    with anyio.fail_after(30):
        while True:
            try:
                await pool.run(tasks.add, 1)
                break
            except cpupool.CpuPoolError:
                await anyio.sleep(0.02)
    await wait_for(listener, "breaker_closed")
    await pool.aclose()


async def test_a_slow_task_is_told_of_once_with_its_stack() -> None:
    async with CpuPool(1, slow_task=0.1) as pool:
        listener = Listener(pool)
        await pool.run(tasks.busy, 0.01)
        await pool.options(label="thumbnail").run(tasks.busy, 0.5)
        await pool.run(tasks.busy, 0.01)
        slow = await wait_for(listener, "task_slow")
        assert slow.task == "thumbnail"
        assert 0.1 <= (slow.seconds or 0) < 10
        assert "in busy" in (slow.stack or "")
        with pytest.raises(cpupool.WorkerDied):
            await pool.run(tasks.exit_at_once, 1)
        assert (await wait_for(listener, "worker_died", "task_slow")).kind == "worker_died"


@pytest.mark.slow
async def test_a_slow_task_in_a_map_and_one_that_holds_the_gil() -> None:
    async with CpuPool(1, slow_task=0.1) as pool:
        listener = Listener(pool)
        await pool.map(items.work, [0.01, 0.4, 0.01])
        slow = await wait_for(listener, "task_slow")
        assert slow.task == "items.work"
        assert "in work" in (slow.stack or "")
        with pytest.raises(cpupool.TaskTimeout):
            await pool.options(timeout=0.3).run(tasks.hold_gil_forever)
        assert "in hold_gil_forever" in ((await wait_for(listener, "task_slow")).stack or "")


@pytest.mark.slow
async def test_a_caller_that_is_late_makes_no_task_slow(caplog: pytest.LogCaptureFixture) -> None:
    async with CpuPool(1, slow_task=0.2) as pool:
        listener = Listener(pool)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.busy, 0.01)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            time.sleep(0.6)  # noqa: ASYNC251  # it is the event loop that is slow
        await pool.map(tasks.busy, [0.05] * 10, chunksize=10)
        await pool.map(tasks.busy, [0.01, 0.4, 0.01, 0.5], chunksize=4)
        slow = [await wait_for(listener, "task_slow"), await wait_for(listener, "task_slow")]
        assert all(0.2 <= (event.seconds or 0) < 10 for event in slow)
    assert "task_slow" not in [event.kind for event in list(listener.events.queue)]


async def test_callbacks_fail_and_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    async with CpuPool(1) as pool:

        def fail(event: Event) -> None:
            raise ArithmeticError(event.kind)

        pool.on_event(fail)
        first, second = Listener(pool), Listener(pool)
        second.stop()
        second.stop()
        os.kill(await pool.run(tasks.get_pid), signal.SIGKILL)
        await wait_for(first, "worker_ready")
        assert second.events.empty()
        with pytest.raises(TypeError, match="on_event takes a function"):
            pool.on_event(3)  # type: ignore[arg-type]
    assert "ArithmeticError" in caplog.text


async def test_a_callback_that_waits_holds_up_nothing_and_may_use_the_pool() -> None:
    async with CpuPool(1) as pool:
        found: queue.Queue[int] = queue.Queue()
        go_on = threading.Event()

        def wait(event: Event) -> None:
            if event.kind == "worker_died":
                go_on.wait(20)
                found.put(pool.run_sync(tasks.add, 1))

        pool.on_event(wait)
        os.kill(await pool.run(tasks.get_pid), signal.SIGKILL)
        with pytest.raises(cpupool.TaskTimeout):
            await pool.options(timeout=0.05).run(tasks.sleep_long)
        go_on.set()
        assert await anyio.to_thread.run_sync(found.get) == 1


async def test_on_event_survives_the_end_of_a_pool() -> None:
    pool = CpuPool(1)
    listener = Listener(pool)
    for _ in range(2):
        async with pool:
            await wait_for(listener, "worker_ready")


def test_each_kind_of_event_has_a_level() -> None:
    for kind in get_args(EventKind):
        assert Event(kind=kind, pool="images", text="").level >= logging.DEBUG


# --- stacks ---


async def test_d6_the_stacks_of_busy_workers(tmp_path: Path) -> None:
    gates = [tasks.Gate(tmp_path / str(number)) for number in range(2)]
    async with CpuPool(3) as pool:
        assert pool.dump_stacks() == {}
        async with anyio.create_task_group() as group:
            pids = []
            for gate in gates:
                group.start_soon(pool.run, tasks.hold, *gate.arguments)
                pids.append(await anyio.to_thread.run_sync(gate.wait_until_begun))
            stacks = await anyio.to_thread.run_sync(pool.dump_stacks)
            assert sorted(stacks) == sorted(pids)
            for stack in stacks.values():
                assert stack.startswith("Stack (most recent call first):")
                assert "in hold" in stack
                assert "_child.py" not in stack
            assert list(await anyio.to_thread.run_sync(pool.dump_stacks, pids[0])) == [pids[0]]
            assert pool.dump_stacks(1) == {}
            for gate in gates:
                gate.open()
        assert sum(worker.tasks_done for worker in pool.statistics().workers) == 2


@pytest.mark.parametrize("task", [tasks.hold_gil_forever, tasks.match_catastrophically])
async def test_the_stack_of_a_task_in_c_code(task: object) -> None:
    name = task.__name__  # type: ignore[attr-defined]
    async with CpuPool(1, grace=0.1) as pool:
        stacks: list[str] = []
        await pool.run(tasks.add, 1)
        async with anyio.create_task_group() as group:

            async def look() -> None:
                while f"in {name}" not in "".join(stacks):
                    stacks.extend((await anyio.to_thread.run_sync(pool.dump_stacks)).values())

            group.start_soon(look)
            with pytest.raises(cpupool.TaskTimeout) as caught:
                await pool.options(timeout=1.5).run(task)  # type: ignore[arg-type]
            group.cancel_scope.cancel()
        assert f"in {name}" in "".join(stacks)
        assert f"in {name}" in (caught.value.stack or ""), "what was asked before has taken nothing from it"


async def test_tasks_are_not_disturbed_by_being_asked() -> None:
    async with CpuPool(2) as pool, anyio.create_task_group() as group:
        is_over = False

        async def ask() -> None:
            while not is_over:
                await anyio.to_thread.run_sync(pool.dump_stacks)

        group.start_soon(ask)
        for _ in range(3):
            assert await pool.map(items.double, range(20_000)) == list(range(0, 40_000, 2))
            assert await pool.run(tasks.busy, 0.1) is not None
        is_over = True
    assert pool.statistics().workers_died == 0


async def test_a_task_that_is_c_code_itself() -> None:
    async with CpuPool(1, slow_task=0.1) as pool, anyio.create_task_group() as group:
        listener = Listener(pool)
        group.start_soon(pool.run, time.sleep, 0.5)
        slow = await wait_for(listener, "task_slow")
        assert "it is in time.sleep itself, which is C code" in (slow.stack or "")
        (stack,) = (await anyio.to_thread.run_sync(pool.dump_stacks)).values()
        assert "it is in time.sleep itself, which is C code" in stack


async def test_a_task_that_does_not_stop_is_there_too() -> None:
    async with CpuPool(1, grace=3) as pool:
        with anyio.move_on_after(0.2):
            await pool.run(tasks.swallow_interrupts)
        with anyio.fail_after(2):
            while (worker := pool.statistics().workers[0]).state != "stopping":
                await anyio.sleep(0.001)
        assert worker.task == "tasks.swallow_interrupts"
        assert list(await anyio.to_thread.run_sync(pool.dump_stacks)) == [worker.pid]


async def test_an_interrupted_map_ends_even_if_its_item_goes_on() -> None:
    async with CpuPool(1) as pool, anyio.create_task_group() as group:

        async def interrupt() -> None:
            with anyio.fail_after(20):
                while not pool.statistics().busy:
                    await anyio.sleep(0.001)
                pid = pool.statistics().workers[0].pid
                while "in swallow_interrupt" not in "".join(pool.dump_stacks().values()):
                    await anyio.sleep(0.001)
                assert await anyio.to_thread.run_sync(pool.interrupt, pid)

        group.start_soon(interrupt)
        with pytest.raises(cpupool.TaskStopped):
            await pool.map(items.swallow_interrupt, range(3), chunksize=3)


async def test_a_stopped_worker_does_not_answer() -> None:
    async with CpuPool(1, grace=0.1) as pool:
        pid = await pool.run(tasks.get_pid)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.sleep_long)
            with anyio.fail_after(10):
                while not pool.statistics().workers[0].task:
                    await anyio.sleep(0.001)
            os.kill(pid, signal.SIGSTOP)
            try:
                stacks = await anyio.to_thread.run_sync(pool.dump_stacks)
                assert "no answer" in stacks[pid]
            finally:
                os.kill(pid, signal.SIGCONT)
            group.cancel_scope.cancel()


async def test_stacks_of_a_pool_without_workers_that_run() -> None:
    pool = CpuPool(1)
    assert pool.dump_stacks() == {}
    async with pool:
        pass
    assert pool.dump_stacks() == {}


@pytest.mark.slow
async def test_stacks_while_workers_die_and_the_pool_closes() -> None:
    for _ in range(5):
        async with CpuPool(2) as pool:
            is_over = threading.Event()

            def ask(pool: CpuPool = pool, is_over: threading.Event = is_over) -> None:
                while not is_over.is_set():
                    pool.dump_stacks()

            thread = threading.Thread(target=ask)
            thread.start()
            await pool.map(items.exit_at_once, range(4), return_exceptions=True)
        is_over.set()
        await anyio.to_thread.run_sync(thread.join)


# --- logs ---


@contextlib.contextmanager
def handling(name: str, emit: Callable[[logging.LogRecord], object]) -> Iterator[None]:
    """Have a handler of that logger call `emit`."""
    handler = logging.Handler()
    handler.emit = emit  # type: ignore[assignment, method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(name).removeHandler(handler)


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO):
        yield caplog


def of(records: pytest.LogCaptureFixture, name: str) -> list[logging.LogRecord]:
    return [record for record in records.records if record.name == name]


async def test_d2_what_a_worker_logs_arrives(records: pytest.LogCaptureFixture, start_method: str) -> None:
    async with CpuPool(1, mp_context=start_method) as pool:
        pid = await pool.run(tasks.log, "app.sub", logging.WARNING, "disk %d", 7)
        await pool.run(tasks.log_exception, "app.failure")
        await pool.run(tasks.log, "app.debug", logging.DEBUG, "unwanted")
        await pool.run(tasks.log_with_extra, "app.extra")
    (record,) = of(records, "app.sub")
    assert (record.levelno, record.getMessage(), record.process) == (logging.WARNING, "disk 7", pid)
    assert record.filename == "tasks.py"
    (failure,) = of(records, "app.failure")
    assert "ZeroDivisionError" in (failure.exc_text or "")
    assert of(records, "app.debug") == []
    (extra,) = of(records, "app.extra")
    assert extra.__dict__["request"] == 5
    assert "lock" in extra.__dict__["lock"], "what cannot be pickled comes as text"


async def test_d2_levels_are_the_programs(records: pytest.LogCaptureFixture) -> None:
    records.handler.setLevel(logging.DEBUG)
    logging.getLogger("app.loud").setLevel(logging.DEBUG)
    logging.getLogger("app.quiet").setLevel(logging.ERROR)
    try:
        async with CpuPool(1) as pool:
            await pool.run(tasks.log, "app.loud", logging.DEBUG, "wanted")
            await pool.run(tasks.log, "app.quiet", logging.WARNING, "unwanted")
            assert await pool.run(tasks.enabled, "app.quiet", logging.WARNING) is False, "filtered in the worker"
            assert await pool.run(tasks.enabled, "app.loud", logging.DEBUG) is True
    finally:
        logging.getLogger("app.loud").setLevel(logging.NOTSET)
        logging.getLogger("app.quiet").setLevel(logging.NOTSET)
    assert len(of(records, "app.loud")) == 1
    assert of(records, "app.quiet") == []


async def test_d2_a_flood_is_bounded_and_counted(records: pytest.LogCaptureFixture) -> None:
    async with CpuPool(1) as pool:
        began = time.monotonic()
        await pool.run(tasks.flood_log, "app.flood", 30_000)
        assert time.monotonic() - began < 30
    arrived = len(of(records, "app.flood"))
    lost = [record.args[-1] for record in of(records, "cpupool") if "are lost" in record.msg]  # type: ignore[index]
    assert arrived + sum(lost) == 30_000  # type: ignore[arg-type]
    assert 1000 < arrived < 30_000


async def test_d2_a_handler_that_blocks_holds_up_no_timeout(records: pytest.LogCaptureFixture) -> None:
    go_on = threading.Event()

    with handling("app.block", lambda _: go_on.wait(20)):
        async with CpuPool(1) as pool:
            await pool.run(tasks.log, "app.block", logging.WARNING, "x")
            with pytest.raises(cpupool.TaskTimeout):
                await pool.options(timeout=0.1).run(tasks.sleep_long)
            go_on.set()
    assert len(of(records, "app.block")) == 1


async def test_d2_what_a_worker_logs_before_it_dies_arrives(records: pytest.LogCaptureFixture) -> None:
    async with CpuPool(1, initializer=tasks.log, initargs=("app.init", logging.WARNING, "ready")) as pool:
        with pytest.raises(cpupool.WorkerDied):
            await pool.run(tasks.log_and_die, "app.last")
    assert [record.getMessage() for record in of(records, "app.last")] == ["the end"]
    assert len(of(records, "app.init")) >= 1


async def test_d2_whatever_is_in_a_record_it_arrives(records: pytest.LogCaptureFixture) -> None:
    async with CpuPool(1) as pool:
        await pool.run(tasks.log_awkwardly, "app.awkward")
    found = of(records, "app.awkward")
    assert [record.getMessage()[:20] for record in found] == [
        "many",
        "\N{GRINNING FACE}" * 20,
        "no way back",
        "{'event': 'hello', '",
    ]
    assert "RefusesToUnpickle" in found[2].__dict__["extra"]
    assert (found[2].__dict__["code"], found[2].__dict__["kind"]) == (404, "a kind")
    assert found[3].msg == {"event": "hello", "user": 1}, "as structlog wants it"
    assert not of(records, "cpupool")


async def test_d2_a_factory_of_records_is_asked_once(records: pytest.LogCaptureFixture) -> None:
    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = logging.LogRecord(*args, **kwargs)
        record.short = record.name.split(".")[-1]
        return record

    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(make)
    try:
        async with CpuPool(1) as pool:
            await pool.run(tasks.log, "app.made", logging.WARNING, "here")
    finally:
        logging.setLogRecordFactory(before)
    (made,) = of(records, "app.made")
    assert made.__dict__["short"] in ("", "made"), "what the program's factory adds is there"


async def test_d2_what_waits_for_a_slow_handler_is_bounded(
    records: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpupool._log_keeper._MOST_WAITING", 100_000)
    go_on, read_on = threading.Event(), threading.Event()

    with handling("app.large", lambda _: go_on.wait(30)):
        async with CpuPool(1) as pool:
            supervisor = pool._supervisor
            await pool.run(tasks.add, 1)
            supervisor.post(read_on.wait, 30)  # meanwhile the socket fills
            await pool.run(tasks.log_many, "app.large", 400, 60_000)
            read_on.set()
            keeper = supervisor._log_keeper
            with anyio.fail_after(10):
                while keeper._delivered < 100_000:
                    await anyio.lowlevel.checkpoint()
            await anyio.to_thread.run_sync(pool.dump_stacks)  # after that turn of the supervisor
            assert 100_000 <= keeper._delivered < 100_000 + 65_536
            go_on.set()
    assert any("are lost" in record.msg for record in of(records, "cpupool"))


@pytest.mark.slow
async def test_d2_a_slow_handler_gets_all_before_the_pool_has_ended() -> None:
    got = []

    def take(record: logging.LogRecord) -> None:
        time.sleep(0.002)
        got.append(record)

    with handling("app.slow", take):
        async with CpuPool(1) as pool:
            await pool.run(tasks.flood_log, "app.slow", 1000)
    assert len(got) == 1000


async def test_d2_a_long_text_is_cut(records: pytest.LogCaptureFixture) -> None:
    async with CpuPool(1) as pool:
        await pool.run(tasks.log, "app.long", logging.WARNING, "x" * 1_000_000)
    (record,) = of(records, "app.long")
    assert 1000 < len(record.getMessage()) < 65_536
    assert record.getMessage().endswith("(1,000,000 characters)")


def test_d2_in_a_program_that_configures_its_logging(run_script: RunScript) -> None:
    """Each record is written once, by the program, though its workers import the same main module."""
    done = run_script("""
import logging, sys, cpupool, tasks
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s", stream=sys.stdout)

if __name__ == "__main__":
    for method in ("forkserver", "spawn", "fork"):
        with cpupool.CpuPool(1, mp_context=method) as pool:
            pool.run_sync(tasks.log, method, logging.INFO, "once")
    print("end")
""")
    assert (done.stdout, done.stderr) == ("forkserver once\nspawn once\nfork once\nend\n", "")


def test_d2_the_files_of_handlers_that_are_not_used_stay_open(run_script: RunScript) -> None:
    """Else there would be warnings in each worker."""
    done = run_script("""
import logging, cpupool, gc
logging.basicConfig(stream=open("/dev/null", "w"))

if __name__ == "__main__":
    with cpupool.CpuPool(1) as pool:
        pool.run_sync(gc.collect)
""")
    assert done.stderr == ""


def test_d2_in_a_program_that_does_not_configure_its_logging(run_script: RunScript) -> None:
    done = run_script("""
import logging, cpupool, tasks

if __name__ == "__main__":
    with cpupool.CpuPool(1) as pool:
        pool.run_sync(tasks.log, "app", logging.WARNING, "a warning")
        pool.run_sync(tasks.log, "app", logging.INFO, "unwanted")
""")
    assert (done.stdout, done.stderr) == ("", "a warning\n")


# --- last words ---


async def test_the_last_words_of_a_worker_are_in_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    async with CpuPool(1) as pool:
        await pool.run(tasks.write_stderr, "before\n")
        with pytest.raises(cpupool.WorkerDied) as caught:
            await pool.run(tasks.write_stderr_and_die, "".join(f"line {number}\n" for number in range(30)))
        assert caught.value.stderr == "\n".join(f"line {number}" for number in range(10, 30))
        assert "line 29" in str(caught.value)
        with pytest.raises(cpupool.WorkerDied) as caught:
            await pool.run(tasks.write_stderr_and_die, "x" * 100_000 + "\nthe end")
        assert caught.value.stderr == "the end"
        with pytest.raises(cpupool.WorkerDied) as caught:
            await pool.run(tasks.exit_at_once, 1)
        assert caught.value.stderr is None
    async with CpuPool(1, initializer=tasks.write_stderr, initargs=("of the initializer\n",)) as pool:
        with pytest.raises(cpupool.WorkerDied) as caught:
            await pool.run(tasks.exit_at_once, 1)
        assert caught.value.stderr is None, "it is none of the task's words"
        await pool.run(tasks.fork_and_speak)
        with pytest.raises(cpupool.WorkerDied) as caught:
            await pool.run(tasks.exit_at_once, 1)
        assert caught.value.stderr is None, "nor are those of a process that another one has forked"
    assert "before\nline 0\nline 1\n" in capfd.readouterr().err, "it stays what it was"
