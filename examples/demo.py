"""What `make demo` runs: domains in the standard library's own source tree, and a crash that harms nobody else."""

from __future__ import annotations

import asyncio
import ctypes
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cpupool
from cpupool import domains


def segfault() -> None:
    ctypes.string_at(0)


def standard_library() -> Iterator[tuple[str, int]]:
    """Yield path and size of the standard library's own source files."""
    unreadable: dict[str, str] = {}
    for path, size in domains.find_files([sysconfig.get_path("stdlib")], unreadable):
        if path.endswith(".py") and not {"site-packages", "dist-packages"} & set(Path(path).parts):
            yield path, size


async def count_domains(tasks: list[list[domains.FileRange]], workers: int) -> tuple[Counter[str], float]:
    """Count the domains on so many workers; return the counts and the seconds, the pool's start left out."""
    async with cpupool.CpuPool(workers) as pool:
        started = time.perf_counter()
        found = await asyncio.gather(*(pool.run(domains.extract, task) for task in tasks))
        seconds = time.perf_counter() - started
    total = domains.Extraction()
    for each in found:
        total.add(each)
    return total.counts, seconds


async def survive_a_segfault() -> None:
    async with cpupool.CpuPool(2) as pool:
        calls = [pool.run(pow, 2, number) for number in range(10)]
        calls.insert(5, pool.run(segfault))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, cpupool.WorkerDied):
                print(f"  one call failed: {str(outcome).splitlines()[0]}")
        print(f"  the others: {[outcome for outcome in outcomes if isinstance(outcome, int)]}")
        print(f"  the same pool afterwards: {await pool.run(sum, [1, 2, 3])}")


async def main() -> None:
    tasks = list(domains.plan_ranges(standard_library()))
    size = sum(each.stop - each.start for task in tasks for each in task)
    print(f"Domain names in the standard library's source tree: {size:,} bytes, {len(tasks)} tasks")

    workers = cpupool.usable_cpus()
    one, seconds_on_one = await count_domains(tasks, 1)
    print(f"  1 worker:  {seconds_on_one:.2f} s")
    many, seconds_on_many = await count_domains(tasks, workers)
    print(f"  {workers} workers: {seconds_on_many:.2f} s, {seconds_on_one / seconds_on_many:.2f} times as fast")
    if one != many:
        raise SystemExit("the results differ")
    print(f"  the results are equal: {one.total():,} domains, {len(one):,} different")
    for domain, count in one.most_common(5):
        print(f"    {count:>7,}  {domain}")

    print("A segmentation fault in one of eleven calls")
    await survive_a_segfault()


if __name__ == "__main__":
    asyncio.run(main())
