"""How a call waits in a task: on asyncio (any loop, uvloop too) and on trio.

Apart from `_waiting`, so that what never awaits, and above all a worker that imports the user's modules, does not load
anyio.  Other threads wake a task by its own loop's thread-safe call, which never blocks them.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import anyio

from ._waiting import Ticket

if TYPE_CHECKING:
    import socket


class AsyncWaits:
    """Waits by suspending the task; cancelling the task ends the wait."""

    async def readable(self, channel: socket.socket) -> None:
        loop = asyncio._get_running_loop()
        if loop is None:
            await anyio.wait_readable(channel)
            return
        # As anyio does it, less its table of who else waits: only the owner of a channel ever does.  That is worth a
        # seventh of the round trip (benchmarks/round_trip.py).
        future = loop.create_future()
        fd = channel.fileno()
        loop.add_reader(fd, _resolve, future)
        try:
            await future
        finally:
            loop.remove_reader(fd)

    async def writable(self, channel: socket.socket) -> None:
        await anyio.wait_writable(channel)

    def ticket(self) -> Ticket:
        loop = asyncio._get_running_loop()
        if loop is not None:
            return Ticket(loop.create_future(), _wake_on_asyncio)
        import trio

        return Ticket((trio.Event(), trio.lowlevel.current_trio_token()), _wake_on_trio)

    async def settled(self, ticket: Ticket) -> None:
        if isinstance(ticket.waiting, tuple):
            event, _ = ticket.waiting
            await event.wait()
        else:
            await ticket.waiting


def _wake_on_asyncio(ticket: Ticket) -> bool:
    future = ticket.waiting
    if threading.get_ident() == ticket.thread:
        _resolve(future)
        return True
    try:
        future.get_loop().call_soon_threadsafe(_resolve, future)
    except RuntimeError:  # the loop is closed
        return False
    return True


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():  # it may have been cancelled
        future.set_result(None)


def _wake_on_trio(ticket: Ticket) -> bool:
    import trio

    event, token = ticket.waiting
    try:
        token.run_sync_soon(event.set)
    except trio.RunFinishedError:
        return False
    return True
