"""The executor face: `concurrent.futures` and `run_in_executor` over the pool, and what those could not do before."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import tasks
from conftest import RunScript, is_gone
from cpupool import CpuPool, InitializerFailed, PoolExecutor, TaskNotPicklable, TaskTimeout, WorkerDied


@pytest.fixture
def executor() -> Iterator[PoolExecutor]:
    with PoolExecutor(2, grace=60) as executor:
        yield executor


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def workers_of(executor: PoolExecutor) -> set[int]:
    pool: Any = executor._driver.pool
    return {worker.process.pid for worker in pool._supervisor._crew.workers}


def test_a_future_goes_from_pending_to_running_to_done(executor: PoolExecutor, tmp_path: Path) -> None:
    gates = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        gates.append(tasks.Gate(tmp_path / name))
    running = [executor.submit(tasks.hold, *gate.arguments) for gate in gates]
    for gate in gates:
        gate.wait_until_begun()
    pending = executor.submit(tasks.add, 1, 2)
    assert all(future.running() and not future.done() for future in running)
    assert not pending.running()
    assert "state=pending" in repr(pending)
    for gate in gates:
        gate.open()
    assert pending.result() == 3
    assert pending.done()
    assert {future.result() for future in running} == workers_of(executor)


def test_cancelling_a_running_call_stops_it_and_its_worker_lives_on(executor: PoolExecutor, fifo: Path) -> None:
    before = {executor.submit(tasks.get_pid).result()}
    for _ in range(5):
        future = executor.submit(tasks.report_begin, str(fifo), tasks.spin_forever)
        called: list[futures.Future[Any]] = []
        future.add_done_callback(called.append)
        fifo.read_text()
        assert future.running()
        assert future.cancel() is True
        assert (future.cancelled(), future.done(), future.running()) == (True, True, False)
        assert future.cancel() is True
        assert called == [future]
        with pytest.raises(futures.CancelledError):
            future.result()
        assert futures.wait([future]).done == {future}
    assert executor.submit(tasks.get_pid).result() in before | workers_of(executor)
    assert len(workers_of(executor)) <= 2


def test_cancelling_wakes_those_who_wait(executor: PoolExecutor, fifo: Path) -> None:
    future = executor.submit(tasks.report_begin, str(fifo), tasks.spin_forever)
    fifo.read_text()
    done: list[Any] = []
    threads = [
        threading.Thread(target=lambda: done.append(futures.wait([future]).done)),
        threading.Thread(target=lambda: done.append(set(futures.as_completed([future])))),
        threading.Thread(target=lambda: done.append({future} if future.exception is not None else None)),
    ]
    for thread in threads:
        thread.start()
    future.cancel()
    for thread in threads:
        thread.join()
    assert done == [{future}] * 3


def test_cancelling_stops_the_call_before_it_calls_back(executor: PoolExecutor, fifo: Path) -> None:
    future = executor.submit(tasks.report_begin, str(fifo), tasks.spin_forever)
    others = [executor.submit(tasks.get_pid) for _ in range(3)]
    results: list[Any] = []
    future.add_done_callback(lambda _: results.extend(other.result(20) for other in others))
    future.add_done_callback(lambda _: results.append(executor.submit(tasks.get_pid).result(20)))
    fifo.read_text()
    assert future.cancel()
    assert len(results) == 4


def test_a_callback_that_exits_harms_nobody_else(executor: PoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    def leave(_: object) -> None:
        raise SystemExit(3)

    executor.submit(tasks.sleep_and_print, 0.05, 1).add_done_callback(leave)
    assert [executor.submit(tasks.add, number).result(20) for number in range(10)] == list(range(10))
    executor.shutdown()
    assert "a done-callback of a future raised" in caplog.text


def test_a_failed_call_s_arguments_are_free_at_once(executor: PoolExecutor) -> None:
    argument = tasks.Weak()
    ref = weakref.ref(argument)
    future = executor.submit(tasks.refuse, argument)
    del argument
    error = future.exception()
    assert isinstance(error, ValueError)
    assert error.__traceback__ is None
    executor.submit(tasks.add, 1).result()
    assert ref() is None


def test_cancelling_a_pending_call_means_that_it_never_runs(tmp_path: Path) -> None:
    gate, path = tasks.Gate(tmp_path), tmp_path / "runs"
    with PoolExecutor(1) as executor:
        running = executor.submit(tasks.hold, *gate.arguments)
        gate.wait_until_begun()
        pending = executor.submit(tasks.append_line, str(path))
        assert pending.cancel()
        assert not running.done()
        gate.open()
        assert executor.submit(tasks.add, 1).result() == 1
    assert not path.exists()


def test_a_call_that_is_done_cannot_be_cancelled(executor: PoolExecutor) -> None:
    future = executor.submit(tasks.add, 1)
    assert future.result() == 1
    assert future.cancel() is False


def test_cancelling_at_any_moment_has_one_outcome(executor: PoolExecutor) -> None:
    """The callback is called once, and the calls after it are undisturbed."""
    for number in range(300):
        called: list[object] = []
        future = executor.submit(tasks.busy, 0.0003)
        future.add_done_callback(called.append)
        time.sleep(number % 10 * 0.0001)  # another moment of the call's life each time
        cancelled = future.cancel()
        assert future.cancelled() is cancelled
        assert executor.submit(tasks.add, number).result() == number
        assert called == [future]


def test_one_crash_fails_one_future(executor: PoolExecutor) -> None:
    submitted = [executor.submit(tasks.add, number) for number in range(10)]
    crash = executor.submit(tasks.exit_at_once, 3)
    submitted += [executor.submit(tasks.add, number) for number in range(10, 20)]
    assert [future.result() for future in submitted] == list(range(20))
    error = crash.exception()
    assert isinstance(error, WorkerDied)
    assert isinstance(error, BrokenProcessPool)
    assert error.exitcode == 3
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert executor.submit(tasks.add, 1).result() == 1


def test_errors_are_the_future_s(executor: PoolExecutor) -> None:
    error = executor.submit(int, "x").exception()
    assert isinstance(error, ValueError)
    assert "int" in str(error.__cause__)
    assert isinstance(executor.submit(lambda: None).exception(), TaskNotPicklable)
    with PoolExecutor(1, initializer=tasks.raise_exception, initargs=(KeyError, "model")) as failing:
        error = failing.submit(tasks.add, 1).exception()
        assert isinstance(error, InitializerFailed)
        assert isinstance(error, BrokenProcessPool)
        assert isinstance(error.__cause__, KeyError)
    with PoolExecutor(1, timeout=0.1) as hasty:
        assert isinstance(hasty.submit(tasks.sleep_long).exception(), TaskTimeout)


# --- map ---


@pytest.mark.parametrize("chunksize", [1, 3, 7, 100])
@pytest.mark.parametrize("buffersize", [None, 1, 4])
def test_map_gives_all_results_in_order(executor: PoolExecutor, chunksize: int, buffersize: int | None) -> None:
    results = executor.map(tasks.add, range(40), range(50), chunksize=chunksize, buffersize=buffersize)
    assert list(results) == [2 * number for number in range(40)]


def test_map_with_a_buffer_takes_its_source_as_it_goes(executor: PoolExecutor) -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(1_000_000_000):
            taken.append(number)
            yield number

    results = executor.map(tasks.add, source(), buffersize=3)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) <= 14
    del results


def test_map_stops_what_is_left_when_one_fails(executor: PoolExecutor) -> None:
    results = executor.map(tasks.fail_or_spin, [True, False, False, False])
    with pytest.raises(ValueError, match="asked to fail"):
        next(results)
    assert executor.submit(tasks.add, 1).result(10) == 1


def test_map_stops_what_is_left_at_its_timeout(executor: PoolExecutor) -> None:
    results = executor.map(tasks.fail_or_spin, [False, False, False], timeout=0.2)
    with pytest.raises(TimeoutError):
        next(results)
    assert executor.submit(tasks.add, 1).result(10) == 1


def test_map_of_an_executor_that_nobody_else_holds() -> None:
    with CpuPool(1) as pool:
        assert list(pool.as_executor().map(tasks.add, range(10), buffersize=2)) == list(range(10))


def test_what_pickling_raises_harms_nobody_else() -> None:
    with PoolExecutor(1) as executor:
        error = executor.submit(tasks.return_it, tasks.CancelsWhenPickled()).exception(20)
        assert isinstance(error, asyncio.CancelledError)
        assert executor.submit(tasks.add, 1).result(20) == 1


def test_closing_the_iterator_of_map_stops_what_is_left(executor: PoolExecutor) -> None:
    results = executor.map(tasks.spin_unless_first, range(3))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]  # it is a generator
    assert executor.submit(tasks.add, 1).result(10) == 1


def test_closing_the_iterator_of_map_before_its_first_result_stops_all(executor: PoolExecutor) -> None:
    for chunksize in (1, 2):
        results = executor.map(tasks.fail_or_spin, [False] * 6, chunksize=chunksize)
        results.close()  # type: ignore[attr-defined]
        del results
        assert executor.submit(tasks.add, 1).result(10) == 1


def test_map_gives_what_it_has_after_a_shutdown() -> None:
    executor = PoolExecutor(1)
    results = executor.map(tasks.add, range(10), buffersize=3)
    assert next(results) == 0
    executor.shutdown()
    assert list(itertools.islice(results, 3)) == [1, 2, 3]
    with pytest.raises(RuntimeError, match="after shutdown"):
        next(results)


@pytest.mark.parametrize("wrong", [{"chunksize": 0}, {"chunksize": -1}, {"buffersize": 0}])
def test_map_refuses_sizes_below_one_at_once(executor: PoolExecutor, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=">= 1"):
        executor.map(tasks.add, [1], **wrong)


def test_map_names_the_size_that_is_no_number(executor: PoolExecutor) -> None:
    with pytest.raises(TypeError, match="buffersize must be an int"):
        executor.map(tasks.add, [1], buffersize=1.5)  # type: ignore[arg-type]


def test_b8_small_calls_are_not_starved_by_a_huge_map() -> None:
    """A million items wait in the executor; a call of the pool itself waits behind one of them at most per worker."""
    with CpuPool(2) as pool, pool.as_executor() as executor:
        results = executor.map(tasks.busy, [0.001] * 1_000_000, chunksize=20, buffersize=50_000 // 20)
        next(results)
        begun = executor._driver._queue
        for number in range(20):
            before = len(begun)
            assert pool.run_sync(tasks.add, number) == number
            assert before - len(begun) < 10, "the map went on for many batches meanwhile"
        results.close()  # type: ignore[attr-defined]


# --- with asyncio ---


def test_run_in_executor_works_and_cancelling_it_stops_the_work(
    executor: PoolExecutor, fifo: Path, tmp_path: Path
) -> None:
    barrier = tmp_path / "barrier"
    barrier.mkdir()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(executor, tasks.add, 1, 2) == 3
        results = await asyncio.gather(*(loop.run_in_executor(executor, tasks.add, n) for n in range(100)))
        assert results == list(range(100))
        # One worker may have been enough for those.
        await asyncio.gather(*(loop.run_in_executor(executor, tasks.meet, str(barrier), 2) for _ in range(2)))
        pids = workers_of(executor)
        assert len(pids) == 2
        for _ in range(3):
            call = loop.run_in_executor(executor, tasks.report_begin, str(fifo), tasks.spin_forever)
            await asyncio.to_thread(fifo.read_text)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await asyncio.gather(*(loop.run_in_executor(executor, tasks.spin_forever) for _ in range(2)))
            assert await loop.run_in_executor(executor, tasks.add, 1, 2) == 3
        assert workers_of(executor) == pids
        with pytest.raises(BrokenProcessPool):
            await loop.run_in_executor(executor, tasks.exit_at_once, 1)
        assert await loop.run_in_executor(executor, tasks.add, 1, 2) == 3

    asyncio.run(main())


# --- shutdown ---


def test_shutdown_makes_the_accepted_calls_and_takes_no_more() -> None:
    executor = PoolExecutor(1)
    submitted = [executor.submit(tasks.add, number) for number in range(50)]
    executor.shutdown()
    assert [future.result(0) for future in submitted] == list(range(50))
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(tasks.add, 1)
    executor.shutdown()


def test_shutdown_without_waiting_still_makes_the_accepted_calls(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    executor = PoolExecutor(1)
    running, pending = executor.submit(tasks.hold, *gate.arguments), executor.submit(tasks.add, 1)
    gate.wait_until_begun()
    executor.shutdown(wait=False)
    assert not running.done()
    gate.open()
    assert pending.result() == 1


def test_shutdown_can_cancel_what_is_pending(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    executor = PoolExecutor(1)
    running = executor.submit(tasks.hold, *gate.arguments)
    gate.wait_until_begun()
    pending = [executor.submit(tasks.add, number) for number in range(20)]
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in pending)
    assert futures.wait(pending).done == set(pending)
    gate.open()
    executor.shutdown()
    assert running.result(0) > 0


def test_an_executor_that_nobody_holds_makes_its_calls_and_ends() -> None:
    executor = PoolExecutor(2)
    submitted = [executor.submit(tasks.add, number) for number in range(20)]
    results = executor.map(tasks.add, range(20))
    pids = workers_of(executor)
    ref = weakref.ref(executor)
    del executor
    gc.collect()
    assert ref() is None
    assert [future.result() for future in submitted] == list(range(20)) == list(results)
    for thread in threading.enumerate():
        if thread.name == "cpupool-executor":
            thread.join()
    assert all(is_gone(pid) for pid in pids)


def test_leaving_the_block_by_ctrl_c_stops_the_calls(fifo: Path) -> None:
    executor = PoolExecutor(1)
    running = executor.submit(tasks.report_begin, str(fifo), tasks.spin_forever)
    pending = executor.submit(tasks.add, 1)
    fifo.read_text()

    def interrupt() -> None:
        with executor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert running.cancelled()
    assert pending.cancelled()


def test_as_executor_leaves_the_pool_open() -> None:
    with CpuPool(1) as pool:
        with pool.as_executor() as executor:
            assert isinstance(executor, futures.Executor)
            assert executor.submit(tasks.add, 1).result() == 1
        assert pool.run_sync(tasks.add, 1) == 1
        with pool.options(label="labelled", timeout=0.1).as_executor() as executor:
            assert executor.submit(tasks.describe_task).result()[1] == "labelled"
            assert isinstance(executor.submit(tasks.sleep_long).exception(), TaskTimeout)
        executor = pool.as_executor()
        assert executor.submit(tasks.add, 1).result() == 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(tasks.add, 1)
    executor.shutdown()


def test_an_executor_works_in_a_forked_child() -> None:
    with PoolExecutor(1) as executor:
        assert executor.submit(tasks.add, 1).result() == 1
        pid = os.fork()
        if pid == 0:
            try:
                assert executor.submit(tasks.add, 2).result(20) == 2
                executor.shutdown()
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert executor.submit(tasks.add, 3).result() == 3


def test_it_takes_all_settings_of_a_pool() -> None:
    with PoolExecutor(1, serializer="cloudpickle", timeout=60, name="mine") as executor:
        assert executor.submit(lambda: 42).result() == 42
        assert "'mine'" in repr(executor)
    with pytest.raises(TypeError, match="no_such_setting"):
        PoolExecutor(1, no_such_setting=1)


def test_max_tasks_per_child_replaces_the_worker() -> None:
    with PoolExecutor(1, max_tasks_per_child=3) as executor:
        pids = [executor.submit(tasks.get_pid).result() for _ in range(9)]
    assert [len(set(pids[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
    assert len(set(pids)) == 3


@pytest.mark.parametrize("number", [0, -1])
def test_max_workers_must_be_positive(number: int) -> None:
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        PoolExecutor(number)


# --- the program's end ---


def test_the_program_s_end_waits_for_accepted_calls(run_script: RunScript) -> None:
    done = run_script("""
