"""How a worker waits for its next call.

A CPU that has nothing to do goes to sleep, and to wake it takes longer than many a task: in a virtual machine some 20
of the 60 microseconds of a trivial call.  So a worker whose last call came soon looks out for the next one for a moment
before it sleeps, as the kernel's haltpoll and many a lock do.  Calls in a row take 0.75 of the time that way, and
5,000 at once 0.72.

Where others want the CPU, that would only take it from them.  So it yields before each look, and rests if it does not
get the CPU back at once.  But not if it was the pool's own process that ran: that has calls for it, and each of them
would wake it up right there, in the place of the one that sends it.  With 5,000 calls at once, two workers and two
CPUs, to rest all the same takes 34 instead of 27 microseconds for each.

It runs in the workers: stdlib only.
"""

from __future__ import annotations

import os
import select
import sys
import time
from functools import partial
from multiprocessing import parent_process
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

LONGEST = 100e-6  # seconds awake, but for those in which the pool's process ran
_LONGEST_BESIDE_POOL = 0.01  # seconds awake with those
_PREEMPTED = 300e-6  # seconds that a yield takes at least if somebody who had more to do ran meanwhile
_POOL_SHARE = 0.8  # of such a time that the pool's process has run, if it was that one
_REST = 0.1  # seconds


class Vigil:
    """Waits until a channel can be read."""

    def __init__(self, channel: socket.socket) -> None:
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._is_soon = False  # the last wait was short
        self._rests_until = 0.0
        self._read_pool_clock = _open_pool_clock()

    def wait(self) -> None:
        began = monotonic()
        if self._is_soon and began >= self._rests_until and self._look_out(began):
            return
        self._poll.poll()
        self._is_soon = monotonic() - began < LONGEST

    def _look_out(self, began: float) -> bool:
        """Return True if something came while it was awake."""
        now, until, ran = began, began + LONGEST, self._read_pool_clock()
        while now < until:
            if self._poll.poll(0):
                return True
            os.sched_yield()
            before, now = now, monotonic()
            if now - before > _PREEMPTED:
                ran_before, ran = ran, self._read_pool_clock()
                if ran - ran_before < _POOL_SHARE * (now - before):
                    self._rests_until = now + _REST
                    break
                until = min(now + LONGEST, began + _LONGEST_BESIDE_POOL)
        return False


def _open_pool_clock() -> Callable[[], float]:
    """Return what reads how much CPU time the pool's process has used, in seconds; always 0 where that cannot be."""
    pool = parent_process()
    if sys.platform != "linux" or pool is None or pool.pid is None:
        return float
    return partial(_read_clock, ~pool.pid << 3 | 2)  # as clock_getcpuclockid(3) makes it


def _read_clock(clock: int) -> float:
    try:
        return time.clock_gettime(clock)
    except OSError:  # the process has gone, or this is not allowed
        return 0.0


def open_vigil(channel: socket.socket) -> Callable[[], object]:
    """Return what waits until a blocking channel can be read; where that cannot be done so, the read itself waits."""
    if not hasattr(os, "sched_yield") or not hasattr(select, "poll"):
        return bool  # it does nothing
    return Vigil(channel).wait
