"""Workers' lives: what replacing them costs, whether a leak stays bounded, and how fast a worker is born.

Run it with `make bench`, or `python benchmarks/lives.py [--rounds N]`; it needs NumPy and a /proc.
"""

from __future__ import annotations

import os
import time

import cpupool

if __name__ == "__main__":  # not in workers, which import this file too: as light as a worker's main module can be
    import argparse
    import asyncio
    import concurrent.futures
    import math
    import multiprocessing
    import statistics
    from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
leaked: list[bytearray] = []


def work(seconds: float, *, asleep: bool) -> tuple[float, float]:
    """Take some time; return when it began and ended, on the clock that all processes share."""
    begin = time.monotonic()
    if asleep:
        time.sleep(seconds)
    while time.monotonic() < begin + seconds:
        pass
    return begin, time.monotonic()


def leak(size: int) -> None:
    leaked.append(bytearray(size))


def use_numpy() -> float:
    import numpy as np

    return float(np.arange(10.0).sum())


def die() -> None:
    os._exit(1)


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(math.ceil(len(values) * percent / 100), len(values)) - 1]


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


# --- replacing ---


async def measure_waits(
    pool: cpupool.CpuPool, calls: int, seconds: float, interval: float, *, asleep: bool
) -> tuple[list[float], list[float]]:
    """Return how long each call waited for a worker, and how long it took to fill each place that came free."""
    times: list[tuple[float, float, float]] = []

    async def call() -> None:
        asked = time.monotonic()
        begun, ended = await pool.run(work, seconds, asleep=asleep)
        times.append((asked, begun, ended))

    async with asyncio.TaskGroup() as group:
        for _ in range(calls):
            group.create_task(call())
            if interval:
                await asyncio.sleep(interval)
    begins = sorted(begun for _, begun, _ in times)
    ends = sorted(ended for _, _, ended in times)
    places = pool.max_workers
    gaps = [begun - ended for begun, ended in zip(begins[places:], ends, strict=False)]
    assert len(times) == calls, "none was lost"
    return [begun - asked for asked, begun, _ in times], gaps


async def measure_replacing(calls: int, rounds: int) -> None:
    print(f"\n{calls} calls, 2 workers, each replaced after every task, beside workers that stay")
    print(f"{'':50}{'wait for a worker, ms':>26}{'empty place, ms':>22}")
    print(f"{'':50}{'median':>13}{'p99':>13}{'median':>11}{'p99':>11}")
    for label, interval, asleep in (
        ("all at once, tasks sleep 20 ms", 0.0, True),
        ("one every 20 ms, tasks sleep 20 ms", 0.02, True),
        ("all at once, tasks compute 20 ms", 0.0, False),
    ):
        for name, limit in (("stay", None), ("are replaced", 1)):
            results = []
            for _ in range(rounds):
                async with cpupool.CpuPool(2, max_tasks_per_child=limit) as pool:
                    results.append(await measure_waits(pool, calls, 0.02, interval, asleep=asleep))
            waits, gaps = min(results, key=lambda result: percentile(result[0], 99))
            figures = [statistics.median(waits), percentile(waits, 99)]
            if not interval:  # else places are empty because nobody wants them
                figures += [statistics.median(gaps), percentile(gaps, 99)]
            row = "".join(f"{1000 * each:{width}.1f}" for each, width in zip(figures, (13, 13, 11, 11), strict=False))
            print(f"  {label:35}{name:>13}{row}")


# --- a leak ---


async def measure_leak(tasks: int, size: int, limit: int) -> None:
    print(f"\nA leak of {size // 10**6} MB a task, max_memory_per_child={limit // 10**6} MB, 2 workers, {tasks} tasks")
    curve = []
    pids = set()
    async with cpupool.CpuPool(2, max_memory_per_child=limit) as pool:
        for _ in range(tasks // 2):
            await asyncio.gather(pool.run(leak, size), pool.run(leak, size))
            children = [worker.process.pid for worker in list(pool._supervisor._crew.workers)]
            pids.update(children)
            curve.append(sum(resident(pid) for pid in children))
    highest = max(curve)
    for index in range(0, len(curve), 5):
        total = max(curve[index : index + 5])
        print(f"  after {2 * index + 10:4} tasks {total / 1e6:6.0f} MB {'#' * round(60 * total / highest)}")
    print(f"  at most {highest / 1e6:.0f} MB in all workers; {len(pids)} workers, no failure")
    print(f"  without a limit: {tasks * size / 1e6:.0f} MB")


# --- birth ---


async def measure_births(rounds: int) -> None:
    print("\nFrom the need of a worker to the first result of a function that uses NumPy, ms")
    ours: list[tuple[str, tuple[str, ...]]] = [
        ("cpupool, preload=('__main__', 'numpy')", ("__main__", "numpy")),
        ("cpupool, preload=('numpy',)", ("numpy",)),
        ("cpupool, forkserver", ()),
    ]
    times: dict[str, list[float]] = {}
    for label, preload in ours:
        times[label] = []
        async with cpupool.CpuPool(1, preload=preload) as pool:
            await pool.run(use_numpy)
            for _ in range(rounds):
                try:
                    await pool.run(die)
                except cpupool.WorkerDied:
                    begin = time.perf_counter()
                    await pool.run(use_numpy)
                    times[label].append(time.perf_counter() - begin)
    for method in ("forkserver", "spawn"):
        label = f"ProcessPoolExecutor, {method}"
        times[label] = []
        context = multiprocessing.get_context(method)
        for _ in range(max(rounds // 3, 3)):
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
                begin = time.perf_counter()
                executor.submit(use_numpy).result()
                times[label].append(time.perf_counter() - begin)
    for label, taken in times.items():
        milliseconds = sorted(1000 * each for each in taken)
        print(f"  {label:42} median {statistics.median(milliseconds):6.1f}   worst {milliseconds[-1]:6.1f}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each measurement is taken")
    rounds = parser.parse_args().rounds
    await measure_replacing(500, rounds)
    await measure_leak(200, 20_000_000, 200_000_000)
    await measure_births(10 * rounds)


def run() -> None:
    asyncio.run(main())


if __name__ == "__main__":
    run()
