"""Results of a map on their way from the wire to the caller."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _payload
from ._errors import decode_error
from ._large import unpickle_apart
from ._outcomes import make_rebuild_error, name_task

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._journal import Results
    from ._settings import CallOptions


@dataclass(frozen=True, slots=True)
class Segment:
    """What has become of some consecutive items.

    Attributes:
        first: the number of the first one.
        values: their results; exceptions in the place of those that failed.
        failures: the positions of those among `values`.
    """

    first: int
    values: list[Any]
    failures: list[int]


def rebuild(first: int, results: Results, known: int, fn: Callable[..., Any], options: CallOptions) -> Segment:
    """Rebuild results, but for the first `known` ones; the number of the next one is `first`."""
    column = results.column
    if results.are_numbers:
        return Segment(first, column[known:] if known else column, [])
    values: list[Any] = []
    failures: list[int] = []
    data, loads, received = results.data, _payload.loads_result, results.received
    is_large = received and not results.are_light
    start = max(column[known - 1], ~column[known - 1]) if known else 0
    for end in column[known:]:
        stop = end if end >= 0 else ~end
        pickled, start = data[start:stop], stop
        error: Exception
        try:
            if end >= 0:
                values.append(unpickle_apart(pickled, received) if is_large else loads(pickled, received))
                continue
            error = decode_error(pickled, name_task(fn, options))
        except _payload.RebuildFailed as failed:
            error = make_rebuild_error(pickled, failed, fn, options)
        failures.append(len(values))
        values.append(_with_note(error, first + len(values)))
    return Segment(first, values, failures)


def make_failure(number: int, error: Exception) -> Segment:
    """Return the segment of one item that has failed."""
    return Segment(number, [_with_note(error, number)], [0])


def _with_note(error: Exception, number: int) -> Exception:
    with contextlib.suppress(Exception):  # it may not take one: a frozen dataclass, say
        error.add_note(f"This was item {number}, counted from 0.")
    return error
