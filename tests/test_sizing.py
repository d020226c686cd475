"""CPUs and memory: the least of what machine, affinity, cgroups and the user allow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import cpupool
from conftest import environment
from cpupool._sizing import Limits, count_oom_kills, measure_limits


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "5:memory:/a/b\n4:cpu,cpuacct:/a/b\n"
V2 = "0::/a/b\n"


@pytest.mark.parametrize(
    ("files", "quota", "memory"),
    [
        pytest.param({}, None, None, id="no cgroups"),
        pytest.param(
            {"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None, None, id="v2 without limit"
        ),
        pytest.param(
            {"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5, None, id="v2 own group"
        ),
        pytest.param({"proc/self/cgroup": V2, "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5, None, id="v2 parent"),
        pytest.param(
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/memory.max": "1000000",
            },
            2.0,
            1_000_000,
            id="v2 the least of all parents",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1.0, None, id="v2 container"
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/gone/elsewhere\n", "sys/fs/cgroup/cpu.max": "100000 100000"},
            1.0,
            None,
            id="v2 path from outside the container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712",
            },
            None,
            None,
            id="v1 without limit",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "2000000",
            },
            2.5,
            2_000_000,
            id="v1 parent, controllers mounted under one name",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "1:cpu:/\n" + V2,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/unified/a/b/memory.max": "3000000",
                "sys/fs/cgroup/memory/a": "",
            },
            None,
            None,
            id="hybrid: version 2 has no controllers there",
        ),
        pytest.param({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "nonsense"}, None, None, id="nonsense"),
    ],
)
def test_cgroup_limits(files: dict[str, str], quota: float | None, memory: int | None, tmp_path: Path) -> None:
    limits = measure_limits(_tree(tmp_path, files))
    assert (limits.quota, limits.memory_limit) == (quota, memory)


@pytest.mark.parametrize(
    ("affinity", "quota", "configured", "usable"),
    [(8, None, None, 8), (8, 1.5, None, 2), (8, 0.2, None, 1), (1, 4.0, None, 1), (8, 4.0, 3, 3), (2, None, 16, 2)],
)
def test_usable_cpus_is_the_least(affinity: int, quota: float | None, configured: int | None, usable: int) -> None:
    assert Limits(8, affinity, quota, configured, None, None).usable_cpus == usable


def test_affinity_for_real() -> None:
    cpu = min(os.sched_getaffinity(0))
    source = "import cpupool; print(cpupool.usable_cpus(), cpupool.CpuPool().max_workers)"
    done = subprocess.run(
        ["taskset", "-c", str(cpu), sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert done.stdout == "1 1\n"


def test_the_environment_sets_an_upper_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPUPOOL_MAX_WORKERS", "1")
    assert cpupool.usable_cpus() == 1
    assert cpupool.CpuPool().max_workers == 1
    assert cpupool.CpuPool(3).max_workers == 3


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_a_bad_variable_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPUPOOL_MAX_WORKERS", text)
    with pytest.raises(ValueError, match="CPUPOOL_MAX_WORKERS must be a whole number of at least 1"):
        cpupool.usable_cpus()


@pytest.mark.parametrize(
    ("memory", "limit", "usable"), [(None, None, None), (1000, None, 1000), (1000, 400, 400), (None, 400, 400)]
)
def test_usable_memory_is_the_least(memory: int | None, limit: int | None, usable: int | None) -> None:
    assert Limits(8, 8, None, None, memory, limit).usable_memory == usable


def test_usable_memory_of_this_machine_is_plausible() -> None:
    memory = cpupool.usable_memory()
    assert memory is not None
    assert 100_000_000 < memory <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limits", "need", "suggested"),
    [
        pytest.param({}, None, 8, id="CPUs alone"),
        pytest.param({"memory": 1000}, 100, 8, id="memory for all"),
        pytest.param({"memory": 1000}, 300, 3, id="900 // 300"),
        pytest.param({"memory": 1000, "memory_limit": 500}, 200, 2, id="450 // 200"),
        pytest.param({"memory": 1000}, 5000, 1, id="one at least"),
        pytest.param({}, 300, 8, id="memory not known"),
        pytest.param({"quota": 2.5}, None, 3, id="quota, rounded up"),
        pytest.param({"siblings": 3}, None, 2, id="8 // 3"),
        pytest.param({"siblings": 16}, None, 1, id="one at least for each"),
        pytest.param({"siblings": 2, "configured": 3}, None, 3, id="the user's limit is for each process"),
        pytest.param({"siblings": 2, "memory": 1000}, 100, 4, id="memory is shared too"),
    ],
)
def test_suggest_workers(limits: dict[str, Any], need: int | None, suggested: int) -> None:
    facts = {"cpus": 8, "affinity": 8, "quota": None, "configured": None, "memory": None, "memory_limit": None}
    assert Limits(**{**facts, **limits}).suggest_workers(need) == suggested


def test_c13_each_of_several_servers_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = cpupool.usable_cpus()
    monkeypatch.setenv("WEB_CONCURRENCY", str(cpus))
    assert cpupool.suggest_workers() == cpupool.CpuPool().max_workers == 1
    assert cpupool.usable_cpus() == cpus
    assert cpupool.CpuPool(3).max_workers == 3
    monkeypatch.setenv("WEB_CONCURRENCY", "")
    assert cpupool.CpuPool().max_workers == cpus
    monkeypatch.setenv("WEB_CONCURRENCY", "two")
    with pytest.raises(ValueError, match="WEB_CONCURRENCY must be a whole number"):
        cpupool.CpuPool()


def test_a_memory_limit_for_workers_limits_their_number() -> None:
    memory = cpupool.usable_memory()
    assert memory is not None
    assert cpupool.CpuPool(max_memory_per_child=memory).max_workers == 1
    assert cpupool.CpuPool(hard_memory_per_child=memory).max_workers == 1
    assert cpupool.CpuPool(5, hard_memory_per_child=memory).max_workers == 5


def test_the_least_number_of_workers_may_exceed_the_suggested_most() -> None:
    assert cpupool.CpuPool(min_workers=100).max_workers == 100


@pytest.mark.parametrize("need", [0, -1, 1.5, "1G"])
def test_a_bad_need_is_refused(need: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="memory_per_worker must be"):
        cpupool.suggest_workers(need)


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/memory.events": "low 0\noom 4\noom_kill 3\n"}, 3),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/a/b/memory.oom_control": "under_oom 0\noom_kill 2\n"}, 2),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/a/b/memory.oom_control": "under_oom 0\n"}, None),
    ],
)
def test_kills_for_want_of_memory_are_counted(files: dict[str, str], count: int | None, tmp_path: Path) -> None:
    assert count_oom_kills(_tree(tmp_path, files)) == count
