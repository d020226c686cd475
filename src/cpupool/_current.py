"""What a task can learn about itself while it runs in a worker.

It runs in the workers too: stdlib only, and nothing slow to import.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Task:
    """The task that this worker is running.

    Attributes:
        id: its number; no other task of the same pool in this program has it, and each attempt has one of its own.
        label: as given to `pool.options(label=...)`, or None.
        attempt: 1 for the first; more when it was retried because a worker died.
        item: the number of the running item in its `map` or `stream`, from 0; None for `run`.  Items that were sent
            together have the same `id`.
    """

    __slots__ = ("attempt", "id", "item", "label")

    def __init__(self, task_id: int, label: str | None, attempt: int, item: int | None = None) -> None:
        self.id: int = task_id
        self.label: str | None = label
        self.attempt: int = attempt
        self.item: int | None = item

    def __repr__(self) -> str:
        item = "" if self.item is None else f" item={self.item}"
        return f"<Task {self.id} label={self.label!r} attempt={self.attempt}{item}>"


_reporter: Callable[[object], object] | None = None


def report(value: object) -> None:
    """Say how far the running task has come: `report({"done": 3, "of": 10})`.

    Whoever awaits the task sees it, if they have asked to (`pool.options(on_report=...)`); the last one wins, and is
    seen before the task's result.  It takes microseconds, and never waits.  Where no task runs it does nothing.

    A task that is tried again reports from the beginning.  A thread that outlives its task reports for the next one.

    Args:
        value: anything small that pickles; 64 kB at most, pickled.

    Raises:
        ValueError: it is larger.
        Exception: what pickling it has raised.
    """
    if _reporter is not None and _running is not None:
        _reporter(value)


def set_reporter(reporter: Callable[[object], object] | None) -> None:
    """Set what takes reports."""
    global _reporter  # noqa: PLW0603  # a worker has one
    _reporter = reporter


_running: Task | Callable[[], Task] | None = None


def current_task() -> Task | None:
    """Return what is known of the task that runs in this worker, or None where no task runs: in the program itself.

    Any thread that the task has started gets the same answer.
    """
    return _running() if callable(_running) else _running


def set_current_task(task: Task | Callable[[], Task] | None) -> None:
    """Note which task runs, or what says so."""
    global _running  # noqa: PLW0603  # a worker runs one at a time
    _running = task
