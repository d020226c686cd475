"""How tasks are stopped: interrupt, then grace, then kill; and how an interrupted worker is won back.

Theory of operation: a task's deadline stands in its lease, and the supervisor's thread sleeps until the first of them
(`Crew.look_by` wakes it if a new one is earlier), so a timeout holds while the event loop is blocked, and nobody polls.
When it has passed, the task is interrupted, and the lease's deadline becomes the end of the grace.  The call goes on
waiting for its answer, and learns there what has become of its task.  If there is no answer by then, the worker is
doomed under the dispatcher's lock, so that it cannot go to another call meanwhile, and killed.

A signal that arrives just before the task makes a system call that blocks is seen by Python only after that call.  So
it is sent again, at growing intervals, until the worker's status page says that the task has felt it.  If it has not
for a while, its stack is asked for.

A call that is given up does not wait.  It leaves its worker to the supervisor, which interrupts the task, reads the
answer in the call's place and throws it away; then the worker is ready again.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._frames import Kind, ProtocolError
from ._lease import Verdict
from ._outcomes import name_task_of
from ._status import BEFORE_FIRST, EVERY_ITEM
from ._worker import State, WorkerGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._crew import Crew
    from ._dispatch import Dispatcher
    from ._lease import Lease
    from ._worker import Worker


FIRST_REMINDER = 0.005  # seconds after the first interrupt
_SILENCE = 0.03  # seconds after which a task that has not felt it is asked for its stack


@dataclass(slots=True)
class _Reminder:
    """When the interrupt of a task is sent again; times in seconds, monotonic.

    Attributes:
        silent_until: when its stack is asked for; infinite once it has been.
    """

    lease: Lease[Worker]
    due: float
    silent_until: float
    interval: float = FIRST_REMINDER


class Stopping:
    """Stops the tasks of a crew's workers; all in the supervisor's thread."""

    def __init__(
        self, grace: float, crew: Crew, dispatcher: Dispatcher[Worker], recycle: Callable[[Worker], object]
    ) -> None:
        """Args: `recycle` sends a worker home that has run its last task."""
        self._grace = grace
        self._recycle = recycle
        self._crew = crew
        self._dispatcher = dispatcher
        self._reminders: dict[Worker, _Reminder] = {}

    def next_deadline(self) -> float:
        """Return when the next task has to be interrupted, also again, or its worker killed."""
        deadlines = [lease.deadline for lease in self._dispatcher.leases()]
        deadlines += [reminder.due for reminder in self._reminders.values()]
        return min(deadlines, default=math.inf)

    def enforce_deadlines(self, now: float) -> None:
        """Interrupt the tasks that have run long enough; kill the workers that an interrupt did not free."""
        for lease in self._dispatcher.leases():
            if lease.deadline > now:
                continue
            if lease.item_timeout is not None and self._has_time_left(lease, lease.item_timeout, now):
                continue
            if lease.verdict is None:
                self.interrupt(lease, Verdict.TIMED_OUT, lease.condemned_item)
            else:
                self._kill(lease)
        for worker, reminder in list(self._reminders.items()):
            if reminder.due <= now:
                self._remind(worker, reminder)

    def _has_time_left(self, lease: Lease[Worker], timeout: float, now: float) -> bool:
        """Look which item of a batch runs, and give it its own time if the deadline was made for another one.

        If it has had its time, it is noted in the lease.
        """
        worker = lease.worker
        if worker is None or lease.verdict not in (None, Verdict.TIMED_OUT):
            return False
        if worker.process.has_felt_interrupt(lease.task_id):  # what stands in its page is of what it does with it
            lease.deadline = lease.interrupted + self._grace
            return now < lease.deadline
        item, since = worker.process.running_item(lease.task_id) or (BEFORE_FIRST, lease.started)
        if since == math.inf:  # its results are being sent; then the next item begins
            lease.deadline = now + timeout
        elif lease.verdict is None and since + timeout <= now:
            lease.condemned_item, lease.item_started = item, since
            return False
        elif lease.verdict is None or lease.condemned_item != item:
            lease.pardon(since + timeout)
        else:
            return False
        return True

    def _remind(self, worker: Worker, reminder: _Reminder) -> None:
        process, task_id = worker.process, reminder.lease.task_id
        is_over = worker.state is State.READY and reminder.lease.worker is not worker
        is_gone = worker.state not in (State.READY, State.RECOVERING)
        if (timeout := reminder.lease.item_timeout) is not None and not is_over and not is_gone:
            is_over = reminder.lease.verdict is None or self._has_time_left(reminder.lease, timeout, time.monotonic())
        if is_over or is_gone or process.has_felt_interrupt(task_id) or process.has_finished(task_id):
            del self._reminders[worker]
            return
        if process.has_started(task_id):
            process.send_interrupt()
            if reminder.due >= reminder.silent_until:
                process.ask_for_stack()
                reminder.silent_until = math.inf
        reminder.due += reminder.interval
        reminder.interval *= 2

    def interrupt(self, lease: Lease[Worker], verdict: Verdict, item: int | None = None) -> None:
        """Interrupt a task, unless it has been before; of a batch only that item, or all."""
        worker = lease.worker
        is_said = lease.verdict is not None and lease.condemned_item is None
        if is_said or worker is None:
            return
        lease.condemned_item = item
        lease.interrupted = time.monotonic()
        lease.deadline = lease.interrupted + self._grace
        lease.verdict = verdict  # before the answer can come
        worker.process.condemn(lease.task_id, EVERY_ITEM if item is None else item)
        if worker.process.has_started(lease.task_id):  # else it looks at its start whether it is condemned
            worker.process.send_interrupt()
        now = lease.interrupted
        self._reminders[worker] = _Reminder(lease, now + FIRST_REMINDER, now + min(_SILENCE, self._grace / 2))

    def _kill(self, lease: Lease[Worker]) -> None:
        worker = lease.worker
        if worker is None:
            return
        if worker.process.has_finished(lease.task_id):
            lease.deadline = math.inf  # its answer is there; the caller is late to read it
        elif self._dispatcher.doom(lease):
            worker.last_task = name_task_of(lease)
            self._crew.kill(worker)

    # --- workers whose call was given up ---

    def recover(self, lease: Lease[Worker]) -> None:
        """Take over the ready worker of a given-up call and interrupt its task; `_on_answer` makes it ready again."""
        self.interrupt(lease, Verdict.GIVEN_UP)
        worker = self._dispatcher.take_over(lease, expected=True)
        if worker is None:
            return
        worker.last_task = name_task_of(lease)
        worker.state = State.RECOVERING
        worker.deadline = lease.deadline
        self._crew.watch_channel(worker, self._on_answer, writable=worker.unsent is not None)
        self._on_answer(worker)  # it may be here already, and only not be noticed

    def _on_answer(self, worker: Worker) -> None:
        try:
            if worker.unsent is not None and worker.send_rest():
                self._crew.watch_channel(worker, self._on_answer)  # it was given up before all was sent
            frame = worker.receive()
            while frame is not None and frame.kind is Kind.PARTIAL:
                frame = worker.next_frame()  # nobody wants it
        except (WorkerGone, ConnectionError, ProtocolError):
            self._crew.unwatch_channel(worker)
            self._crew.kill(worker)
            return
        if frame is None:
            worker.drop_answer()
            return
        self._crew.unwatch_channel(worker)
        if worker.state is not State.RECOVERING:
            return  # it was killed in the moment of its answer
        worker.process.take_stack()
        worker.in_call = False
        worker.tasks_done += 1
        if not worker.tasks_left:
            self._dispatcher.remove(worker)
            self._recycle(worker)
            return
        if worker.is_too_large:
            self._dispatcher.replace(worker)
        worker.forget_ended_shares()
        worker.state = State.READY
        worker.deadline = math.inf
        self._dispatcher.add_ready(worker)
