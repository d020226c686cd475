"""What `make demo` runs second: four ways to serve CPU-bound work, on real servers, side by side.

Clients ask for 20 pieces of work at once; meanwhile others ask, 50 times a second, for something that takes no time.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import psutil
import work
from fastapi import FastAPI
from rich.console import Console
from rich.table import Table

from cpupool import CpuPool
from cpupool.fastapi import PoolDep, install

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

REQUESTS = 20
SECONDS = 0.2  # of CPU for each request: 20 of 1 s, four times, would take more than a minute on two CPUs
PING_INTERVAL = 0.02  # seconds

# --- the servers ---

inline, threads, executors, pooled = FastAPI(), FastAPI(), FastAPI(), FastAPI()


@inline.post("/work")
async def work_on_the_event_loop(rounds: int) -> int:
    return work.burn(rounds)


@threads.post("/work")
def work_in_a_thread(rounds: int) -> int:
    return work.burn(rounds)


@executors.post("/work")
async def work_in_an_executor_of_its_own(rounds: int) -> int:
    with ProcessPoolExecutor(1) as executor:  # as many as CPUs, by default, for one call
        return await asyncio.get_running_loop().run_in_executor(executor, work.burn, rounds)


install(pooled, CpuPool())


@pooled.post("/work")
async def work_in_the_pool(pool: PoolDep, rounds: int) -> int:
    return await pool.run(work.burn, rounds)


@inline.get("/ping")
@threads.get("/ping")
@executors.get("/ping")
@pooled.get("/ping")
async def ping() -> str:
    return "pong"


WAYS = {
    "inline": "async def, computing inline",
    "threads": "def, in the thread pool",
    "executors": "a new ProcessPoolExecutor for each request",
    "pooled": "cpupool",
}

# --- the clients ---


@dataclass
class Outcome:
    """Seconds that all took, seconds of CPU that the server and its children used, and seconds that each ping took."""

    total: float
    cpu: float
    pings: list[float]


@asynccontextmanager
async def serve(app: str) -> AsyncIterator[tuple[httpx2.AsyncClient, psutil.Process]]:
    """Start a server of its own for one of the applications, with a client for it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", f"{Path(__file__).stem}:{app}", "--app-dir", str(Path(__file__).parent)]
    options = ["--port", str(port), "--log-level", "warning"]
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    process = await asyncio.create_subprocess_exec(*command, *options)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits) as client:
            while not await is_up(client):
                if process.returncode is not None:
                    raise SystemExit(f"the server has ended with status {process.returncode}")
                await asyncio.sleep(0.01)
            yield client, psutil.Process(process.pid)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def is_up(client: httpx2.AsyncClient) -> bool:
    try:
        await client.get("/ping")
    except httpx2.ConnectError:
        return False
    return True


def cpu_of(server: psutil.Process) -> float:
    """Return the CPU seconds of a process and of all that it has started."""
    seconds = 0.0
    for process in [server, *server.children(recursive=True)]:
        times = process.cpu_times()
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


async def compare(app: str, rounds: int) -> Outcome:
    async with serve(app) as (client, server):
        pings: list[float] = []

        async def ask() -> None:
            began = time.perf_counter()
            (await client.get("/ping")).raise_for_status()
            pings.append(time.perf_counter() - began)

        async def ask_again_and_again() -> None:
            async with asyncio.TaskGroup() as group:  # each at its time, whether those before have been answered or not
                try:
                    while True:
                        group.create_task(ask())
                        await asyncio.sleep(PING_INTERVAL)
                except asyncio.CancelledError:
                    pass  # those that are on their way are waited for

        async def do_work() -> None:
            (await client.post("/work", params={"rounds": rounds})).raise_for_status()

        await asyncio.gather(*(ask() for _ in range(2 * REQUESTS)))  # connections are open, then
        pings.clear()
        cpu, began = cpu_of(server), time.perf_counter()
        pinging = asyncio.create_task(ask_again_and_again())
        await asyncio.gather(*(do_work() for _ in range(REQUESTS)))
        total = time.perf_counter() - began
        pinging.cancel()
        await pinging
        return Outcome(total, cpu_of(server) - cpu, pings)


def calibrate() -> int:
    """Return how many rounds take so many seconds of CPU here."""
    rounds = 1_000_000
    work.burn(rounds)
    began = time.process_time()
    work.burn(rounds)
    return int(rounds * SECONDS / (time.process_time() - began))


async def main() -> None:
    rounds = calibrate()
    table = Table("how", "total", "CPU used", "ping p50", "ping p99")
    for column in table.columns[1:]:
        column.justify = "right"
    for app, description in WAYS.items():
        outcome = await compare(app, rounds)
        p50, p99 = statistics.median(outcome.pings), statistics.quantiles(outcome.pings, n=100, method="inclusive")[98]
        table.add_row(
            description,
            f"{outcome.total:.1f} s",
            f"{outcome.cpu:.1f} s",
            f"{p50 * 1000:,.1f} ms",
            f"{p99 * 1000:,.1f} ms",
        )
    print(
        f"{REQUESTS} requests at once, each for {SECONDS} s of pure CPU, on a FastAPI application (uvicorn, "
        f"{os.cpu_count()} CPUs);\nmeanwhile a GET /ping every {PING_INTERVAL * 1000:.0f} ms"
    )
    Console(width=100).print(table)


if __name__ == "__main__":
    asyncio.run(main())
