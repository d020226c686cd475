"""What is known of a pool: the records that `CpuPool.statistics` returns, and the counting behind them.

Rules: whoever has something to count leaves a note, which takes no lock.  Now and then, and before they are read, the
notes are added up under the dispatcher's lock, so that a record is of one moment.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from ._errors import (
    InitializerFailed,
    PoolBroken,
    PoolClosed,
    PoolFull,
    QueueTimeout,
    TaskStopped,
    TaskTimeout,
    WorkerDied,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

# Upper bounds in seconds; the last bucket has none.  Below 100 microseconds nothing happens in a pool.
BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long something took, of many tasks.

    Attributes:
        bounds: the upper bound of each bucket, in seconds, the bound included; the last bucket is what is above.
        counts: how many were in each bucket: one more than there are bounds.
        sum: of all of them, in seconds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """The average in seconds; 0 if there were none."""
        return self.sum / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """Return what this share of them (0.5, 0.99) did not exceed, in seconds: the bound of their bucket.

        Infinite if that is the last bucket; 0 if there were none.

        Raises:
            ValueError: the share is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"a share is between 0 and 1, not {share!r}")
        wanted = share * self.count
        seen = 0
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            seen += count
            if count and seen >= wanted:
                return bound
        return 0.0

    def __sub__(self, earlier: Histogram) -> Histogram:
        """Return what has been added since an earlier one of the same pool."""
        counts = tuple(now - before for now, before in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.bounds, counts, self.sum - earlier.sum)


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """One worker process, at one moment.

    Attributes:
        pid: its process id.
        state: "starting" until its initializer has run; "idle"; "busy" with a task; "stopping" a task that was given
            up; "leaving"; or "killed", and not yet gone.
        task: the label of the task that it runs, or the name of the function; None without one.
        seconds: for how long it has run that; 0 without one, and while it stops.
        tasks_done: how many tasks it has answered, items of a `map` included.
        resident_bytes: the memory it holds (resident size, shared pages included); None where there is no /proc.
        cpu_seconds: the CPU time it has used, in user and system mode; None likewise.
        cpu_share: that, as a share of its age: 1.0 is one CPU all the time; None likewise.
        age: seconds since it was started.
        last_seen: seconds since something last came from it; its age, before anything has.
    """

    pid: int
    state: str
    task: str | None
    seconds: float
    tasks_done: int
    resident_bytes: int | None
    cpu_seconds: float | None
    cpu_share: float | None
    age: float
    last_seen: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """A pool at one moment, and what it has counted since it was started.

    A task is a call of `run`, or one item of a `map` or `stream`.  Each that was submitted waits or runs, or is counted
    once as succeeded, failed, timed_out, cancelled, died or refused, as it ended for its caller.

    Attributes:
        name: the pool's.
        workers: its workers, oldest first.
        max_workers: how many there may be.
        idle, busy, starting: how many of the workers are; those that stop a task count as busy.
        pending: how many calls and batches wait for a worker, or for room (`max_inflight_bytes`).
        submitted: tasks that callers wanted to run, but for those that could not be pickled on the spot.
        succeeded: they have returned.
        failed: they raised, or what they returned could not be sent, or not be rebuilt.
        timed_out: they ran longer than their `timeout`.
        cancelled: their callers gave them up, or have left the stream, or somebody has stopped them; also what a `map`
            that fails had still to do.
        died: their workers died.
        refused: they have not run, because of `max_pending`, `queue_timeout`, a closed pool, or no worker to be had.
        retried: attempts after a worker died while it ran the task.
        workers_started: processes started.
        workers_died: those of them that ended without having been told to leave: by themselves, or killed by others, or
            by the pool for a task that did not stop, or because their initializer failed.
        recycled: those of them that were replaced in peace (`max_tasks_per_child`, `max_memory_per_child`).
        queue_wait: how long tasks waited for a worker.  Those of a batch of a `map` waited together.  These times are
            of tasks that were answered, and of those that ran into their `timeout`; the latter without overhead.
        run_time: how long the function ran, in the worker.  The items of a batch count with their average.
        overhead: what a task took besides these: pickling, sending, waking up.
    """

    name: str
    workers: tuple[WorkerStatistics, ...]
    max_workers: int
    idle: int
    busy: int
    starting: int
    pending: int
    submitted: int
    succeeded: int
    failed: int
    timed_out: int
    cancelled: int
    died: int
    refused: int
    retried: int
    workers_started: int
    workers_died: int
    recycled: int
    queue_wait: Histogram
    run_time: Histogram
    overhead: Histogram


