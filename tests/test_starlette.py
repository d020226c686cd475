"""`cpupool.starlette`: lifespan, errors as responses, probes."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

import items
import tasks
from conftest import is_gone
from cpupool import (
    CpuPool,
    InitializerFailed,
    PoolBroken,
    PoolClosed,
    PoolFull,
    PoolNotStarted,
    QueueTimeout,
    TaskTimeout,
    WorkerDied,
)
from cpupool.starlette import (
    exception_handlers,
    get_pool,
    health_route,
    lifespan,
    run_until_disconnect,
    until_disconnect,
)

BACKENDS = ["asyncio", "trio"]


async def show_pid(request: Request) -> Response:
    return JSONResponse(await get_pool(request).run(tasks.get_pid))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pool_lives_as_long_as_the_application(backend: Any) -> None:
    pool = CpuPool(1)
    app = Starlette(routes=[Route("/", show_pid)], lifespan=lifespan(pool))
    pids = set()
    for _ in range(2):
        with TestClient(app, backend=backend) as client:
            pid = client.get("/").json()
            pids.add(pid)
            assert not is_gone(pid)
        assert is_gone(pid)
    assert len(pids) == 2


def test_the_application_s_own_lifespan_runs_within() -> None:
    seen: list[object] = []

    @asynccontextmanager
    async def inner(app: Starlette) -> AsyncIterator[dict[str, object]]:
        seen.append(pool.health)
        seen.append(await pool.run(tasks.add, 1, 2))
        yield {"mine": 5}
        seen.append(await pool.run(tasks.add, 3, 4))

    async def show(request: Request) -> Response:
        return JSONResponse([request.state.mine, await request.state.cpu.run(tasks.add, 5)])

    pool = CpuPool(1)
    app = Starlette(routes=[Route("/", show)], lifespan=lifespan(pool, inner=inner, state_key="cpu"))
    with TestClient(app) as client:
        assert client.get("/").json() == [5, 5]
    assert seen == ["ready", 3, 7]


def test_a_lifespan_that_yields_nothing_may_run_within() -> None:
    @asynccontextmanager
    async def inner(app: Starlette) -> AsyncIterator[None]:
        yield

    app = Starlette(routes=[Route("/", show_pid)], lifespan=lifespan(CpuPool(1), inner=inner))
    with TestClient(app) as client:
        assert client.get("/").status_code == 200


def test_a_websocket_finds_the_pool() -> None:
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(await get_pool(websocket).run(tasks.add, 40, 2))
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", talk)], lifespan=lifespan(CpuPool(1)))
    with TestClient(app) as client, client.websocket_connect("/") as websocket:
        assert websocket.receive_json() == 42


def test_a_name_that_the_application_uses_itself_is_refused() -> None:
    @asynccontextmanager
    async def inner(app: Starlette) -> AsyncIterator[dict[str, str]]:
        yield {"pool": "of database connections"}

    app = Starlette(lifespan=lifespan(CpuPool(1), inner=inner))
    with pytest.raises(ValueError, match="the application's own lifespan yields 'pool' too"), TestClient(app):
        pass


def test_a_failing_initializer_fails_the_start_with_the_real_error() -> None:
    pool = CpuPool(1, initializer=items.fail, initargs=("model",))
    with pytest.raises(InitializerFailed) as caught, TestClient(Starlette(lifespan=lifespan(pool))):
        pass
    assert str(caught.value.__cause__) == "no model"


def test_d7_without_a_lifespan_the_three_cures_are_named() -> None:
    app = Starlette(routes=[Route("/", show_pid)], lifespan=lifespan(CpuPool(1)))
    with pytest.raises(PoolNotStarted) as caught:
        TestClient(app).get("/")
    for cure in ("with TestClient(app) as client", "cpupool.fastapi.install(app, pool)", "dependency_overrides"):
        assert cure in str(caught.value)
    with pytest.raises(PoolNotStarted, match="no pool named 'images'"):
        get_pool(HTTPConnection({"type": "http", "state": {"pool": 1}}), "images")


# --- errors ---

ERRORS: list[tuple[Callable[[], Exception], int, int, dict[str, str]]] = [
    (lambda: PoolFull(20, 2.3), 503, 1013, {"Retry-After": "3"}),
    (lambda: PoolFull(20, 0.001), 503, 1013, {"Retry-After": "1"}),
    (lambda: QueueTimeout("secret.task", 1.0, 1.1), 503, 1013, {}),
    (lambda: TaskTimeout("secret.task", 1.0, 0.0, 1.1, "secret stack"), 504, 1011, {}),
    (lambda: PoolClosed("secret pool"), 503, 1012, {}),
    (lambda: PoolBroken("secret reason", ValueError("secret")), 503, 1011, {}),
    (lambda: InitializerFailed("secret.initializer", 5), 503, 1011, {}),
    (lambda: WorkerDied(5, None, 11, False, "secret.task", "secret stack"), 500, 1011, {}),
]


@pytest.mark.parametrize(("make", "status", "code", "headers"), ERRORS)
def test_an_error_of_the_pool_is_a_response_that_says_nothing_of_the_inside(
    make: Callable[[], Exception], status: int, code: int, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: Request) -> Response:
        raise make()

    async def hang_up(websocket: WebSocket) -> None:
        if "accept" in websocket.query_params:
            await websocket.accept()
        if "close" in websocket.query_params:
            await websocket.close()
        raise make()

    app = Starlette(
        routes=[Route("/", fail, methods=["POST"]), WebSocketRoute("/ws", hang_up)],
        exception_handlers=exception_handlers(),
    )
    client = TestClient(app)
    with caplog.at_level(logging.WARNING, "cpupool"):
        response = client.post("/")
    assert response.status_code == status
    assert list(response.json()) == ["detail"]
    assert "secret" not in response.text
    assert "cpupool" not in response.text.lower()
    assert {name: response.headers[name] for name in headers} == headers
    assert ("Retry-After" in response.headers) == ("Retry-After" in headers)
    (record,) = caplog.records
    assert record.levelname == ("ERROR" if status == 500 else "WARNING")
    assert record.getMessage().startswith(f"POST /: {status}")
    if status == 500:
        assert isinstance(record.exc_info, tuple)
        assert type(record.exc_info[1]) is type(make())
    else:
        assert f"({type(make()).__name__}: {make()})" in record.getMessage(), "the log has it all"
    with client.websocket_connect("/ws?accept=1") as websocket, pytest.raises(WebSocketDisconnect) as caught:
        websocket.receive_text()
    assert caught.value.code == code
    assert "secret" not in caught.value.reason
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/ws"):
        pass
    assert (denied.value.status_code, denied.value.text) == (status, response.text)
    with client.websocket_connect("/ws?accept=1&close=1") as websocket, pytest.raises(WebSocketDisconnect) as caught:
        websocket.receive_text()
    assert caught.value.code == 1000


def test_what_a_task_raises_is_the_application_s_own_affair() -> None:
    async def fail(request: Request) -> Response:
        await get_pool(request).run(items.fail, "such thing")
        raise AssertionError("it went on")

    app = Starlette(routes=[Route("/", fail)], lifespan=lifespan(CpuPool(1)), exception_handlers=exception_handlers())
    with TestClient(app) as client, pytest.raises(ValueError, match="no such thing"):
        client.get("/")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_timeout_and_a_real_crash_become_responses(backend: Any) -> None:
    async def run(request: Request) -> Response:
        pool = get_pool(request)
        if request.path_params["what"] == "spin":
            await pool.options(timeout=0.1).run(tasks.spin_forever)
        await pool.run(tasks.exit_at_once, 3)
        raise AssertionError("it went on")

    app = Starlette(
        routes=[Route("/{what}", run)], lifespan=lifespan(CpuPool(1)), exception_handlers=exception_handlers()
    )
    with TestClient(app, backend=backend) as client:
        assert [client.get(path).status_code for path in ("/spin", "/die")] == [504, 500]


# --- work that stops when the client leaves: see test_servers for real clients ---


async def run_in_body(request: Request) -> Response:
    """Read the body in several ways, then work."""
    how = request.path_params["how"]
    size = 0
    if how == "body":
        size = len(await request.body())
    elif how == "stream":
        size = sum([len(chunk) async for chunk in request.stream()])
    elif how == "twice":  # at the same time, and nobody has read the body yet
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(run_until_disconnect, request, tasks.add, 1)
    got = await run_until_disconnect(request, tasks.add, size, c=1)
    return JSONResponse([got, len(await request.body()) if how != "stream" else size])


@pytest.mark.parametrize("has_middleware", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_whose_client_stays_is_as_any_other(backend: Any, has_middleware: bool) -> None:
    async def fail(request: Request) -> Response:
        await run_until_disconnect(request, items.fail, "such thing")
        raise AssertionError("it went on")

    async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await call_next(request)

    app = Starlette(
        routes=[Route("/fail", fail), Route("/{how}", run_in_body, methods=["POST"])],
        lifespan=lifespan(CpuPool(1)),
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=pass_on)] if has_middleware else [],
    )
    with TestClient(app, backend=backend) as client:
        for how, expected in (
            ("none", [1, 100_000]),
            ("twice", [1, 100_000]),
            ("body", [100_001, 100_000]),
            ("stream", [100_001, 100_000]),
        ):
            assert client.post(f"/{how}", content=bytes(100_000)).json() == expected
        with pytest.raises(ValueError, match="no such thing"):  # itself, and not in a group
            client.get("/fail")


@pytest.mark.anyio
async def test_all_blocks_of_a_request_hear_that_the_client_has_left(anyio_backend_name: str) -> None:
    """Servers say so once."""
    send, receive = anyio.create_memory_object_stream[dict[str, Any]](2)
    stopped = []

    async def block(request: Request) -> None:
        with pytest.raises(ClientDisconnect):
            async with until_disconnect(request):
                await anyio.sleep_forever()
        stopped.append(1)

    with send, receive:
        request = Request({"type": "http", "method": "GET", "path": "/", "headers": []}, receive.receive)
        send.send_nowait({"type": "http.request", "body": b"", "more_body": False})
        async with anyio.create_task_group() as group:
            group.start_soon(block, request)
            group.start_soon(block, request)
            await anyio.wait_all_tasks_blocked()
            send.send_nowait({"type": "http.disconnect"})
        await block(Request(request.scope, receive.receive))  # as a middleware has it: the body is not read again
    assert len(stopped) == 3


# --- probes ---


def probe(client: TestClient) -> tuple[int, str]:
    response = client.get("/health")
    return response.status_code, response.json()["status"]


def test_health_of_a_pool_that_works_is_full_and_is_closed(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    pool = CpuPool(1, max_pending=1)
    app = Starlette(routes=[health_route(pool)])
    with TestClient(app) as client:
        assert probe(client) == (200, "ready")  # it has not started: it will
        with pool, ThreadPoolExecutor(2) as threads:
            running = threads.submit(lambda: pool.run_sync(tasks.hold_and_return_much, *gate.arguments, 1))
            gate.wait_until_begun()
            assert probe(client) == (200, "ready")
            waiting = threads.submit(pool.run_sync, tasks.add, 1)
            while "1 waiting" not in repr(pool):
                pass
            assert probe(client) == (200, "degraded")
            gate.open()
            running.result()
            waiting.result()
            assert probe(client) == (200, "ready")
        assert probe(client) == (503, "broken")
        assert set(client.get("/health").json()) == {"status"}


def test_health_of_a_pool_that_cannot_start_recovers_by_being_asked(tmp_path: Path) -> None:
    """Nobody else would try: a server that is not ready gets no requests."""
    flaky = tasks.Flaky(tmp_path)
    flaky.flag.touch()
    pool = CpuPool(1, initializer=flaky)
    seen = []
    with TestClient(Starlette(routes=[health_route(pool)])) as client:
        for _ in range(3):
            with pytest.raises(InitializerFailed):
                pool.run_sync(tasks.add, 1)
            seen.append(probe(client))
        assert seen == [(200, "degraded"), (200, "degraded"), (503, "broken")]
        flaky.flag.unlink()
        deadline = time.monotonic() + 20
        while (answer := probe(client)) != (200, "ready"):
            assert answer == (503, "broken")
            assert time.monotonic() < deadline
    pool.close()
