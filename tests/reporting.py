"""What the tests of `report` run in workers."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any

import cpupool


def report_all(values: list[Any]) -> int:
    for value in values:
        cpupool.report(value)
    return len(values)


def report_then(value: object, fn: Any, *args: object) -> object:
    cpupool.report(value)
    return fn(*args)


def report_and_die_the_first_time(path: str) -> None:
    if not os.path.exists(path):
        open(path, "w").close()
        cpupool.report("first")
        time.sleep(0.2)  # so long that it is seen
        os._exit(3)


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


def report_for(seconds: float, size: int) -> int:
    """Report without a pause, each value larger by one."""
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        number += 1
        cpupool.report((number, bytes(size)))
    return number


def report_until_seen(path: str) -> None:
    """Report, and wait until somebody has heard it."""
    cpupool.report("here")
    while not os.path.exists(path):
        time.sleep(0.001)


class Vanishing:
    """Ends the program that unpickles it, if that may."""

    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def report_vanishing() -> str:
    cpupool.report(Vanishing())
    return "result"


def report_lambda() -> None:
    cpupool.report(lambda: None)
