"""How a worker waits for its next call: awake for a moment if that pays."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

import tasks
from cpupool import CpuPool, _vigil
from cpupool._vigil import LONGEST, Vigil, open_vigil

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_yield"), reason="workers do not look out here")


class Clock:
    """What the vigil knows of time and of others; a yield takes `slice` seconds, or calls what is given."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slice = 5e-6
        self.yields = 0
        self.on_yield: Callable[[], object] = bool

    def monotonic(self) -> float:
        return self.now

    def sched_yield(self) -> None:
        self.yields += 1
        self.now += self.slice
        self.on_yield()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_vigil, "monotonic", clock.monotonic)
    monkeypatch.setattr(os, "sched_yield", clock.sched_yield)
    return clock


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def arrive(wait: Callable[[], object], pair: tuple[socket.socket, socket.socket]) -> None:
    """Wait for what is there already."""
    pair[0].send(b"x")
    wait()
    assert pair[1].recv(10) == b"x"


def test_it_looks_out_after_a_short_wait(clock: Clock, pair: tuple[socket.socket, socket.socket]) -> None:
    wait = open_vigil(pair[1])
    arrive(wait, pair)
    clock.on_yield = lambda: clock.yields == 3 and pair[0].send(b"y")
    wait()
    assert (clock.yields, pair[1].recv(10)) == (3, b"y")


def test_it_sleeps_after_a_moment(
    clock: Clock, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    vigil, sleeper = open_sleeping(clock, pair, monkeypatch)
    sleeper.sleep = 0.0
    vigil.wait()
    assert sleeper.sleeps == 1
    sleeper.sleep = 1.0
    vigil.wait()  # looks out in vain, and sleeps
    assert clock.yields == pytest.approx(LONGEST / clock.slice, abs=1)
    assert sleeper.sleeps == 2
    looks = sleeper.looks
    vigil.wait()  # sleeps at once: the wait was long, and it expects nothing soon
    assert (sleeper.looks, sleeper.sleeps) == (looks, 3)


class Sleeper:
    """In the place of a poll object; a sleep takes `sleep` seconds, and a look finds nothing."""

    def __init__(self, clock: Clock, channel: socket.socket) -> None:
        self._clock = clock
        self._channel = channel
        self.sleep = 0.0
        self.sleeps = self.looks = 0

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        if timeout == 0:
            self.looks += 1
            return []
        self.sleeps += 1
        self._clock.now += self.sleep
        return [(self._channel.fileno(), select.POLLIN)]


def open_sleeping(
    clock: Clock, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> tuple[Vigil, Sleeper]:
    vigil = Vigil(pair[1])
    sleeper = Sleeper(clock, pair[0])
    monkeypatch.setattr(vigil, "_poll", sleeper)
    return vigil, sleeper


def test_it_rests_where_others_want_the_cpu(
    clock: Clock, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    vigil, sleeper = open_sleeping(clock, pair, monkeypatch)
    vigil.wait()
    clock.slice = 80e-6  # others run, for a moment
    vigil.wait()
    assert clock.yields == 2
    clock.slice = 400e-6  # somebody has much to do
    vigil._is_soon = True
    vigil.wait()
    assert clock.yields == 3
    vigil._is_soon = True
    looks = sleeper.looks
    vigil.wait()
    assert sleeper.looks == looks, "it rests"
    clock.now += 1
    vigil._is_soon = True
    vigil.wait()
    assert sleeper.looks == looks + 1


@pytest.mark.parametrize(("share", "yields"), [(1.0, 1 + LONGEST / 5e-6), (0.5, 1.0)])
def test_it_does_not_rest_if_it_was_the_pool_that_ran(
    clock: Clock,
    pair: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    yields: float,
) -> None:
    vigil, _ = open_sleeping(clock, pair, monkeypatch)
    ran = 0.0

    def run_pool() -> None:
        nonlocal ran
        ran += share * clock.slice
        if clock.yields == 1:
            clock.now += 0.003 - clock.slice  # it has much to do, once
            ran += share * (0.003 - clock.slice)

    clock.on_yield = run_pool
    monkeypatch.setattr(vigil, "_read_pool_clock", lambda: ran)
    vigil._is_soon = True
    vigil.wait()
    assert clock.yields == pytest.approx(yields, abs=1)


def test_it_sleeps_in_the_end_though_the_pool_goes_on(
    clock: Clock, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    vigil, sleeper = open_sleeping(clock, pair, monkeypatch)
    monkeypatch.setattr(vigil, "_read_pool_clock", lambda: clock.now)
    clock.slice = 0.003
    vigil._is_soon = True
    vigil.wait()
    assert (clock.yields, sleeper.sleeps) == (4, 1)


def test_a_worker_knows_how_much_its_pool_has_run() -> None:
    with CpuPool(1) as pool:
        ran = pool.run_sync(tasks.read_pool_clock)
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        assert 0.1 <= pool.run_sync(tasks.read_pool_clock) - ran < 0.2


def test_where_the_pool_has_gone_it_has_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE, check=True)
    assert _vigil._read_clock(~int(gone.stdout) << 3 | 2) == 0.0
    monkeypatch.setattr(_vigil, "parent_process", lambda: None)
    assert _vigil._open_pool_clock()() == 0.0


def test_it_ends_with_the_channel(clock: Clock, pair: tuple[socket.socket, socket.socket]) -> None:
    wait = open_vigil(pair[1])
    arrive(wait, pair)
    clock.on_yield = pair[0].close
    wait()
    assert pair[1].recv(10) == b""


def test_without_yielding_the_read_itself_waits(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    monkeypatch.delattr(os, "sched_yield")
    open_vigil(pair[1])()
