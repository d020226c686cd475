"""What is measured of a system: each function takes one that is open, and returns figures by their names in `FIGURES`.

A figure that a system cannot have is missing; one that did not come is None: it hung, it raised, it never ended.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import statistics
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ping
import psutil
from chores import count, double, echo, get_pid, make_dicts, spin, spin_and_get_pid, total
from peers import System

from cpupool.domains import find_domains

WORKERS = 2
AWAITED = 1_000
AWAITED_FOR = 2.0  # seconds
GATHERED = 5_000
MANY_GATHERED = 100_000
ARRAY_BYTES = 64 * 2**20
DICTS = 100_000
PATIENCE = 60  # seconds for one measurement

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Figure:
    """What a figure is: a title, its unit, and whether more is better."""

    title: str
    unit: str
    more_is_better: bool = False


FIGURES = {
    "round_trip": Figure("round trip of a trivial call, median", "µs"),
    "round_trip_p99": Figure("round trip of a trivial call, 99th percentile", "µs"),
    "gathered": Figure(f"{GATHERED:,} trivial calls gathered", "calls/s", more_is_better=True),
    "gathered_stall": Figure(f"longest stall of the loop, {GATHERED:,} gathered", "ms"),
    "call_of_1000": Figure("a trivial call, 1,000 gathered", "µs"),
    "call_of_100000": Figure("a trivial call, 100,000 gathered", "µs"),
    "queued_memory": Figure("memory for a queued call, with its task", "bytes"),
    "tasks_1ms": Figure("400 tasks of 1 ms, beside the ideal time", "times"),
    "tasks_20ms": Figure("40 tasks of 20 ms, beside the ideal time", "times"),
    "tasks_stall": Figure("longest stall of the loop, tasks of 1 ms", "ms"),
    "million": Figure("a million tiny items", "ms"),
    "million_stall": Figure("longest stall of the loop, a million tiny items", "ms"),
    "array_in": Figure("64 MB array as argument, its sum returned", "ms"),
    "array_echo": Figure("64 MB array there and back", "ms"),
    "array_stall": Figure("longest stall of the loop, array there and back", "ms"),
    "objects_in": Figure(f"{DICTS:,} dicts as argument", "ms"),
    "objects_out": Figure(f"{DICTS:,} dicts as result", "ms"),
    "objects_stall": Figure(f"longest stall of the loop, {DICTS:,} dicts as argument", "ms"),
    "objects_out_stall": Figure(f"longest stall of the loop, {DICTS:,} dicts as result", "ms"),
    "first_result": Figure("start to first result", "ms"),
    "recovery": Figure("SIGKILL of an idle worker to two tasks at a time again", "ms"),
    "recovery_errors": Figure("calls that failed meanwhile", "calls"),
    "deadline": Figure("deadline of 0.1 s to a free CPU", "ms"),
    "domains": Figure("domains in a text of 12 MB", "MB/s", more_is_better=True),
    "domains_stall": Figure("longest stall of the loop, domains in a text of 12 MB", "ms"),
    "ping": Figure("a server's answer to a ping while eight callers have tasks of 20 ms run, median", "ms"),
    "ping_p99": Figure("the same, 99th percentile", "ms"),
    "requests": Figure("20 requests at once of one second of CPU time", "s"),
}


# --- how it is measured ---


@asynccontextmanager
async def watching_stalls() -> AsyncIterator[list[float]]:
    """Note for how long the loop stood still, again and again, in milliseconds."""
    stalls = [0.0]

    async def tick() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            stalls.append((time.perf_counter() - began - 0.001) * 1e3)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.02)
    stalls[:] = [0.0]
    try:
        yield stalls
        await asyncio.sleep(0.01)
    finally:
        ticker.cancel()


async def time_ms(call: Callable[[], Awaitable[Any]]) -> float:
    gc.collect()
    began = time.perf_counter()
    result = await call()
    taken = time.perf_counter() - began
    del result  # to free it is the caller's affair
    return taken * 1e3


async def call_in_task(system: System, function: Callable[..., Any], *args: Any) -> Any:
    return await system.call(function, *args)  # whatever it raises comes from here


async def median_ms(call: Callable[[], Awaitable[Any]], calls: int = 3) -> float:
    await call()  # warm
    return statistics.median([await time_ms(call) for _ in range(calls)])


async def gather(system: System, calls: int) -> float:
    """Return for how long each of so many calls at once takes, in microseconds."""
    gc.collect()
    began = time.perf_counter()
    results = await asyncio.gather(*(system.call(double, number) for number in range(calls)))
    taken = time.perf_counter() - began
    if results[-1] != 2 * (calls - 1):
        raise AssertionError(results[-1])
    return taken / calls * 1e6


# --- the measurements ---


async def round_trip(system: System) -> Figures:
    times: list[float] = []
    start = time.perf_counter()
    for number in range(AWAITED):
        if time.perf_counter() - start > AWAITED_FOR and len(times) >= 20:
            break  # so slow that fewer do
        began = time.perf_counter()
        await system.call(double, number)
        times.append((time.perf_counter() - began) * 1e6)
    return {"round_trip": statistics.median(times), "round_trip_p99": statistics.quantiles(times, n=100)[-1]}


async def gathered(system: System) -> Figures:
    if system.costs_a_pool or not system.calls_at_once:
        return {}
    each = statistics.median([await gather(system, GATHERED) for _ in range(3)])
    async with watching_stalls() as stalls:
        await gather(system, GATHERED)
    return {"gathered": 1e6 / each, "gathered_stall": max(stalls)}


async def many_gathered(system: System) -> Figures:
    """How much longer a call takes if very many wait; with each, asyncio's own tasks take longer too."""
    if system.costs_a_pool or not system.calls_at_once:
        return {}
    few = statistics.median([await gather(system, 1_000) for _ in range(5)])
    if few * MANY_GATHERED > PATIENCE / 3 * 1e6:
        return {"call_of_1000": few}
    return {"call_of_1000": few, "call_of_100000": await gather(system, MANY_GATHERED)}


