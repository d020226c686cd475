"""What a process's pools do when it forks: the child's neither touch the parent's workers nor wait for its locks."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def at_fork(
    *,
    before: Callable[[], object] = bool,
    after_in_parent: Callable[[], object] = bool,
    after_in_child: Callable[[], object] = bool,
) -> None:
    """Do as `os.register_at_fork`, where there is such a thing."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=after_in_parent, after_in_child=after_in_child)


# A fork waits for a start in progress, and no start begins during a fork: the child would inherit locks of
# multiprocessing and of the import system that nobody there ever releases.  Reentrant, because the start method "fork"
# forks.
starting_or_forking = threading.RLock()
at_fork(
    before=starting_or_forking.acquire,
    after_in_parent=starting_or_forking.release,
    after_in_child=starting_or_forking.release,
)
