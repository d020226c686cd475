"""Background jobs over HTTP, in Starlette and in FastAPI."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

import items
import reporting
import tasks
from cpupool import CpuPool, _job_routes
from cpupool.fastapi import install
from cpupool.fastapi import routes as fastapi_routes
from cpupool.jobs import Jobs, JobsNotStarted, JobState
from cpupool.starlette import JobStatus, accepted, exception_handlers, lifespan, routes

FUNCTIONS: dict[str, Callable[..., object]] = {
    "add": tasks.add,
    "fail": items.fail,
    "hold": tasks.hold,
    "pid": tasks.get_pid,
    "report": reporting.report_then,
    "report_until_seen": reporting.report_until_seen,
    "same": items.same,
    "spin": tasks.spin_forever,
}


def submit(jobs: Jobs, request: Request, body: list[Any]) -> Response:
    fn, *arguments = body
    return accepted(request, jobs.submit(FUNCTIONS[fn], *arguments))


def make_starlette(jobs: Jobs, **options: Any) -> Starlette:
    async def take(request: Request) -> Response:
        return submit(jobs, request, await request.json())

    return Starlette(
        routes=[Route("/work", take, methods=["POST"]), *routes(jobs, **options)],
        lifespan=lifespan(jobs.pool),
        exception_handlers=exception_handlers(),
    )


def make_fastapi(jobs: Jobs, **options: Any) -> FastAPI:
    app = FastAPI()
    install(app, jobs.pool)

    @app.post("/work", status_code=202, response_model=JobStatus)
    def take(request: Request, body: list[Any]) -> Response:  # in a thread
        return submit(jobs, request, body)

    app.include_router(fastapi_routes(jobs, **options))
    return app


@pytest.fixture(params=[make_starlette, make_fastapi])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


def post(client: TestClient, *body: object) -> tuple[str, dict[str, Any]]:
    """Submit a job; return where it is, and its status."""
    response = client.post("/work", json=body)
    assert response.status_code == 202
    assert response.headers["Retry-After"] == "1"
    return response.headers["Location"], response.json()


def wait_until(client: TestClient, location: str, state: str) -> dict[str, Any]:
    while True:
        response = client.get(location)
        assert response.status_code == 200
        status: dict[str, Any] = response.json()
        is_done = status["state"] not in ("queued", "running")
        assert ("Retry-After" in response.headers) is not is_done
        if status["state"] == state:
            return status
        assert not is_done, status


def test_a_client_submits_asks_and_takes_the_result(make: Any) -> None:
    with TestClient(make(Jobs(CpuPool(1)))) as client:
        location, status = post(client, "add", 40, 2)
        assert status["state"] in ("queued", "running")
        assert location == f"/jobs/{status['id']}"
        done = wait_until(client, location, "succeeded")
        assert list(done) == [field.name for field in dataclasses.fields(JobStatus)]
        assert done["created_at"] <= done["started_at"] <= done["ended_at"]
        assert done["created_at"].endswith("+00:00")
        assert done["detail"] is None
        response = client.get(f"{location}/result")
        assert (response.status_code, response.json()) == (200, 42)


def test_every_answer_has_its_status_code(make: Any, tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path)
    with TestClient(make(Jobs(CpuPool(1), max_jobs=2))) as client:
        running, _ = post(client, "hold", *gate.arguments)
        queued, _ = post(client, "add", 1)
        gate.wait_until_begun()
        wait_until(client, running, "running")
        for each in (running, queued):
            response = client.get(f"{each}/result")
            assert (response.status_code, response.json()) == (409, {"detail": "The job is not done yet."})
            assert response.headers["Retry-After"] == "1"
        response = client.post("/work", json=["add"])  # two that have not ended
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        response = client.delete(queued)
        assert (response.status_code, response.json()["state"]) == (200, "cancelled")
        assert client.delete(queued).status_code == 200, "a client may repeat it"
        response = client.get(f"{queued}/result")
        assert (response.status_code, response.json()) == (
            409,
            {"detail": "There is no result. The work was cancelled."},
        )
        assert "Retry-After" not in response.headers
        gate.open()
        wait_until(client, running, "succeeded")
        assert client.delete(running).status_code == 409
        third, _ = post(client, "add", 1)  # makes room for itself
        for end in ("", "/result", "/events"):
            response = client.get(queued + end)
            assert response.status_code == 410
            assert list(response.json()) == ["detail"]
            assert client.get(f"/jobs/nonsense{end}").status_code == 404
        assert client.delete(queued).status_code == 410
        assert client.delete("/jobs/nonsense").status_code == 404
        assert client.post(running).status_code == 405
        wait_until(client, third, "succeeded")


def test_a_client_that_cancels_stops_the_work(make: Any, tmp_path: Path) -> None:
    with TestClient(make(Jobs(CpuPool(1)))) as client:
        location, _ = post(client, "pid")
        wait_until(client, location, "succeeded")
        pid = client.get(f"{location}/result").json()
        location, _ = post(client, "spin")
        wait_until(client, location, "running")
        assert client.delete(location).json()["state"] == "cancelled"
        location, _ = post(client, "pid")
        wait_until(client, location, "succeeded")
        assert client.get(f"{location}/result").json() == pid


def test_what_went_wrong_is_told_without_a_word_of_the_inside(make: Any) -> None:
    pool = CpuPool(1)
    with TestClient(make(Jobs(pool.options(timeout=0.2)))) as client:
        location, _ = post(client, "fail", "secret")
        failed = wait_until(client, location, "failed")
        assert failed["detail"] == "The work failed."
        response = client.get(f"{location}/result")
        assert (response.status_code, response.json()) == (409, {"detail": "There is no result. The work failed."})
        location, _ = post(client, "spin")
        assert wait_until(client, location, "timed_out")["detail"] == "The work took too long and was stopped."
        assert client.get(f"{location}/result").status_code == 409


def read_events(client: TestClient, location: str, **headers: str) -> list[tuple[str, dict[str, Any]]]:
    """Return id and status of each event, to the last."""
    ids: list[str] = []
    statuses: list[dict[str, Any]] = []
    with client.stream("GET", f"{location}/events", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-store"
        for line in response.iter_lines():
            field, _, value = line.partition(": ")
            if field == "id":
                ids.append(value)
            elif field == "data":
                statuses.append(json.loads(value))
    return list(zip(ids, statuses, strict=True))


def test_a_client_listens_to_events_until_the_job_is_done(make: Any) -> None:
    with TestClient(make(Jobs(CpuPool(1)))) as client:
        location, _ = post(client, "report", {"done": 3}, "add")
        events = read_events(client, location)
        states = [status["state"] for _, status in events]
        assert states[-1] == "failed"  # text is not callable
        assert events[-1][1]["progress"] == {"done": 3}
        assert states == sorted(states, key=["queued", "running", "failed"].index)
        ids = [int(id_) for id_, _ in events]
        assert ids == sorted(set(ids))
        again = read_events(client, location, **{"Last-Event-ID": "0"})
        assert [id_ for id_, _ in again] == [events[-1][0]]
        response = client.get(f"{location}/events", headers={"Last-Event-ID": events[-1][0]})
        assert response.status_code == 204, "so that a browser stops asking"


@pytest.mark.anyio
async def test_events_beat_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies cut connections on which nothing comes."""
    monkeypatch.setattr(_job_routes, "HEARTBEAT", 0.01)
    async with CpuPool(1) as pool:
        jobs = Jobs(pool)
        job = jobs.submit(tasks.spin_forever)
        request = Request({"type": "http", "method": "GET", "headers": []})
        response = _job_routes.JobAnswers(jobs).events(request, job.id)
        messages: list[str] = []
        async for message in response.body_iterator:  # type: ignore[attr-defined]
            messages.append(message)
            if messages[-2:] == [": wait\n\n"] * 2:
                jobs.cancel(job)
    assert messages[0].startswith("id: ")
    assert '"state": "queued"' in messages[0].replace('":"', '": "')
    assert '"cancelled"' in messages[-1]
    assert all(message.endswith("\n\n") for message in messages)


