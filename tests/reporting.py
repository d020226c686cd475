"""What the tests of `report` run in workers."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import cpupool


def report_all(values: list[Any]) -> int:
    for value in values:
        cpupool.report(value)
    return len(values)


def report_then(value: object, fn: Any, *args: object) -> object:
    cpupool.report(value)
    return fn(*args)


def report_item(item: int) -> int:
    cpupool.report(item)
    return item


def report_from_threads() -> None:
    threads = [threading.Thread(target=report_all, args=([[number] * 1000] * 50,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


def report_in_a_fork() -> None:
    cpupool.report("parent")
    if (pid := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            cpupool.report("child")
        os._exit(0)
    os.waitpid(pid, 0)


def report_lambda() -> None:
    cpupool.report(lambda: None)
