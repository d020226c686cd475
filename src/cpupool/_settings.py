"""Everything a pool can be told, in one frozen record, checked in one place."""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A pool's settings, as `CpuPool` documents them.

    Raises:
        TypeError, ValueError: a setting is not what it can be; the message names it.
    """

    max_workers: int | None = None
    mp_context: str | BaseContext | None = None
    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    start_timeout: float = 60.0
    max_tasks_per_child: int | None = None
    timeout: float | None = None
    queue_timeout: float | None = None
    grace: float = 1.0
    drain: float = 5.0
    max_pending: int | None = None
    retries: int = 0
    name: str = "CpuPool"

    def __post_init__(self) -> None:
        for name in ("max_workers", "max_tasks_per_child"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, at_least=1)
        if self.max_pending is not None:
            check_count("max_pending", self.max_pending, at_least=0)
        self.call_options()
        for name in ("start_timeout", "grace", "drain"):
            check_seconds(name, getattr(self, name))
        if self.initializer is not None and not callable(self.initializer):
            raise TypeError(f"initializer must be callable or None, not {self.initializer!r}")
        if not isinstance(self.initargs, tuple):
            raise TypeError(f"initargs must be a tuple, not {self.initargs!r}; for one argument write (argument,)")
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name must be a string that is not empty, not {self.name!r}")
        if self.mp_context is not None:
            _check_context(self.mp_context)

    def call_options(self) -> CallOptions:
        """Return those settings that a call may change for itself."""
        return CallOptions(timeout=self.timeout, queue_timeout=self.queue_timeout, retries=self.retries)


class Unset(enum.Enum):
    """The default of an option that stays as the pool has it, where None would mean no limit."""

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """How one call is run, as `CpuPool.options` documents it.

    Raises:
        TypeError, ValueError: an option is not what it can be; the message names it.
    """

    timeout: float | None = None
    queue_timeout: float | None = None
    retries: int = 0
    label: str | None = None

    def __post_init__(self) -> None:
        for name in ("timeout", "queue_timeout"):
            if (value := getattr(self, name)) is not None:
                check_seconds(name, value)
        check_count("retries", self.retries, at_least=0)
        if self.label is not None and not isinstance(self.label, str):
            raise TypeError(f"label must be a string or None, not {self.label!r}")

    def changed(self, **changes: Any) -> CallOptions:
        """Return a copy with those of the changes that are not `UNSET`."""
        return dataclasses.replace(self, **{name: each for name, each in changes.items() if each is not UNSET})


def check_count(name: str, value: object, *, at_least: int) -> None:
    """Raise unless `value` is an int of at least `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {value}")


def check_seconds(name: str, value: object) -> None:
    """Raise unless `value` is a number of seconds, not negative and not NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large; for no limit, use None or math.inf") from None
    if math.isnan(number) or number < 0:
        raise ValueError(f"{name} must not be negative, not {value}")


def _check_context(context: object) -> None:
    import multiprocessing

    if isinstance(context, str):
        methods = multiprocessing.get_all_start_methods()
        if context not in methods:
            raise ValueError(f"mp_context must be one of {', '.join(methods)} on this system, not {context!r}")
    elif not hasattr(context, "Process") or not hasattr(context, "get_start_method"):
        raise TypeError(
            "mp_context must be the name of a start method or what multiprocessing.get_context() returns, "
            f"not {context!r}"
        )