import cpupool, tasks

if __name__ == "__main__":
    executor = cpupool.PoolExecutor(2)
    for number in range(5):
        executor.submit(tasks.sleep_and_print, 0.2, number)
    print("end", flush=True)
""")
    assert (done.stderr, done.returncode) == ("", 0)
    first, *rest = done.stdout.split()
    assert first == "end"
    assert sorted(rest) == ["0", "1", "2", "3", "4"]


def test_calls_submitted_as_the_script_ends_find_its_functions(run_script: RunScript) -> None:
    """Python deletes `__file__` of the main module then, before a worker was started that has to import it."""
    done = run_script("""
import cpupool

def show(number):
    print(number)

if __name__ == "__main__":
    executor = cpupool.PoolExecutor(2)
    for number in range(3):
        executor.submit(show, number)
""")
    assert (done.stderr, done.returncode) == ("", 0)
    assert sorted(done.stdout.split()) == ["0", "1", "2"]


def test_a_ctrl_c_in_the_middle_of_a_submit_leaves_nothing_half_begun(run_script: RunScript) -> None:
    """It is raised wherever in `submit` a function returns; the block is left, and the program ends."""
    done = run_script(
        """
import sys
import cpupool

class Stop(BaseException):
    pass

def raise_at(number):
    def count(frame, event, argument):
        nonlocal number
        if event in ("return", "c_return") and "cpupool" in frame.f_code.co_filename:
            number -= 1
            if number == 0:
                sys.setprofile(None)
                raise Stop
    return count

