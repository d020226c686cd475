"""Applications with a pool on real servers, each a process of its own, with real clients."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

import tasks
from conftest import TESTS, environment, is_gone, let_ctrl_c_through, wait_until_gone

DRAIN = 0.5  # seconds, of the applications' pool


class Server:
    """A server that runs, and all that it has started.

    Attributes:
        url: where it listens.
    """

    def __init__(self, command: list[str], folder: Path, wait: bool, **env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment(**{"WEBAPP_DRAIN": str(DRAIN), "WEBAPP_MAX_WORKERS": "2", **env}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=let_ctrl_c_through,  # noqa: PLW1509  # it changes a signal handler, and that is all
        )
        self._lines: list[str] = []
        self._clients = ThreadPoolExecutor()
        self._pids: set[int] = set()
        self.url = ""
        found = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(found,))
        self._reader.start()
        if wait:
            assert found.wait(30), self.log
        if self.url:
            self._wait_until_it_listens()

    def _wait_until_it_listens(self) -> None:
        """One that has several processes says where it listens before one of them does."""
        host, port = self.url.removeprefix("http://").split(":")
        deadline = time.monotonic() + 30
        while self._process.poll() is None:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port))):
                return
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)

    def _read(self, found: threading.Event) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._lines.append(line)
                if match := re.search(r"(?:running on|Listening at:) (http://[\d.]+:\d+)", line):
                    self.url = match[1]
                    found.set()
        found.set()

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def remember_processes(self) -> set[int]:
        """Return all processes that it has had so far, itself included; none may outlive it."""
        process = psutil.Process(self._process.pid)
        self._pids |= {process.pid, *(child.pid for child in process.children(recursive=True))}
        return self._pids

    def get(self, path: str, **params: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, params=params, timeout=60)

    def post(self, path: str, json: object = None, **params: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=json, params=params, timeout=60)

    def get_soon(self, path: str, **params: Any) -> Future[httpx2.Response]:
        return self._clients.submit(self.get, path, **params)

    def spin(self, fifo: Path) -> Future[httpx2.Response]:
        """Begin a request whose task never ends, and wait until that runs."""
        if not fifo.exists():
            os.mkfifo(fifo)
        response = self.get_soon("/spin", fifo=str(fifo))
        self._pids.add(int(fifo.read_text()))
        return response

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def seconds_to_end(self, *, at_most: float) -> float:
        """Wait until it has ended, and all that it has started with it."""
        began = time.monotonic()
        try:
            self._process.wait(at_most)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it runs on: {self.log}")
        wait_until_gone(*self._pids, seconds=1)
        return time.monotonic() - began

    def close(self) -> None:
        if self._process.poll() is None:
            pids = self.remember_processes()
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            wait_until_gone(*pids)
        self._reader.join()
        self._clients.shutdown()


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server: `serve("uvicorn", "webapps:app", ...)`; it listens on a port of its own."""
    servers = []

    def start(*command: str, wait: bool = True, **env: str) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        places = {"uvicorn": ["--port", port], "gunicorn": ["--bind", f"127.0.0.1:{port}"]}
        if command[0] in places:
            command = ("-m", *command, *places[command[0]])
        servers.append(Server([*command], tmp_path, wait, PORT=port, **env))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


