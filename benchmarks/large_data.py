"""What large values cost, and how long the event loop stands still for them, beside other pools.

All pools have one worker, live through the whole run and start it by forkserver where they let one choose.  In each
round each of them makes a call that does not count, and then some that do; the figures are medians.  Memory that nobody
has used for some seconds can be many times slower on a virtual machine, whose host takes it away meanwhile; so calls
after a pause are measured for themselves.  Every task touches all bytes that it gets.

Usage: python benchmarks/large_data.py [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import anyio.to_process
import joblib
import loky
import numpy as np
import numpy.typing as npt
import pebble
import psutil

import cpupool

MEGABYTE = 2**20
ARRAY_BYTES = 100 * MEGABYTE
DICTS = 400_000
CALLS = 3  # in a row, in each round

Array = npt.NDArray[np.float64]
Call = Callable[..., Awaitable[Any]]


def total(array: Array) -> float:
    return float(array.sum())


def echo(array: Array) -> Array:
    array.sum()
    return array


def total_shared(shared: cpupool.Shared[Array]) -> tuple[float, float]:
    """Return the sum, and the seconds that it takes by itself."""
    array = shared.get()
    started = time.perf_counter()
    value = float(array.sum())
    return value, time.perf_counter() - started


def count(items: list[dict[str, Any]]) -> int:
    return sum(item["id"] >= 0 for item in items)


def make_dicts(number: int) -> list[dict[str, Any]]:
    return [{"id": each, "name": f"user {each}", "is_active": each % 3 == 0} for each in range(number)]


def resident() -> int:
    return psutil.Process().memory_info().rss


async def measure(call: Callable[[], Awaitable[Any]]) -> float:
    started = time.perf_counter()
    await call()
    return time.perf_counter() - started


async def compare(calls: dict[str, Callable[[], Awaitable[Any]]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median seconds of each, the rounds interleaved: of calls in a row, and of the first after a pause."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    first: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            gc.collect()
            first[name].append(await measure(call))
            await call()
            seconds[name] += [await measure(call) for _ in range(CALLS)]
    return {name: (statistics.median(each), statistics.median(first[name])) for name, each in seconds.items()}


async def longest_stall(call: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
    """Return for how long the loop stood still while a call was made, at most, and how long the call took."""
    stalls: list[float] = []

    async def tick() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            stalls.append(time.perf_counter() - started - 0.001)

    gc.collect()
    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.05)
    stalls.clear()
    started = time.perf_counter()
    result = await call()
    taken = time.perf_counter() - started
    await asyncio.sleep(0.02)
    ticker.cancel()
    del result  # not before: to free it takes a while too, and is the caller's affair
    return max(stalls), taken


def print_table(title: str, seconds: dict[str, tuple[float, float]]) -> None:
    print(f"{title}: in a row, beside cpupool; after a pause")
    for name, (each, first) in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"  {name:25s}{each * 1000:10.1f} ms {each / seconds['cpupool'][0]:7.2f} {first * 1000:10.1f} ms")


async def arrays(calls: dict[str, Call], rounds: int, joblib_call: Callable[[Any, Any], Any]) -> None:
    array = np.random.default_rng(1).random(ARRAY_BYTES // 8)
    warm = array.copy()
    started = time.perf_counter()
    copies = 7
    for _ in range(copies):
        warm[:] = array
    copy = (time.perf_counter() - started) / copies
    started = time.perf_counter()
    for _ in range(copies):
        array.sum()
    summing = (time.perf_counter() - started) / copies
    print(f"100 MB of float64: one warm copy takes {copy * 1000:.1f} ms, the sum {summing * 1000:.1f} ms")
    for title, function in (("as argument, its sum returned", total), ("the same array returned", echo)):
        runs: dict[str, Callable[[], Awaitable[Any]]] = {
            name: partial(call, function, array) for name, call in calls.items()
        }

        async def by_joblib(function: Any = function) -> Any:
            return joblib_call(function, array)

        runs["joblib (memmap)"] = by_joblib
        found = await compare(runs, rounds)
        print_table(title, found)
        if function is total:
            print(f"  cpupool: {(found['cpupool'][0] - summing) / copy:.2f} warm copies, and the sum")


async def stalls(calls: dict[str, Call], rounds: int) -> None:
    dicts = make_dicts(DICTS)
    array = np.random.default_rng(1).random(ARRAY_BYTES // 8)
    for title, function, value in (
        (f"{DICTS:,} dicts as argument", count, dicts),
        (f"{DICTS:,} dicts as result", make_dicts, DICTS),
        ("100 MB array as argument", total, array),
        ("100 MB array there and back", echo, array),
    ):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                found[name].append(await longest_stall(partial(call, function, value)))
        print(f"{title}: longest stall of the loop (median, worst), time taken")
        for name, pairs in found.items():
            longest = [stall for stall, _ in pairs]
            taken = statistics.median(seconds for _, seconds in pairs)
            print(
                f"  {name:35s}{statistics.median(longest) * 1000:8.1f} ms {max(longest) * 1000:8.1f} ms"
                f"{taken * 1000:10.0f} ms"
            )


async def shared(pool: cpupool.CpuPool) -> None:
    array = np.random.default_rng(1).random(ARRAY_BYTES // 8)
    async with pool.share(array) as share:
        await pool.run(total_shared, share)
        started = time.perf_counter()
        own = [(await pool.run(total_shared, share))[1] for _ in range(100)]
        taken = time.perf_counter() - started
    each, summing = taken / 100 * 1000, sum(own) / 100 * 1000
    print(f"100 calls with the array shared: {each:.2f} ms each, of which the sum {summing:.2f} ms")


async def many_calls(pool: cpupool.CpuPool) -> None:
    array = np.random.default_rng(1).random(10 * MEGABYTE // 8)
    for _ in range(20):
        await pool.run(echo, array)

    async def weigh() -> tuple[int, int, int]:
        gc.collect()
        return resident() // MEGABYTE, await pool.run(resident) // MEGABYTE, len(os.listdir("/proc/self/fd"))

    before = await weigh()
    started = time.perf_counter()
    for _ in range(1000):
        await pool.run(echo, array)
    taken = time.perf_counter() - started
    after = await weigh()
    print(f"1,000 calls with 10 MB there and back, {taken * 1000 / 1000:.1f} ms each; before and after:")
    for name, old, new in zip(
        ("MB of the pool's process", "MB of the worker", "descriptors"), before, after, strict=True
    ):
        print(f"  {name:30s}{old:6d}{new:6d}")


async def by_size(calls: dict[str, Call]) -> None:
    print("bytes as argument, round trip in microseconds")
    for exponent in range(12, 27, 2):
        data = b"x" * 2**exponent
        repeats = 200 if exponent < 20 else 20
        row = []
        for call in calls.values():
            times = [await measure(partial(call, len, data)) for _ in range(repeats)]
            row.append(statistics.median(times) * 1e6)
        cells = "".join(f"{name} {each:10,.0f}   " for name, each in zip(calls, row, strict=True))
        print(f"  {2**exponent:12,d}  {cells}")


async def main(rounds: int) -> None:
    loop = asyncio.get_running_loop()
    context = multiprocessing.get_context("forkserver")
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs")
    with (
        ProcessPoolExecutor(1, mp_context=context) as executor,
        pebble.ProcessPool(1, context=context) as pebble_pool,
        joblib.Parallel(n_jobs=2) as parallel,
    ):
        loky_executor = loky.get_reusable_executor(1, timeout=600)

        async def by_executor(function: Any, value: Any) -> Any:
            return await loop.run_in_executor(executor, function, value)

        async def by_loky(function: Any, value: Any) -> Any:
            return await loop.run_in_executor(loky_executor, function, value)

        async def by_pebble(function: Any, value: Any) -> Any:
            return await asyncio.wrap_future(pebble_pool.schedule(function, args=(value,)))

        async def by_anyio(function: Any, value: Any) -> Any:
            return await anyio.to_process.run_sync(function, value)

        def by_joblib(function: Any, value: Any) -> Any:
            return parallel([joblib.delayed(function)(value)])[0]

        async with cpupool.CpuPool(1, mp_context=context) as pool:
            ours_and_two: dict[str, Call] = {
                "cpupool": pool.run,
                "ProcessPoolExecutor": by_executor,
                "anyio.to_process": by_anyio,
            }
            calls: dict[str, Call] = {**ours_and_two, "pebble": by_pebble, "loky": by_loky}
            await arrays(calls, rounds, by_joblib)
            await shared(pool)
            await stalls(ours_and_two, rounds)
            await by_size({"cpupool": pool.run, "ProcessPoolExecutor": by_executor})
            await many_calls(pool)
        loky_executor.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(main(parser.parse_args().rounds))
