"""Everything a pool can be told, in one frozen record, checked in one place."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _payload
from ._checks import check_bytes, check_count, check_seconds
from ._context import find_carrier

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext

    from ._context import ContextCarrier


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
    finalizer: Callable[[], object] | None = None
    preload: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None
    start_timeout: float = 60.0
    min_workers: int | None = None
    idle_timeout: float | None = None
    max_tasks_per_child: int | None = None
    max_memory_per_child: int | None = None
    hard_memory_per_child: int | None = None
    timeout: float | None = None
    queue_timeout: float | None = None
    grace: float = 1.0
    drain: float = 5.0
    max_pending: int | None = None
    max_inflight_bytes: int | None = None
    retries: int = 0
    serializer: str = "pickle"
    context: tuple[Any, ...] = ()
    slow_task: float | None = None
    name: str = "CpuPool"

    def __post_init__(self) -> None:
        for name in ("max_workers", "max_tasks_per_child"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, at_least=1)
        for name in ("max_pending", "min_workers"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, at_least=0)
        for name in ("max_memory_per_child", "hard_memory_per_child", "max_inflight_bytes"):
            if (value := getattr(self, name)) is not None:
                check_bytes(name, value)
        if not isinstance(self.context, tuple):
            raise TypeError(f"context must be a tuple of context variables, not {self.context!r}; for one write (it,)")
        self.call_options()
        for name in ("start_timeout", "grace", "drain"):
            check_seconds(name, getattr(self, name))
        for name in ("idle_timeout", "slow_task"):
            if (value := getattr(self, name)) is not None:
                check_seconds(name, value)
        for name in ("initializer", "finalizer"):
            if (value := getattr(self, name)) is not None and not callable(value):
                raise TypeError(f"{name} must be callable or None, not {value!r}")
        if not isinstance(self.initargs, tuple):
            raise TypeError(f"initargs must be a tuple, not {self.initargs!r}; for one argument write (argument,)")
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name must be a string that is not empty, not {self.name!r}")
        if self.mp_context is not None:
            _check_context(self.mp_context)
        _payload.check_serializer(self.serializer)
        self._check_preload()
        self._check_env()
        self._check_limits_together()

    def _check_preload(self) -> None:
        given: object = self.preload
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(
                f"preload must be a tuple of module names, not {given!r}; for one write ('package.module',)"
            )
        preload = tuple(given)
        for module in preload:
            if not isinstance(module, str) or not all(part.isidentifier() for part in module.split(".")):
                raise TypeError(f"preload must hold full names of modules, like 'package.module', not {module!r}")
        if preload and self.start_method not in ("forkserver", None):
            raise ValueError(
                f"preload needs the start method 'forkserver', not {self.start_method!r}: only there can workers share "
                "what was imported once; let the initializer import what they need"
            )
        object.__setattr__(self, "preload", preload)

    def _check_env(self) -> None:
        if self.env is None:
            return
        if not isinstance(self.env, Mapping):
            raise TypeError(f"env must be a mapping of names to values, not {self.env!r}")
        for name, value in self.env.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"env must map strings to strings, not {name!r} to {value!r}")
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(f"env cannot set {name!r} to {value!r}: no environment variable can be that")
        object.__setattr__(self, "env", dict(self.env))

    def _check_limits_together(self) -> None:
        if None not in (self.min_workers, self.max_workers) and self.min_workers > self.max_workers:  # type: ignore[operator]
            raise ValueError(f"min_workers is {self.min_workers}, more than max_workers ({self.max_workers})")
        if self.hard_memory_per_child is not None and not os.path.exists("/proc/self/statm"):
            raise ValueError("hard_memory_per_child needs /proc, which this system does not have")
        soft, hard = self.max_memory_per_child, self.hard_memory_per_child
        if soft is not None and hard is not None and soft > hard:
            raise ValueError(
                f"max_memory_per_child is {soft}, more than hard_memory_per_child ({hard}), which kills before"
            )

    @property
    def start_method(self) -> str | None:
        """The name of the start method; None for the one that suits the system."""
        if self.mp_context is None or isinstance(self.mp_context, str):
            return self.mp_context
        method: str | None = self.mp_context.get_start_method()
        return method

    def call_options(self) -> CallOptions:
        """Return those settings that a call may change for itself."""
        serializer = _payload.get_serializer(self.serializer)
        return CallOptions(
            timeout=self.timeout,
            queue_timeout=self.queue_timeout,
            retries=self.retries,
            serializer=serializer,
            carriers=tuple(map(find_carrier, self.context)),
        )


class Unset(enum.Enum):
    """The default of an option that stays as the pool has it, where None would mean no limit."""

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """How one call is run, as `CpuPool.options` documents it; and how its pool pickles calls.

    Raises:
        TypeError, ValueError: an option is not what it can be; the message names it.
    """

    timeout: float | None = None
    queue_timeout: float | None = None
    retries: int = 0
    label: str | None = None
    on_report: Callable[[Any], object] | None = field(default=None, repr=False)
    on_start: Callable[[], object] | None = field(default=None, repr=False)
    background: bool = False
    serializer: _payload.Serializer = field(default=_payload.BY_NAME, repr=False)
    carriers: tuple[ContextCarrier, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("timeout", "queue_timeout"):
            if (value := getattr(self, name)) is not None:
                check_seconds(name, value)
        check_count("retries", self.retries, at_least=0)
        if not isinstance(self.background, bool):
            raise TypeError(f"background must be True or False, not {self.background!r}")
        if self.label is not None and not isinstance(self.label, str):
            raise TypeError(f"label must be a string or None, not {self.label!r}")
        for name in ("on_report", "on_start"):
            value = getattr(self, name)
            if value is not None and (not callable(value) or inspect.iscoroutinefunction(value)):
                raise TypeError(f"{name} must be a function made with 'def', or None, not {value!r}")

    @property
    def is_unobserved(self) -> bool:
        """True if nobody here has to be told when the task begins, nor between its beginning and its end."""
        return self.on_start is None and self.on_report is None and not self.carriers

    def changed(self, **changes: Any) -> CallOptions:
        """Return a copy with those of the changes that are not `UNSET`."""
        return dataclasses.replace(self, **{name: each for name, each in changes.items() if each is not UNSET})


def encode_label(options: CallOptions) -> bytes:
    """Return the label as a worker is told it; empty for none."""
    return b"" if options.label is None else options.label.encode("utf-8", "backslashreplace")


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