APPS = ["app", pytest.param("starlette_app", marks=pytest.mark.slow), pytest.param("asgi_app", marks=pytest.mark.slow)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("app", APPS)
def test_c2_a_server_that_is_told_to_stop_ends_in_time(
    app: str, number: signal.Signals, serve: Serve, tmp_path: Path
) -> None:
    """Its request runs for ever; it is answered when the time for that is over."""
    server = serve("uvicorn", f"webapps:{app}")
    response = server.spin(tmp_path / "fifo")
    assert len(server.remember_processes()) >= 3
    server.signal(number)
    assert server.seconds_to_end(at_most=DRAIN + 1) >= DRAIN
    assert response.result().status_code == 503
    assert "Traceback" not in server.log


def test_c2_a_server_that_is_told_to_stop_while_it_starts_ends_in_time(serve: Serve, tmp_path: Path) -> None:
    """Its initializer takes for ever."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    server = serve(
        "uvicorn",
        "webapps:app",
        wait=False,
        WEBAPP_INITIALIZER="tasks:report_begin_and_hold_gil",
        WEBAPP_INITARGS=f'["{fifo}"]',
    )
    fifo.read_text()
    server.remember_processes()
    server.signal(signal.SIGTERM)
    server.seconds_to_end(at_most=DRAIN + 1)


def test_c2_what_ends_in_time_is_answered(serve: Serve, tmp_path: Path) -> None:
    server = serve("uvicorn", "webapps:app", WEBAPP_DRAIN="20")
    response = server._clients.submit(httpx2.post, f"{server.url}/work?seconds=1", timeout=60)
    pid = server.get("/pid").json()[1]  # on the other worker: the server has taken both requests
    server.remember_processes()
    server.signal(signal.SIGTERM)
    assert server.seconds_to_end(at_most=5) < 5
    assert (response.result().status_code, response.result().json()) == (200, 1.0)
    assert is_gone(pid)


def test_c2_a_second_ctrl_c_ends_it_at_once(serve: Serve, tmp_path: Path) -> None:
    server = serve("uvicorn", "webapps:app", WEBAPP_DRAIN="60")
    response = server.spin(tmp_path / "fifo")
    server.remember_processes()
    server.signal(signal.SIGINT)
    while "Waiting for connections to close" not in server.log:
        time.sleep(0.01)
    server.signal(signal.SIGINT)
    server.seconds_to_end(at_most=1)
    assert response.exception() is not None or response.result().status_code == 500


def test_c2_reload_during_a_task(serve: Serve, tmp_path: Path) -> None:
    module = tmp_path / "changing.py"
    shutil.copy(TESTS / "webapps.py", module)
    server = serve("uvicorn", "changing:app", "--reload", "--reload-dir", str(tmp_path))
    old, _ = server.get("/pid").json()
    response = server.spin(tmp_path / "fifo")
    before = server.remember_processes() - {server._process.pid}
    began = time.monotonic()
    module.touch()
    assert response.result().status_code == 503
    wait_until_gone(old, seconds=DRAIN + 1)
    new, worker = server.get("/pid").json()
    assert new != old
    assert worker not in before
    assert (
        time.monotonic() - began < DRAIN + 1 + 5
    )  # the file is looked at every quarter of a second, and Python starts
    server.spin(tmp_path / "fifo")
    server.remember_processes()
    server.signal(signal.SIGINT)
    server.seconds_to_end(at_most=DRAIN + 1)
    assert "Traceback" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_c2_several_server_processes(number: signal.Signals, serve: Serve, tmp_path: Path) -> None:
    """Each has a pool of its own."""
    server = serve("uvicorn", "webapps:app", "--workers", "2")
    pids: dict[int, int] = {}
    deadline = time.monotonic() + 30
    while len(pids) < 2:
        server_pid, worker_pid = server.get("/pid").json()
        pids[server_pid] = worker_pid
        assert time.monotonic() < deadline
    assert len(set(pids.values())) == 2
    response = server.spin(tmp_path / "fifo")
    server.remember_processes()
    server.signal(number)
    server.seconds_to_end(at_most=DRAIN + 1.5)  # the parent looks after its children every half a second
    assert response.result().status_code == 503
    assert "Traceback" not in server.log


@pytest.mark.parametrize("preload", [False, True])
def test_c2_gunicorn(preload: bool, serve: Serve, tmp_path: Path) -> None:
    """With `--preload` the application, and its pool, is made in the parent, which forks."""
    options = ["--preload"] if preload else []
    server = serve(
        "gunicorn", "webapps:app", "--worker-class", "uvicorn_worker.UvicornWorker", "--workers", "2", *options
    )
    assert server.get("/pid").status_code == 200
    response = server.spin(tmp_path / "fifo")
    server.remember_processes()
    server.signal(signal.SIGTERM)
    server.seconds_to_end(at_most=DRAIN + 1.5)  # likewise
    assert response.result().status_code == 503
    assert "Traceback" not in server.log


def test_a_server_whose_pool_cannot_start_says_why(serve: Serve) -> None:
    server = serve("uvicorn", "webapps:app", WEBAPP_INITIALIZER="items:fail", WEBAPP_INITARGS='["model"]')
    server.seconds_to_end(at_most=10)
    assert "ValueError: no model" in server.log
    assert "Application startup failed" in server.log


def test_the_application_in_the_readme_works(serve: Serve, tmp_path: Path) -> None:
    readme = (TESTS.parent / "README.md").read_text()
    (block,) = (
        each for each in re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL) if "FastAPI()" in each
    )
    assert len([line for line in block.splitlines() if line]) <= 12
    (tmp_path / "main.py").write_text(block)
    server = serve("uvicorn", "main:app")
    assert server.post("/domains", text="see example.org, or www.python.org.").json() == [
        "example.org",
        "www.python.org",
    ]
    server.remember_processes()
    server.signal(signal.SIGTERM)
    server.seconds_to_end(at_most=3)


# --- examples ---

EXAMPLES = TESTS.parent / "examples"
TEXT = "see example.org, or www.python.org, or example.org"
DOMAINS = ["example.org", "www.python.org", "example.org"]
COUNTS = {"example.org": 2, "www.python.org": 1}


def run_job(server: Server, accepted: httpx2.Response) -> httpx2.Response:
    """Wait for a job, by its events, and return its result."""
    assert accepted.status_code == 202
    location = accepted.headers["Location"]
    events = server.get(f"{location}/events").text
    assert '"state": "succeeded"' in events
    assert server.get(location).json()["progress"] == {"done": len(TEXT), "of": len(TEXT)}
    return server.get(f"{location}/result")


def end(server: Server) -> None:
    server.remember_processes()
    server.signal(signal.SIGTERM)
    server.seconds_to_end(at_most=3)
    assert "Traceback" not in server.log


def test_the_fastapi_example_works(serve: Serve) -> None:
    server = serve("uvicorn", "--app-dir", str(EXAMPLES), "fastapi_app:app")
    assert server.post("/process-content", json={"data": TEXT}).json() == DOMAINS
    assert server.post("/addContent", json={"data": TEXT}).json() == {"domains": COUNTS}
    assert server.post("/addContent", json={}).status_code == 422
    assert run_job(server, server.post("/jobs", json={"data": TEXT})).json() == COUNTS
    assert server.get("/jobs/nonsense").status_code == 404
    assert server.get("/health").json() == {"status": "ready"}
    assert "/jobs/{job_id}" in server.get("/openapi.json").json()["paths"]
    end(server)


def test_the_starlette_example_works(serve: Serve) -> None:
    server = serve("uvicorn", "--app-dir", str(EXAMPLES), "starlette_app:app")
    assert httpx2.post(f"{server.url}/domains", content=TEXT).json() == DOMAINS
    assert run_job(server, httpx2.post(f"{server.url}/jobs", content=TEXT)).json() == COUNTS
    assert server.get("/health").status_code == 200
    end(server)


def test_the_example_with_a_live_page_works(serve: Serve) -> None:
    server = serve("uvicorn", "--app-dir", str(EXAMPLES), "dashboard:app")
    assert "<title>cpupool</title>" in server.get("/pool/").text
    with httpx2.stream("GET", f"{server.url}/pool/events", timeout=30) as response:
        assert '"name": "images"' in next(line for line in response.iter_lines() if '"workers"' in line)
        end(server)


def test_the_example_without_a_framework_works(serve: Serve) -> None:
    server = serve("uvicorn", "--app-dir", str(EXAMPLES), "any_asgi:app")
    assert httpx2.post(server.url, content=TEXT).json() == DOMAINS
    end(server)


@pytest.mark.parametrize("example", ["fastapi_app.py", "starlette_app.py", "any_asgi.py"])
def test_the_examples_with_servers_run_as_scripts(example: str, serve: Serve) -> None:
    """Their workers import the script too, and start no servers of their own."""
    server = serve(str(EXAMPLES / example))
    if example == "any_asgi.py":
        assert httpx2.post(server.url, content=TEXT).json() == DOMAINS
    else:
        body = {"json": {"data": TEXT}} if example == "fastapi_app.py" else {"content": TEXT}
        assert run_job(server, httpx2.post(f"{server.url}/jobs", **body)).json() == COUNTS
    end(server)


# --- background jobs ---


def test_c2_a_server_with_a_background_job_and_somebody_who_listens_ends_in_time(serve: Serve, tmp_path: Path) -> None:
    server = serve("uvicorn", "webapps:app")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    location = server.post("/spin-in-background", fifo=str(fifo)).headers["Location"]
    assert fifo.read_text()
    with httpx2.stream("GET", f"{server.url}{location}/events", timeout=30) as response:
        events = response.iter_lines()
        assert next(events).startswith("id: ")
        server.remember_processes()
        server.signal(signal.SIGTERM)
        assert '"state": "cancelled"' in "".join(events)
    assert server.seconds_to_end(at_most=DRAIN + 1) < DRAIN + 1
    assert "Traceback" not in server.log


# --- B10 ---


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_b10_the_work_stops_when_the_client_leaves(method: str, serve: Serve, tmp_path: Path) -> None:
    server = serve("uvicorn", "webapps:app", WEBAPP_MAX_WORKERS="1")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pid = server.get("/pid").json()[1]
    host, port = server.url.removeprefix("http://").split(":")
    body = b"x" * 200_000 if method == "POST" else b""
    for _ in range(3):
        with socket.create_connection((host, int(port))) as client:
            head = f"{method} /spin-until-disconnect?fifo={fifo} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}"
            client.sendall(f"{head}\r\n\r\n".encode() + body)
            assert int(fifo.read_text()) == pid
        began = time.monotonic()
        assert server.get("/pid").json()[1] == pid  # it has only one: it is free, and was not lost
        assert time.monotonic() - began < 2
    assert "Traceback" not in server.log


# --- back-pressure ---


def test_two_hundred_requests_at_once_against_a_queue_of_twenty(serve: Serve, tmp_path: Path) -> None:
    """One worker is busy throughout: exactly so many wait as may, and the others are refused at once."""
    server = serve("uvicorn", "webapps:app", "--no-access-log", WEBAPP_MAX_WORKERS="1", WEBAPP_MAX_PENDING="20")
    pid = server.get("/pid").json()[0]
    memory = []
    with contextlib.closing(Crowd(server.url, 200)) as crowd:
        for number in range(4):
            gate = tasks.Gate(tmp_path / str(number))
            holding = server.get_soon("/hold", begun=gate.arguments[0], end=gate.arguments[1])
            gate.wait_until_begun()
            began = time.perf_counter()
            crowd.ask("POST /work?seconds=0")
            refused = crowd.take_answers(180)
            assert {head.split()[1] for head, _ in refused} == {"503"}
            assert all(re.search(r"^retry-after: \d+\r$", head, re.MULTILINE) for head, _ in refused)
            assert max(at for _, at in refused) - began < 1
            gate.open()
            assert {head.split()[1] for head, _ in crowd.take_answers(20)} == {"200"}
            assert holding.result().status_code == 200
            memory.append(psutil.Process(pid).memory_info().rss)
    assert memory[-1] - memory[1] < 2_000_000


class Crowd:
    """Many clients that ask at once, each with a connection of its own."""

    def __init__(self, url: str, clients: int) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._selector = selectors.DefaultSelector()
        self._sockets = [socket.create_connection((host, int(port))) for _ in range(clients)]
        self._parts: dict[int, str] = {}
        for each in self._sockets:
            self._selector.register(each, selectors.EVENT_READ)

    def ask(self, what: str) -> None:
        for each in self._sockets:
            each.sendall(f"{what} HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n".encode())

    def take_answers(self, count: int) -> list[tuple[str, float]]:
        """Return so many answers, and when each came."""
        answers: list[tuple[str, float]] = []
        while len(answers) < count:
            events = self._selector.select(30)
            assert events, f"{len(answers)} answers"
            now = time.perf_counter()
            for key, _ in events:
                assert isinstance(key.fileobj, socket.socket)
                text = self._parts.pop(key.fd, "") + key.fileobj.recv(10_000).decode()
                size = re.search(r"^content-length: (\d+)\r\n(?:.*\r\n)*?\r\n", text, re.MULTILINE)
                if size is not None and len(text) >= size.end() + int(size[1]):
                    answers.append((text, now))
                else:
                    self._parts[key.fd] = text
        return answers

    def close(self) -> None:
        self._selector.close()
        for each in self._sockets:
            each.close()
