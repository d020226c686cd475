"""What a trivial call costs, beside `loop.run_in_executor` with a `ProcessPoolExecutor` under forkserver.

All pools live through the whole run, and the measurements alternate between them, so that a noisy moment hits all;
the figures are medians over the rounds.  Usage: python benchmarks/round_trip.py [--rounds N] [--uvloop]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor

import cpupool

WORKERS = 2
AWAITED = 1_000
GATHERED = 5_000

PEER = "run_in_executor(ProcessPoolExecutor)"

Call = Callable[[int], Awaitable[int]]


def double(number: int) -> int:
    return number * 2


async def median_round_trip(call: Call) -> float:
    """Await calls one after another; return the median in microseconds."""
    times = []
    for number in range(AWAITED):
        start = time.perf_counter()
        await call(number)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


async def throughput(call: Call) -> float:
    """Gather many calls at once; return calls a second."""
    gc.collect()
    start = time.perf_counter()
    results = await asyncio.gather(*(call(number) for number in range(GATHERED)))
    seconds = time.perf_counter() - start
    assert results == [number * 2 for number in range(GATHERED)]
    return GATHERED / seconds


async def main(rounds: int) -> None:
    loop = asyncio.get_running_loop()
    context = multiprocessing.get_context("forkserver")
    with (
        ProcessPoolExecutor(WORKERS, mp_context=context) as peer_executor,
        cpupool.PoolExecutor(WORKERS, mp_context=context) as our_executor,
    ):
        async with cpupool.CpuPool(WORKERS, mp_context=context) as pool:
            calls: dict[str, Call] = {
                PEER: lambda number: loop.run_in_executor(peer_executor, double, number),
                "pool.run": lambda number: pool.run(double, number),
                "run_in_executor(PoolExecutor)": lambda number: loop.run_in_executor(our_executor, double, number),
            }
            round_trips: dict[str, list[float]] = {name: [] for name in calls}
            throughputs: dict[str, list[float]] = {name: [] for name in calls}
            for call in calls.values():
                await asyncio.gather(*(call(number) for number in range(GATHERED)))  # warm
            for _ in range(rounds):
                for name, call in calls.items():
                    round_trips[name].append(await median_round_trip(call))
                    throughputs[name].append(await throughput(call))
    print(f"{type(loop).__module__}, {WORKERS} workers, medians of {rounds} rounds")
    for name in calls:
        trip, rate = statistics.median(round_trips[name]), statistics.median(throughputs[name])
        print(f"{name:38s} round trip {trip:6.1f} us    {GATHERED:,} gathered: {rate:8,.0f} calls/s")
    for name in list(calls)[1:]:
        trip, rate = (ratio(each[name], each[PEER]) for each in (round_trips, throughputs))
        print(f"{name + ' : peer':38s} round trip {trip:6.2f}       {GATHERED:,} gathered: {rate:8.2f}")


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    if options.uvloop:
        import uvloop

        uvloop.run(main(options.rounds))
    else:
        asyncio.run(main(options.rounds))
