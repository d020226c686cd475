"""The live page: over HTTP on a real server, and in a real browser."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from starlette.applications import Starlette
from starlette.routing import Mount

import cpupool
import tasks
from conftest import environment
from cpupool import CpuPool
from cpupool.starlette import dashboard, lifespan


@contextlib.contextmanager
def served(pool: CpuPool, **options: Any) -> Iterator[str]:
    """Serve the page of a pool; gives its address."""
    page = dashboard(pool, interval=0.1, **options)
    app = Starlette(routes=[Mount("/pool", app=page)], lifespan=lifespan(pool))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/pool/"
    finally:
        pool.close_soon()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Busy:
    """Keeps all workers of a pool busy, and so many calls waiting, until it is left."""

    def __init__(self, pool: CpuPool, folder: Path, workers: int, waiting: int) -> None:
        self.pool = pool
        self.gates = [tasks.Gate(folder / str(number)) for number in range(workers)]
        self.waiting = waiting
        self.threads = ThreadPoolExecutor(workers + waiting)

    def __enter__(self) -> Busy:
        call = self.pool.options(label="make <b>thumbnail</b>").run_sync
        self.calls = [self.threads.submit(functools.partial(call, tasks.hold, *gate.arguments)) for gate in self.gates]
        self.pids = sorted(gate.wait_until_begun() for gate in self.gates)
        self.calls += [self.threads.submit(self.pool.run_sync, tasks.add, 1) for _ in range(self.waiting)]
        wait_until(lambda: self.pool.statistics().pending == self.waiting)
        return self

    def __exit__(self, *_: object) -> None:
        for gate, call in zip(self.gates, self.calls, strict=False):
            if not call.done():
                gate.open()
        self.threads.shutdown()


def read_events(url: str, names: list[str]) -> list[Any]:
    """Return the data of the first events, which have these names."""
    found: list[Any] = []
    with httpx2.stream("GET", url + "events", timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                assert name == names[len(found)]
                found.append(json.loads(line.removeprefix("data: ")))
                if len(found) == len(names):
                    return found
    raise AssertionError("the stream has ended")


# --- over HTTP ---


def test_the_page_agrees_with_the_statistics(tmp_path: Path) -> None:
    pool = CpuPool(2, name="images")
    with served(pool) as url, Busy(pool, tmp_path, 2, 3) as busy:
        history, sample = read_events(url, ["history", "sample"])
        known = pool.statistics()
        assert history == []
        for name in ("name", "max_workers", "idle", "busy", "starting", "pending", "submitted", "succeeded"):
            assert sample[name] == getattr(known, name)
        assert (sample["busy"], sample["pending"], sample["health"]) == (2, 3, "ready")
        assert sorted(worker["pid"] for worker in sample["workers"]) == busy.pids
        assert sample["memory"] == pytest.approx(sum(each.resident_bytes or 0 for each in known.workers), rel=0.5)
        history, first, second = read_events(url, ["history", "sample", "sample"])
        assert len(history) >= 1
        assert second["time"] > first["time"]


def test_stacks_are_shown_and_interrupting_is_off(tmp_path: Path) -> None:
    pool = CpuPool(2)
    with served(pool) as url, Busy(pool, tmp_path, 1, 0) as busy:
        (pid,) = busy.pids
        answer = httpx2.get(f"{url}stacks/{pid}")
        assert "in hold" in answer.text
        assert answer.headers["cache-control"] == "no-store"
        assert httpx2.get(f"{url}stacks/1").text == "It runs nothing now."
        answer = httpx2.post(f"{url}interrupt/{pid}", headers={"X-Cpupool": "interrupt"})
        assert (answer.status_code, busy.calls[0].done()) == (403, False)
        assert httpx2.post(url).status_code == 405


def test_a_task_is_interrupted_where_that_is_enabled(tmp_path: Path) -> None:
    pool = CpuPool(2)
    with served(pool, interrupt=True) as url, Busy(pool, tmp_path, 1, 0) as busy:
        (pid,) = busy.pids
        assert httpx2.post(f"{url}interrupt/{pid}").status_code == 403, "another site's form cannot"
        headers = {"X-Cpupool": "interrupt"}
        assert httpx2.post(f"{url}interrupt/1", headers=headers).status_code == 409
        assert httpx2.post(f"{url}interrupt/{pid}", headers=headers).status_code == 202
        with pytest.raises(cpupool.TaskStopped, match="was stopped on request") as caught:
            busy.calls[0].result(20)
        assert "in hold" in (caught.value.stack or "")
        assert pool.run_sync(tasks.get_pid) is not None
        assert pid in [worker.pid for worker in pool.statistics().workers], "it lives on"
        wait_until(lambda: pool.statistics().cancelled == 1)


def test_the_page_is_one_file_with_a_strict_policy() -> None:
    pool = CpuPool(1)
    with served(pool) as url:
        answer = httpx2.get(url)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"\s(?:src|href|style|on\w+)=\"", answer.text)
    assert set(re.findall(r"https?://[^\s\"']+", answer.text)) == {"http://www.w3.org/2000/svg"}


def test_intervals() -> None:
    for interval in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="interval must be a number of seconds above 0"):
            dashboard(CpuPool(1), interval=interval)


def test_nobody_looks_at_the_pool_while_nobody_looks_at_the_page() -> None:
    pool = CpuPool(1)
    asked = 0
    look = pool.statistics

    def count() -> cpupool.Statistics:
        nonlocal asked
        asked += 1
        return look()

    pool.statistics = count  # type: ignore[method-assign]
    with served(pool) as url:
        httpx2.get(url)
        pool.run_sync(tasks.add, 1)
        assert asked == 0
        read_events(url, ["history", "sample"])
        before = asked
        threads = [threading.Thread(target=read_events, args=(url, ["history", *["sample"] * 5])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert asked - before < 20, "they share what is found"


# --- in a browser ---


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver, env=environment()))
    yield found
    found.quit()


def text(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def wait_for_text(browser: webdriver.Chrome, name: str, wanted: str) -> None:
    WebDriverWait(browser, 20, 0.05).until(lambda _: wanted in text(browser, name))


def complaints(browser: webdriver.Chrome) -> list[str]:
    """Return what the browser has to say: errors, and what a policy forbids; but for the icon that it looks for."""
    log: list[dict[str, str]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [each["message"] for each in log if "favicon" not in each["message"]]


def test_the_page_in_a_browser(tmp_path: Path, browser: webdriver.Chrome) -> None:
    pool = CpuPool(2, name="images")
    with served(pool) as url:
        with Busy(pool, tmp_path, 2, 3) as busy:
            browser.get(url)
            wait_for_text(browser, "pending", "3")
            assert text(browser, "name") == "images"
            assert text(browser, "health") == "ready"
            assert text(browser, "busy") == "2 of 2"
            rows = browser.find_elements(By.CSS_SELECTOR, "#workers tr")
            assert sorted(int(row.get_attribute("data-pid") or 0) for row in rows) == busy.pids
            assert "make <b>thumbnail</b>" in rows[0].text, "as text, not as a part of the page"
            assert browser.find_elements(By.CSS_SELECTOR, "button.interrupt") == []
            rows[0].find_element(By.CSS_SELECTOR, "button.stack").click()
            wait_for_text(browser, "stack", "in hold")
        wait_for_text(browser, "count-succeeded", "5")
        assert pool.statistics().succeeded == 5
        wait_for_text(browser, "busy", "0 of 2")
        assert browser.find_elements(By.CSS_SELECTOR, "button:enabled") == []
        assert browser.find_elements(By.CSS_SELECTOR, "polyline.curve")
        resources: list[str] = browser.execute_script(
            "return performance.getEntriesByType('resource').map((each) => each.name)"
        )
        assert all(resource.startswith(url.removesuffix("pool/")) for resource in resources)
        assert complaints(browser) == []
    wait_for_text(browser, "trouble", "the pool is closed")


def test_the_button_that_interrupts(tmp_path: Path, browser: webdriver.Chrome) -> None:
    pool = CpuPool(1)
    with served(pool, interrupt=True) as url, Busy(pool, tmp_path, 1, 0) as busy:
        browser.get(url)
        wait_for_text(browser, "busy", "1 of 1")
        button = WebDriverWait(browser, 20, 0.05).until(
            lambda _: browser.find_elements(By.CSS_SELECTOR, "button.interrupt:enabled")
        )[0]
        button.click()
        browser.switch_to.alert.accept()
        with pytest.raises(cpupool.TaskStopped):
            busy.calls[0].result(20)
        wait_for_text(browser, "stack", "Its task is being stopped.")
        wait_for_text(browser, "count-cancelled", "1")
        assert complaints(browser) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_on_a_phone_and_in_the_dark(tmp_path: Path, browser: webdriver.Chrome, width: int) -> None:
    pool = CpuPool(2, name="images")
    with served(pool) as url, Busy(pool, tmp_path, 2, 1):
        for scheme in ("light", "dark"):
            browser.execute_cdp_cmd(
                "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            )
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get(url)
            wait_for_text(browser, "busy", "2 of 2")
            across: int = browser.execute_script("return document.documentElement.scrollWidth")
            assert across <= width, "nothing to scroll sideways"
            body = browser.find_element(By.TAG_NAME, "body")
            red = int(re.findall(r"\d+", body.value_of_css_property("background-color"))[0])
            assert (red < 60) is (scheme == "dark")
        assert complaints(browser) == []
