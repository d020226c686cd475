"""What many items cost, beside `multiprocessing.Pool.map`, `ProcessPoolExecutor.map`, joblib and mpire.

All pools live through the whole run, start their workers by forkserver where they let one choose, and the measurements
alternate between them; the figures are medians over the rounds.  Usage: python benchmarks/many_items.py [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import joblib
import psutil
from mpire.pool import WorkerPool

import cpupool
from cpupool import domains

WORKERS = 2
MANY = 1_000_000
FEW = 20_000  # for what takes too long with all of them; the figure is scaled
GIGABYTE = 2**30

Run = Callable[[], Awaitable[list[Any]] | list[Any]]


def work(seconds: float) -> float:
    """Compute for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


async def measure(run: Run) -> float:
    started = time.perf_counter()
    results = run()
    if isinstance(results, Awaitable):
        await results
    return time.perf_counter() - started


async def compare(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, the rounds interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(await measure(run))
    return {name: statistics.median(each) for name, each in seconds.items()}


async def tiny_items(pool: cpupool.CpuPool, rounds: int) -> None:
    """A million times `abs`."""
    context = multiprocessing.get_context("forkserver")
    with (
        context.Pool(WORKERS) as std_pool,
        ProcessPoolExecutor(WORKERS, mp_context=context) as executor,
        WorkerPool(WORKERS, start_method="forkserver", keep_alive=True) as mpire_pool,
        joblib.Parallel(n_jobs=WORKERS) as parallel,
    ):

        def by_joblib(count: int) -> list[int]:
            found: list[int] = parallel(joblib.delayed(abs)(number) for number in range(count))
            return found

        runs: dict[str, Run] = {
            "cpupool": lambda: pool.map(abs, range(MANY)),
            "multiprocessing.Pool.map": lambda: std_pool.map(abs, range(MANY)),
            "ProcessPoolExecutor.map, chunksize 100": lambda: list(executor.map(abs, range(MANY), chunksize=100)),
            "ProcessPoolExecutor.map, chunksize 10,000": lambda: list(executor.map(abs, range(MANY), chunksize=10_000)),
            "mpire": lambda: mpire_pool.map(abs, range(MANY)),
        }
        slow: dict[str, Run] = {
            "ProcessPoolExecutor.map, chunksize 1": lambda: list(executor.map(abs, range(FEW))),
            "joblib": lambda: by_joblib(FEW),
        }
        await compare(runs | slow, 1)  # warm
        found = await compare(runs, rounds)
        found |= {name: each * MANY / FEW for name, each in (await compare(slow, 3)).items()}
        lists = await compare(
            {
                "cpupool": lambda: pool.map(abs, list(range(MANY))),
                "multiprocessing.Pool.map": lambda: std_pool.map(abs, list(range(MANY))),
            },
            rounds,
        )
    print(f"{MANY:,} items of abs, from a range")
    for name, seconds in sorted(found.items(), key=lambda item: item[1]):
        scaled = f"  (from {FEW:,} items)" if name in slow else ""
        print(f"  {name:45s}{seconds * 1000:10,.0f} ms   {seconds / found['cpupool']:7.2f}{scaled}")
    print("  the same from a list")
    for name, seconds in lists.items():
        print(f"  {name:45s}{seconds * 1000:10,.0f} ms   {seconds / lists['cpupool']:7.2f}")


async def long_items(pool: cpupool.CpuPool) -> None:
    """Items of 20 ms; and of a microsecond and 50 ms, alternating."""
    for title, times in (
        ("200 items of 20 ms", [0.02] * 200),
        ("items of 1 us and 50 ms in turn, 100 of each", [1e-6, 0.05] * 100),
        ("100 items of 1 us, then 40 of 50 ms, then 100 of 1 us", [*[1e-6] * 100, *[0.05] * 40, *[1e-6] * 100]),
    ):
        alone = await measure(lambda times=times: list(map(work, times)))  # type: ignore[misc]
        seconds = statistics.median(
            [await measure(lambda times=times: pool.map(work, times)) for _ in range(3)]  # type: ignore[misc]
        )
        ideal = sum(times) / WORKERS
        print(
            f"{title}: {seconds:.3f} s, {alone / seconds:.2f} times one process, "
            f"{seconds / ideal:.3f} of the ideal schedule"
        )


async def fairness(pool: cpupool.CpuPool) -> None:
    """Small calls while a million items run."""
    waits = []
    crowd = asyncio.ensure_future(pool.map(work, [0.001] * MANY))
    for _ in range(200):
        started = time.perf_counter()
        await pool.run(work, 0.001)
        waits.append(time.perf_counter() - started)
        await asyncio.sleep(0.005)
    crowd.cancel()
    await asyncio.gather(crowd, return_exceptions=True)
    waits.sort()
    print(
        f"a call of 1 ms while a million items of 1 ms run: p50 {waits[100] * 1000:.0f} ms, "
        f"p99 {waits[197] * 1000:.0f} ms, worst {waits[-1] * 1000:.0f} ms"
    )


class PeakMemory:
    """The most memory that this process and its children held, each for itself."""

    def __enter__(self) -> PeakMemory:
        self.here = self.worker = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(0.05):
            self.here = max(self.here, process.memory_info().rss)
            for child in process.children(recursive=True):
                try:
                    self.worker = max(self.worker, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    pass

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def write_gigabyte(path: Path) -> None:
    numbers = range(20_000)
    lines = [f"{each} see www.example{each % 1000}.com, or mail a@host-{each % 77}.example.org\n" for each in numbers]
    block = "".join(lines).encode()
    with open(path, "wb") as file:
        while file.tell() < GIGABYTE:
            file.write(block)


async def gigabyte(pool: cpupool.CpuPool, folder: Path) -> None:
    """Domains in a file of a gigabyte."""
    path = folder / "gigabyte.txt"
    write_gigabyte(path)
    size = path.stat().st_size
    alone = domains.Extraction()

    def here() -> list[Any]:
        for task in domains.plan_ranges([(str(path), size)]):
            alone.add(domains.extract(task))
        return []

    seconds_alone = await measure(here)
    with PeakMemory() as peak:
        started = time.perf_counter()
        found = await domains.extract_domains_from_paths(pool, [str(path)])
        seconds = time.perf_counter() - started
    assert list(found.counts.items()) == list(alone.counts.items())
    print(
        f"domains in a file of {size:,} bytes: {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s, "
        f"{seconds_alone / seconds:.2f} times one process; at most {peak.here / 2**20:.0f} MB here and "
        f"{peak.worker / 2**20:.0f} MB in a worker; the results are equal"
    )


async def text(pool: cpupool.CpuPool) -> None:
    """Domains in a text in memory."""
    words = " ".join(f"www.example{number}.com or not" for number in range(1_000_000))
    pairs = []
    for _ in range(3):
        alone = await measure(lambda: domains.find_domains(words))
        pairs.append((alone, await measure(lambda: domains.extract_domains(pool, words))))
    assert await domains.extract_domains(pool, words) == domains.find_domains(words)
    ratio = statistics.median(alone / pooled for alone, pooled in pairs)
    print(f"domains in a text of {len(words):,} characters in memory: {ratio:.2f} times one process (results travel)")


async def main(rounds: int) -> None:
    print(f"{os.cpu_count()} CPUs, {WORKERS} workers; ratios are to cpupool, above 1 is slower")
    async with cpupool.CpuPool(WORKERS) as pool:
        await tiny_items(pool, rounds)
        await long_items(pool)
        await fairness(pool)
        await text(pool)
        with tempfile.TemporaryDirectory() as folder:
            await gigabyte(pool, Path(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure what many items cost.")
    parser.add_argument("--rounds", type=int, default=9)
    asyncio.run(main(parser.parse_args().rounds))
