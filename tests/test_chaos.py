"""Calls of mixed kinds while workers are killed at random: each call ends exactly once, and nothing is left behind.

`make chaos` runs it for longer: CPUPOOL_CHAOS_CALLS says how many calls, CPUPOOL_CHAOS_SEED which random numbers.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import signal
import threading
import time

import pytest

import tasks
from cpupool import CpuPool, WorkerDied

CALLS = int(os.environ.get("CPUPOOL_CHAOS_CALLS", "2000"))
SEED = int(os.environ.get("CPUPOOL_CHAOS_SEED", "0")) or random.randrange(1, 2**32)
SECONDS = 60 * max(CALLS / 2000, 1)


class Killer:
    """Sends signals to random workers, at random intervals, until it is told to stop."""

    def __init__(self, pool: CpuPool, randomness: random.Random) -> None:
        self.sent: collections.Counter[str] = collections.Counter()
        self._pool = pool
        self._random = randomness
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._random.uniform(0.005, 0.06)):
            workers = list(set(self._pool._supervisor._crew.workers))
            if not workers:
                continue
            kind = self._random.choice(["SIGKILL", "SIGTERM", "SIGSTOP"])
            try:
                pidfd = os.pidfd_open(self._random.choice(workers).process.pid)
            except ProcessLookupError:
                continue
            try:
                signal.pidfd_send_signal(pidfd, signal.Signals[kind])
                if kind == "SIGSTOP":
                    self._is_over.wait(self._random.uniform(0, 0.03))
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended
            finally:
                os.close(pidfd)
            self.sent[kind] += 1


async def _run_calls(pool: CpuPool, randomness: random.Random) -> collections.Counter[str]:
    outcomes: collections.Counter[str] = collections.Counter()
    at_once = asyncio.Semaphore(32)

    async def call(number: int) -> None:
        kind = randomness.randrange(6)
        async with at_once:
            try:
                result = await pool.run(tasks.mixed, kind, number)
            except WorkerDied:
                outcomes["died"] += 1
            except LookupError as error:
                is_right = (kind, error.args) == (4, (number,))
                outcomes["raised" if is_right else "wrong"] += 1
            else:
                outcomes["returned" if result == number else "wrong"] += 1

    await asyncio.gather(*(call(number) for number in range(CALLS)))
    return outcomes


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_chaos() -> None:
    """2,000 calls over 4 workers in less than 60 s; every one of them has exactly one outcome."""
    randomness = random.Random(SEED)
    with CpuPool(4, name=f"chaos with seed {SEED}") as pool:
        killer = Killer(pool, random.Random(SEED + 1))
        start = time.monotonic()
        try:
            outcomes = asyncio.run(asyncio.wait_for(_run_calls(pool, randomness), SECONDS))
        finally:
            killer.stop()
        seconds = time.monotonic() - start
        assert pool.run_sync(tasks.add, 1) == 1
    print(f"seed {SEED}, {seconds:.1f} s, {dict(outcomes)}, sent {dict(killer.sent)}")
    assert outcomes.total() == CALLS
    assert not outcomes["wrong"]
    assert outcomes["died"] <= killer.sent.total()
    assert min(outcomes["returned"], outcomes["raised"]) > CALLS / 12
    assert min(killer.sent[kind] for kind in ("SIGKILL", "SIGTERM", "SIGSTOP")) > 0
