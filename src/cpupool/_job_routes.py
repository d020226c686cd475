"""Background jobs over HTTP, for Starlette; `cpupool.fastapi` gives the same answers.

A client gets 202 and a `Location` when its job is accepted, and asks there until the job is done, or listens to its
events; then it takes the result from `Location` + "/result".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003  # FastAPI reads the annotations
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import anyio
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import NoMatchFound, Route

from ._answers import CANCELLED, FAILED, TOO_LONG, answer_to
from .jobs import Job, JobNotFound, JobState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.requests import Request

    from .jobs import Jobs

HEARTBEAT = 15.0  # seconds: less than proxies and load balancers wait, which is 30 and more
ASK_AGAIN = {"Retry-After": "1"}  # second
_NOT_KEPT = {"Cache-Control": "no-store"}

_DETAILS = {JobState.FAILED: FAILED, JobState.TIMED_OUT: TOO_LONG, JobState.CANCELLED: CANCELLED}

_names: WeakKeyDictionary[Jobs, str] = WeakKeyDictionary()  # of their routes


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """What has become of a job so far."""

    id: str
    """Its id."""
    state: JobState
    """Whether it is queued, running, succeeded, failed, cancelled or timed_out."""
    progress: Any
    """What the work has reported last; None before that, and if JSON cannot have it."""
    created_at: datetime
    """When it was submitted."""
    started_at: datetime | None
    """When the work began."""
    ended_at: datetime | None
    """When it ended, in whatever way."""
    detail: str | None
    """What went wrong, in a sentence."""


def _as_it_is(value: Any) -> Any:
    return value


def to_json(job: Job, encode: Callable[[Any], Any] = _as_it_is) -> dict[str, Any]:
    """Return a job's status, a `JobStatus`, in JSON's terms."""
    return {
        "id": job.id,
        "state": job.state,
        "progress": _encode_progress(job.progress, encode),
        "created_at": job.created_at.isoformat(),
        "started_at": job.started_at and job.started_at.isoformat(),
        "ended_at": job.ended_at and job.ended_at.isoformat(),
        "detail": _DETAILS.get(job.state),
    }


def _encode_progress(progress: object, encode: Callable[[Any], Any]) -> object:
    try:
        encoded = encode(progress)
        json.dumps(encoded, allow_nan=False, ensure_ascii=False).encode()  # as Starlette sends it
    except Exception:  # whatever an encoder raises; a job is to be seen whatever it reports
        return None
    return encoded


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """Return a response that says why there is no other."""
    return JSONResponse({"detail": detail}, status_code=status, headers={**_NOT_KEPT, **(headers or {})})


class JobAnswers:
    """The answers to requests for jobs, whatever framework has routed them.

    Args:
        jobs: the jobs.
        encode: makes of a value one that JSON has.
    """

    def __init__(self, jobs: Jobs, encode: Callable[[Any], Any] = _as_it_is) -> None:
        self._jobs = jobs
        self._encode = encode

    def find(self, job_id: str) -> Job | Response:
        """Return the job, or 404 or 410."""
        try:
            return self._jobs.get(job_id)
        except JobNotFound as error:
            answer = answer_to(error)
            return problem(answer.status, answer.text)

    def status(self, job_id: str) -> Response:
        """Return 200 and the job's status."""
        job = self.find(job_id)
        return job if isinstance(job, Response) else self._show(job)

    def result(self, job_id: str) -> Job | Response:
        """Return the job if it has succeeded, or 409."""
        job = self.find(job_id)
        if isinstance(job, Response) or job.state is JobState.SUCCEEDED:
            return job
        if job.is_done:
            return problem(409, f"There is no result. {_DETAILS[job.state]}")
        return problem(409, "The job is not done yet.", ASK_AGAIN)

    def cancel(self, job_id: str) -> Response:
        """Cancel the job: 200 and its status, also if that was done before; 409 if it has ended otherwise."""
        job = self.find(job_id)
        if isinstance(job, Response):
            return job
        if self._jobs.cancel(job) or job.state is JobState.CANCELLED:
            return self._show(job)
        return problem(409, "The job is done.")

    def events(self, request: Request, job_id: str) -> Response:
        """Return the job's events as a stream; 204 for a client that has seen the last: it stops asking."""
        job = self.find(job_id)
        if isinstance(job, Response):
            return job
        if job.is_done and request.headers.get("last-event-id") == str(job.version):
            return Response(status_code=204, headers=_NOT_KEPT)
        headers = {**_NOT_KEPT, "X-Accel-Buffering": "no"}  # the latter is nginx's
        if request.method == "HEAD":
            return Response(media_type="text/event-stream", headers=headers)
        return StreamingResponse(self._stream(job), media_type="text/event-stream", headers=headers)

    async def _stream(self, job: Job) -> AsyncGenerator[str]:
        events = self._jobs.events(job)
        while True:
            message = ": wait\n\n"
            with anyio.move_on_after(HEARTBEAT):
                if await anext(events, None) is None:
                    return
                message = f"id: {job.version}\ndata: {json.dumps(to_json(job, self._encode))}\n\n"
            yield message

    def _show(self, job: Job) -> Response:
        headers = _NOT_KEPT if job.is_done else {**_NOT_KEPT, **ASK_AGAIN}
        return JSONResponse(to_json(job, self._encode), headers=headers)


