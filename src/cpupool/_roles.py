"""Which part this process plays: the program, a worker, or a worker that is still being born.

It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import contextlib
import os
import sys
from contextvars import ContextVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NAME_PREFIX = "cpupool-worker-"  # of a worker's process

# A new process that imports the user's main module and finds itself asked to start a pool there ends with this status.
EXIT_UNGUARDED_MAIN = 89

GUARD_ADVICE = (
    "A new worker imports the program's main module, and that starts the pool again. Put what starts it behind\n\n"
    "    if __name__ == '__main__':\n        main()\n\n"
    "so that importing the module only defines things."
)

_is_worker = False
_plays_worker = ContextVar("cpupool_plays_worker", default=False)  # where a pool without workers runs a task


def become_worker() -> None:
    """Note that this process is a worker from now on."""
    global _is_worker  # noqa: PLW0603  # a fact about this process
    _is_worker = True


def in_worker() -> bool:
    """Return True in a worker process (and in what a task forks), False in the program that owns the pool.

    Also in a task of a pool without workers (`cpupool.testing.InlinePool`).
    """
    return _is_worker or _plays_worker.get()


@contextlib.contextmanager
def playing_worker() -> Iterator[None]:
    """Count as a worker in the block; other threads and tasks do not."""
    token = _plays_worker.set(True)
    try:
        yield
    finally:
        _plays_worker.reset(token)


def is_importing_main() -> bool:
    """Return True in a process that multiprocessing has started and that is still importing the user's main module."""
    process = sys.modules.get("multiprocessing.process")  # else this process was not started by it
    return process is not None and getattr(process.current_process(), "_inheriting", False)


def is_newborn_worker() -> bool:
    """Return True in a worker that is still importing the user's main module."""
    return is_importing_main() and sys.modules["multiprocessing.process"].current_process().name.startswith(NAME_PREFIX)


def refuse_pool_here() -> None:
    """Raise where a pool must not start workers: in a worker, and in a new process that imports the main module."""
    if is_newborn_worker():
        os._exit(EXIT_UNGUARDED_MAIN)  # the supervisor tells the user, once
    if in_worker():
        raise RuntimeError(
            "a worker must not use a pool: its workers would compete with this one's for the same CPUs. "
            "Return what is to be done to the caller and let it call the pool, or use multiprocessing here."
        )
    if is_importing_main():
        raise RuntimeError(f"a pool was used while a new process imports the main module. {GUARD_ADVICE}")