class Unspeakable:
    def __str__(self) -> str:
        raise ValueError("nothing to say")


@pytest.mark.parametrize(
    "progress",
    [float("nan"), b"\xff", {1, object()}, object, 10**5000, "caf\udce9.txt", Unspeakable()],
    ids=["nan", "bytes", "set", "class", "long", "surrogate", "unspeakable"],
)
def test_a_job_is_seen_whatever_it_reports(make: Any, progress: object) -> None:
    jobs = Jobs(CpuPool(1))
    with TestClient(make(jobs)) as client:
        location, status = post(client, "add", 1)
        wait_until(client, location, "succeeded")
        jobs.get(status["id"]).progress = progress
        response = client.get(location)
        assert response.status_code == 200
        assert response.json()["progress"] in (None, {})  # FastAPI takes objects apart
        assert " at 0x" not in response.text, "nothing of the inside"
        assert read_events(client, location)[-1][1]["progress"] in (None, {})


def test_a_result_is_rendered_as_the_application_likes(make: Any) -> None:
    def render(value: Any) -> Response:
        return PlainTextResponse(f"<{value}>")

    with TestClient(make(Jobs(CpuPool(1)), render=render)) as client:
        location, _ = post(client, "same", "text")
        wait_until(client, location, "succeeded")
        assert client.get(f"{location}/result").text == "<text>"


