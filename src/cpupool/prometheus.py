"""Metrics of pools for Prometheus: `cpupool.prometheus.register(pool)`.

Needs prometheus_client.  The numbers are those of `pool.statistics()`, taken when they are scraped; so they cost
nothing in between.  Each server process has, and exposes, pools of its own: where several serve one port,
`prometheus_client`'s multiprocess mode leaves such metrics out.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.metrics_core import Metric

    from . import CpuPool, Histogram, Statistics

__all__ = ["PoolCollector", "register"]

_WORKER_STATES = ("starting", "idle", "busy", "stopping", "leaving", "killed")
_OUTCOMES = ("succeeded", "failed", "timed_out", "cancelled", "died", "refused")
_COUNTERS = {
    "submitted": ("cpupool_tasks_submitted", "Tasks that callers wanted to run."),
    "retried": ("cpupool_task_retries", "Attempts after a worker died."),
    "workers_started": ("cpupool_workers_started", "Worker processes started."),
    "workers_died": ("cpupool_workers_died", "Worker processes that ended without being told to."),
    "recycled": ("cpupool_workers_recycled", "Worker processes replaced in peace."),
}
_HISTOGRAMS = {
    "queue_wait": ("cpupool_queue_wait_seconds", "How long tasks waited for a worker."),
    "run_time": ("cpupool_run_seconds", "How long tasks ran, in the worker."),
    "overhead": ("cpupool_overhead_seconds", "What tasks took besides these: pickling, sending, waking up."),
}


class PoolCollector(Collector):
    """Collects the metrics of pools; each has the label `pool`, the pool's name.

    - `cpupool_workers` by `state`, `cpupool_workers_max`, `cpupool_pending_calls`,
      `cpupool_workers_resident_bytes`: gauges;
    - `cpupool_tasks_total` by `outcome`, `cpupool_tasks_submitted_total`, `cpupool_task_retries_total`,
      `cpupool_workers_started_total`, `cpupool_workers_died_total`, `cpupool_workers_recycled_total`: counters;
    - `cpupool_queue_wait_seconds`, `cpupool_run_seconds`, `cpupool_overhead_seconds`: histograms.

    Raises:
        ValueError: two pools have the same name, so that their metrics could not be told apart.
    """

    def __init__(self, *pools: CpuPool) -> None:
        names = [pool.settings.name for pool in pools]
        if len(set(names)) < len(names):
            raise ValueError(f"each pool needs a name of its own (CpuPool(name=...)); these are {', '.join(names)}")
        self._pools = pools

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without values: nothing has to be asked to register them."""
        return _make_metrics([])

    def collect(self) -> Iterable[Metric]:
        """Return the metrics as they are now."""
        return _make_metrics([pool.statistics() for pool in self._pools])


def register(*pools: CpuPool, registry: CollectorRegistry = REGISTRY) -> PoolCollector:
    """Register a collector for these pools; `registry.unregister` takes it away again.

    Raises:
        ValueError: two pools have the same name; or the registry has such a collector already: give it all pools.
    """
    collector = PoolCollector(*pools)
    registry.register(collector)
    return collector


def _make_metrics(found: list[Statistics]) -> list[Metric]:
    workers = GaugeMetricFamily("cpupool_workers", "Worker processes.", labels=["pool", "state"])
    most = GaugeMetricFamily("cpupool_workers_max", "How many workers there may be.", labels=["pool"])
    pending = GaugeMetricFamily("cpupool_pending_calls", "Calls and batches that wait for a worker.", labels=["pool"])
    resident = GaugeMetricFamily(
        "cpupool_workers_resident_bytes", "Memory that all workers hold together.", labels=["pool"]
    )
    tasks = CounterMetricFamily("cpupool_tasks", "Tasks that have ended.", labels=["pool", "outcome"])
    for each in found:
        states = [worker.state for worker in each.workers]
        for state in _WORKER_STATES:
            workers.add_metric([each.name, state], states.count(state))
        most.add_metric([each.name], each.max_workers)
        pending.add_metric([each.name], each.pending)
        resident.add_metric([each.name], sum(worker.resident_bytes or 0 for worker in each.workers))
        for outcome in _OUTCOMES:
            tasks.add_metric([each.name, outcome], getattr(each, outcome))
    metrics: list[Metric] = [workers, most, pending, resident, tasks]
    for field, (name, text) in _COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=["pool"])
        for each in found:
            counter.add_metric([each.name], getattr(each, field))
        metrics.append(counter)
    for field, (name, text) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, text, labels=["pool"])
        for each in found:
            times: Histogram = getattr(each, field)
            histogram.add_metric([each.name], buckets=_cumulate(times), sum_value=times.sum)
        metrics.append(histogram)
    return metrics


def _cumulate(times: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(repr, times.bounds), "+Inf"]
    return list(zip(bounds, itertools.accumulate(times.counts), strict=True))
