"""A Starlette service that finds domain names: in a request, and in the background.

    pip install 'cpupool[starlette]' uvicorn
    python examples/starlette_app.py    # or, in this folder: uvicorn starlette_app:app

    curl localhost:8000/domains -d 'see example.org, or www.python.org'
    curl -i localhost:8000/jobs -d 'see example.org'
    curl localhost:8000/jobs/ID/result

The same for FastAPI, with a little more, is in fastapi_app.py.
"""

from __future__ import annotations

import os

import work
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cpupool import CpuPool
from cpupool.domains import find_domains
from cpupool.jobs import Jobs
from cpupool.starlette import accepted, exception_handlers, get_pool, health_route, lifespan, routes

pool = CpuPool(timeout=10, max_pending=100)
jobs = Jobs(pool.options(timeout=600))


async def find(request: Request) -> Response:
    text = (await request.body()).decode(errors="replace")
    return JSONResponse(await get_pool(request).run(find_domains, text))


async def submit(request: Request) -> Response:
    text = (await request.body()).decode(errors="replace")
    return accepted(request, jobs.submit(work.count_domains, text))


app = Starlette(
    routes=[
        Route("/domains", find, methods=["POST"]),
        Route("/jobs", submit, methods=["POST"]),
        *routes(jobs),
        health_route(pool),
    ],
    lifespan=lifespan(pool),
    exception_handlers=exception_handlers(),
)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
