"""`offload`: a function whose calls run in a pool."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ._call import check_function
from ._calls import PoolCalls
from ._default import default_pool
from ._roles import in_worker
from ._settings import UNSET, CallOptions, Unset

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ._calls import CpuPoolView
    from ._pool import CpuPool

P = ParamSpec("P")
T = TypeVar("T")


def offload(
    pool: CpuPool | CpuPoolView | Callable[[], CpuPool | CpuPoolView] | None = None,
    *,
    timeout: float | Unset | None = UNSET,
    queue_timeout: float | Unset | None = UNSET,
    retries: int | Unset = UNSET,
    label: str | Unset | None = UNSET,
) -> Callable[[Callable[P, T]], Callable[P, Coroutine[Any, Any, T]]]:
    """Make a plain function one that is awaited, and runs in a worker: `@cpupool.offload(timeout=5)`.

    It has the same parameters, and is `await`ed as `pool.run` is.  In a worker it is the plain function, so offloaded
    functions may call each other; elsewhere that one is its `__wrapped__`.  Methods can be decorated too, if their
    objects can be pickled: the worker has a copy of the object.

    Args:
        pool: the pool, a view of one, or a function that returns it, called each time; by default the default pool.
        timeout: as in `CpuPool.options`; by default as the pool has it, as are the others.
        queue_timeout: likewise.
        retries: likewise.
        label: likewise.

    Raises:
        TypeError, ValueError: an argument is not what it can be; the message names it.  Also if it is used without
            parentheses.
    """
    if inspect.isroutine(pool) and not _takes_nothing(pool):
        raise TypeError(f"write @offload() with parentheses above 'def {pool.__name__}'")
    if pool is not None and not callable(pool) and not isinstance(pool, PoolCalls):
        raise TypeError(f"pool must be a CpuPool, a function that returns one, or None, not {pool!r}")
    changes: dict[str, Any] = {"timeout": timeout, "queue_timeout": queue_timeout, "retries": retries, "label": label}
    CallOptions().changed(**changes)  # checks them

    def decorate(fn: Callable[P, T] | None = None) -> Callable[P, Coroutine[Any, Any, T]]:
        if fn is None:
            raise TypeError("write @offload() with parentheses: here it got a function, and no pool")
        check_function(fn, "run")

        @functools.wraps(fn)
        def offloaded(*args: P.args, **kwargs: P.kwargs) -> Any:
            if in_worker():
                return fn(*args, **kwargs)
            found = default_pool() if pool is None else pool() if callable(pool) else pool
            return found.options(**changes).run(sent, *args, **kwargs)

        qualname = getattr(fn, "__qualname__", "")
        is_method = "." in qualname and "<locals>" not in qualname
        sent: Callable[..., Any] = _Method(fn.__module__, qualname) if is_method else offloaded
        _mark_as_coroutine_function(offloaded)
        return offloaded

    return decorate


class _Method:
    """What stands for a function in a class on its way, where pickle would look for it in the wrong way.

    A class method is another object each time it is looked up, and a name that begins with two underscores is mangled.
    """

    def __init__(self, module: str, qualname: str) -> None:
        self.__module__ = module
        self.__qualname__ = qualname

    def __reduce__(self) -> tuple[object, ...]:
        return _Method, (self.__module__, self.__qualname__)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        *path, name = self.__qualname__.split(".")
        if name.startswith("__") and not name.endswith("__"):
            name = f"_{path[-1].lstrip('_')}{name}"
        owner: Any = functools.reduce(getattr, path, importlib.import_module(self.__module__))
        found = inspect.getattr_static(owner, name)
        fn: Callable[..., Any] = getattr(found, "__func__", found)  # of a class method, or a static one
        return fn(*args, **kwargs)


def _mark_as_coroutine_function(fn: Callable[..., object]) -> None:
    """Let frameworks know that its result is to be awaited."""
    if hasattr(inspect, "markcoroutinefunction"):  # Python 3.12
        inspect.markcoroutinefunction(fn)
    elif not in_worker():
        import asyncio.coroutines

        fn._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]


def _takes_nothing(fn: Callable[..., object]) -> bool:
    try:
        inspect.signature(fn).bind()
    except TypeError:
        return False
    return True