def name_routes(jobs: Jobs, prefix: str, name: str | None) -> str:
    """Return the name of the routes for these jobs, and note it for `accepted`."""
    _names[jobs] = name or prefix.strip("/").replace("/", "_") or "jobs"
    return _names[jobs]


def accepted(request: Request, job: Job, *, name: str | None = None) -> Response:
    """Return the response for a job that was just submitted: 202, `Location`, `Retry-After` and the job's status.

    Args:
        request: the request that has submitted it.
        job: the job.
        name: that of its routes, if it is not the one that they were made with: they are mounted under another name
            (`name="api:jobs"`).

    Raises:
        RuntimeError: the application has no such routes.
    """
    found = name or _names.get(job.jobs)
    try:
        if found is None:
            raise NoMatchFound("", {})
        location = request.url_for(found, job_id=job.id).path
    except NoMatchFound:
        raise RuntimeError(
            "the application has no routes for these jobs"
            + (f" under the name {found!r}" if found else "")
            + ": add routes(jobs), and if they are mounted, say so: accepted(request, job, name='api:jobs') for "
            "Mount('/api', routes=routes(jobs), name='api')"
        ) from None
    return JSONResponse(to_json(job), status_code=202, headers={"Location": location, **_NOT_KEPT, **ASK_AGAIN})


def routes(
    jobs: Jobs, prefix: str = "/jobs", *, name: str | None = None, render: Callable[[Any], Response] = JSONResponse
) -> list[Route]:
    """Return the routes by which clients ask for jobs: `Starlette(routes=[..., *routes(jobs)])`.

    They are `GET {prefix}/{job_id}` for its status, `GET {prefix}/{job_id}/result`, `GET {prefix}/{job_id}/events` for
    its status as server-sent events, whenever it changes, and `DELETE {prefix}/{job_id}` to cancel it.  The answer is
    404 for a job that is not known, 410 for one that has expired, and 409 for the result of a job that has none (yet),
    and to cancel one that has ended otherwise.  Whoever knows a job's id may ask; to ask for more, guard the routes.

    Args:
        jobs: the jobs.
        prefix: what the paths begin with; another one for each `Jobs`.
        name: the name of the first route; by default made of the prefix ("jobs").
        render: makes a response of a job's result; by default it has to be something that `json.dumps` takes.
    """
    answers, name = JobAnswers(jobs), name_routes(jobs, prefix, name)

    async def get_status(request: Request) -> Response:
        return answers.status(request.path_params["job_id"])

    async def get_result(request: Request) -> Response:
        job = answers.result(request.path_params["job_id"])
        return job if isinstance(job, Response) else keep_private(render(job.result))

    async def get_events(request: Request) -> Response:
        return answers.events(request, request.path_params["job_id"])

    async def cancel(request: Request) -> Response:
        return answers.cancel(request.path_params["job_id"])

    path = f"{prefix}/{{job_id}}"
    return [
        Route(path, get_status, methods=["GET"], name=name),
        Route(path, cancel, methods=["DELETE"], name=f"{name}_cancel"),
        Route(f"{path}/result", get_result, methods=["GET"], name=f"{name}_result"),
        Route(f"{path}/events", get_events, methods=["GET"], name=f"{name}_events"),
    ]


def keep_private(response: Response) -> Response:
    """Return the response with a header by which no cache keeps it, unless it has one of its own."""
    response.headers.setdefault("Cache-Control", _NOT_KEPT["Cache-Control"])
    return response
