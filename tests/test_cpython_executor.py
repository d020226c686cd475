"""CPython's own tests of executors, run on `PoolExecutor`.

They are in `test.test_concurrent_futures`, which most source builds of CPython install and many packages leave out; its
files are those of CPython 3.12 and later.  What does not apply is listed with the reason.
"""

from __future__ import annotations

import importlib
import unittest
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import IGNORE_FORK_WARNING, START_METHODS
from cpupool import PoolExecutor

PACKAGE = "test.test_concurrent_futures"
pytest.importorskip(f"{PACKAGE}.util", reason="the tests of this CPython are not installed")


def load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)


SUITES = {
    "ProcessPoolExecutorTest": "test_process_pool",
    "ProcessPoolShutdownTest": "test_shutdown",
    "WaitTests": "test_wait",
    "AsCompletedTests": "test_as_completed",
    "InitializerMixin": "test_init",
    "FailingInitializerMixin": "test_init",
    "ExecutorDeadlockTest": "test_deadlock",
}

OWN_EXECUTOR = "it makes a ProcessPoolExecutor of its own; test_executor.py has a test of the same"
OWN_SCRIPT = "its script imports the executor from concurrent.futures; test_executor.py has one of its own"
DOES_NOT_BREAK = "it wants an executor that one crash, bad pickle or failed initializer breaks for good"
SENDS_SEMAPHORE = "it submits a semaphore, which does not pickle, and counts processes started for nothing"
RAISES_EXIT = "it wants a task's SystemExit to be raised in the caller, whose program that would end"

DOES_NOT_APPLY = {
    "ProcessPoolExecutorTest.test_killed_child": DOES_NOT_BREAK,
    "ProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": (
        "max_tasks_per_child works with every start method, so there is no need to change it"
    ),
    "ProcessPoolExecutorTest.test_saturation": SENDS_SEMAPHORE,
    "ProcessPoolExecutorTest.test_traceback": "it wants a private class of concurrent.futures as the cause",
    "ProcessPoolShutdownTest.test_context_manager_shutdown": OWN_EXECUTOR,
    "ProcessPoolShutdownTest.test_del_shutdown": OWN_EXECUTOR,
    "ProcessPoolShutdownTest.test_hang_gh83386": OWN_SCRIPT,
    "ProcessPoolShutdownTest.test_interpreter_shutdown": OWN_SCRIPT,
    "ProcessPoolShutdownTest.test_processes_terminate": SENDS_SEMAPHORE,
    "ProcessPoolShutdownTest.test_shutdown_no_wait": OWN_EXECUTOR,
    "ProcessPoolShutdownTest.test_submit_after_interpreter_shutdown": OWN_SCRIPT,
    "FailingInitializerMixin.test_initializer": DOES_NOT_BREAK,
    "ExecutorDeadlockTest.test_error_at_task_unpickle": DOES_NOT_BREAK,
    "ExecutorDeadlockTest.test_error_during_result_unpickle_in_result_handler": DOES_NOT_BREAK,
    "ExecutorDeadlockTest.test_exit_at_task_unpickle": DOES_NOT_BREAK,
    "ExecutorDeadlockTest.test_exit_during_func_exec_on_worker": RAISES_EXIT,
    "ExecutorDeadlockTest.test_exit_during_result_pickle_on_worker": RAISES_EXIT,
    "ExecutorDeadlockTest.test_exit_during_result_unpickle_in_result_handler": DOES_NOT_BREAK,
    "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": "it waits for a private thread of ProcessPoolExecutor",
}
ONLY_WITH_FORK = {
    "ProcessPoolExecutorTest.test_max_tasks_per_child": "it wants max_tasks_per_child to be refused",
}


class ShownExecutor(PoolExecutor):
    """Shows what some of these tests look at."""

    @property
    def _pool(self) -> Any:
        return self._driver.pool

    @property
    def _max_workers(self) -> int:
        workers: int = self._pool.max_workers
        return workers

    @property
    def _processes(self) -> dict[int, Any]:
        """Those that run tasks, or will; one that was replaced may be on its way out for a moment."""
        dispatcher = self._pool._dispatcher
        workers = [*dispatcher._expected, *dispatcher._idle, *dispatcher._lent]
        return {worker.process.pid: worker.process for worker in workers}


def make_case(suite: str, method: str) -> type[unittest.TestCase]:
    mixin: Any = load("util", "ExecutorMixin")
    bases = (load(SUITES[suite], suite), mixin, load("util", "BaseTestCase"))
    return type(f"{suite}-{method}", bases, {"executor_type": ShownExecutor, "ctx": method})


def parameters() -> Iterator[Any]:
    for method in START_METHODS:
        for suite in SUITES:
            for name in unittest.TestLoader().getTestCaseNames(make_case(suite, method)):
                test = f"{suite}.{name}"
                marks = [pytest.mark.slow]  # they take half a minute and more for each method
                reason = DOES_NOT_APPLY.get(test) or (ONLY_WITH_FORK.get(test) if method == "fork" else None)
                if reason:
                    marks.append(pytest.mark.skip(reason=reason))
                if method == "fork":
                    marks.append(IGNORE_FORK_WARNING)
                yield pytest.param(suite, name, method, marks=marks, id=f"{method}-{test}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("suite", "name", "method"), list(parameters()))
def test_cpython_s_own(suite: str, name: str, method: str) -> None:
    result = unittest.TestResult()
    make_case(suite, method)(name).run(result)
    for _, text in result.errors + result.failures:
        pytest.fail(text, pytrace=False)
    for _, reason in result.skipped:
        pytest.skip(reason)


def test_what_does_not_apply_exists() -> None:
    for test in [*DOES_NOT_APPLY, *ONLY_WITH_FORK]:
        suite, _, name = test.partition(".")
        assert name in dir(load(SUITES[suite], suite))