def test_jobs_of_two_kinds_and_an_application_within_another() -> None:
    pool = CpuPool(1)
    reports, images = Jobs(pool), Jobs(pool)

    async def take(request: Request) -> Response:
        return accepted(request, reports.submit(tasks.add, 1), name="inner:report")

    async def take_image(request: Request) -> Response:
        return accepted(request, images.submit(tasks.add, 2), name="inner:image")

    async def forget_the_name(request: Request) -> Response:
        return accepted(request, images.submit(tasks.add, 2))

    both = [*routes(reports, "/reports", name="report"), *routes(images, "/images", name="image")]
    work = [Route("/report", take, methods=["POST"]), Route("/image", take_image, methods=["POST"])]
    work.append(Route("/forgetful", forget_the_name, methods=["POST"]))
    app = Starlette(routes=[Mount("/api", routes=[*work, *both], name="inner")], lifespan=lifespan(pool))
    with TestClient(app, root_path="/behind-a-proxy") as client:
        for kind, expected in (("report", 1), ("image", 2)):
            location = client.post(f"/behind-a-proxy/api/{kind}").headers["Location"]
            assert location.startswith(f"/behind-a-proxy/api/{kind}s/")
            wait_until(client, location, "succeeded")
            assert client.get(f"{location}/result").json() == expected
        with pytest.raises(RuntimeError, match="no routes for these jobs under the name 'image': add routes"):
            client.post("/behind-a-proxy/api/forgetful")


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
def test_each_job_is_asked_for_where_it_is(framework: str) -> None:
    """Without a word about names, in an application with jobs of several kinds."""
    pool = CpuPool(1)
    kinds = [Jobs(pool), Jobs(pool), Jobs(pool)]

    async def take(request: Request) -> Response:
        number = int(request.query_params["kind"])
        return accepted(request, kinds[number].submit(tasks.add, number))

    app = FastAPI() if framework == "fastapi" else Starlette(lifespan=lifespan(pool))
    app.add_route("/work", take, methods=["POST"])
    for jobs, prefix in zip(kinds, ("/jobs", "/api/reports"), strict=False):
        if isinstance(app, FastAPI):
            app.include_router(fastapi_routes(jobs, prefix))
        else:
            app.router.routes.extend(routes(jobs, prefix))
    if isinstance(app, FastAPI):
        install(app, pool)
    with TestClient(app) as client:
        for number, prefix in enumerate(("/jobs/", "/api/reports/")):
            location = client.post(f"/work?kind={number}").headers["Location"]
            assert location.startswith(prefix)
            wait_until(client, location, "succeeded")
            assert client.get(f"{location}/result").json() == number
        with pytest.raises(RuntimeError, match=r"no routes for these jobs: add routes\(jobs\)"):
            client.post("/work?kind=2")


def test_head_of_events_does_not_wait_for_the_end() -> None:
    with TestClient(make_starlette(Jobs(CpuPool(1)))) as client:
        location, _ = post(client, "spin")
        response = client.head(f"{location}/events")
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert client.delete(location).status_code == 200


def test_nothing_is_kept_by_a_cache(make: Any) -> None:
    with TestClient(make(Jobs(CpuPool(1)))) as client:
        location, _ = post(client, "add", 1)
        wait_until(client, location, "succeeded")
        for response in (
            client.post("/work", json=["add", 1]),
            client.get(location),
            client.get(f"{location}/result"),
            client.delete(location),
            client.get("/jobs/nonsense"),
        ):
            assert response.headers["Cache-Control"] == "no-store"


def test_what_an_endpoint_of_one_s_own_asks_for_in_vain(make: Any) -> None:
    jobs = Jobs(CpuPool(1))

    async def ask(request: Request) -> Response:
        job = jobs.get(request.query_params["id"])
        return PlainTextResponse(str(await jobs.wait(job)))

    app = make(jobs)
    app.add_route("/ask", ask)
    with TestClient(app) as client:
        response = client.get("/ask?id=nonsense")
        assert (response.status_code, response.json()) == (404, {"detail": "There is no such job."})
        location, status = post(client, "spin")
        client.delete(location)
        assert client.get(f"/ask?id={status['id']}").status_code == 409


def test_d7_without_a_lifespan_no_job_is_taken(make: Any) -> None:
    with pytest.raises(JobsNotStarted, match="with TestClient"):
        TestClient(make(Jobs(CpuPool(1)))).post("/work", json=["add", 1])


def test_openapi_has_the_types() -> None:
    app = make_fastapi(Jobs(CpuPool(1)), result=list[int])
    paths = app.openapi()["paths"]
    schemas = app.openapi()["components"]["schemas"]
    assert set(schemas["JobStatus"]["properties"]) == {field.name for field in dataclasses.fields(JobStatus)}
    assert schemas["JobState"]["enum"] == [state.value for state in JobState]
    status = paths["/jobs/{job_id}"]["get"]["responses"]
    assert status["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/JobStatus"}
    assert set(status) == {"200", "404", "410", "422"}
    assert set(paths["/jobs/{job_id}"]["delete"]["responses"]) == {"200", "404", "409", "410", "422"}
    result = paths["/jobs/{job_id}/result"]["get"]["responses"]
    assert result["200"]["content"]["application/json"]["schema"]["items"] == {"type": "integer"}
    assert "409" in result
    events = paths["/jobs/{job_id}/events"]["get"]["responses"]
    assert list(events["200"]["content"]) == ["text/event-stream"]
    assert list(events["404"]["content"]) == ["application/json"]
    assert "204" in events
    assert "Attributes" not in schemas["JobStatus"]["description"]
    assert set(schemas) >= {"JobState", "JobStatus", "Problem"}
    assert paths["/work"]["post"]["responses"]["202"]["content"]["application/json"]["schema"]
    operations = [each["operationId"] for path in paths.values() for each in path.values()]
    assert len(set(operations)) == len(operations)
