"""`PoolExecutor`: what `ProcessPoolExecutor` does, by a pool that survives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import CpuPool
from ._executor import PoolExecutorFace

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext

__all__ = ["PoolExecutor"]


class PoolExecutor(PoolExecutorFace):
    """A drop-in for `concurrent.futures.ProcessPoolExecutor`, with a pool of its own.

    Workers start as calls need them.  What goes beyond it: `Future.cancel()` stops a call that runs; a crash fails one
    future (its error is `WorkerDied` as well as `BrokenProcessPool`), and the executor goes on; `timeout` bounds each
    call; leaving its `with` block by Ctrl-C stops the calls instead of waiting for them.

    Args:
        max_workers, mp_context, initializer, initargs, max_tasks_per_child: as `ProcessPoolExecutor`.
        settings: any other argument of `CpuPool`.

    Raises:
        TypeError, ValueError: an argument is not what it can be; the message names it.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: str | BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(max_workers, int) and max_workers <= 0:
            raise ValueError(f"max_workers must be greater than 0, not {max_workers}")
        pool = CpuPool(
            max_workers,
            mp_context=mp_context,
            initializer=initializer,
            initargs=initargs,
            max_tasks_per_child=max_tasks_per_child,
            **{"name": "PoolExecutor", **settings},
        )
        super().__init__(pool, pool.run, pool.aclose)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self._driver.pool!r}>"
