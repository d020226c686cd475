"""How a call waits in a task: on asyncio (any loop, uvloop too) and on trio.

Apart from `_waiting`, so that what never awaits, and above all a worker that imports the user's modules, does not load
anyio.  Other threads wake a task by its own loop's thread-safe call, which never blocks them.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

if TYPE_CHECKING:
    import socket

    from ._waiting import Ticket

__all__ = ["AsyncWaits", "anyio", "checkpoint"]


class AsyncWaits:
    """Waits by suspending the task; cancelling the task ends the wait."""

    async def readable(self, channel: socket.socket) -> None:
        await anyio.wait_readable(channel)

    async def writable(self, channel: socket.socket) -> None:
        await anyio.wait_writable(channel)

    def prepare(self, ticket: Ticket) -> None:
        loop = asyncio._get_running_loop()
        if loop is None:
            _prepare_on_trio(ticket)
        else:
            _prepare_on_asyncio(ticket, loop)

    async def settled(self, ticket: Ticket) -> None:
        await ticket.waiting.wait()


def _prepare_on_asyncio(ticket: Ticket, loop: asyncio.AbstractEventLoop) -> None:
    thread = threading.get_ident()
    ticket.waiting = event = asyncio.Event()

    def wake() -> bool:
        if threading.get_ident() == thread:
            event.set()
            return True
        try:
            loop.call_soon_threadsafe(event.set)
        except RuntimeError:  # the loop is closed
            return False
        return True

    ticket.wake_with(wake)


def _prepare_on_trio(ticket: Ticket) -> None:
    import trio

    token = trio.lowlevel.current_trio_token()
    ticket.waiting = event = trio.Event()

    def wake() -> bool:
        try:
            token.run_sync_soon(event.set)
        except trio.RunFinishedError:
            return False
        return True

    ticket.wake_with(wake)
