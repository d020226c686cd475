"""What it takes to stop a task: from its deadline to a free CPU, what the others feel of it, and what a timeout costs.

It prints figures beside the bounds that we want to keep.  Usage: python benchmarks/stopping.py [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import os
import re
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cpupool

TIMEOUT = 0.1  # seconds
GRACE = 0.2
SAMPLE = 0.0002  # seconds between two looks at a process


def loop_in_python() -> None:
    while True:
        pass


def backtrack() -> None:
    re.match(r"(a+)+$", "a" * 40 + "b")


def hold_gil() -> None:
    collections.deque(itertools.repeat(0), maxlen=0)


def get_pid() -> int:
    return os.getpid()


def cpu_ticks(pid: int) -> int | None:
    """Return the CPU time of a process in clock ticks, or None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[11]) + int(fields[12])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"
    except (FileNotFoundError, ProcessLookupError):
        return False


def seconds_to_free_cpu(pool: cpupool.CpuPool, fn: Callable[[], None]) -> float:
    """Run a task past its timeout; return how long after its deadline its process no longer runs."""
    pid = pool.run_sync(get_pid)
    last_seen_running = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal last_seen_running
        while not done.is_set():
            if is_running(pid):
                last_seen_running = time.monotonic()
            time.sleep(SAMPLE)

    watcher = threading.Thread(target=watch)
    watcher.start()
    deadline = time.monotonic() + TIMEOUT
    with contextlib.suppress(cpupool.TaskTimeout):
        pool.options(timeout=TIMEOUT).run_sync(fn)
    ended = time.monotonic()
    done.set()
    watcher.join()
    ticks = cpu_ticks(pid)
    time.sleep(0.02)
    assert cpu_ticks(pid) == ticks, "it goes on after its caller was told that it is stopped"
    return max(min(last_seen_running + SAMPLE, ended) - deadline, 0)


async def worst_probe(pool: cpupool.CpuPool, seconds: float) -> tuple[float, float]:
    """Call a second worker again and again; return the median and the worst round trip in seconds."""
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        await pool.run(abs, -1)
        times.append(time.perf_counter() - start)
        await asyncio.sleep(0.0005)
    return statistics.median(times), max(times)


async def delay_of_others() -> tuple[float, float]:
    """Return the worst round trip on another worker, while one is interrupted and killed, and while none is."""
    async with cpupool.CpuPool(2, grace=GRACE) as pool:
        _, quiet = await worst_probe(pool, TIMEOUT + GRACE)
        killed = asyncio.create_task(pool.options(timeout=TIMEOUT).run(hold_gil))
        _, busy = await worst_probe(pool, TIMEOUT + GRACE + 0.05)
        with contextlib.suppress(cpupool.TaskTimeout):
            await killed
    return busy, quiet


async def cost_of_timeout(rounds: int) -> float:
    """Return the round trip of a trivial call with a timeout, as a ratio to one without."""
    ratios = []
    async with cpupool.CpuPool(1) as pool:
        timed = pool.options(timeout=30)
        for _ in range(rounds):
            medians = []
            for target in (pool, timed):
                times = []
                for _ in range(1_000):
                    start = time.perf_counter()
                    await target.run(abs, -1)
                    times.append(time.perf_counter() - start)
                medians.append(statistics.median(times))
            ratios.append(medians[1] / medians[0])
    return statistics.median(ratios)


async def cancellations(count: int) -> tuple[float, str]:
    """Cancel running calls; return the median seconds until the worker was free for the next, and what is left."""

    def census() -> tuple[int, int, int]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(children)

    times = []
    async with cpupool.CpuPool(2) as pool:
        await pool.run(abs, -1)
        pids = {await pool.run(get_pid) for _ in range(20)}
        before = census()
        for _ in range(count):
            call = asyncio.create_task(pool.run(loop_in_python))
            await asyncio.sleep(0.001)
            start = time.perf_counter()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await asyncio.gather(pool.run(abs, -1), pool.run(abs, -1))
            times.append(time.perf_counter() - start)
        pids |= {await pool.run(get_pid) for _ in range(20)}
        after = census()
    names = ("descriptors", "threads", "children")
    left = ", ".join(f"{name} {b} -> {a}" for name, b, a in zip(names, before, after, strict=True))
    return statistics.median(times), f"{left}, workers seen {len(pids)}"


def main(rounds: int) -> None:
    print(f"timeout {TIMEOUT:g} s, grace {GRACE:g} s, median and worst of {rounds} rounds")
    for fn, bound in ((loop_in_python, 0.02), (backtrack, 0.02), (hold_gil, GRACE + 0.05)):
        with cpupool.CpuPool(1, grace=GRACE) as pool:
            times = [seconds_to_free_cpu(pool, fn) for _ in range(rounds)]
        worst, middle = max(times) * 1e3, statistics.median(times) * 1e3
        what = f"deadline to free CPU, {fn.__name__}"
        print(f"{what:40s}{middle:7.1f} ms, worst {worst:7.1f} ms   (bound {bound * 1e3:.0f})")
    delays = [asyncio.run(delay_of_others()) for _ in range(rounds)]
    busy, quiet = (statistics.median(each) * 1e3 for each in zip(*delays, strict=True))
    print(f"worst call on the other worker          {busy:7.1f} ms, without a kill {quiet:5.1f} ms   (bound 5 more)")
    ratio = asyncio.run(cost_of_timeout(rounds))
    print(f"round trip with a timeout : without     {ratio:7.2f}   (bound 1.10)")
    middle, left = asyncio.run(cancellations(1_000))
    print(f"1,000 cancellations, worker free after  {middle * 1e3:7.1f} ms; {left}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    main(parser.parse_args().rounds)
