"""How a call waits: in a task of any event loop, or in a plain thread.

The way of a call is written once, as a coroutine that waits only through a `Waits`.  `AsyncWaits` (in `_async_waits`)
suspends the task; `BlockingWaits` blocks the thread and never suspends, so that `run_to_end` gets such a coroutine's
result by starting it.
"""

from __future__ import annotations

import selectors
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine

T = TypeVar("T")


class Wake(Protocol):
    """Wakes one waiting task or thread, from any thread, without blocking."""

    def __call__(self) -> bool:
        """Return False if the one who waits can never run again (its event loop is closed)."""
        ...


class Waits(Protocol):
    """The ways in which a call waits."""

    async def readable(self, channel: socket.socket) -> None: ...

    async def writable(self, channel: socket.socket) -> None: ...

    def prepare(self, ticket: Ticket) -> None:
        """Give the ticket the way to wake this task or thread; call it before another thread can see the ticket."""
        ...

    async def settled(self, ticket: Ticket) -> None:
        """Wait until a prepared ticket is settled."""
        ...


class Ticket:
    """What one task or thread waits for and another thread settles: exactly once, or never if it was withdrawn.

    Rules: `settle` and `withdraw` may race; the one that takes the token has won, and taking it is a single atomic
    step.  So neither needs a lock, and `withdraw` is safe where no lock may be taken: while a coroutine is being
    garbage-collected, which can happen in the middle of anything.

    Attributes:
        value: what it was settled with; meaningful once `settle` has won.
        error: the exception it was settled with instead.
    """

    __slots__ = ("_token", "_wake", "error", "value", "waiting")

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.waiting: Any = None  # what its `Waits` waits on
        self._wake: Wake | None = None
        self._token = [None]

    def wake_with(self, wake: Wake) -> None:
        self._wake = wake

    @property
    def is_open(self) -> bool:
        """True until it is settled or withdrawn."""
        return bool(self._token)

    def settle(self, value: object = None, error: BaseException | None = None) -> bool:
        """Set the outcome and wake the one who waits.

        Returns:
            False if nobody will take the outcome: the ticket was withdrawn, or its event loop is closed.
        """
        if not self._token:
            return False
        self.value, self.error = value, error
        if not self.withdraw():
            self.value = self.error = None
            return False
        return self._wake is None or self._wake()

    def withdraw(self) -> bool:
        """Take the ticket back.  Returns False if it has been settled: then its value is here, and has to be used."""
        try:
            self._token.pop()
        except IndexError:
            return False
        return True

    def result(self) -> Any:
        """Return the value, or raise the error, of a settled ticket."""
        if self.error is not None:
            raise self.error
        return self.value


class BlockingWaits:
    """Waits by blocking the thread; Ctrl-C in the main thread ends the wait."""

    async def readable(self, channel: socket.socket) -> None:
        _block_until(channel, selectors.EVENT_READ)

    async def writable(self, channel: socket.socket) -> None:
        _block_until(channel, selectors.EVENT_WRITE)

    def prepare(self, ticket: Ticket) -> None:
        ticket.waiting = event = threading.Event()

        def wake() -> bool:
            event.set()
            return True

        ticket.wake_with(wake)

    async def settled(self, ticket: Ticket) -> None:
        ticket.waiting.wait()


def _block_until(channel: socket.socket, event: int) -> None:
    with selectors.PollSelector() as selector:
        selector.register(channel, event)
        selector.select()


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
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        return "asyncio"
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return "trio"
    return None
