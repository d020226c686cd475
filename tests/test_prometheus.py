"""Metrics: scraped from a real endpoint; and names in `ps` (D5)."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import anyio
import prometheus_client
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

import cpupool
import tasks
from cpupool import CpuPool, prometheus

pytestmark = pytest.mark.anyio


@pytest.fixture
def registry() -> prometheus_client.CollectorRegistry:
    return prometheus_client.CollectorRegistry()


@pytest.fixture
def address(registry: prometheus_client.CollectorRegistry) -> Iterator[str]:
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()
    thread.join()


async def scrape(address: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the values by names and labels."""

    def read() -> str:
        with urllib.request.urlopen(address) as response:
            return str(response.read().decode())

    text = await anyio.to_thread.run_sync(read)
    families = list(text_string_to_metric_families(text))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value for each in families for sample in each.samples
    }


async def test_metrics_are_scraped(address: str, registry: prometheus_client.CollectorRegistry) -> None:
    pool, other = CpuPool(2, name="images"), CpuPool(1, name="text")
    prometheus.register(pool, other, registry=registry)
    async with pool:
        await pool.map(tasks.busy, [0.001] * 20)
        with pytest.raises(ZeroDivisionError):
            await pool.run(tasks.raise_exception, ZeroDivisionError)
        with pytest.raises(cpupool.WorkerDied):
            await pool.run(tasks.exit_at_once, 1)
        await pool.run(tasks.add, 1)
        with anyio.fail_after(20):
            while pool.statistics().idle != 2:  # the dead one is replaced
                await anyio.sleep(0.001)
        found = await scrape(address)
        known = pool.statistics()

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset({"pool": "images", **labels}.items())]

    assert value("cpupool_tasks_submitted_total") == 23 == known.submitted
    assert value("cpupool_tasks_total", outcome="succeeded") == 21 == known.succeeded
    assert value("cpupool_tasks_total", outcome="failed") == 1
    assert value("cpupool_tasks_total", outcome="died") == 1
    assert value("cpupool_tasks_total", outcome="timed_out") == 0
    assert value("cpupool_workers_max") == 2
    assert value("cpupool_workers_died_total") == 1
    assert value("cpupool_workers_started_total") == known.workers_started
    assert value("cpupool_workers_resident_bytes") > 2**20
    assert value("cpupool_pending_calls") == 0
    assert sum(value("cpupool_workers", state=state) for state in ("starting", "idle", "busy")) >= 1
    assert value("cpupool_run_seconds_count") == known.run_time.count == 22
    assert value("cpupool_run_seconds_sum") == pytest.approx(known.run_time.sum)
    buckets = [value("cpupool_run_seconds_bucket", le=str(bound)) for bound in known.run_time.bounds]
    assert buckets == sorted(buckets)
    assert value("cpupool_run_seconds_bucket", le="+Inf") == 22
    assert found["cpupool_workers_max", frozenset({("pool", "text")})] == 1


def test_pools_that_cannot_be_told_apart(registry: prometheus_client.CollectorRegistry) -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        prometheus.register(CpuPool(1), CpuPool(1), registry=registry)
    collector = prometheus.register(CpuPool(1), registry=registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        prometheus.register(CpuPool(1, name="other"), registry=registry)
    registry.unregister(collector)
    prometheus.register(CpuPool(1), registry=registry)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
async def test_workers_leave_no_files_in_the_folder_of_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Twenty recycles of workers that count something; `PROMETHEUS_MULTIPROC_DIR` is the servers'."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    async with CpuPool(1, max_tasks_per_child=1, mp_context=method) as pool:
        for _ in range(20 if method == "forkserver" else 3):
            assert await pool.run(tasks.count_in_prometheus) is None
    assert os.listdir(tmp_path) == []


async def test_d5_workers_are_named_for_ps(tmp_path: Path) -> None:
    gate = tasks.Gate(tmp_path / "gate")
    async with CpuPool(1, name="images") as pool:
        pid = await pool.run(tasks.get_pid)
        with anyio.fail_after(10):
            while psutil.Process(pid).cmdline()[0] != "cpupool images: idle":
                await anyio.sleep(0.001)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.run, tasks.hold, *gate.arguments)
            await anyio.to_thread.run_sync(gate.wait_until_begun)
            assert psutil.Process(pid).cmdline()[0] == "cpupool images: busy"
            gate.open()
