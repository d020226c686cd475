"""The pool that a process has without asking: one, made on first use."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ._forking import at_fork
from ._pool import CpuPool

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()
_pool: CpuPool | None = None
_settings: dict[str, Any] = {}


def default_pool() -> CpuPool:
    """Return this process's default pool; it is the same for all threads and event loops.

    It is made on first use, closed when the program ends, and made anew after it was closed.  A forked child has its
    own workers.
    """
    global _pool  # noqa: PLW0603  # the one
    pool = _pool
    if pool is None or pool.is_closed:
        with _lock:
            if _pool is None or _pool.is_closed:
                _pool = CpuPool(**{"name": "default pool", **_settings})
            pool = _pool
    return pool


def configure_default(**settings: Any) -> None:
    """Set how the default pool is made, with the arguments of `CpuPool`; before it is first used.

    Raises:
        RuntimeError: it exists already, so that the settings would have no effect.
        TypeError, ValueError: a setting is unknown or not what it can be.
    """
    CpuPool(**settings)  # checks them; a pool that nobody uses starts nothing
    with _lock:
        if _pool is not None and not _pool.is_closed:
            raise RuntimeError(
                "the default pool exists already; call configure_default() before its first use, or close it "
                "(cpupool.default_pool().close()) so that the next use makes a new one"
            )
        _settings.clear()
        _settings.update(settings)


async def run(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `fn(*args, **kwargs)` in a worker of the default pool; see `CpuPool.run`."""
    return await default_pool().run(fn, *args, **kwargs)


def run_sync(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `fn(*args, **kwargs)` in a worker of the default pool; see `CpuPool.run_sync`."""
    return default_pool().run_sync(fn, *args, **kwargs)


at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
