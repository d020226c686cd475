"""What clients of a web application feel: of full CPUs, and of being refused when too many have come.

A real uvicorn server, and plain sockets as clients, which cost little.  Usage: python benchmarks/web.py [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from cpupool import CpuPool
from cpupool.fastapi import PoolDep, install

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENTS = 200
MAX_PENDING = 20
PINGS = 500
PING_INTERVAL = 0.02  # seconds

# --- the server ---

app = FastAPI()
install(app, CpuPool.from_env("BENCH_"))


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@app.post("/work")
async def work(pool: PoolDep, seconds: float) -> None:
    await pool.run(spin, seconds)


@app.post("/plain")
async def refuse(seconds: float) -> Response:  # noqa: ARG001  # it takes what the others take
    """Refuse without a pool: what the server and the framework need for it."""
    return JSONResponse({"detail": "The server is busy."}, 503, {"Retry-After": "1"})


@app.get("/ping")
async def ping() -> str:
    return "pong"


# --- the clients ---


@contextmanager
def serve(**env: str) -> Iterator[tuple[int, psutil.Process]]:
    """Start a server; the port, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", f"{Path(__file__).stem}:app", "--app-dir", str(Path(__file__).parent)]
    options = ["--port", str(port), "--no-access-log", "--log-level", "warning"]
    with subprocess.Popen([*command, *options], env={**os.environ, **env}, stderr=subprocess.DEVNULL) as process:
        try:
            while not is_up(port):
                if process.poll() is not None:
                    raise SystemExit(f"the server has ended with status {process.returncode}")
                time.sleep(0.01)
            yield port, psutil.Process(process.pid)
        finally:
            process.terminate()


def is_up(port: int) -> bool:
    try:
        with closing(Client(port)) as client:
            client.ask("GET /ping")
            client.take()
    except ConnectionRefusedError:
        return False
    return True


class Client:
    """A connection that is kept open."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))

    def ask(self, what: str) -> None:
        self.socket.sendall(f"{what} HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n".encode())

    def take(self) -> int:
        """Return the status of the answer."""
        text = ""
        while (size := re.search(r"^content-length: (\d+)\r\n(?:.*\r\n)*?\r\n", text, re.MULTILINE)) is None or (
            len(text) < size.end() + int(size[1])
        ):
            text += self.socket.recv(65536).decode()
        return int(text.split()[1])

    def close(self) -> None:
        self.socket.close()


def time_pings(port: int) -> list[float]:
    """Ask for nothing, again and again; return the seconds that each answer took."""
    seconds = []
    with closing(Client(port)) as client:
        for _ in range(PINGS):
            began = time.perf_counter()
            client.ask("GET /ping")
            client.take()
            seconds.append(time.perf_counter() - began)
            time.sleep(PING_INTERVAL)
    return seconds


def crowd(port: int, path: str) -> dict[int, list[float]]:
    """Ask for the same 200 times at once; return the seconds until each answer, by status."""
    clients = [Client(port) for _ in range(CLIENTS)]
    for client in clients:
        client.ask("GET /ping")  # so that the server knows them all
        client.take()
    answers: dict[int, list[float]] = {}
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        began = time.perf_counter()
        for client in clients:
            client.ask(f"POST {path}?seconds=0.1")
        while selector.get_map():
            for key, _ in selector.select():
                status = key.data.take()
                answers.setdefault(status, []).append(time.perf_counter() - began)
                selector.unregister(key.fileobj)
    for client in clients:
        client.close()
    return answers


def show(what: str, seconds: list[float]) -> None:
    percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
    p50, p99 = (f"{percentiles[at - 1] * 1000:6.1f}" for at in (50, 99))
    print(f"  {what:<44} p50 {p50} ms, p99 {p99} ms, worst {max(seconds) * 1000:6.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds: int = parser.parse_args().rounds

    print(f"GET /ping every {PING_INTERVAL * 1000:.0f} ms ({os.cpu_count()} CPUs; p99 to keep under 30 ms)")
    with serve(BENCH_DRAIN="0") as (port, _):
        show("with nothing to do", time_pings(port))
        busy = [Client(port) for _ in range(2 * (os.cpu_count() or 1))]
        for client in busy:
            client.ask("POST /work?seconds=1000")
        show("with all workers busy, and more to do waiting", time_pings(port))
        for client in busy:
            client.close()

    print(f"{CLIENTS} requests at once, max_pending={MAX_PENDING}, 1 worker (to keep under 100 ms)")
    refused, plain, counts, memory = [], [], set(), []  # of the first two: the last answer of each round
    with serve(BENCH_MAX_WORKERS="1", BENCH_MAX_PENDING=str(MAX_PENDING)) as (port, server):
        for _ in range(rounds):
            answers = crowd(port, "/work")
            counts.add(tuple((status, len(answers[status])) for status in sorted(answers)))
            refused.append(max(answers[503]))
            plain.append(max(crowd(port, "/plain")[503]))
            memory.append(server.memory_info().rss)
    print(f"  answers by status: {'; '.join(str(dict(each)) for each in sorted(counts))}")
    for what, seconds in (("the pool is full", refused), ("without a pool, for comparison", plain)):
        each = " ".join(f"{second * 1000:.0f}" for second in seconds)
        print(f"  ms until the last 503, {what}: median {statistics.median(seconds) * 1000:.0f} ({each})")
    print(f"  memory of the server after each round: {', '.join(f'{each / 2**20:.1f}' for each in memory)} MiB")


if __name__ == "__main__":
    main()
