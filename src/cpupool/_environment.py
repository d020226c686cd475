"""A pool's settings as text: how environment variables become what `CpuPool` takes.

Each setting has one reader, and an error of a reader names the variable.  That every setting has one, a test holds.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from typing import TYPE_CHECKING, Any

from ._settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Container

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?", re.IGNORECASE)


def read_settings(prefix: str, without: Container[str]) -> dict[str, Any]:
    """Return the settings that the variables give: `prefix` and the setting in capitals; an empty one gives nothing.

    `without` names settings whose variables are not looked at.

    Raises:
        ValueError: a variable does not hold what its setting can be; the message names it.
    """
    found: dict[str, Any] = {}
    for setting, read in READERS.items():
        variable = prefix + setting.upper()
        text = os.environ.get(variable, "").strip()
        if not text or setting in without:
            continue
        try:
            value: Any = None if text.lower() == "none" else read(text)
            Settings(**{setting: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"the environment variable {variable} is {text!r}: {error}") from error
        found[setting] = value
    return found


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("it must be a whole number") from None


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("it must be a number of seconds") from None


def _bytes(text: str) -> int:
    """Read a size as Docker and systemd do (512M, 1.5G: powers of 1024), or as 200MB, in powers of 1000."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("it must be a number of bytes, like 200000000, 512M, 1.5G or 200MB")
    number, letter, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    size = float(number) * base ** _POWERS[letter.upper()]
    if size >= 2**63:
        raise ValueError("that is more memory than there is")
    if not size.is_integer() and not letter:
        raise ValueError("it must be a whole number of bytes")
    return int(size)


def _function(text: str) -> Callable[..., object]:
    module, colon, name = text.partition(":")
    if not colon:
        raise ValueError("it must be a module and a function in it, like 'package.module:function'")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # the module's own code runs
        raise ValueError(f"it cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError("it is no function")  # and is not shown: it may be a secret
    function: Callable[..., object] = found
    return function


def _variables(text: str) -> tuple[object, ...]:
    found = []
    for each in _names(text):
        module, _, name = each.partition(":")
        try:
            found.append(getattr(importlib.import_module(module), name))
        except Exception as error:
            raise ValueError(
                f"it must be a list of modules and variables in them, like 'package.module:variable': {error}"
            ) from error
    return tuple(found)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _arguments(text: str) -> tuple[object, ...]:
    wanted = 'it must be a JSON array, like ["model.bin", 3]'
    values = _json(text, wanted)
    if not isinstance(values, list):
        raise ValueError(wanted)
    return tuple(values)


def _mapping(text: str) -> dict[str, str]:
    wanted = 'it must be a JSON object of strings, like {"OMP_NUM_THREADS": "2"}'
    values = _json(text, wanted)
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError(wanted)
    return values


def _json(text: str, wanted: str) -> object:
    try:
        value: object = json.loads(text)
    except ValueError:
        raise ValueError(wanted) from None
    return value


READERS: dict[str, Callable[[str], object]] = {
    "max_workers": _int,
    "mp_context": str,
    "initializer": _function,
    "initargs": _arguments,
    "finalizer": _function,
    "preload": _names,
    "env": _mapping,
    "start_timeout": _seconds,
    "min_workers": _int,
    "idle_timeout": _seconds,
    "max_tasks_per_child": _int,
    "max_memory_per_child": _bytes,
    "hard_memory_per_child": _bytes,
    "timeout": _seconds,
    "queue_timeout": _seconds,
    "grace": _seconds,
    "drain": _seconds,
    "max_pending": _int,
    "max_inflight_bytes": _bytes,
    "retries": _int,
    "serializer": str,
    "context": _variables,
    "slow_task": _seconds,
    "name": str,
}
