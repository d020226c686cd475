"""What runs in a worker when one call makes several.

It runs in the workers too: stdlib only, and nothing slow to import.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any


def run_chunk(fn: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call `fn` with the arguments in each item."""
    return [fn(*item) for item in items]