async def queued_memory(system: System) -> Figures:
    """What Python has allocated for each call that waits while all workers are busy."""
    if system.costs_a_pool or not system.calls_at_once:
        return {}
    blocking = [asyncio.ensure_future(system.call(spin, 1.5)) for _ in range(WORKERS)]
    await asyncio.sleep(0.2)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    waiting = [asyncio.ensure_future(system.call(double, number)) for number in range(GATHERED)]
    await asyncio.sleep(0.7)
    gc.collect()
    size = (tracemalloc.get_traced_memory()[0] - before) / GATHERED
    tracemalloc.stop()
    await asyncio.gather(*blocking, *waiting)
    return {"queued_memory": size}


async def tasks(system: System) -> Figures:
    if system.costs_a_pool or not system.calls_at_once:
        return {}
    found: Figures = {}
    for name, seconds, number in (("tasks_1ms", 0.001, 400), ("tasks_20ms", 0.02, 40)):
        began = time.perf_counter()
        await asyncio.gather(*(system.call(spin, seconds) for _ in range(number)))
        found[name] = (time.perf_counter() - began) / (number * seconds / WORKERS)
    async with watching_stalls() as stalls:
        await asyncio.gather(*(system.call(spin, 0.001) for _ in range(400)))
    return {**found, "tasks_stall": max(stalls)}


async def million(system: System) -> Figures:
    if system.map is None:
        return {}
    items = range(1_000_000)
    map_all = system.map
    taken = await median_ms(lambda: map_all(abs, items), 1)
    async with watching_stalls() as stalls:
        await map_all(abs, items)
    return {"million": taken, "million_stall": max(stalls)}