# How a task ends for its caller, and what else is counted: names in `Statistics`.
Outcome: TypeAlias = Literal["succeeded", "failed", "timed_out", "cancelled", "died", "refused"]
Counter: TypeAlias = Literal[Outcome, "submitted", "retried", "workers_started", "workers_died", "recycled"]

_REFUSALS = (PoolFull, QueueTimeout, PoolClosed, PoolBroken, InitializerFailed)


def outcome_of(error: BaseException, *, has_run: bool) -> Outcome:
    """Return as what a task counts whose caller gets this error."""
    if not isinstance(error, Exception) or (has_run and isinstance(error, PoolClosed)):
        return "cancelled"
    if isinstance(error, TaskStopped):
        return "cancelled"
    if isinstance(error, TaskTimeout):
        return "timed_out"
    if isinstance(error, WorkerDied):
        return "died"
    return "refused" if isinstance(error, _REFUSALS) else "failed"


# How long a task has waited, run, and taken besides, in seconds.
Times: TypeAlias = tuple[float, float, float]
# As what so many tasks count (None: that is noted apart), and how long each of them took.
Note: TypeAlias = tuple[Counter | None, int, Times | None]

SUBMITTED: Note = ("submitted", 1, None)

_MOST_NOTES = 64  # to add them up takes some 50 microseconds


class _Growing:
    """A histogram that grows."""

    __slots__ = ("counts", "sum")

    def __init__(self, counts: Sequence[int] = (0,) * (len(BUCKETS) + 1), total: float = 0.0) -> None:
        self.counts = list(counts)
        self.sum = total

    def grown(self, values: Sequence[float], weights: Sequence[int]) -> _Growing:
        """Return one with these values too, each so many times."""
        grown = _Growing(self.counts, self.sum + sum(map(mul, values, weights)))
        counts = grown.counts
        for at, many in zip(map(partial(bisect_left, BUCKETS), values), weights, strict=True):
            counts[at] += many
        return grown

    def freeze(self) -> Histogram:
        return Histogram(BUCKETS, tuple(self.counts), self.sum)


class Tally:
    """Counts what becomes of the tasks of a pool.

    Attributes:
        note: takes a `Note`.  It is one call of C: no signal handler can raise in the midst of it, and it takes no
            lock, so that it may run in a garbage collection.
    """

    def __init__(self, lock: threading.Lock) -> None:
        """Args: `lock` is the dispatcher's."""
        self._lock = lock
        self._notes: list[Note] = []
        self.note = self._notes.append
        self._counts: dict[Counter, int] = dict.fromkeys(get_args(Counter), 0)
        self._histograms = _Growing(), _Growing(), _Growing()  # of the three times

    def count(self, what: Counter, many: int = 1) -> None:
        """Count so many tasks as that."""
        self.note((what, many, None))
        self.tidy()

    def tidy(self) -> None:
        """Add the notes up, if they are many."""
        if len(self._notes) >= _MOST_NOTES:
            with self._lock:
                self._add_up()

    def _add_up(self) -> None:
        notes = self._notes
        while many_notes := len(notes):
            counts, histograms = self._counts.copy(), self._histograms
            weights, all_times = [], []
            for what, many, times in notes[:many_notes]:
                if what is not None:
                    counts[what] += many
                if times is not None:
                    weights.append(many)
                    all_times.append(times)
            if all_times:
                queued, ran, besides = zip(*all_times, strict=True)
                queue_wait, run_time, overhead = histograms
                histograms = (
                    queue_wait.grown(queued, weights),
                    run_time.grown(ran, weights),
                    overhead.grown(besides, weights),
                )
            # Here nothing is called: no signal handler can raise before the notes are gone.
            self._counts, self._histograms = counts, histograms
            del notes[:many_notes]

    def read(self) -> dict[str, Any]:
        """Return all counters and histograms, by their names in `Statistics`; the caller holds the lock."""
        self._add_up()
        queue_wait, run_time, overhead = self._histograms
        return {
            **{str(what): many for what, many in self._counts.items()},
            "queue_wait": queue_wait.freeze(),
            "run_time": run_time.freeze(),
            "overhead": overhead.freeze(),
        }
