"""A pool in a Starlette application: its lifespan, its errors as responses, work that stops when the client leaves.

Needs Starlette.  It works in FastAPI too, which has `cpupool.fastapi`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import anyio
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from . import CpuPoolError, PoolFull, PoolNotStarted
from ._answers import ANSWERS, answer_to
from ._dashboard import dashboard
from ._job_routes import JobStatus, accepted, routes
from .asgi import closing_on_signals

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from starlette.requests import HTTPConnection, Request

    from . import CpuPool
    from ._answers import Answer

__all__ = [
    "JobStatus",
    "accepted",
    "dashboard",
    "exception_handlers",
    "get_pool",
    "health_route",
    "lifespan",
    "routes",
    "run_until_disconnect",
    "until_disconnect",
]

P = ParamSpec("P")
T = TypeVar("T")

_logger = logging.getLogger("cpupool")

LONGEST_PROBE = 1.0  # seconds that a health check waits for a worker of a broken pool


def lifespan(
    pool: CpuPool,
    *,
    inner: Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]] | None = None,
    state_key: str = "pool",
) -> Callable[[Any], AbstractAsyncContextManager[dict[str, Any]]]:
    """Return a lifespan for an application: `Starlette(lifespan=lifespan(pool))`.

    The pool is started before the first request, and drained after the last.  It is the same as to write
    `async with pool: yield {"pool": pool}` in a lifespan of one's own, and besides lets the server stop in time (see
    `cpupool.asgi`).

    Args:
        pool: the pool.  Nothing is started before the application starts; it may be started and shut down several
            times, as tests do.
        inner: the application's own lifespan, which runs within; what it yields is kept.
        state_key: the pool's name in `request.state`.
    """

    @contextlib.asynccontextmanager
    async def live(app: Any) -> AsyncGenerator[dict[str, Any]]:
        with closing_on_signals(pool):  # also while it starts: to load a model takes long
            async with pool:
                if inner is None:
                    yield {state_key: pool}
                    return
                async with inner(app) as state:
                    if (state or {}).get(state_key, pool) is not pool:
                        raise ValueError(
                            f"the application's own lifespan yields {state_key!r} too; give the pool another name: "
                            "lifespan(pool, state_key='cpu'), or install(app, pool, name='cpu') and pool_dep('cpu')"
                        )
                    yield {**(state or {}), state_key: pool}

    return live


def get_pool(connection: HTTPConnection, state_key: str = "pool") -> CpuPool:
    """Return the pool of the application that serves this request or websocket.

    Raises:
        PoolNotStarted: it has none under this name: its lifespan did not run.
    """
    try:
        pool: CpuPool = connection.scope["state"][state_key]
    except KeyError:
        raise PoolNotStarted(state_key) from None
    return pool


# --- errors ---


def _respond(connection: Request, error: Exception) -> Response:
    """Answer a request whose call has failed, without a word of what went on inside; that is logged."""
    answer, path = answer_to(error), connection.scope["path"]
    _log(f"{connection.method} {path}: {answer.status}", error, answer)
    return _make_response(error, answer)


def _make_response(error: Exception, answer: Answer) -> JSONResponse:
    headers = None
    if isinstance(error, PoolFull):
        headers = {"Retry-After": str(max(math.ceil(error.retry_after), 1))}
    return JSONResponse({"detail": answer.text}, status_code=answer.status, headers=headers)


def _log(what: str, error: Exception, answer: Answer) -> None:
    """Log what became of a request; with a traceback only if something is broken, and not if too much was asked for."""
    if answer.status == 500:
        _logger.error("%s", what, exc_info=error)
    elif answer.status > 500:
        _logger.warning("%s (%s: %s)", what, type(error).__name__, error)


async def _handle(connection: HTTPConnection, error: Exception) -> Response | None:
    if isinstance(connection, WebSocket):
        await _hang_up(connection, error)
        return None
    return _respond(connection, error)  # type: ignore[arg-type]  # there is no third kind


async def _hang_up(websocket: WebSocket, error: Exception) -> None:
    """Refuse a websocket that was not accepted yet, with a response where the server can do that; close another."""
    answer, path = answer_to(error), websocket.scope["path"]
    if websocket.application_state is WebSocketState.CONNECTING:
        _log(f"websocket {path}: {answer.status}", error, answer)
        if "websocket.http.response" in websocket.scope.get("extensions", {}):
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the client has gone
                await websocket.send_denial_response(_make_response(error, answer))
            return
    else:
        _log(f"websocket {path}: closed with {answer.code}", error, answer)
    if websocket.application_state is not WebSocketState.DISCONNECTED:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the client has gone
            await websocket.close(answer.code, answer.text)


async def _forget(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=499)  # nobody reads it; the number is nginx's


def exception_handlers() -> dict[type[Exception], Callable[..., Any]]:
    """Return handlers for the pool's errors: `Starlette(exception_handlers=exception_handlers())`.

    `PoolFull` becomes 503 with `Retry-After`, `QueueTimeout` 503, `TaskTimeout` 504, `PoolClosed`, `PoolBroken` and
    `InitializerFailed` 503, `WorkerDied` 500.  The response says no more than that; the error goes to the log, under
    the name "cpupool".  A websocket gets the same response before it is accepted, where the server can give one, and is
    closed with 1011, 1012 or 1013 after that.  `JobNotFound` becomes 404, `JobExpired` 410 and `JobCancelled` 409.
    Errors of a task itself stay as they are.
    """
    return {**dict.fromkeys(ANSWERS, _handle), ClientDisconnect: _forget}


# --- work that nobody waits for any more ---


@contextlib.asynccontextmanager
async def until_disconnect(request: Request) -> AsyncGenerator[None]:
    """Cancel what runs in an `async with` block when the client has gone.

    The request's body is read before the block begins, and kept, as `request.body()` does it; a body that is to be read
    as a stream has to be read before.

    Raises:
        ClientDisconnect: that has happened; the handler in `exception_handlers` swallows it.

    Cancellation: of the block, as anyio's; a pool's call in it stops.
    """
    client = request.scope.setdefault("cpupool.client", _Client())
    await client.read_body(request)
    is_done = False
    failure: Exception | None = None

    async def watch() -> None:
        await client.leaves(request)
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            yield
        except Exception as error:
            failure = error  # in the group, it would be wrapped in another one
        is_done = True
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not is_done:
        raise ClientDisconnect


class _Client:
    """Whether the client of a request is still there; one for all blocks in it, which take turns at the messages."""

    def __init__(self) -> None:
        self._reading = anyio.Lock()
        self._has_read = False
        self._listening = anyio.Lock()
        self._has_left = False

    async def read_body(self, request: Request) -> None:
        """Read the body, before its messages are taken for others; what was read as a stream is there."""
        async with self._reading:
            if not self._has_read:
                with contextlib.suppress(RuntimeError):  # it was read as a stream
                    await request.body()
                self._has_read = True

    async def leaves(self, request: Request) -> None:
        """Wait until the client has gone."""
        async with self._listening:
            while not self._has_left:
                self._has_left = (await request.receive())["type"] == "http.disconnect"


async def run_until_disconnect(request: Request, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `fn(*args, **kwargs)` in the application's pool, the one named "pool", and stop it when the client leaves.

    For another pool, a call with options, or several, see `until_disconnect`.

    Raises:
        ClientDisconnect: the client has left.
        Exception: as `CpuPool.run`.

    Cancellation: as `CpuPool.run`.
    """
    async with until_disconnect(request):
        return await get_pool(request).run(fn, *args, **kwargs)
    raise ClientDisconnect  # for the type checker: a block that was cancelled has raised it


# --- probes ---


def health_route(pool: CpuPool, path: str = "/health") -> Route:
    """Return a route that says whether the pool works: `{"status": "ready"}`, "degraded" or "broken".

    For load balancers and orchestrators: 200 for the first two, 503 for the last; see `CpuPool.health`.  A broken pool
    is given a chance to start a worker, so that it recovers though no other request reaches it.
    """

    async def answer(request: Request) -> JSONResponse:  # noqa: ARG001
        if pool.health == "broken" and not pool.is_closed:
            with anyio.move_on_after(LONGEST_PROBE), contextlib.suppress(CpuPoolError):
                await pool.options(timeout=None, queue_timeout=None, retries=0).run(int)
        health = pool.health
        return JSONResponse({"status": health}, status_code=503 if health == "broken" else 200)

    return Route(path, answer, methods=["GET"], include_in_schema=False)