async def arrays(system: System) -> Figures:
    if system.costs_a_pool:
        return {}
    array = np.random.default_rng(1).random(ARRAY_BYTES // 8)
    found: Figures = {"array_in": await median_ms(lambda: system.call(total, array))}
    found["array_echo"] = await median_ms(lambda: system.call(echo, array))
    async with watching_stalls() as stalls:
        result = await system.call(echo, array)
    del result
    return {**found, "array_stall": max(stalls)}


async def objects(system: System) -> Figures:
    if system.costs_a_pool:
        return {}
    dicts = make_dicts(DICTS)
    found: Figures = {"objects_in": await median_ms(lambda: system.call(count, dicts))}
    found["objects_out"] = await median_ms(lambda: system.call(make_dicts, DICTS))
    async with watching_stalls() as stalls:
        await system.call(count, dicts)
    found["objects_stall"] = max(stalls)
    async with watching_stalls() as stalls:
        await system.call(make_dicts, DICTS)
    return {**found, "objects_out_stall": max(stalls)}


async def extraction(system: System) -> Figures:
    if system.costs_a_pool or not system.calls_at_once:
        return {}
    text = "See https://www.example.com/a and http://sub.example.org, or write to me@mail.example.net. " * 130_000

    async def by_parts(text: str) -> list[str]:
        size = -(-len(text) // WORKERS)
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        return [
            each
            for found in await asyncio.gather(*(system.call(find_domains, part) for part in parts))
            for each in found
        ]

    extract = system.extract_domains or by_parts
    speed = len(text) / 1e3 / await median_ms(lambda: extract(text), 1)
    async with watching_stalls() as stalls:
        await extract(text)
    return {"domains": speed, "domains_stall": max(stalls)}


async def pings(system: System) -> Figures:
    """How soon a server whose event loop makes calls answers a request that needs none."""
    if system.costs_a_pool or not system.calls_at_once:
        return {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            writer.write(b"pong\n")
        writer.close()

    async def load() -> None:
        while True:
            await system.call(spin, 0.02)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    loads = [asyncio.create_task(load()) for _ in range(8)]
    port = server.sockets[0].getsockname()[1]
    client = await asyncio.create_subprocess_exec(
        sys.executable, ping.__file__, str(port), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await client.communicate()
    for task in loads:
        task.cancel()
    server.close()
    await asyncio.wait(loads)
    median, worst = map(float, output.split())
    return {"ping": median, "ping_p99": worst}


async def recovery(system: System) -> Figures:
    """How long after a SIGKILL two workers run tasks at a time again, and how many calls have failed until then."""
    if system.costs_a_pool or not system.calls_at_once:
        return {}
    os.kill(await system.call(get_pid), signal.SIGKILL)
    began = time.perf_counter()
    errors = 0
    while time.perf_counter() - began < 5:
        calls = [asyncio.ensure_future(call_in_task(system, spin_and_get_pid, 0.02)) for _ in range(WORKERS)]
        done, late = await asyncio.wait(calls, timeout=2)
        for each in late:
            each.cancel()
        failed = len(late) + sum(each.exception() is not None for each in done)
        errors += failed
        if not failed and len({each.result() for each in done}) == WORKERS:
            return {"recovery": (time.perf_counter() - began) * 1e3, "recovery_errors": errors}
        await asyncio.sleep(0.001)
    return {"recovery": None}


def cpu_seconds() -> float:
    """Return what all processes of this one have used."""
    used = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used += times.user + times.system
    return used


async def deadline(system: System) -> Figures:
    """How long the CPU stays busy after a task should have ended; None if for two seconds or more."""
    if system.costs_a_pool:
        return {}
    running = asyncio.ensure_future(system.call_until(0.1, spin, 3.0))
    await asyncio.sleep(0.1)
    began = time.perf_counter()
    await asyncio.wait([running])
    if not isinstance(running.exception(), TimeoutError):
        raise AssertionError(repr(running))
    free = None
    while free is None and time.perf_counter() - began < 2:
        now, used = time.perf_counter(), cpu_seconds()
        await asyncio.sleep(0.03)
        if cpu_seconds() - used < 0.01:
            free = (now - began) * 1e3
    return {"deadline": free}


async def requests(system: System) -> Figures:
    if not system.calls_at_once:
        return {}
    began = time.perf_counter()
    await asyncio.gather(*(system.call(spin, 1.0) for _ in range(20)))
    return {"requests": time.perf_counter() - began}


Measurement = Callable[[System], Awaitable[Figures]]

# In each round, and in this order: the last ones may leave a system broken.
IN_ROUNDS: list[Measurement] = [round_trip, gathered, tasks, million, arrays, objects, extraction, pings]
ONCE: list[Measurement] = [many_gathered, queued_memory, requests, deadline, recovery]
