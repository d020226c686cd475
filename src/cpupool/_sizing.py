"""How much of this machine is ours: CPUs and memory, as affinity and cgroups limit them.

The limits of a cgroup hold together with those of all its parents.  `/proc/self/cgroup` names the process's own group
in each hierarchy; in a container the mount often shows only that group, as the root, so the path is followed as far as
it exists.  Formats: https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/index.html beside it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ._checks import check_count

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY_SHARE = 0.9  # of the usable memory, for the workers

# Version 1 says "no limit" with the largest multiple of the page size; nobody has that much.
_NO_MEMORY_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class Limits:
    """What this process may use.

    Attributes:
        cpus: CPUs the machine has.
        affinity: CPUs the process may run on.
        quota: CPUs' worth of time that its cgroups allow, or None.
        configured: the value of CPUPOOL_MAX_WORKERS, or None.
        memory: bytes of memory the machine has, or None where that cannot be learnt.
        memory_limit: bytes that its cgroups allow, or None.
        siblings: how many server processes share all that, itself included, as WEB_CONCURRENCY says; else 1.
    """

    cpus: int
    affinity: int
    quota: float | None
    configured: int | None
    memory: int | None
    memory_limit: int | None
    siblings: int = 1

    @property
    def usable_cpus(self) -> int:
        return self._at_most_configured(self.allowed_cpus)

    @property
    def usable_memory(self) -> int | None:
        return min((each for each in (self.memory, self.memory_limit) if each is not None), default=None)

    def suggest_workers(self, memory_per_worker: int | None = None) -> int:
        workers = self._at_most_configured(self.allowed_cpus // self.siblings)
        if memory_per_worker is not None and self.usable_memory is not None:
            share = self.usable_memory * MEMORY_SHARE / self.siblings
            workers = min(workers, int(share // memory_per_worker))
        return max(workers, 1)

    @property
    def allowed_cpus(self) -> int:
        return self.affinity if self.quota is None else min(self.affinity, math.ceil(self.quota))

    def _at_most_configured(self, number: int) -> int:
        return max(number if self.configured is None else min(number, self.configured), 1)


def usable_cpus() -> int:
    """Return how many CPUs this process may keep busy: the least of affinity, cgroup quota and CPUPOOL_MAX_WORKERS.

    A quota is rounded up: 1.5 CPUs keep two workers busy.

    Raises:
        ValueError: CPUPOOL_MAX_WORKERS is no positive whole number.
    """
    return measure_limits().usable_cpus


def usable_memory() -> int | None:
    """Return how many bytes of memory this process may use: the least of what the machine has and its cgroups allow.

    Returns:
        None where the system does not say.
    """
    return measure_limits().usable_memory


def suggest_workers(memory_per_worker: int | None = None) -> int:
    """Return how many workers suit this process; a pool's `max_workers` is `suggest_workers()` by default.

    That is `usable_cpus()`, or fewer if memory does not suffice for so many: nine tenths of `usable_memory()` are
    shared out, the rest is for this process.  Where several server processes share the machine and WEB_CONCURRENCY says
    how many (as gunicorn, uvicorn and hosting platforms have it), it is this one's share of both.

    Args:
        memory_per_worker: bytes that a worker needs at its worst.

    Returns:
        At least 1.

    Raises:
        TypeError, ValueError: `memory_per_worker` is no positive int.
        ValueError: CPUPOOL_MAX_WORKERS or WEB_CONCURRENCY is no whole number that makes sense.
    """
    if memory_per_worker is not None:
        check_count("memory_per_worker", memory_per_worker, at_least=1)
    return measure_limits().suggest_workers(memory_per_worker)


def measure_limits(root: Path = Path("/")) -> Limits:
    """Measure all limits; `root` is where /proc and /sys are."""
    cpus = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpus
    return Limits(
        cpus=cpus,
        affinity=affinity,
        quota=min(_cpu_quotas(root), default=None),
        configured=_whole_number("CPUPOOL_MAX_WORKERS", at_least=1),
        memory=_machine_memory(),
        memory_limit=min(_memory_limits(root), default=None),
        siblings=max(_whole_number("WEB_CONCURRENCY", at_least=0) or 1, 1),
    )


def _whole_number(variable: str, *, at_least: int) -> int | None:
    text = os.environ.get(variable, "").strip()
    if not text or text.lower() == "none":
        return None
    if not text.isdecimal() or int(text) < at_least:
        raise ValueError(
            f"the environment variable {variable} must be a whole number of at least {at_least}, not {text!r}"
        )
    return int(text)


def _machine_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cpu_quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, "cpu"):
        words = _read(group / "cpu.max").split()  # version 2: "max 100000" or "150000 100000", in microseconds
        if not words:
            words = [_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        try:
            quota, period = int(words[0]), int(words[1])
        except ValueError:
            continue
        if quota > 0 and period > 0:
            yield quota / period


def _memory_limits(root: Path) -> Iterator[int]:
    for group in _groups(root, "memory"):
        text = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        if text.isdecimal() and int(text) < _NO_MEMORY_LIMIT:
            yield int(text)


def count_oom_kills(root: Path = Path("/")) -> int | None:
    """Return how many processes of this process's cgroup were ever killed for want of memory; None if nobody counts."""
    for group in _groups(root, "memory"):
        text = _read(group / "memory.events") or _read(group / "memory.oom_control")
        for line in text.splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill" and number.isdecimal():
                return int(number)
    return None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group for a controller and of all its parents, in both versions."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in (controllers, controller)]
        else:
            continue
        for mount in mounts:
            if mount.is_dir():
                folder = mount / path.lstrip("/")
                yield from (each for each in (folder, *folder.parents) if each == mount or mount in each.parents)
                break


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
