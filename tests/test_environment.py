"""`CpuPool.from_env`: every setting has its variable, and a bad value names it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import cpupool
import tasks
from cpupool import CpuPool
from cpupool._environment import READERS


def test_every_setting_has_a_reader_and_is_an_argument_of_the_pool() -> None:
    settings = [field.name for field in dataclasses.fields(cpupool.Settings)]
    assert settings == list(READERS)
    assert settings == [name for name in CpuPool.__init__.__annotations__ if name != "return"]


EXAMPLES = {
    "max_workers": ("3", 3),
    "mp_context": ("spawn", "spawn"),
    "initializer": ("tasks:initialise", tasks.initialise),
    "initargs": ('["model.bin", 3]', ("model.bin", 3)),
    "finalizer": ("tasks:get_pid", tasks.get_pid),
    "preload": ("json, collections.abc", ("json", "collections.abc")),
    "env": ('{"A": "1"}', {"A": "1"}),
    "start_timeout": ("7.5", 7.5),
    "min_workers": ("1", 1),
    "idle_timeout": ("60", 60.0),
    "max_tasks_per_child": ("100", 100),
    "max_memory_per_child": ("200MB", 200_000_000),
    "hard_memory_per_child": ("1.5G", 3 * 2**29),
    "timeout": ("30", 30.0),
    "queue_timeout": ("none", None),
    "grace": ("0.5", 0.5),
    "drain": ("10", 10.0),
    "max_pending": ("50", 50),
    "max_inflight_bytes": ("1.5G", 3 * 2**29),
    "retries": ("2", 2),
    "serializer": ("cloudpickle", "cloudpickle"),
    "context": ("tasks:request_id, tasks:tenant", (tasks.request_id, tasks.tenant)),
    "slow_task": ("2.5", 2.5),
    "name": ("images", "images"),
}


@pytest.mark.parametrize("setting", READERS)
def test_each_setting_is_read(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = EXAMPLES[setting]
    monkeypatch.setenv(f"APP_POOL_{setting.upper()}", text)
    assert getattr(CpuPool.from_env("APP_POOL_").settings, setting) == value


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("2K", 2048), ("512m", 2**29), ("1 GiB", 2**30), ("1GB", 10**9), ("0.5T", 2**39), ("10B", 10)],
)
def test_sizes_have_units(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPUPOOL_MAX_MEMORY_PER_CHILD", text)
    assert CpuPool.from_env().settings.max_memory_per_child == size


def test_nothing_set_means_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPUPOOL_TIMEOUT", " ")
    assert CpuPool.from_env().settings == CpuPool().settings


def test_overrides_win_and_spare_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPUPOOL_TIMEOUT", "nonsense")
    monkeypatch.setenv("CPUPOOL_MAX_WORKERS", "3")
    pool = CpuPool.from_env(timeout=5)
    assert (pool.settings.timeout, pool.settings.max_workers) == (5, 3)


@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [
        ("max_workers", "four", "it must be a whole number"),
        ("max_workers", "0", "max_workers must be at least 1"),
        ("timeout", "soon", "it must be a number of seconds"),
        ("timeout", "-1", "timeout must not be negative"),
        ("timeout", "nan", "timeout must not be negative"),
        ("grace", "none", "grace must be a number of seconds"),
        ("max_memory_per_child", "much", "it must be a number of bytes, like 200000000, 512M"),
        ("mp_context", "threads", "mp_context must be one of"),
        ("initializer", "load", "like 'package.module:function'"),
        ("initializer", "tasks:nothing", "it cannot be imported"),
        ("initializer", "no_such_module:nothing", "it cannot be imported"),
        ("initializer", "os:environ", "it is no function"),
        ("initializer", "raises:load", "it cannot be imported: no configuration"),
        ("max_memory_per_child", "1.5", "it must be a whole number of bytes"),
        ("max_memory_per_child", "9" * 400, "that is more memory than there is"),
        ("initargs", "model.bin", "it must be a JSON array"),
        ("initargs", '{"a": 1}', "it must be a JSON array"),
        ("env", '{"A": 1}', "it must be a JSON object of strings"),
        ("preload", "no module", "preload must hold full names"),
        ("serializer", "json", "serializer must be one of"),
    ],
)
def test_a_bad_value_names_its_variable(
    setting: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "raises.py").write_text("raise RuntimeError('no configuration')")
    monkeypatch.syspath_prepend(tmp_path)
    variable = f"CPUPOOL_{setting.upper()}"
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is looked at
        CpuPool.from_env()
    assert str(caught.value).startswith(f"the environment variable {variable} is {text!r}: ")
    assert message in str(caught.value)


def test_settings_that_contradict_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPUPOOL_MIN_WORKERS", "5")
    settings: dict[str, Any] = {"max_workers": 2}
    with pytest.raises(ValueError, match=r"min_workers is 5, more than max_workers.*CPUPOOL_MIN_WORKERS"):
        CpuPool.from_env(**settings)
    monkeypatch.setenv("CPUPOOL_MAX_WORKERS", "none")
    assert CpuPool.from_env().max_workers >= 5
