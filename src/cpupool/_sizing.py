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

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    """

    cpus: int
    affinity: int
    quota: float | None
    configured: int | None
    memory: int | None
    memory_limit: int | None

    @property
    def usable_cpus(self) -> int:
        limits = [self.affinity]
        if self.quota is not None:
            limits.append(math.ceil(self.quota))
        if self.configured is not None:
            limits.append(self.configured)
        return max(min(limits), 1)


def usable_cpus() -> int:
    """Return how many CPUs this process may keep busy: the least of affinity, cgroup quota and CPUPOOL_MAX_WORKERS.

    Raises:
        ValueError: CPUPOOL_MAX_WORKERS is no positive whole number.
    """
    return measure_limits().usable_cpus


def measure_limits(root: Path = Path("/")) -> Limits:
    """Measure all limits; `root` is where /proc and /sys are."""
    cpus = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpus
    return Limits(
        cpus=cpus,
        affinity=affinity,
        quota=min(_cpu_quotas(root), default=None),
        configured=_configured_workers(),
        memory=_machine_memory(),
        memory_limit=min(_memory_limits(root), default=None),
    )


def _configured_workers() -> int | None:
    text = os.environ.get("CPUPOOL_MAX_WORKERS", "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"the environment variable CPUPOOL_MAX_WORKERS must be a whole number of at least 1, not {text!r}"
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
