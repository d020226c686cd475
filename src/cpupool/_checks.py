"""Checks of arguments: each error names the argument and says what it can be."""

from __future__ import annotations

import math


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


def check_bytes(name: str, value: object) -> None:
    """Raise unless `value` is a positive int."""
    if isinstance(value, float) and value.is_integer():
        raise TypeError(f"{name} must be an int, a number of bytes, not {value!r}; write {int(value)}")
    check_count(name, value, at_least=1)
