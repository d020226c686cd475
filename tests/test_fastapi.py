"""`cpupool.fastapi`: one line for an application, one word for an endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.responses import JSONResponse

import tasks
from conftest import is_gone
from cpupool import CpuPool, PoolNotStarted, WorkerDied
from cpupool.fastapi import PoolDep, get_pool, install, pool_dep

ImagePool = Annotated[CpuPool, pool_dep("images")]


def make_app(pool: CpuPool) -> FastAPI:
    app = FastAPI()

    @app.get("/pid")
    async def pid(pool: PoolDep) -> int:
        return await pool.run(tasks.get_pid)

    @app.get("/images")
    async def show_images(images: ImagePool) -> str:
        return str(images)

    @app.get("/plain")
    def in_a_thread(pool: PoolDep) -> int:
        return pool.run_sync(tasks.add, 40, 2)

    @app.get("/die")
    async def die(pool: PoolDep) -> None:
        await pool.run(tasks.exit_at_once, 3)

    @app.websocket("/ws")
    async def talk(websocket: WebSocket, pool: PoolDep) -> None:
        await websocket.accept()
        await websocket.send_json(await pool.run(tasks.add, 1, 2))
        await websocket.close()

    install(app, pool)
    return app


def test_one_line_gives_an_application_a_pool() -> None:
    app = make_app(CpuPool(1))
    for _ in range(2):
        with TestClient(app) as client:
            pid = client.get("/pid").json()
            assert client.get("/pid").json() == pid
            assert client.get("/plain").json() == 42
            with client.websocket_connect("/ws") as websocket:
                assert websocket.receive_json() == 3
            assert client.get("/health").json() == {"status": "ready"}
            response = client.get("/die")
            assert (response.status_code, response.json()) == (500, {"detail": "The work failed."})
        assert is_gone(pid)


def test_the_pool_shows_nowhere_in_the_interface() -> None:
    """It is no parameter of an endpoint, and the health check no part of the application."""
    schema = TestClient(make_app(CpuPool(1))).get("/openapi.json").json()
    assert "/health" not in schema["paths"]
    assert "parameters" not in schema["paths"]["/pid"]["get"]
    assert set(schema["paths"]["/pid"]["get"]["responses"]) == {"200"}


def test_several_pools_have_names_and_what_the_application_had_stays() -> None:
    seen = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        seen.append("started")
        yield {"mine": 5}
        seen.append("ended")

    async def explain(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse("gone", status_code=418)

    app = FastAPI(lifespan=own, exception_handlers={WorkerDied: explain})
    router = APIRouter()

    @router.get("/names")
    async def names(request: Request, pool: PoolDep, images: ImagePool) -> list[object]:
        both = {await pool.run(tasks.get_pid), await images.run(tasks.get_pid)}
        return [pool.settings.name, images.settings.name, len(both), request.state.mine]

    @router.get("/die")
    async def die(images: ImagePool) -> None:
        await images.run(tasks.exit_at_once, 3)

    install(app, CpuPool(1, name="first"))
    install(app, CpuPool(1, name="second"), name="images", health=None)
    app.include_router(router)
    with TestClient(app) as client:
        assert client.get("/names").json() == ["first", "second", 2, 5]
        assert client.get("/die").status_code == 418
        assert seen == ["started"]
    assert seen == ["started", "ended"]


def test_what_cannot_be_installed_is_refused() -> None:
    app = make_app(CpuPool(1))
    with pytest.raises(ValueError, match="has a route '/health' already"):
        install(app, CpuPool(1), name="images")
    with pytest.raises(ValueError, match="has a pool named 'pool' already"):
        install(app, CpuPool(1), health=None)
    with TestClient(app), pytest.raises(RuntimeError, match="before the application starts"):
        install(app, CpuPool(1), name="images", health=None)


def test_d7_without_a_lifespan_the_cures_are_named_and_work() -> None:
    app = make_app(CpuPool(1))
    with pytest.raises(PoolNotStarted, match=r"with TestClient\(app\) as client"):
        TestClient(app).get("/pid")
    with CpuPool(1) as other:
        app.dependency_overrides[get_pool] = lambda: other
        assert not is_gone(TestClient(app).get("/pid").json())
    with pytest.raises(PoolNotStarted, match=r"overrides\[cpupool\.fastapi\.pool_dep\('images'\)\.dependency\]"):
        TestClient(app).get("/images")
    app.dependency_overrides[pool_dep("images").dependency] = lambda: 42
    assert TestClient(app).get("/images").json() == "42"
