"""What a pool would use on this machine, and why, in words: for `python -m cpupool doctor`."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform

from . import __version__
from ._process import DEFAULT_START_METHOD
from ._sizing import Limits, measure_limits


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
        *((name, _optional(name)) for name in ("rich", "trio", "uvloop")),
    ]


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
