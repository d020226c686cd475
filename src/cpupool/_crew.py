"""The workers of one pool and what the supervisor's thread sleeps on: their descriptors, deadlines, and its alarm.

Rules: only the supervisor's thread uses it, except for `wake` and `look_by`, which any thread may call; they take no
lock and never block.
"""

from __future__ import annotations

import math
import selectors
import socket
import time
from typing import TYPE_CHECKING

from ._worker import State

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from ._worker import Worker

LONGEST_SLEEP = 3600.0  # seconds; a deadline may be infinite, the system's timers are not


class Crew:
    """Holds the workers, from their start to their end.

    Attributes:
        workers: all that were started and not yet closed.
    """

    def __init__(self) -> None:
        self.workers: set[Worker] = set()
        self._wakes_at = math.inf

    def open(self, opened: contextlib.ExitStack) -> None:
        """Open what `sleep` needs; `opened` closes it."""
        self._selector = opened.enter_context(selectors.DefaultSelector())
        self._alarm, self._wake_sender = socket.socketpair()
        for end in (self._alarm, self._wake_sender):
            opened.callback(end.close)
            end.setblocking(False)
        self._selector.register(self._alarm, selectors.EVENT_READ, lambda: self._alarm.recv(4096))

    def close(self) -> None:
        self._selector.close()
        self._alarm.close()
        self._wake_sender.close()

    # --- sleeping ---

    def wake(self) -> None:
        """Let the thread look at everything again."""
        try:
            self._wake_sender.send(b"\0")
        except (BlockingIOError, OSError, AttributeError):
            pass  # it has been woken already, or has stopped, or has not begun: it will look anyway

    def look_by(self, deadline: float) -> None:
        """Let the thread look at everything again at `deadline`, which was written down before, at the latest.

        It costs nothing where the thread wakes earlier anyway.
        """
        if deadline < self._wakes_at:
            self.wake()

    def sleep(self, next_deadline: Callable[[], float]) -> None:
        """Sleep until a descriptor or a deadline needs attention, and attend to the descriptors."""
        self._wakes_at = math.inf  # whoever writes down a deadline from now on wakes the thread
        self._wakes_at = until = next_deadline()
        timeout = None if until == math.inf else min(max(until - time.monotonic(), 0), LONGEST_SLEEP)
        events = self._selector.select(timeout)
        self._wakes_at = -math.inf  # it is awake
        for key, _ in events:
            if self._selector.get_map().get(key.fd) is key:  # else an event before it has put an end to it
                key.data()

    def watch_descriptor(self, descriptor: int, on_event: Callable[[], object]) -> None:
        """Call `on_event()` whenever it can be read."""
        self._selector.register(descriptor, selectors.EVENT_READ, on_event)

    def unwatch_descriptor(self, descriptor: int) -> None:
        """Do so no more, if that was so."""
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    # --- workers ---

    def watch_end(self, worker: Worker, on_end: Callable[[Worker], None]) -> None:
        """Call `on_end(worker)` when its process has ended."""
        self._selector.register(worker.process.sentinel, selectors.EVENT_READ, lambda: on_end(worker))

    def unwatch_end(self, worker: Worker) -> None:
        self._selector.unregister(worker.process.sentinel)

    def watch_channel(self, worker: Worker, on_event: Callable[[Worker], None], *, writable: bool = False) -> None:
        """Call `on_event(worker)` whenever its channel can be read, or, if asked for, written."""
        self.unwatch_channel(worker)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writable else 0)
        self._selector.register(worker.process.channel, events, lambda: on_event(worker))

    def unwatch_channel(self, worker: Worker) -> None:
        if self.watches_channel(worker):
            self._selector.unregister(worker.process.channel)

    def watches_channel(self, worker: Worker) -> bool:
        return worker.process.channel in self._selector.get_map()

    def send_home(self, worker: Worker, deadline: float) -> None:
        """Ask a worker that runs no task to exit; it is killed at `deadline`."""
        if worker.state in (State.READY, State.RECOVERING):
            worker.state = State.LEAVING
            worker.was_sent_home = True
            worker.deadline = deadline
            worker.say_bye()

    def kill(self, worker: Worker) -> None:
        """Kill a worker and what it has started, unless it has ended or was killed before."""
        worker.deadline = math.inf
        if worker.state not in (State.KILLED, State.ENDED):
            worker.state = State.KILLED
            worker.was_killed = True
            worker.process.kill()

    def next_deadline(self) -> float:
        """Return when the next worker has to be killed."""
        return min((worker.deadline for worker in self.workers), default=math.inf)
