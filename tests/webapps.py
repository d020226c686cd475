"""Applications for servers of their own (`test_servers`)."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, WebSocket
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import items
import tasks
from cpupool import CpuPool
from cpupool.asgi import PoolLifespan
from cpupool.fastapi import PoolDep, accepted, install, routes
from cpupool.jobs import Jobs
from cpupool.starlette import exception_handlers, get_pool, lifespan, run_until_disconnect

pool = CpuPool.from_env("WEBAPP_", name="web pool")
jobs = Jobs(pool)

# --- FastAPI ---

app = FastAPI()
install(app, pool)


@app.get("/pid")
async def pid(pool: PoolDep) -> list[int]:
    return [os.getpid(), await pool.run(os.getpid)]


@app.get("/spin")
async def spin(pool: PoolDep, fifo: str) -> None:
    """Keep a worker busy for ever; say in a FIFO when it has begun."""
    await pool.run(tasks.report_begin, fifo, tasks.spin_forever)


@app.get("/spin-until-disconnect")
@app.post("/spin-until-disconnect")
async def spin_until_disconnect(request: Request, fifo: str) -> None:
    await run_until_disconnect(request, tasks.report_begin, fifo, tasks.spin_forever)


@app.post("/work")
async def work(pool: PoolDep, seconds: float) -> float:
    return await pool.run(items.work, seconds)


@app.get("/hold")
async def hold(pool: PoolDep, begun: str, end: str) -> int:
    return len(await pool.run(tasks.hold_and_return_much, begun, end, 1))


@app.post("/spin-in-background")
async def spin_in_background(request: Request, fifo: str) -> Response:
    return accepted(request, jobs.submit(tasks.report_begin, fifo, tasks.spin_forever))


app.include_router(routes(jobs))


@app.websocket("/ws")
async def talk(websocket: WebSocket, pool: PoolDep) -> None:
    await websocket.accept()
    await websocket.send_json(await pool.run(os.getpid))


# --- Starlette ---


async def spin_in_starlette(request: Request) -> Response:
    await get_pool(request).run(tasks.report_begin, request.query_params["fifo"], tasks.spin_forever)
    raise AssertionError("it ended")


async def pid_in_starlette(request: Request) -> Response:
    return JSONResponse([os.getpid(), await get_pool(request).run(os.getpid)])


starlette_app = Starlette(
    routes=[Route("/spin", spin_in_starlette), Route("/pid", pid_in_starlette)],
    lifespan=lifespan(pool),
    exception_handlers=exception_handlers(),
)


# --- plain ASGI ---


async def plain(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    status = 200
    try:
        if scope["path"] == "/spin":
            fifo = parse_qs(scope["query_string"].decode())["fifo"][0]
            await scope["state"]["pool"].run(tasks.report_begin, fifo, tasks.spin_forever)
        body = str([os.getpid(), await scope["state"]["pool"].run(os.getpid)]).encode()
    except Exception as error:
        status, body = 503, type(error).__name__.encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


asgi_app = PoolLifespan(plain, pool)
