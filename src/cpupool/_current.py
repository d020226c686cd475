"""What a task can learn about itself while it runs in a worker.

It runs in the workers too: stdlib only, and nothing slow to import.
"""

from __future__ import annotations


class Task:
    """The task that this worker is running.

    Attributes:
        id: its number; no other task of the same pool in this program has it, and each attempt has one of its own.
        label: as given to `pool.options(label=...)`, or None.
        attempt: 1 for the first; more when it was retried because a worker died.
    """

    __slots__ = ("attempt", "id", "label")

    def __init__(self, task_id: int, label: str | None, attempt: int) -> None:
        self.id: int = task_id
        self.label: str | None = label
        self.attempt: int = attempt

    def __repr__(self) -> str:
        return f"<Task {self.id} label={self.label!r} attempt={self.attempt}>"


_running: Task | None = None


def current_task() -> Task | None:
    """Return what is known of the task that runs in this worker, or None where no task runs: in the program itself.

    Any thread that the task has started gets the same answer.
    """
    return _running


def set_current_task(task: Task | None) -> None:
    """Note which task runs."""
    global _running  # noqa: PLW0603  # a worker runs one at a time
    _running = task
