"""The systems that are compared, each as its users set it up, behind one face.

Where a system lets one choose how processes start, it is forkserver, unless its name says otherwise.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiomultiprocess
import anyio.to_process
import deadpool
import joblib
import loky
import pebble
import trio_parallel
from mpire.pool import WorkerPool

import cpupool
from cpupool import domains


@dataclass(frozen=True)
class System:
    """A system that is open.

    Attributes:
        call: `await call(function, *args)` runs it in a worker.
        timed: `await timed(seconds, function, *args)` does so for so long at most, if the system has a way of its own.
        map: `await map(function, items)` runs it on all items, in the system's own way; None if it has none.
        calls_at_once: False if it can run one call at a time only.
        costs_a_pool: True if each call starts processes: measured with fewer calls.
        extract_domains: finds the domains in a text, in the system's own way; by default it is cut into equal parts, as
            tutorials do.
        measured: the names of the only measurements in which it takes part; None for all.
    """

    call: Callable[..., Awaitable[Any]]
    timed: Callable[..., Awaitable[Any]] | None = None
    map: Callable[[Callable[[Any], Any], Sequence[Any]], Awaitable[list[Any]]] | None = None
    calls_at_once: bool = True
    costs_a_pool: bool = False
    extract_domains: Callable[[str], Awaitable[list[str]]] | None = None
    measured: frozenset[str] | None = None

    async def call_until(self, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """Run it for so long at most, as well as the system can."""
        if self.timed is not None:
            return await self.timed(seconds, function, *args)
        return await asyncio.wait_for(self.call(function, *args), seconds)


Opener = Callable[[int], AbstractAsyncContextManager[System]]


@asynccontextmanager
async def open_cpupool(workers: int) -> AsyncIterator[System]:
    async with cpupool.CpuPool(workers, mp_context="forkserver") as pool:

        async def timed(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
            return await pool.options(timeout=seconds).run(function, *args)

        async def extract_domains(text: str) -> list[str]:
            return await domains.extract_domains(pool, text)

        yield System(pool.run, timed, pool.map, extract_domains=extract_domains)


@asynccontextmanager
async def open_executor(workers: int, method: str = "forkserver") -> AsyncIterator[System]:
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as executor:

        async def map_all(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
            return await asyncio.to_thread(lambda: list(executor.map(function, items, chunksize=10_000)))

        yield System(lambda function, *args: loop.run_in_executor(executor, function, *args), map=map_all)


def open_executor_spawn(workers: int) -> AbstractAsyncContextManager[System]:
    return open_executor(workers, "spawn")


@asynccontextmanager
async def open_pool_for_each_call(_: int) -> AsyncIterator[System]:
    loop = asyncio.get_running_loop()
    context = multiprocessing.get_context("forkserver")

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            return await loop.run_in_executor(executor, function, *args)

    yield System(call, costs_a_pool=True)


async def settle_by_callbacks(start: Callable[..., object], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Await what reports its end by callbacks in another thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(method: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            method(value)

    start(
        function,
        args,
        callback=lambda value: loop.call_soon_threadsafe(settle, future.set_result, value),
        error_callback=lambda error: loop.call_soon_threadsafe(settle, future.set_exception, error),
    )
    return await future


@asynccontextmanager
async def open_multiprocessing(workers: int) -> AsyncIterator[System]:
    with multiprocessing.get_context("forkserver").Pool(workers) as pool:

        async def map_all(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
            return await asyncio.to_thread(pool.map, function, items)

        yield System(lambda function, *args: settle_by_callbacks(pool.apply_async, function, args), map=map_all)


@asynccontextmanager
async def open_anyio(workers: int) -> AsyncIterator[System]:
    limiter = anyio.CapacityLimiter(workers)

    async def timed(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        with anyio.fail_after(seconds):
            return await anyio.to_process.run_sync(function, *args, cancellable=True, limiter=limiter)

    yield System(lambda function, *args: anyio.to_process.run_sync(function, *args, limiter=limiter), timed)


def submitting(submit: Callable[..., Future[Any]]) -> Callable[..., Awaitable[Any]]:
    return lambda function, *args: asyncio.wrap_future(submit(function, *args))


@asynccontextmanager
async def open_pebble(workers: int) -> AsyncIterator[System]:
    with pebble.ProcessPool(workers, context=multiprocessing.get_context("forkserver")) as pool:

        async def timed(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
            return await asyncio.wrap_future(pool.schedule(function, args, timeout=seconds))

        yield System(submitting(lambda function, *args: pool.schedule(function, args)), timed)


@asynccontextmanager
async def open_loky(workers: int) -> AsyncIterator[System]:
    with loky.ProcessPoolExecutor(workers, timeout=600) as executor:

        async def map_all(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
            return await asyncio.to_thread(lambda: list(executor.map(function, items, chunksize=10_000)))

        yield System(submitting(executor.submit), map=map_all)


@asynccontextmanager
async def open_joblib(workers: int) -> AsyncIterator[System]:
    with joblib.Parallel(n_jobs=workers) as parallel:

        async def call(function: Callable[..., Any], *args: Any) -> Any:
            return (await asyncio.to_thread(parallel, [joblib.delayed(function)(*args)]))[0]

        yield System(call, calls_at_once=False)
        # Its map starts with one item at a time, and takes minutes for a million: see many_items.py.


@asynccontextmanager
async def open_mpire(workers: int) -> AsyncIterator[System]:
    with WorkerPool(workers, start_method="forkserver", keep_alive=True) as pool:
        yield System(lambda function, *args: settle_by_callbacks(pool.apply_async, function, args))


async def call_in_loop(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@asynccontextmanager
async def open_aiomultiprocess(workers: int) -> AsyncIterator[System]:
    async with aiomultiprocess.Pool(workers) as pool:
        yield System(lambda function, *args: pool.apply(call_in_loop, (function, *args)))


@asynccontextmanager
async def open_deadpool(workers: int) -> AsyncIterator[System]:
    context = multiprocessing.get_context("forkserver")
    # By default it blocks whoever submits the 1,001st call, and an event loop with that.
    with deadpool.Deadpool(workers, mp_context=context, max_backlog=200_000) as executor:
        yield System(submitting(executor.submit))


@asynccontextmanager
async def open_trio_parallel(workers: int) -> AsyncIterator[System]:
    import trio

    limiter = trio.CapacityLimiter(workers)
    yield System(lambda function, *args: trio_parallel.run_sync(function, *args, limiter=limiter))


@asynccontextmanager
async def open_floor(_: int) -> AsyncIterator[System]:
    """What nothing can be faster than: a socket and a process that echoes, a copy in memory, the function itself."""
    ours, theirs = socket.socketpair()
    echo = multiprocessing.get_context("fork").Process(target=echo_all, args=(theirs, ours))
    echo.start()
    theirs.close()
    spare: dict[int, Any] = {}

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        (value,) = args
        if isinstance(value, int):
            ours.send(bytes(60))
            ours.recv(1000)
            return function(value)
        copy = spare.setdefault(value.nbytes, value.copy())
        copy[:] = value
        return function(copy)

    async def extract_domains(text: str) -> list[str]:
        return domains.find_domains(text)

    async def map_all(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return list(map(function, items))

    measured = frozenset({"round_trip", "arrays", "million", "extraction"})
    with ours:
        yield System(call, map=map_all, extract_domains=extract_domains, measured=measured)
    echo.join()


@asynccontextmanager
async def open_idle(workers: int) -> AsyncIterator[System]:
    """Tasks that wait for nothing but their turn, so many at a time: what asyncio itself takes for them."""
    loop = asyncio.get_running_loop()
    waiting: deque[asyncio.Future[None]] = deque()

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        if not waiting:
            loop.call_soon(serve)
        future = loop.create_future()
        waiting.append(future)
        await future
        return function(*args)

    def serve() -> None:
        for _ in range(min(workers, len(waiting))):
            waiting.popleft().set_result(None)
        if waiting:
            loop.call_soon(serve)

    yield System(call, measured=frozenset({"many_gathered"}))


def echo_all(channel: socket.socket, other_end: socket.socket) -> None:
    other_end.close()  # inherited; or the end would never come
    while data := channel.recv(1000):
        channel.send(data)


OURS = "cpupool"
IDLE = "asyncio alone: tasks that wait for a future"
FLOOR = "the floor: one process, a bare socket, one copy"
EXECUTOR = "run_in_executor(ProcessPoolExecutor)"

ON_ASYNCIO: dict[str, Opener] = {
    OURS: open_cpupool,
    EXECUTOR: open_executor,
    "the same, spawn": open_executor_spawn,
    "a pool for each call": open_pool_for_each_call,
    "multiprocessing.Pool": open_multiprocessing,
    "anyio.to_process": open_anyio,
    "pebble": open_pebble,
    "loky": open_loky,
    "joblib": open_joblib,
    "mpire": open_mpire,
    "aiomultiprocess": open_aiomultiprocess,
    "deadpool": open_deadpool,
    IDLE: open_idle,
    FLOOR: open_floor,
}
ON_TRIO: dict[str, Opener] = {OURS: open_cpupool, "anyio.to_process": open_anyio, "trio-parallel": open_trio_parallel}


def of_loop(loop: str) -> dict[str, Opener]:
    """Return the systems that run on that event loop."""
    if loop == "trio":
        return ON_TRIO
    if loop == "uvloop" and sys.platform == "win32":
        return {}
    return ON_ASYNCIO
