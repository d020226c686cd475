"""Background jobs over HTTP, for Starlette; `cpupool.fastapi` gives the same answers.

A client gets 202 and a `Location` when its job is accepted, and asks there until the job is done, or listens to its
events; then it takes the result from `Location` + "/result".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003  # FastAPI reads the annotations
from typing import TYPE_CHECKING, Any

import anyio
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import NoMatchFound, Route

from ._answers import FAILED, TOO_LONG
from .jobs import Job, JobExpired, JobNotFound, JobState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.requests import Request

    from .jobs import Jobs

HEARTBEAT = 15.0  # seconds: less than proxies and load balancers wait, which is 30 and more
ASK_AGAIN = 1  # seconds

_DETAILS = {
    JobState.FAILED: FAILED,
    JobState.TIMED_OUT: TOO_LONG,
    JobState.CANCELLED: "The work was cancelled.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """What a client is told of a job.

    Attributes:
        id: its id.
        state: queued, running, succeeded, failed, cancelled or timed_out.
        progress: what the work has reported last, or None.
        created_at: when it was submitted.
        started_at: when the work began, or None.
        ended_at: when it ended, or None.
        detail: what went wrong, in a sentence, or None.
    """

    id: str
    state: JobState
    progress: Any
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    detail: str | None


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
    """A job is to be seen whatever it reports: what JSON does not have becomes a string."""
    try:
        encoded = encode(progress)
        json.dumps(encoded, allow_nan=False)
    except Exception:  # whatever an encoder raises
        return str(progress)
    return encoded


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """Return a response that says why there is no other."""
    return JSONResponse({"detail": detail}, status_code=status, headers=headers)


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
        except JobExpired:
            return problem(410, "The job has ended, and its result has been removed.")
        except JobNotFound:
            return problem(404, "There is no such job.")

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
        return problem(409, "The job is not done yet.", {"Retry-After": str(ASK_AGAIN)})

    def cancel(self, job_id: str) -> Response:
        """Cancel the job: 200 and its status, or 409 if it was done."""
        job = self.find(job_id)
        if isinstance(job, Response):
            return job
        return self._show(job) if self._jobs.cancel(job) else problem(409, "The job is done.")

    def events(self, job_id: str, last_event_id: str | None) -> Response:
        """Return the job's events as a stream; 204 for a client that has seen the last: it stops asking."""
        job = self.find(job_id)
        if isinstance(job, Response):
            return job
        if job.is_done and last_event_id == str(job.version):
            return Response(status_code=204)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter is nginx's
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
        headers = {"Cache-Control": "no-store"}
        if not job.is_done:
            headers["Retry-After"] = str(ASK_AGAIN)
        return JSONResponse(to_json(job, self._encode), headers=headers)


def accepted(request: Request, job: Job, *, name: str = "job") -> Response:
    """Return the response for a job that was just submitted: 202, `Location`, `Retry-After` and the job's status.

    Args:
        request: the request that has submitted it.
        job: the job.
        name: that of its routes.

    Raises:
        RuntimeError: the application has no such routes.
    """
    try:
        location = request.url_for(name, job_id=job.id).path
    except NoMatchFound:
        raise RuntimeError(
            f"the application has no routes for jobs under the name {name!r}: add routes(jobs), or give the name that "
            'they have: accepted(request, job, name="reports") for routes(jobs, name="reports")'
        ) from None
    headers = {"Location": location, "Retry-After": str(ASK_AGAIN)}
    return JSONResponse(to_json(job), status_code=202, headers=headers)


def routes(
    jobs: Jobs, prefix: str = "/jobs", *, name: str = "job", render: Callable[[Any], Response] = JSONResponse
) -> list[Route]:
    """Return the routes by which clients ask for jobs: `Starlette(routes=[..., *routes(jobs)])`.

    They are `GET {prefix}/{job_id}` for its status, `GET {prefix}/{job_id}/result`, `GET {prefix}/{job_id}/events` for
    its status as server-sent events, whenever it changes, and `DELETE {prefix}/{job_id}` to cancel it.  The answer is
    404 for a job that is not known, 410 for one that has expired, and 409 for the result of a job that has none (yet),
    and to cancel one that is done.  Whoever knows a job's id may ask; to ask for more, guard the routes.

    Args:
        jobs: the jobs.
        prefix: what the paths begin with.
        name: the name of the first route, for `accepted`; needed for a second set of routes.
        render: makes a response of a job's result.
    """
    answers = JobAnswers(jobs)

    async def get_status(request: Request) -> Response:
        return answers.status(request.path_params["job_id"])

    async def get_result(request: Request) -> Response:
        job = answers.result(request.path_params["job_id"])
        return job if isinstance(job, Response) else render(job.result)

    async def get_events(request: Request) -> Response:
        return answers.events(request.path_params["job_id"], request.headers.get("last-event-id"))

    async def cancel(request: Request) -> Response:
        return answers.cancel(request.path_params["job_id"])

    path = f"{prefix}/{{job_id}}"
    return [
        Route(path, get_status, methods=["GET"], name=name),
        Route(path, cancel, methods=["DELETE"], name=f"{name}_cancel"),
        Route(f"{path}/result", get_result, methods=["GET"], name=f"{name}_result"),
        Route(f"{path}/events", get_events, methods=["GET"], name=f"{name}_events"),
    ]
