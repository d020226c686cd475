"""What a pool would use on this machine, and why; and how one is: in words, for `python -m cpupool doctor`."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
from typing import Any

from . import Histogram, __version__
from ._process import DEFAULT_START_METHOD
from ._sizing import Limits, measure_limits

_OPTIONAL = ("opentelemetry-api", "prometheus-client", "rich", "setproctitle", "trio", "uvloop")


def diagnose() -> list[tuple[str, str]]:
    """Return subjects and findings."""
    limits = measure_limits()
    return [
        ("workers", f"{limits.suggest_workers()} by default: {_why(limits)}"),
        ("CPUs", str(limits.cpus)),
        ("affinity", f"{limits.affinity} of them may be used by this process"),
        ("cgroup quota", "none" if limits.quota is None else f"{limits.quota:g} CPUs"),
        ("memory", _memory(limits)),
        ("start method", _start_method()),
        ("end of parent", _end_of_parent()),
        ("crash stacks", "in nameless memory" if hasattr(os, "memfd_create") else "in a nameless temporary file"),
        ("cpupool", __version__),
        ("Python", f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}"),
        ("anyio", importlib.metadata.version("anyio")),
        *((name, _optional(name)) for name in _OPTIONAL),
    ]


def describe_pool(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return subjects and findings about a running pool; `found` is its `statistics()`, as a dictionary."""
    counters = ("submitted", "succeeded", "failed", "timed_out", "cancelled", "died", "refused", "retried")
    lives = ("workers_started", "workers_died", "recycled")
    states = [f"{found[state]} {state}" for state in ("busy", "idle", "starting")]
    times = {"queue_wait": "waiting", "run_time": "running", "overhead": "overhead"}
    return [
        ("pool", found["name"]),
        ("workers", f"{', '.join(states)}; {found['max_workers']} at most"),
        ("calls waiting", f"{found['pending']:,}"),
        ("tasks", ", ".join(f"{found[name]:,} {name.replace('_', ' ')}" for name in counters)),
        ("processes", ", ".join(f"{found[name]:,} {name.replace('_', ' ')}" for name in lives)),
        *((subject, _describe_times(found[name])) for name, subject in times.items()),
        *((f"worker {worker['pid']}", _describe_worker(worker)) for worker in found["workers"]),
    ]


def _describe_times(found: dict[str, Any]) -> str:
    times = Histogram(tuple(found["bounds"]), tuple(found["counts"]), found["sum"])
    if not times.count:
        return "no task yet"
    half, most = times.quantile(0.5), times.quantile(0.99)
    return f"{times.mean:.3g} s on average, half at most {half:g} s, 99 % at most {most:g} s"


def _describe_worker(found: dict[str, Any]) -> str:
    task = f" with {found['task']} for {found['seconds']:.3g} s" if found["task"] else ""
    memory = "" if found["resident_bytes"] is None else f", {found['resident_bytes'] / 2**20:.1f} MiB"
    cpu = "" if found["cpu_seconds"] is None else f", {found['cpu_seconds']:.3g} s of CPU time"
    return f"{found['state']}{task}; {found['tasks_done']:,} tasks done{memory}{cpu}, {found['age']:.3g} s old"


def _why(limits: Limits) -> str:
    reasons = {
        "CPUPOOL_MAX_WORKERS says so": limits.configured,
        "the cgroup's CPU quota, rounded up": limits.quota,
        "the CPUs this process may run on": limits.affinity,
    }
    if limits.siblings > 1:
        share = max(limits.allowed_cpus // limits.siblings, 1)
        reasons[f"this process's share, one of {limits.siblings} (WEB_CONCURRENCY)"] = share
    return min((value, reason) for reason, value in reasons.items() if value is not None)[1]


def _memory(limits: Limits) -> str:
    machine = "unknown" if limits.memory is None else f"{limits.memory / 2**30:.1f} GiB in the machine"
    limit = "no cgroup limit" if limits.memory_limit is None else f"cgroup limit {limits.memory_limit / 2**30:.1f} GiB"
    return f"{machine}, {limit}"


def _start_method() -> str:
    available = ", ".join(multiprocessing.get_all_start_methods())
    return f"{DEFAULT_START_METHOD} by default; available: {available}"


def _end_of_parent() -> str:
    if platform.system() == "Linux":
        return "the kernel kills workers when this process is gone"
    return "a thread in each worker notices that this process is gone (untested on this system)"


def _optional(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