if __name__ == "__main__":
    stopped = 0
    with cpupool.PoolExecutor(1) as executor:
        executor.submit(abs, -1).result()
        for number in range(1, 30):
            sys.setprofile(raise_at(number))
            try:
                executor.submit(abs, -1)
            except Stop:
                stopped += 1
            finally:
                sys.setprofile(None)
        assert executor.submit(abs, -2).result(10) == 2
    assert stopped > 5, stopped
    print("ended")
""",
        timeout=30,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("ended\n", "", 0)


def test_no_call_is_taken_after_the_program_s_end(run_script: RunScript) -> None:
    done = run_script("""
import atexit

def run_last():
    try:
        executor.submit(id, None)
    except RuntimeError as error:
        print(error)

if __name__ == "__main__":
    atexit.register(run_last)  # the first to be registered is the last to run
    import cpupool

    executor = cpupool.PoolExecutor(1)
    executor.submit(id, 42).result()
""")
    assert (done.stdout, done.stderr, done.returncode) == (
        "cannot schedule new futures after interpreter shutdown\n",
        "",
        0,
    )


def test_ctrl_c_ends_a_program_that_waits_for_a_future(run_script: RunScript, fifo: Path) -> None:
    done = run_script(
        """
import os, signal, sys, threading
import cpupool, tasks

if __name__ == "__main__":
    executor = cpupool.PoolExecutor(1)
    future = executor.submit(tasks.report_begin, sys.argv[1], tasks.spin_forever)
    threading.Thread(target=tasks.press_ctrl_c_after, args=(sys.argv[1],)).start()
    future.result()
""",
        str(fifo),
        timeout=10,
    )
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert done.returncode == -2
