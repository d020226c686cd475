"""What goes along with a call besides its arguments: context variables, and whatever else carries a context.

Theory of operation: when a call is sent, each carrier of the pool is entered (`carry`), and gives a value, which
travels in the call's frame.  In the worker the task runs in a context of its own, in which each carrier is entered with
its value (`restore`); so nothing of it is left for the next task.  When the call is over the carriers are left.

It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import pickle
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Any, Protocol

    class ContextCarrier(Protocol):
        """What takes a context along to workers; it is pickled, and so are its values."""

        def carry(self, task: str, waited: float) -> AbstractContextManager[object]:
            """Return what is entered when a call is sent, gives the value, and is left when the call is over.

            Args:
                task: the call's label, or the name of its function.
                waited: how long it has waited for a worker, in seconds.
            """
            ...

        def restore(self, value: Any) -> AbstractContextManager[object]:
            """Return what is entered in the worker, around the task."""
            ...


class TaskFailed(Exception):
    """What a carrier sees, in the place of the task's own error, when it is left because the task has failed."""


class VariableCarrier:
    """Carries a context variable, which is known by its module and its name there."""

    __slots__ = ("_module", "_name")

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __repr__(self) -> str:
        return f"{self._module}:{self._name}"

    def __reduce__(self) -> tuple[object, ...]:
        return VariableCarrier, (self._module, self._name)

    @property
    def _variable(self) -> contextvars.ContextVar[Any]:
        variable: contextvars.ContextVar[Any] = getattr(importlib.import_module(self._module), self._name)
        return variable

    @contextlib.contextmanager
    def carry(self, task: str, waited: float) -> Iterator[object]:  # noqa: ARG002
        value: tuple[object, ...]
        try:
            value = (self._variable.get(),)
        except LookupError:
            value = ()  # it has none
        yield value

    @contextlib.contextmanager
    def restore(self, value: tuple[object, ...]) -> Iterator[None]:
        if value:
            self._variable.set(value[0])  # in the task's own context
        yield


def find_carrier(variable: object) -> ContextCarrier:
    """Return what carries a context variable; a carrier itself is returned as it is.

    Raises:
        TypeError: it is neither.
        ValueError: no module has that variable at its top level.
    """
    if not isinstance(variable, contextvars.ContextVar):
        if callable(getattr(variable, "carry", None)) and callable(getattr(variable, "restore", None)):
            return variable  # type: ignore[return-value]  # it is one
        raise TypeError(f"context must hold context variables, not {variable!r}")
    last = {"__main__": 1, "__mp_main__": 2}  # two names for one module, if multiprocessing is imported
    modules = sorted(sys.modules.items(), key=lambda item: last.get(item[0], 0))
    for module_name, module in modules:
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is variable:
                return VariableCarrier(module_name, name)
    raise ValueError(
        f"no module has the context variable {variable.name!r} at its top level, where workers could find it; "
        "define it there, before the pool is made"
    )


@contextlib.contextmanager
def carrying(
    carriers: Iterable[ContextCarrier], task: str, waited: float, dumps: Callable[[object], bytes]
) -> Iterator[bytes]:
    """Enter the carriers, give what they give, pickled with `dumps`, and leave them.

    Raises:
        TypeError: a value cannot be pickled.
    """
    with contextlib.ExitStack() as entered:
        values = [(carrier, entered.enter_context(carrier.carry(task, waited))) for carrier in carriers]
        try:
            packed = dumps(values)
        except Exception as error:
            for carrier, value in values:
                _check_picklable(carrier, value, dumps)
            raise TypeError(f"the pool's context cannot be sent to a worker: {error}") from error
        yield packed


def _check_picklable(carrier: ContextCarrier, value: object, dumps: Callable[[object], bytes]) -> None:
    try:
        dumps((carrier, value))
    except Exception as error:
        raise TypeError(
            f"the value of {carrier!r} in the pool's context cannot be sent to a worker: "
            f"{type(error).__name__}: {error}"
        ) from error


def skip_own_frames(trace: TracebackType | None, caller: str) -> TracebackType | None:
    """Return a traceback from the task's own first line: without the first frames that are of the caller's file."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (caller, __file__):
        trace = trace.tb_next
    return trace


def in_context(packed: bytes | memoryview, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `fn`, each time in a context of its own, with what was carried."""
    if not packed:
        return fn
    try:
        values: list[tuple[ContextCarrier, Any]] = pickle.loads(packed)
    except Exception as error:
        raise RuntimeError(f"the pool's context cannot be rebuilt in the worker: {error!r}") from error
    return functools.partial(_run_in_copy, values, fn)


def _run_in_copy(values: list[tuple[ContextCarrier, Any]], fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return contextvars.copy_context().run(_run_restored, values, fn, args, kwargs)


def _run_restored(
    values: list[tuple[ContextCarrier, Any]], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with contextlib.ExitStack() as entered:
        for carrier, value in values:
            entered.enter_context(carrier.restore(value))
        return fn(*args, **kwargs)
