"""A live page about a pool, in any Starlette or FastAPI application: `dashboard`."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import time
from collections import deque
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import anyio
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request

    from . import CpuPool

_KEPT = 300  # samples, five minutes of them by default
_LOOK_INTERVAL = 0.5  # seconds between two looks whether the pool is to close
_PRIVATE = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def dashboard(pool: CpuPool, *, interrupt: bool = False, interval: float = 1.0) -> Router:
    """Return an application that shows a live page about a pool: `Mount("/cpupool", app=dashboard(pool))`.

    The page shows the workers, what each runs, the queue, throughput, times and memory, and where a busy worker is, in
    Python.  It is one file that loads nothing from elsewhere, with a strict `Content-Security-Policy` of its own.
    Whoever sees it sees names of functions and paths of files: put it behind the application's own authentication.

    An open page ends when the pool is told to close.  So that a server can stop while somebody has it open, the pool
    needs `lifespan(pool)`, or `cpupool.asgi.closing_on_signals` in a lifespan of one's own.

    Args:
        pool: the pool.
        interrupt: let whoever sees the page stop the task of a worker, too.
        interval: seconds between two looks at the pool.  While nobody has the page open there are none.

    Raises:
        ValueError: the interval is not a number of seconds that is more than 0.
    """
    if not 0 < interval < math.inf:
        raise ValueError(f"interval must be a number of seconds above 0, not {interval!r}")
    return _Dashboard(pool, interrupt=interrupt, interval=interval).make_router()


class _Sample(NamedTuple):
    """What was found at one moment, encoded once for all who have the page open.

    Attributes:
        time: when, in seconds since the epoch.
        whole: all of it.
        short: without the workers, as the history has it.
    """

    time: float
    whole: str
    short: str


class _Dashboard:
    def __init__(self, pool: CpuPool, *, interrupt: bool, interval: float) -> None:
        self._pool = pool
        self._can_interrupt = interrupt
        self._interval = interval
        self._samples: deque[_Sample] = deque(maxlen=_KEPT)
        self._page = resources.files(__package__).joinpath("dashboard.html").read_text("utf-8")

    def make_router(self) -> Router:
        return Router(
            [
                Route("/", self._show, methods=["GET"]),
                Route("/events", self._events, methods=["GET"]),
                Route("/stacks/{pid:int}", self._stack, methods=["GET"]),
                Route("/interrupt/{pid:int}", self._interrupt, methods=["POST"]),
            ]
        )

    async def _show(self, _: Request) -> Response:
        return HTMLResponse(self._page, headers={**_PRIVATE, "Content-Security-Policy": _make_policy(self._page)})

    # --- samples ---

    async def _events(self, _: Request) -> Response:
        headers = {**_PRIVATE, "X-Accel-Buffering": "no"}  # the latter is nginx's
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=headers)

    async def _stream(self) -> AsyncGenerator[str]:
        oldest = time.time() - _KEPT * self._interval
        yield _event("history", "[" + ",".join(each.short for each in self._samples if each.time > oldest) + "]")
        while True:
            yield _event("sample", self._sample().whole)
            until = time.monotonic() + self._interval
            while not self._pool.is_closing and (left := until - time.monotonic()) > 0:  # noqa: ASYNC110
                await anyio.sleep(min(left, _LOOK_INTERVAL))
            if self._pool.is_closing:  # else the server would wait for the client to go
                yield _event("closed", "{}")
                return

    def _sample(self) -> _Sample:
        """Look at the pool, unless that was just done for somebody else who has the page open."""
        now = time.time()
        if self._samples and 0 <= now - self._samples[-1].time < self._interval / 2:
            return self._samples[-1]
        found = self._pool.statistics()
        whole = dataclasses.asdict(found)
        whole |= {
            "time": now,
            "health": self._pool.health,
            "memory": sum(worker.resident_bytes or 0 for worker in found.workers),
            "can_interrupt": self._can_interrupt,
        }
        short = {name: value for name, value in whole.items() if name != "workers"}
        self._samples.append(_Sample(now, json.dumps(whole), json.dumps(short)))
        return self._samples[-1]

    # --- what can be done ---

    async def _stack(self, request: Request) -> Response:
        pid = request.path_params["pid"]
        stacks = await anyio.to_thread.run_sync(self._pool.dump_stacks, pid)
        return PlainTextResponse(stacks.get(pid, "It runs nothing now."), headers=_PRIVATE)

    async def _interrupt(self, request: Request) -> Response:
        if not self._can_interrupt:
            return PlainTextResponse(
                "Interrupting is not enabled on this page: dashboard(pool, interrupt=True).", 403, headers=_PRIVATE
            )
        if "x-cpupool" not in request.headers:  # other sites' pages cannot send that without being asked first
            return PlainTextResponse("This is for the page itself.", 403, headers=_PRIVATE)
        is_done = await anyio.to_thread.run_sync(self._pool.interrupt, request.path_params["pid"])
        text = "Its task is being stopped." if is_done else "It runs nothing now."
        return PlainTextResponse(text, 202 if is_done else 409, headers=_PRIVATE)


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _make_policy(page: str) -> str:
    """Return a policy that allows the page's own script and style, and nothing else."""
    script, style = (_hash(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(page: str, tag: str) -> str:
    found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no {tag}")
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
