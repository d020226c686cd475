"""A FastAPI service that finds domain names: in a request, on all CPUs, and in the background.

    pip install 'cpupool[fastapi]' uvicorn
    python examples/fastapi_app.py      # or, in this folder: uvicorn fastapi_app:app

    curl localhost:8000/process-content --json '{"data": "see example.org"}'
    curl localhost:8000/addContent --json '{"data": "see example.org, or www.python.org"}'
    curl -i localhost:8000/jobs --json '{"data": "see example.org"}'
    curl localhost:8000/jobs/ID
    curl localhost:8000/jobs/ID/result
    curl -N localhost:8000/jobs/ID/events
    curl -X DELETE localhost:8000/jobs/ID
    curl localhost:8000/health

What a client gets when there is too much to do, when something takes too long, or when a worker crashes, is in
docs/web.md.
"""

from __future__ import annotations

import os
from collections import Counter

import work
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from cpupool import CpuPool
from cpupool.domains import extract_domains, find_domains
from cpupool.fastapi import JobStatus, PoolDep, accepted, install, routes
from cpupool.jobs import Jobs
from cpupool.starlette import run_until_disconnect

pool = CpuPool(timeout=10, max_pending=100)
jobs = Jobs(pool.options(timeout=600))  # may take longer than a client would wait

app = FastAPI(title="Domains")
install(app, pool)
app.include_router(routes(jobs, result=dict[str, int]))


class Content(BaseModel):
    data: str


class Domains(BaseModel):
    domains: dict[str, int]


@app.post("/process-content")
async def process_content(content: Content, request: Request) -> list[str]:
    """Return the domains in a text, in their order; if the client leaves, the work stops."""
    return await run_until_disconnect(request, find_domains, content.data)


@app.post("/addContent")
async def add_content(content: Content, pool: PoolDep) -> Domains:
    """Count the domains in a text of any size, on all CPUs; no domain is cut in two."""
    return Domains(domains=Counter(await extract_domains(pool, content.data)))


@app.post("/jobs", status_code=202, response_model=JobStatus)
async def submit(content: Content, request: Request) -> Response:
    """Do the same in the background, and tell the client where to ask for the result."""
    return accepted(request, jobs.submit(work.count_domains, content.data))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
