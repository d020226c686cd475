"""What the workers do.  They import this, so it imports nothing large."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def double(number: int) -> int:
    return number * 2


def spin(seconds: float) -> None:
    """Use so much CPU time."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def spin_and_get_pid(seconds: float) -> int:
    spin(seconds)
    return os.getpid()


def total(array: npt.NDArray[np.float64]) -> float:
    return float(array.sum())


def echo(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    array.sum()
    return array


def count(items: list[dict[str, Any]]) -> int:
    return sum(item["id"] >= 0 for item in items)


def make_dicts(number: int) -> list[dict[str, Any]]:
    return [{"id": each, "name": f"user {each}", "is_active": each % 3 == 0} for each in range(number)]


def get_pid() -> int:
    return os.getpid()
