"""What `make demo` runs: domains in the standard library's own source tree, and a crash that harms nobody else."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import re
import sysconfig
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cpupool
from cpupool import domains

Files = list[tuple[str, int]]


def standard_library() -> Files:
    """Return path and size of the standard library's own source files."""
    found = domains.find_files([sysconfig.get_path("stdlib")], unreadable={})
    return [
        (path, size)
        for path, size in found
        if path.endswith(".py") and not {"site-packages", "dist-packages"} & set(Path(path).parts)
    ]


def count_here(files: Files) -> tuple[Counter[str], float]:
    """Count the domains in this process; return the counts and the seconds."""
    started = time.perf_counter()
    total = domains.Extraction()
    for task in domains.plan_ranges(files):
        total.add(domains.extract(task))
    return total.counts, time.perf_counter() - started


async def count_in_pool(pool: cpupool.CpuPool, files: Files) -> tuple[Counter[str], float]:
    """Count them in the workers of a pool."""
    started = time.perf_counter()
    total = domains.Extraction()
    await domains.extract_domains_from_files(pool, files, total)
    return total.counts, time.perf_counter() - started


PATTERN = re.compile(r"([a-zA-Z0-9\-_]+\.){1,}[a-zA-Z0-9\-_]+")


def find_in_chunk(chunk: str) -> list[str]:
    return [match.group() for match in PATTERN.finditer(chunk)]


def read_in_chunks(files: Files) -> list[str]:
    texts = [Path(path).read_text("utf-8", "replace") for path, _ in files]
    return [text[at : at + 1000] for text in texts for at in range(0, len(text), 1000)]


async def count_as_tutorials_do(files: Files) -> tuple[Counter[str], float]:
    """Send every 1,000 characters to a `ProcessPoolExecutor` as a task of their own."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(cpupool.usable_cpus(), mp_context=context) as executor:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(executor, find_in_chunk, "") for _ in range(8)))
        started = time.perf_counter()
        chunks = read_in_chunks(files)
        found = await asyncio.gather(*(loop.run_in_executor(executor, find_in_chunk, chunk) for chunk in chunks))
        counts = Counter(domain for each in found for domain in each)
        return counts, time.perf_counter() - started


def segfault() -> None:
    ctypes.string_at(0)


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
    files = standard_library()
    print(f"Domain names in the standard library's source tree: {sum(size for _, size in files):,} bytes")
    async with cpupool.CpuPool() as pool:  # entering starts the workers
        runs = [(count_here(files), await count_in_pool(pool, files)) for _ in range(5)]
    here, pooled = runs[0][0][0], runs[0][1][0]
    seconds_here, seconds_pooled = (min(run[way][1] for run in runs) for way in (0, 1))
    print(f"  this process:        {seconds_here:.2f} s (the best of 5)")
    workers = cpupool.usable_cpus()
    print(f"  a pool of {workers} workers: {seconds_pooled:.2f} s, {seconds_here / seconds_pooled:.2f} times as fast")
    if list(here.items()) != list(pooled.items()):
        raise SystemExit("the results differ")
    print(f"  the results are equal: {here.total():,} domains, {len(here):,} different")
    for domain, count in here.most_common(5):
        print(f"    {count:>7,}  {domain}")
    naive, seconds_naive = await count_as_tutorials_do(files)
    print(
        f"  as tutorials do, a task for every 1,000 characters on a ProcessPoolExecutor: {seconds_naive:.2f} s;\n"
        f"    the pool is {seconds_naive / seconds_pooled:.1f} times as fast, and cuts no domain in two\n"
        f"    (they miss {(here - naive).total():,} and find {(naive - here).total():,} that are not there)"
    )
    print("A segmentation fault in one of eleven calls")
    await survive_a_segfault()


if __name__ == "__main__":
    asyncio.run(main())
