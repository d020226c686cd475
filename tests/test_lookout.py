"""How event loops of asyncio watch the channels of workers."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import select
import signal
import threading
import time
import weakref
from types import FrameType

import pytest

import tasks
from conftest import RunLoop, RunScript, alarms
from cpupool import CpuPool, _asyncio_waits

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="loops watch channels themselves here")

variable: contextvars.ContextVar[object] = contextvars.ContextVar("variable")


def epolls() -> int:
    found = 0
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found += os.readlink(f"/proc/self/fd/{each}") == "anon_inode:[eventpoll]"
    return found


class Raised(Exception):
    """What a signal handler of the program raises."""


def test_a_signal_handler_that_raises_loses_no_event(pool: CpuPool) -> None:
    raised = 0

    def handle(_: int, frame: FrameType | None) -> None:
        nonlocal raised
        if frame is not None and frame.f_code.co_name in ("_tell", "_resolve") and raised < 3:
            raised += 1
            raise Raised

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.00007)
        deadline = time.monotonic() + 20
        while raised < 3 and time.monotonic() < deadline:
            assert await asyncio.wait_for(pool.run(abs, -1), 10) == 1

    with alarms(handle):
        asyncio.run(main())


def test_it_does_not_keep_the_context_of_the_first_call(pool: CpuPool, run: RunLoop) -> None:
    class Request:
        pass

    async def handle() -> weakref.ref[Request]:
        request = Request()
        variable.set(request)
        await pool.run(abs, -1)
        return weakref.ref(request)

    async def main() -> None:
        found = [await asyncio.create_task(handle()) for _ in range(2)]
        await pool.run(abs, -1)
        gc.collect()
        assert [each() for each in found] == [None, None]

    run(main())


def test_loops_that_have_ended_leave_nothing(pool: CpuPool, run: RunLoop) -> None:
    async def call() -> None:
        assert await pool.run(abs, -1) == 1

    run(call())
    gc.collect()
    before = epolls()
    for _ in range(3):
        run(call())
    gc.collect()
    assert epolls() == before


def test_a_pool_that_closes_leaves_nothing_in_a_loop_that_goes_on(pool: CpuPool, run: RunLoop) -> None:
    async def main() -> None:
        before = epolls()
        async with CpuPool(1) as one:
            await one.run(abs, -1)
            given_up = one.run(tasks.sleep_long)
            given_up.send(None)
            given_up.close()
        assert epolls() == before
        assert await pool.run(abs, -1) == 1  # it is opened anew

    run(main())


def test_a_wait_of_another_pool_goes_on(pool: CpuPool, run: RunLoop) -> None:
    async def main() -> None:
        async with CpuPool(1) as one:
            await one.run(abs, -1)
            running = asyncio.create_task(pool.run(time.sleep, 0.2))
            await asyncio.sleep(0)
        await running

    run(main())


def test_without_a_descriptor_or_epoll_the_loop_watches_itself(
    pool: CpuPool, monkeypatch: pytest.MonkeyPatch, run: RunLoop
) -> None:
    def fail() -> None:
        raise OSError("too many open files")

    async def main() -> None:
        monkeypatch.setattr(_asyncio_waits, "_Lookout", lambda _: fail())
        assert await pool.run(abs, -1) == 1
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.run(tasks.sleep_long), 0.1)
        assert await pool.map(abs, range(-100, 0)) == list(range(100, 0, -1))

    run(main())


def test_a_loop_that_a_forked_child_goes_on_with(run_script: RunScript) -> None:
    """First the child, then the parent again; at the same time they cannot: what the kernel holds of a loop is one."""
    done = run_script("""
import asyncio, os
from cpupool import CpuPool

async def call(pool):
    return await pool.run(abs, -1)

async def call_often():
    async with CpuPool(1) as pool:
        for _ in range(100):
            await asyncio.wait_for(pool.run(abs, -1), 10)

if __name__ == "__main__":
    loop = asyncio.new_event_loop()
    pool = CpuPool(1)
    loop.run_until_complete(call(pool))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            loop.run_until_complete(call_often())
            code = 0
        finally:
            os._exit(code)
    print(os.waitpid(child, 0)[1], loop.run_until_complete(call(pool)))
    loop.close()
    pool.close()
""")
    assert (done.stdout, done.stderr) == ("0 1\n", "")


def test_loops_in_threads_share_a_worker(pool: CpuPool, run: RunLoop) -> None:
    """They take turns, some calls are given up, and none waits in vain."""
    answers: list[int] = []

    async def call_often(first: int) -> None:
        for number in range(first, first + 150):
            if number % 10 == 0:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(pool.run(tasks.sleep_long), 0.002)
            answers.append(await asyncio.wait_for(pool.run(abs, -number), 20))

    threads = [threading.Thread(target=lambda first=first: run(call_often(first))) for first in (1000, 2000, 3000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [first + number for first in (1000, 2000, 3000) for number in range(150)]


def test_a_call_made_while_another_error_is_handled_gives_its_room_back() -> None:
    async def main() -> None:
        async with CpuPool(1, max_inflight_bytes=1000, max_pending=0) as pool:
            try:
                raise asyncio.CancelledError
            except asyncio.CancelledError:
                for _ in range(100):
                    assert await pool.run(len, b"x" * 600) == 600

    asyncio.run(main())


def test_a_worker_that_waits_has_no_stack_of_a_task() -> None:
    async def main() -> None:
        async with CpuPool(1) as pool:
            await pool.run(abs, -1)
            running = asyncio.create_task(pool.run(abs, -1))
            await asyncio.sleep(0)
            (lease,) = pool._supervisor.dispatcher.leases()
            (worker,) = pool._supervisor._crew.workers
            while not worker.process.has_finished(lease.task_id):
                pass  # the loop does not get to the answer
            assert pool.dump_stacks() == {}
            assert await running == 1

    asyncio.run(main())
