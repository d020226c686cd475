"""What seeing inside costs: counting, beside the same pool without it; and what is asked of a pool.

Two pools live through the whole run, and the measurements alternate between them, in short turns; the ratio is the
median over all pairs of turns.  Usage: python benchmarks/seeing_inside.py [--turns N]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextvars
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import cpupool

AWAITED = 200  # calls in a turn
REPEATED = 200

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="r42")


class Uncounted:
    """In the place of a pool's tally."""

    def count(self, *_: object) -> None:
        """Count nothing."""

    note = tidy = count


def hold_gil(seconds: float) -> None:
    """Spend some time in C code that looks at nothing."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        collections.deque(itertools.repeat(0, 100_000_000), maxlen=0)


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


async def take_turn(pool: cpupool.CpuPool) -> float:
    """Return the median of some trivial calls, in microseconds."""
    times = []
    for _ in range(AWAITED):
        began = time.perf_counter()
        await pool.run(abs, -1)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


async def compare(subject: str, pool: cpupool.CpuPool, other: cpupool.CpuPool, turns: int) -> None:
    """Print what a trivial call costs in one pool, as a ratio to the other."""
    ratios, ours, theirs = [], [], []
    for number in range(turns):
        pools = (pool, other) if number % 2 else (other, pool)
        taken = [await take_turn(each) for each in pools]
        our, their = taken if number % 2 else reversed(taken)
        ours.append(our)
        theirs.append(their)
        ratios.append(our / their)
    low, high = statistics.quantiles(ratios, n=4)[::2]
    print(
        f"{subject}: {statistics.median(ours):.1f} us a call, {statistics.median(theirs):.1f} us without; "
        f"ratio {statistics.median(ratios):.3f} (half of all turns between {low:.3f} and {high:.3f})"
    )


def time_of(call: Callable[[], Any], times: int = REPEATED) -> float:
    """Return the median of some calls, in milliseconds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e3


async def main(turns: int) -> None:
    async with cpupool.CpuPool(1) as counted, cpupool.CpuPool(1) as uncounted:
        uncounted._supervisor.tally = Uncounted()  # type: ignore[assignment]
        await take_turn(counted)
        await take_turn(uncounted)
        await compare("counting", counted, uncounted, turns)
        async with cpupool.CpuPool(1) as same:
            await take_turn(same)
            await compare("noise: the same twice", same, counted, turns)
        async with cpupool.CpuPool(1, context=(request_id,)) as carrying:
            await take_turn(carrying)
            await compare("one context variable", carrying, counted, turns)
        print(f"statistics() of a pool with one worker: {time_of(counted.statistics) * 1e3:.0f} us")
        for task in (spin, hold_gil):
            running = asyncio.ensure_future(counted.run(task, 2.0))
            await asyncio.sleep(0.3)
            print(f"dump_stacks() while {task.__name__} runs: {time_of(counted.dump_stacks, 20):.1f} ms")
            await running


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=200, help="how often the measurements alternate")
    asyncio.run(main(parser.parse_args().turns))
