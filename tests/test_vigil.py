"""How a worker waits for its next call: awake for a moment if that pays."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from cpupool import _vigil
from cpupool._vigil import LONGEST, open_vigil

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


def test_it_sleeps_after_a_moment(clock: Clock, pair: tuple[socket.socket, socket.socket]) -> None:
    wait = open_vigil(pair[1])
    arrive(wait, pair)
    sender = threading.Thread(target=send_when_it_sleeps, args=(clock, pair[0]))
    sender.start()
    wait()
    sender.join()
    looks = clock.yields
    assert looks == pytest.approx(LONGEST / clock.slice, abs=1)
    assert pair[1].recv(10) == b"late"
    clock.on_yield = pytest.fail  # the wait was long: it expects no call soon
    arrive(wait, pair)


def send_when_it_sleeps(clock: Clock, channel: socket.socket) -> None:
    """Send once it looks out no more; it has slept for a second then."""
    enough = LONGEST / clock.slice
    while clock.yields < enough - 1:
        os.stat("/")
    clock.now += 1
    channel.send(b"late")


def test_it_rests_where_others_want_the_cpu(clock: Clock, pair: tuple[socket.socket, socket.socket]) -> None:
    wait = open_vigil(pair[1])
    arrive(wait, pair)
    clock.slice = 400e-6  # somebody else has run
    clock.on_yield = lambda: pair[0].send(b"x")
    wait()
    assert (clock.yields, pair[1].recv(10)) == (1, b"x")
    clock.on_yield = pytest.fail
    for _ in range(10):
        arrive(wait, pair)
    clock.now += 1
    clock.on_yield = lambda: pair[0].send(b"x")
    wait()
    assert clock.yields == 2


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
