"""The next call is sent in the task that gives its worker back, before the one that waits for it wakes up."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import tasks
from conftest import RunLoop, alarms, wait_until_gone
from cpupool import CpuPool, PoolClosed, TaskTimeout, WorkerDied, _asyncio_waits
from cpupool._call import Call
from cpupool._lease import Lease
from cpupool._worker import Worker

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="calls are not handed over here")


class Begin:
    """Where a task says that it has begun."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "begun")
        os.mkfifo(self.path)
        self._end = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def wait_without_the_loop(self) -> bool:
        """Stand still until a task has begun; False if none has."""
        readable, _, _ = select.select([self._end], [], [], 10)
        return bool(readable) and bool(os.read(self._end, 100))

    def close(self) -> None:
        os.close(self._end)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    begin = Begin(tmp_path)
    yield begin
    begin.close()


@pytest.fixture
def gate(tmp_path: Path) -> tasks.Gate:
    return tasks.Gate(tmp_path / "gate")


async def let_wait(pool: CpuPool, gate: tasks.Gate, *calls: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Let these calls wait for the only worker, one after the other, and only then let it end its task."""
    holding = asyncio.ensure_future(pool.run(tasks.hold, *gate.arguments))
    await asyncio.to_thread(gate.wait_until_begun)
    started = [asyncio.ensure_future(call) for call in calls]
    while pool.statistics().pending < len(calls):
        await asyncio.sleep(0)
    await asyncio.to_thread(gate.open)
    await holding
    return started


def test_a_call_begins_before_its_caller_wakes_up(run: RunLoop, pool: CpuPool, gate: tasks.Gate, begin: Begin) -> None:
    async def main() -> None:
        (begun,) = await let_wait(pool, gate, pool.run(tasks.report_begin, begin.path, abs, -2))
        assert begin.wait_without_the_loop()
        assert await begun == 2

    run(main())


def test_a_chain_of_calls_keeps_order_values_and_errors(run: RunLoop, pool: CpuPool) -> None:
    async def call(number: int) -> int:
        try:
            return await pool.run(int, str(number) if number % 3 else "three")
        finally:
            ended.append(number)

    async def main() -> None:
        outcomes = await asyncio.gather(*map(call, range(100)), return_exceptions=True)
        for number, outcome in enumerate(outcomes):
            assert outcome == number if number % 3 else isinstance(outcome, ValueError)

    ended: list[int] = []
    run(main())
    assert ended == list(range(100))
    assert pool.statistics().succeeded + pool.statistics().failed == 100
    (worker,) = pool._supervisor.dispatcher.snapshot().idle
    assert not worker.in_call  # else whoever is cancelled when it has it would interrupt it


def test_a_call_that_is_cancelled_in_the_same_moment_does_not_begin(
    pool: CpuPool, gate: tasks.Gate, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"

    async def main() -> None:
        async def cancel_in_the_turn_of_the_answer() -> None:
            while not waited_for.done():  # it looks before the one who waits for that has its turn
                await asyncio.sleep(0)
            second.cancel()

        holding = asyncio.ensure_future(pool.run(tasks.hold, *gate.arguments))
        await asyncio.to_thread(gate.wait_until_begun)
        second = asyncio.ensure_future(pool.run(tasks.append_line, str(trace)))
        while pool.statistics().pending < 1:
            await asyncio.sleep(0)
        lookout = _asyncio_waits._find_lookout(asyncio.get_running_loop())
        assert lookout is not None
        ((waited_for, _),) = lookout._waiting.values()
        cancelling = asyncio.ensure_future(cancel_in_the_turn_of_the_answer())
        await asyncio.to_thread(gate.open)
        await holding
        await cancelling
        with pytest.raises(asyncio.CancelledError):
            await second
        assert await pool.run(abs, -2) == 2

    asyncio.run(main())
    assert not trace.exists()


def test_a_call_that_is_cancelled_after_it_was_sent_is_interrupted(
    run: RunLoop, pool: CpuPool, gate: tasks.Gate, begin: Begin
) -> None:
    async def main() -> None:
        pid = await pool.run(os.getpid)
        (second,) = await let_wait(pool, gate, pool.run(tasks.report_begin, begin.path, tasks.spin_forever))
        assert begin.wait_without_the_loop()
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert await pool.run(os.getpid) == pid

    run(main())


def test_its_timeout_counts_from_when_it_was_sent(run: RunLoop, pool: CpuPool, gate: tasks.Gate) -> None:
    async def main() -> None:
        pid = await pool.run(os.getpid)
        (second,) = await let_wait(pool, gate, pool.options(timeout=0.1).run(tasks.spin_forever))
        with pytest.raises(TaskTimeout):
            await second
        assert await pool.run(os.getpid) == pid

    run(main())


def test_the_death_of_its_worker_is_its_own(run: RunLoop, pool: CpuPool, gate: tasks.Gate) -> None:
    async def main() -> None:
        second, third = await let_wait(pool, gate, pool.run(os._exit, 3), pool.run(abs, -3))
        with pytest.raises(WorkerDied, match="3"):
            await second
        assert await third == 3

    run(main())


def test_a_worker_that_dies_before_the_call_is_sent_costs_nothing(
    run: RunLoop, pool: CpuPool, gate: tasks.Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    send_early = Worker.send_early

    def die_and_send(self: Worker, call: bytes, lease: Lease[Worker]) -> bool:
        if not killed:
            killed.append(self.process.pid)
            os.kill(self.process.pid, signal.SIGKILL)
            wait_until_gone(self.process.pid)
        return send_early(self, call, lease)

    async def main() -> None:
        (second,) = await let_wait(pool, gate, pool.run(os.getpid))
        assert await second not in killed

    monkeypatch.setattr(Worker, "send_early", die_and_send)
    run(main())
    assert len(killed) == pool.statistics().workers_died == 1


def test_the_error_of_a_death_shows_nothing_internal(run: RunLoop, pool: CpuPool, gate: tasks.Gate) -> None:
    async def main() -> None:
        (second,) = await let_wait(pool, gate, pool.run(os._exit, 3))
        for call in (second, pool.run(os._exit, 3)):
            with pytest.raises(WorkerDied) as caught:
                await call
            assert (caught.value.__context__, caught.value.__cause__) == (None, None)

    run(main())


def test_large_answers_arrive(run: RunLoop, pool: CpuPool) -> None:
    async def main() -> None:
        sizes = [10, 70_000, 255_000, 300_000, 3_000_000] * 3
        results = await asyncio.gather(*(pool.run(bytes, size) for size in sizes))
        assert [len(result) for result in results] == sizes

    run(main())


def test_only_the_loop_on_which_a_task_waits_is_here() -> None:
    async def main() -> None:
        ticket = _asyncio_waits.AsyncioWaits().ticket()
        assert ticket.is_here
        assert not await asyncio.to_thread(lambda: ticket.is_here)
        ticket.waiting.cancel()
        assert not ticket.is_here

    asyncio.run(main())


def test_a_call_that_is_cancelled_when_its_answer_was_taken_costs_nothing(
    pool: CpuPool, gate: tasks.Gate, begin: Begin, tmp_path: Path
) -> None:
    async def main() -> None:
        pid = await pool.run(os.getpid)
        report_pid = pool.run(tasks.report_begin, begin.path, os.getpid)
        second_gate = tasks.Gate(tmp_path / "second gate")
        hold = pool.run(tasks.hold, *second_gate.arguments)
        second, third = await let_wait(pool, gate, hold, report_pid)
        second_gate.wait_until_begun()
        lookout = _asyncio_waits._find_lookout(asyncio.get_running_loop())
        assert lookout is not None
        ((answered, _),) = lookout._waiting.values()
        second_gate.open()
        while not answered.done():  # this task looks before the other has its turn
            await asyncio.sleep(0)
        assert begin.wait_without_the_loop()  # the next one has begun
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert await third == pid
        assert (pool.statistics().cancelled, pool.statistics().succeeded) == (1, 3)

    asyncio.run(main())


def test_a_loop_that_is_closed_meanwhile_leaves_the_worker(pool: CpuPool, gate: tasks.Gate) -> None:
    async def main() -> None:
        await let_wait(pool, gate, pool.run(tasks.spin_forever))

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # that a task was destroyed
    loop.run_until_complete(main())
    loop.close()
    del loop
    gc.collect()
    assert pool.options(queue_timeout=20).run_sync(abs, -1) == 1
    assert pool.statistics().cancelled == 1


def test_calls_that_were_given_up_while_they_waited_hold_no_arguments(pool: CpuPool, gate: tasks.Gate) -> None:
    def count() -> int:
        gc.collect()
        return sum(type(each) is Call for each in gc.get_objects())

    async def give_up_waiting() -> None:
        waiting = asyncio.ensure_future(pool.run(len, bytes(100_000)))
        while pool.statistics().pending < 1:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])

    async def main() -> None:
        busy = asyncio.ensure_future(pool.run(tasks.hold, *gate.arguments))
        await asyncio.to_thread(gate.wait_until_begun)
        before = count()
        for _ in range(20):
            await give_up_waiting()
        assert count() <= before + 1
        await asyncio.to_thread(gate.open)
        await busy

    asyncio.run(main())


def test_a_pool_that_closes_ends_the_chain(run: RunLoop, gate: tasks.Gate) -> None:
    async def main() -> None:
        pool = CpuPool(1)
        await pool.run(abs, -1)
        calls = await let_wait(pool, gate, *(pool.run(time.sleep, 0.01) for _ in range(30)))
        await asyncio.wait(calls[:3])
        await pool.aclose(drain=0)
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(end) for end in ends} == {type(None), PoolClosed}

    run(main())


def test_a_channel_that_cannot_be_watched_concerns_no_other_call(
    run: RunLoop, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = _asyncio_waits._Lookout.watch

    def watch_or_not(self: Any, fd: int, future: Any, take: Any = None) -> None:
        if take is not None:
            raise OSError(errno.ENOSPC, "too many watches")
        watch(self, fd, future)

    monkeypatch.setattr(_asyncio_waits._Lookout, "watch", watch_or_not)

    async def main() -> None:
        assert await asyncio.gather(*(pool.run(abs, -number) for number in range(9))) == list(range(9))

    run(main())


def test_a_retry_is_sent_anew(run: RunLoop, pool: CpuPool, gate: tasks.Gate, tmp_path: Path) -> None:
    async def main() -> None:
        flaky = pool.options(retries=1).run(tasks.die_the_first_time_and_describe, str(tmp_path / "died"))
        (second,) = await let_wait(pool, gate, flaky)
        assert await second == 2

    run(main())


def test_what_does_not_fit_into_the_channel_is_sent_by_its_caller(run: RunLoop, pool: CpuPool) -> None:
    text = b"x" * 255_000

    async def main() -> None:
        calls = [pool.run(len, text) for _ in range(20)]
        assert await asyncio.gather(*calls) == [len(text)] * 20

    run(main())


def test_callers_in_other_threads_and_loops_get_their_turns(pool: CpuPool) -> None:
    done: list[int] = []

    def in_thread() -> None:
        done.extend(pool.run_sync(abs, -number) for number in range(100))

    async def in_loop() -> None:
        done.extend(await asyncio.gather(*(pool.run(abs, -number) for number in range(100))))

    threads = [
        threading.Thread(target=in_thread),
        *(threading.Thread(target=asyncio.run, args=(in_loop(),)) for _ in "ab"),
    ]
    for thread in threads:
        thread.start()
    asyncio.run(in_loop())
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(4 * list(range(100)))


def test_calls_that_follow_another_are_counted_and_timed(run: RunLoop, pool: CpuPool) -> None:
    async def main() -> None:
        await asyncio.gather(*(pool.run(tasks.busy, seconds) for _ in range(5)))

    seconds = 0.1
    run(main())
    stats = pool.statistics()
    assert stats.succeeded == 5
    assert stats.queue_wait.sum >= seconds * (1 + 2 + 3 + 4) * 0.9
    assert stats.run_time.sum >= seconds * 5 * 0.9
    assert stats.overhead.sum < seconds * 2.5  # none of it is queueing, or it would be ten times as long as a call


def test_a_signal_handler_that_raises_while_a_call_is_handed_over_loses_no_call(pool: CpuPool) -> None:
    raised = 0
    raised_at = 0.0  # one at a time: what a second one breaks off, which mends what the first has, is not looked after

    class Raised(Exception):
        pass

    def handle(_: int, frame: FrameType | None) -> None:
        nonlocal raised, raised_at
        package = os.path.dirname(_asyncio_waits.__file__)
        if frame is None or os.path.dirname(frame.f_code.co_filename) != package:
            return  # in a callback of the garbage collector, for one
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        if names & {"begin_early", "_finish_early"} and raised < 50 and time.monotonic() > raised_at + 0.005:
            raised += 1
            raised_at = time.monotonic()
            raise Raised

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.00007)
        deadline = time.monotonic() + 20
        while raised < 50 and time.monotonic() < deadline:
            calls = [pool.run(abs, -number) for number in range(50)]
            outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
            for number, outcome in enumerate(outcomes):
                assert outcome == number or isinstance(outcome, Raised)

    with alarms(handle):
        asyncio.run(main())
    assert raised == 50
    assert pool.run_sync(abs, -7) == 7
    assert pool.statistics().busy == pool.statistics().pending == 0
