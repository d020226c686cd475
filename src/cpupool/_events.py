"""What happens to a pool, for those who want to know: callbacks, and the logger `cpupool`.

Theory of operation: events come from the supervisor's thread, which must not wait for anybody's code.  So they, and the
records that workers log, are queued, and a thread of their own hands them out, one after another.  It exists only while
there are any.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

EventKind: TypeAlias = Literal[
    "worker_started",
    "worker_ready",
    "worker_died",
    "worker_recycled",
    "breaker_opened",
    "breaker_closed",
    "task_slow",
]

logger = logging.getLogger("cpupool")

_LEVELS: dict[EventKind, int] = {
    "worker_started": logging.DEBUG,
    "worker_ready": logging.DEBUG,
    "worker_died": logging.WARNING,
    "worker_recycled": logging.INFO,
    "breaker_opened": logging.ERROR,
    "breaker_closed": logging.WARNING,
    "task_slow": logging.WARNING,
}
_MOST_PATIENCE = 10  # times as long as `finish` waits at first


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened to a pool; `str(event)` is a sentence.

    Attributes:
        kind: "worker_started", "worker_ready" (its initializer has run), "worker_died" (without being told to leave),
            "worker_recycled" (it leaves, and another takes its place), "breaker_opened" (workers fail to start, again
            and again, and who asks for one is refused meanwhile), "breaker_closed", or "task_slow" (it runs longer than
            the pool's `slow_task`).
        pool: the pool's name.
        text: what has happened, in words.
        time: when, in seconds since the epoch.
        pid: the worker's process id, if it is about one.
        task: the label of the task that it runs, or the name of the function; None without one.
        seconds: how long the worker took to be ready, or the task has run; else None.
        stack: where the slow task is, or the crash was, in Python; None where that is not known.
    """

    kind: EventKind
    pool: str
    text: str
    time: float = field(default_factory=time.time)
    pid: int | None = None
    task: str | None = None
    seconds: float | None = None
    stack: str | None = None

    @property
    def level(self) -> int:
        """The level on which it is logged; a death of which a caller is told is no warning."""
        return logging.INFO if self.kind == "worker_died" and self.task is not None else _LEVELS[self.kind]

    def __str__(self) -> str:
        text = f"{self.pool}: {self.text}"
        return f"{text}\n{self.stack}" if self.stack else text


class Announcer:
    """Tells everybody of what happens to one pool; from any thread.

    Rules: no lock, because any of it may run inside a garbage collection.  Whoever takes the token out of `_idle` may
    start the thread; it puts it back when it ends.
    """

    def __init__(self) -> None:
        self._subscriptions: dict[_Subscription, None] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what is queued, as a forked child does: it is the parent's."""
        self._queue: deque[Callable[[], object]] = deque()
        self._idle = [None]
        self._thread_id: int | None = None

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call `callback(event)` from now on, until what is returned is called."""
        if not callable(callback):
            raise TypeError(f"on_event takes a function with one argument, the event, not {callback!r}")
        subscription = _Subscription(callback)
        self._subscriptions[subscription] = None

        def unsubscribe() -> None:
            self._subscriptions.pop(subscription, None)

        return unsubscribe

    def announce(self, event: Event) -> None:
        """Tell everybody; it waits for nobody."""
        subscriptions = tuple(self._subscriptions)  # of those who have asked before
        if subscriptions or logger.isEnabledFor(event.level):
            self.deliver(lambda: _tell(event, subscriptions))

    def deliver(self, delivery: Callable[[], object]) -> None:
        """Call this in the thread, after what was queued before."""
        self._queue.append(delivery)
        try:
            self._idle.pop()
        except IndexError:
            return  # the thread runs
        try:
            threading.Thread(target=self._work, name="cpupool-events", daemon=True).start()
        except RuntimeError:  # no more threads, or the program is ending: the next one tries again
            self._idle.append(None)

    def finish(self, at_most: float) -> None:
        """Wait until all is delivered that was queued before: so many seconds, and on while something is."""
        if threading.get_ident() == self._thread_id or (not self._queue and self._idle):  # in this order
            return
        is_done = threading.Event()
        self.deliver(is_done.set)
        left = len(self._queue)
        for _ in range(_MOST_PATIENCE):
            if is_done.wait(at_most) or len(self._queue) >= left:
                return
            left = len(self._queue)

    def _work(self) -> None:
        queue, idle = self._queue, self._idle  # a callback may fork, and the child begins anew with others
        while True:
            self._thread_id = threading.get_ident()
            try:
                delivery = queue.popleft()
            except IndexError:
                self._thread_id = None
                idle.append(None)
                if not queue or not _take_token(idle):
                    return
                continue
            try:
                delivery()
            except BaseException:  # a handler's or a filter's: the thread must go on
                with contextlib.suppress(BaseException):
                    logger.exception("an error while telling what happens to a pool")


def _take_token(idle: list[None]) -> bool:
    """Return True if the thread goes on, because something was queued just before it ended."""
    try:
        idle.pop()
    except IndexError:
        return False  # another one was started
    return True


def _tell(event: Event, callbacks: tuple[Callable[[Event], object], ...]) -> None:
    logger.log(event.level, "%s", event)
    for callback in callbacks:
        try:
            callback(event)
        except BaseException:
            logger.exception("%s: the callback %r of on_event has failed", event.pool, callback)


class _Subscription:
    """A callback, each time it is subscribed another one."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[Event], object]) -> None:
        self._callback = callback

    def __call__(self, event: Event) -> object:
        return self._callback(event)

    def __repr__(self) -> str:
        return repr(self._callback)
