"""A pool in a FastAPI application: `install(app, pool)`, and `pool: PoolDep` in the endpoints.

Needs FastAPI.  What it does is made of the parts in `cpupool.starlette`, which work here too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakKeyDictionary

from fastapi import Depends
from starlette.requests import HTTPConnection  # noqa: TC002  # FastAPI reads the annotations

from . import CpuPool, starlette

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastapi import FastAPI

__all__ = ["PoolDep", "get_pool", "install", "pool_dep"]

_installed: WeakKeyDictionary[FastAPI, set[str]] = WeakKeyDictionary()  # the names of their pools


async def get_pool(connection: HTTPConnection) -> CpuPool:
    """Return the application's pool: the dependency behind `PoolDep`, and what a test overrides.

    Raises:
        PoolNotStarted: the application's lifespan did not run.
    """
    return starlette.get_pool(connection)


def pool_dep(name: str = "pool") -> Any:
    """Return the dependency on the pool that was installed under this name.

    Give it a name of your own: `ImagePool = Annotated[CpuPool, pool_dep("images")]`, then `pool: ImagePool`.  A test
    overrides `pool_dep("images").dependency`.
    """
    return Depends(_getter(name))


@functools.cache
def _getter(name: str) -> Callable[[HTTPConnection], Coroutine[Any, Any, CpuPool]]:
    if name == "pool":
        return get_pool

    async def get_named_pool(connection: HTTPConnection) -> CpuPool:
        return starlette.get_pool(connection, name)

    return get_named_pool


PoolDep = Annotated[CpuPool, pool_dep()]
"""The application's pool, as the type of an endpoint's argument."""


def install(app: FastAPI, pool: CpuPool, *, name: str = "pool", health: str | None = "/health") -> None:
    """Give an application a pool: its lifespan, its errors as responses, and a route for probes.

    Call it once for each pool, before the application starts; a lifespan that the application has runs within.

    Args:
        app: the application.
        pool: the pool; nothing is started before the application starts.
        name: for `pool_dep`, and in `request.state`.
        health: the path of the route that says whether the pool works (`cpupool.starlette.health_route`), or None; it
            comes before all others.

    Raises:
        RuntimeError: the application has started.
        ValueError: it has a pool, or a route, of this name.
    """
    if app.middleware_stack is not None:
        raise RuntimeError("install(app, pool) must be called before the application starts: where it is made")
    names = _installed.setdefault(app, set())
    if name in names:
        raise ValueError(f"the application has a pool named {name!r} already; install(app, pool, name=...) another one")
    if health is not None and any(getattr(route, "path", None) == health for route in app.routes):
        raise ValueError(
            f"the application has a route {health!r} already; for a second pool write install(app, pool, "
            'name="images", health="/health/images"), or health=None'
        )
    names.add(name)
    app.router.lifespan_context = starlette.lifespan(pool, inner=app.router.lifespan_context, state_key=name)
    for kind, handler in starlette.exception_handlers().items():
        app.exception_handlers.setdefault(kind, handler)
    if health is not None:
        app.router.routes.insert(0, starlette.health_route(pool, health))  # before one that matches everything
