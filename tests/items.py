"""What the tests of `map` and `stream` run in workers, with one item each."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpupool

Note = collections.namedtuple("Note", "number")


def same(item: Any) -> Any:
    return item


def double(item: int) -> int:
    return 2 * item


def to_text(item: object) -> str:
    return str(item)


def weigh(item: int, factor: int = 1, offset: int = 0) -> int:
    return item * factor + offset if offset else item * factor


def by_kind(item: int) -> object:
    """Return values of many types, so that neighbours differ."""
    kinds: list[Callable[[int], object]] = [
        int,
        float,
        str,
        bool,
        (2**64).__add__,
        (-(2**63)).__or__,
        float("inf").__add__,
        Note,
        bytearray,
        ValueError,
    ]
    place = item % (len(kinds) + 2)
    return kinds[place](item) if place < len(kinds) else (None, [item])[place - len(kinds)]


def count_down(item: int) -> int | float | None:
    """Return ints, then floats, then None, for a while each."""
    return (item, item / 2, None)[item // 300 % 3]


def work(seconds: float) -> float:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


def write_line(path: str, text: object) -> None:
    """Append a line in one piece, whoever else does."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


class Traced:
    """A function of one item that writes the item down before it does it."""

    def __init__(self, path: Path, fn: Callable[[Any], Any], fatal: tuple[int, ...] = ()) -> None:
        self.path = str(path)
        self.fn = fn
        self.fatal = fatal

    def __call__(self, item: int) -> Any:
        write_line(self.path, item)
        return self.fn(item) if item in self.fatal or not self.fatal else item

    def begun(self) -> list[int]:
        """Return all items that were begun, in order, each as often as it was."""
        return sorted(map(int, Path(self.path).read_text().split())) if os.path.exists(self.path) else []


class Fatal:
    """A function of one item that does what it should to some items, and returns the others; in no time."""

    def __init__(self, fn: Callable[[Any], Any], *fatal: int, value: Callable[[int], Any] = int) -> None:
        self.fn = fn
        self.fatal = frozenset(fatal)
        self.value = value

    def __call__(self, item: int) -> Any:
        return self.fn(item) if item in self.fatal else self.value(item)


def exit_at_once(item: object) -> None:
    os._exit(3)


def kill_itself(item: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(item: object) -> None:
    raise ValueError(f"no {item}")


def leave(item: object) -> None:
    raise SystemExit(item)


def stop_iteration(item: object) -> None:
    raise StopIteration(item)


def return_lambda(item: object) -> object:
    return lambda: item


def spin(item: object) -> None:
    while True:
        pass


def hold_gil(item: object) -> None:
    collections.deque(itertools.repeat(0), maxlen=0)


def swallow_interrupt(item: object) -> str:
    try:
        spin(item)
    except cpupool.TaskInterrupted:
        pass
    return "caught"


def fail_when_interrupted(item: object) -> None:
    try:
        spin(item)
    except cpupool.TaskInterrupted:
        raise OSError("made of it") from None


def match_catastrophically(item: object) -> None:
    re.match(r"(a+)+$", "a" * 40 + "b")


def die_the_first_time(item: int) -> tuple[int, int]:
    task = cpupool.current_task()
    assert task is not None
    if item % 7 == 3 and task.attempt == 1:
        os._exit(1)
    return item, task.attempt


def describe_task(item: int) -> tuple[int, int | None, str | None, int]:
    task = cpupool.current_task()
    assert task is not None
    return item, task.item, task.label, task.attempt


def count_task(item: int) -> int:
    """Return the number that the running task has, among items so small that the journal counts them by itself."""
    task = cpupool.current_task() if item % 1000 == 7 else None
    return item if task is None else task.item or 0


def pid_of(item: object) -> int:
    return os.getpid()


def log_pid(path: str, item: object) -> object:
    write_line(path, os.getpid())
    return item


def big(item: int) -> bytes:
    return bytes([item % 256]) * (300_000 if item % 3 else 10)


def work_or_fail(seconds: float) -> float:
    """Fail after so long if it is negative."""
    work(abs(seconds))
    if seconds < 0:
        raise ValueError(seconds)
    return seconds


def work_here(seconds: float) -> tuple[float, int]:
    return work(seconds), os.getpid()


class ExitOnceDone:
    """Ends its worker behind the last of some items: when it is done, and not yet answered for."""

    def __init__(self, last: int) -> None:
        self.last = last

    def __call__(self, item: int) -> Any:
        if item != self.last:
            return item
        from cpupool import _batches  # as a crash in that moment would, which no item can time

        take_held = _batches._Run.take_held

        def exit_at_once(self: Any) -> bytes:
            take_held(self)
            os._exit(1)

        _batches._Run.take_held = exit_at_once  # type: ignore[method-assign]
        return item


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class NoNotes(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError(f"no {note}")


def raise_frozen(item: int) -> None:
    raise FrozenError(item)


def raise_without_notes(item: int) -> None:
    raise NoNotes(item)


def fail_after(seconds: float) -> None:
    work(seconds)
    raise ValueError(seconds)


class BadItem:
    """Cannot be unpickled in a worker."""

    def __reduce__(self) -> Any:
        return fail, ("such item",)


class FatalItem:
    """Kills the worker that unpickles it."""

    def __reduce__(self) -> Any:
        return exit_at_once, (None,)


class BadResult:
    """Cannot be unpickled here."""

    def __init__(self, item: int) -> None:
        self.item = item

    def __reduce__(self) -> Any:
        return fail, (self.item,)


def lurk(begun: str, end: str, item: int) -> int:
    """Wait with item 0 as a gate does; be quick with all others."""
    if item == 0:
        with open(begun, "w") as file:
            file.write(f"{os.getpid()}\n")
        with open(end) as file:
            file.read()
    return item


def log_warning(item: int) -> int:
    logging.getLogger("items").warning("item %s", item)
    return item


class SlowToSay(Exception):
    """Takes longer to travel than the timeout of the item that raises it."""

    def __reduce__(self) -> Any:
        time.sleep(0.5)
        return SlowToSay, ()


def fill_or_spin(item: str | int) -> bytes:
    """Return so many bytes; or say that it has begun, spin, and make an error of the interrupt."""
    if isinstance(item, int):
        return bytes(item)
    Path(item).write_text("begun")
    try:
        while True:
            pass
    except cpupool.TaskInterrupted:
        raise SlowToSay from None


def fail_at_one(item: int) -> int:
    if item == 1:
        raise ValueError(item)
    return item


def return_or_raise(item: object) -> object:
    if isinstance(item, BaseException):
        raise item
    return item


def work_and_negate(seconds: float) -> float:
    work(seconds)
    return -1.5


def sleep_or_die(seconds: float) -> None:
    if seconds < 0:
        os._exit(1)
    time.sleep(seconds)
