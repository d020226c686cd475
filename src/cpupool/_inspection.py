"""What can be said of a worker while it works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._outcomes import name_task_of
from ._statistics import WorkerStatistics
from ._usage import read_cpu_seconds, read_resident
from ._worker import State

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ._lease import Lease
    from ._worker import Worker

_STATES = {State.STARTING: "starting", State.RECOVERING: "stopping", State.LEAVING: "leaving", State.KILLED: "killed"}


def describe_worker(
    worker: Worker, idle: Collection[Worker], lent: Mapping[Worker, Lease[Worker] | None], now: float
) -> WorkerStatistics:
    """Return the record of a worker at the moment `now`, from any thread."""
    lease, pid = lent.get(worker), worker.process.pid
    age = max(now - worker.born, 0.0)
    cpu_seconds = read_cpu_seconds(pid)
    return WorkerStatistics(
        pid=pid,
        state=_STATES.get(worker.state) or ("idle" if worker in idle else "busy"),
        task=worker.last_task if worker.state is State.RECOVERING else name_task_of(lease),
        seconds=max(now - lease.started, 0.0) if lease is not None and lease.started else 0.0,
        tasks_done=worker.tasks_done,
        resident_bytes=read_resident(pid),
        cpu_seconds=cpu_seconds,
        cpu_share=None if cpu_seconds is None else cpu_seconds / max(age, 0.001),
        age=age,
        last_seen=max(now - worker.heard, 0.0),
    )
