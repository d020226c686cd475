"""A live page about a pool under load: run it, and open http://127.0.0.1:8000/pool/ in a browser."""

import contextlib
import os
import random
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount

from cpupool import CpuPool
from cpupool.starlette import dashboard, lifespan

pool = CpuPool(name="images", slow_task=2.0)


def resize(seconds: float) -> int:
    """Do what keeps a CPU busy for a while."""
    pixels = 0
    for number in range(int(seconds * 10_000_000)):
        pixels += number & 255
    return pixels


@contextlib.asynccontextmanager
async def load(_: Starlette) -> AsyncGenerator[Mapping[str, Any]]:
    """Make requests as visitors would."""

    async def visit(label: str, seconds: float) -> None:
        while True:
            await anyio.sleep(random.expovariate(1 / seconds))
            with contextlib.suppress(Exception):
                await pool.options(label=label).run(resize, random.expovariate(1 / seconds))

    async with anyio.create_task_group() as group:
        for label, seconds in {"thumbnail": 0.05, "poster": 0.4, "film": 3.0}.items():
            for __ in range(3):
                group.start_soon(visit, label, seconds)
        yield {}
        group.cancel_scope.cancel()


app = Starlette(
    routes=[Mount("/pool", app=dashboard(pool, interrupt=True))],
    # In the place of the application's own authentication: this one is reached from this machine only.
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
    lifespan=lifespan(pool, inner=load),
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
