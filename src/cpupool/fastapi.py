"""A pool in a FastAPI application: `install(app, pool)`, and `pool: PoolDep` in the endpoints.

Needs FastAPI.  What it does is made of the parts in `cpupool.starlette`, which work here too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Depends
from fastapi.encoders import jsonable_encoder
from starlette.requests import HTTPConnection, Request  # noqa: TC002  # FastAPI reads the annotations
from starlette.responses import Response

from . import CpuPool, starlette
from ._answers import ANSWERS
from ._job_routes import JobAnswers, keep_private, name_routes
from .jobs import JobExpired, JobNotFound
from .starlette import JobStatus, accepted

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastapi import FastAPI

    from .jobs import Jobs

__all__ = ["JobStatus", "PoolDep", "Problem", "accepted", "get_pool", "install", "pool_dep", "routes"]

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


# --- background jobs ---


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no other response."""

    detail: str


def routes(
    jobs: Jobs,
    prefix: str = "/jobs",
    *,
    name: str | None = None,
    result: Any = Any,
    render: Callable[[Any], Response] | None = None,
) -> APIRouter:
    """Return the endpoints by which clients ask for jobs: `app.include_router(routes(jobs))`.

    They are those of `cpupool.starlette.routes`, and stand in the application's OpenAPI document.

    Args:
        jobs: the jobs.
        prefix: what the paths begin with; another one for each `Jobs`.
        name: the name of the first route; by default made of the prefix ("jobs").
        result: the type of the jobs' results, as a `response_model`.
        render: makes a response of a job's result, in the place of FastAPI.
    """
    answers, name = JobAnswers(jobs, jsonable_encoder), name_routes(jobs, prefix, name)
    router = APIRouter(prefix=prefix, tags=["jobs"])

    @router.get("/{job_id}", name=name, summary="Get a job's status", response_model=JobStatus, responses=_problems())
    async def get_status(job_id: str) -> Any:
        """What has become of a job so far; with `Retry-After` until it is done."""
        return answers.status(job_id)

    @router.delete(
        "/{job_id}",
        name=f"{name}_cancel",
        summary="Cancel a job",
        response_model=JobStatus,
        responses=_problems(conflict="The job has ended otherwise."),
    )
    async def cancel(job_id: str) -> Any:
        """Stop a job, whether it waits or runs."""
        return answers.cancel(job_id)

    @router.get(
        "/{job_id}/result",
        name=f"{name}_result",
        summary="Get a job's result",
        response_model=result,
        responses=_problems(conflict="There is no result, or not yet."),
    )
    async def get_result(job_id: str, response: Response) -> Any:
        """The result of a job that has succeeded."""
        job = answers.result(job_id)
        if isinstance(job, Response):
            return job
        if render is not None:
            return keep_private(render(job.result))
        keep_private(response)
        return job.result

    stream: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "The client has seen the last event"},
    }

    @router.get(
        "/{job_id}/events",
        name=f"{name}_events",
        summary="Listen to a job",
        response_class=Response,
        responses=stream | _problems(),
    )
    async def get_events(job_id: str, request: Request) -> Any:
        """A job's status, now and whenever it changes, as server-sent events."""
        return answers.events(request, job_id)

    return router


def _problems(conflict: str | None = None) -> dict[int | str, dict[str, Any]]:
    problems = {404: ANSWERS[JobNotFound].text, 409: conflict, 410: ANSWERS[JobExpired].text}
    return {status: {"model": Problem, "description": text} for status, text in problems.items() if text is not None}
