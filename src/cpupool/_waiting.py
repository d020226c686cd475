"""How a call waits: in a task of any event loop, or in a plain thread.

The way of a call is written once, as a coroutine that waits only through a `Waits`.  `AsyncioWaits` and `TrioWaits` (in
modules of their own) suspend the task; `BlockingWaits` blocks the thread and never suspends, so that `run_to_end` gets
such a coroutine's result by starting it.
"""

from __future__ import annotations

import select
import sys
import threading
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from . import _roles

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Coroutine
    from contextlib import AbstractContextManager

T = TypeVar("T")

# Seconds.  A signal that arrives just before the main thread blocks in the system is seen by Python only after that.
# So that Ctrl-C is never lost, the main thread looks for it so often while it waits.
SIGNAL_LATENCY = 0.5


class ChannelWaits(Protocol):
    """How a task or a thread waits for a worker's channel, and for another thread."""

    async def readable(self, channel: socket.socket, timeout: float | None = None) -> None:
        """Wait until it can be read, or for so many seconds."""
        ...

    async def writable(self, channel: socket.socket) -> None: ...

    def ticket(self) -> Ticket:
        """Make a ticket that this task or thread is going to wait for."""
        ...

    def settled(self, ticket: Ticket) -> Awaitable[object]:
        """Wait until it is settled."""
        ...


class Waits(ChannelWaits, Protocol):
    """The ways in which a call waits."""

    def shielded(self) -> AbstractContextManager[object]:
        """Within it, the scopes around the task do not cancel a wait."""
        ...

    async def open_tasks(self) -> Tasks:
        """Open a place for tasks of one's own; it has to be left by `stop`."""
        ...

    def rest(self) -> None:
        """Give back what is kept open from one wait to the next, unless somebody waits; the next wait opens it anew."""
        ...


class Tasks(Protocol):
    """Tasks that somebody has started, and stops."""

    def start(self, function: Callable[..., Coroutine[Any, Any, object]], *args: object) -> None:
        """Run `function(*args)` in a task; it must not raise, except when it is cancelled."""
        ...

    async def stop(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        ...


class Ticket:
    """What one task or thread waits for and another thread settles: exactly once, or never if it was withdrawn.

    Rules: `settle` and `withdraw` may race; the one that deletes the token has won, and deleting it is a single atomic
    step.  So neither needs a lock, and `withdraw` is safe where no lock may be taken: while a coroutine is being
    garbage-collected, which can happen in the middle of anything.

    Attributes:
        waiting: what its maker waits on: a future, a lock.
        value: what it was settled with, or None.
        error: the exception it was settled with instead, or None.
        is_settled: True once it is.
    """

    __slots__ = ("_token", "_wake", "error", "is_settled", "value", "waiting")

    def __init__(self, waiting: Any, wake: Callable[[Ticket], bool]) -> None:
        """Args: `wake` wakes the maker from any thread, without blocking; False if it can never run again."""
        self.waiting = waiting
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_settled = False
        self._wake = wake
        self._token = True

    @property
    def is_open(self) -> bool:
        """True until it is settled or withdrawn."""
        return hasattr(self, "_token")

    @property
    def is_here(self) -> bool:
        """True if its maker waits on the event loop that runs in this thread, and can `follow` a channel."""
        return False

    def claim(self) -> bool:
        """Settle it, but wake nobody yet: then comes `follow`, or `settle`.  Returns False if it was withdrawn."""
        try:
            del self._token
            self.is_settled = True  # no signal handler can come between these two
        except AttributeError:
            return False
        return True

    def follow(self, channel: socket.socket, take: Callable[[], bool]) -> None:
        """Wake its maker, once it is claimed, when what can be read is complete; where `is_here` is true.

        Args:
            channel: what is read.
            take: is called on the event loop whenever it can be read, and returns True when that was all.
        """
        raise NotImplementedError

    def settle(self, value: object = None, error: BaseException | None = None) -> bool:
        """Set the outcome, if there is one to set, and wake the one who waits.

        To settle it again does nothing, unless a signal handler has broken off the first time: then it ends what that
        has begun.

        Returns:
            False if nobody will take the outcome: the ticket was withdrawn, or its event loop is closed.
        """
        has_outcome = value is not None or error is not None
        if has_outcome and self.is_open:
            self.value, self.error = value, error  # before it can be seen to be settled
        self.claim()
        if self.is_settled and self._wake(self):
            return True
        if has_outcome:
            self.value = self.error = None  # whoever finds this ticket later must not take the outcome for theirs
        return False

    def withdraw(self) -> bool:
        """Take the ticket back.  Returns False if it has been settled: then its outcome has to be used."""
        try:
            del self._token
        except AttributeError:
            return False
        return True

    def result(self) -> Any:
        """Return the value, or raise the error, of a settled ticket."""
        if self.error is not None:
            raise self.error
        return self.value


class BlockingWaits:
    """Waits by blocking the thread; Ctrl-C in the main thread ends the wait."""

    async def readable(self, channel: socket.socket, timeout: float | None = None) -> None:
        _block_until(channel, select.POLLIN, timeout)

    async def writable(self, channel: socket.socket) -> None:
        _block_until(channel, select.POLLOUT)

    def ticket(self) -> Ticket:
        lock = threading.Lock()  # not an Event: that one is left broken by an exception from a signal handler
        lock.acquire()
        return Ticket(lock, _release)

    async def settled(self, ticket: Ticket) -> None:
        if threading.current_thread() is threading.main_thread():
            while not ticket.waiting.acquire(timeout=SIGNAL_LATENCY):
                pass
        else:
            ticket.waiting.acquire()

    def shielded(self) -> AbstractContextManager[object]:
        return nullcontext()

    async def open_tasks(self) -> Tasks:
        raise NotImplementedError("a plain thread has no tasks")

    def rest(self) -> None:
        """Nothing is kept."""


def _release(ticket: Ticket) -> bool:
    with suppress(RuntimeError):  # it was woken before
        ticket.waiting.release()
    return True


def _block_until(channel: socket.socket, event: int, timeout: float | None = None) -> None:
    poll = select.poll()
    poll.register(channel, event)
    if timeout is not None:
        poll.poll(timeout * 1000)
    elif threading.current_thread() is threading.main_thread():
        while not poll.poll(SIGNAL_LATENCY * 1000):
            pass
    else:
        poll.poll()


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits only through `BlockingWaits`."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError("a coroutine over BlockingWaits was suspended")


def running_loop() -> str | None:
    """Return "asyncio" or "trio" if this thread is running an event loop, without importing either."""
    # Either may be in the middle of being imported by another thread; then no loop of it runs in this one.
    get_running_loop = getattr(sys.modules.get("asyncio"), "_get_running_loop", None)
    if get_running_loop is not None and get_running_loop() is not None:
        return "asyncio"
    in_trio_run = getattr(getattr(sys.modules.get("trio"), "lowlevel", None), "in_trio_run", None)
    if in_trio_run is not None and in_trio_run():
        return "trio"
    return None


def refuse_in_event_loop(what: str, instead: str) -> None:
    """Raise if this thread runs an event loop, which `what` would block."""
    if (loop := running_loop()) is not None:
        _roles.refuse_pool_here()  # in a task of a pool without workers, that is what is wrong
        raise RuntimeError(
            f"{what} would block the {loop} event loop that runs in this thread; use '{instead}' there, "
            f"or call {what} from another thread"
        )
