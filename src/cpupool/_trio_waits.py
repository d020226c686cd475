"""How a call waits in a task on trio; see `_asyncio_waits`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from anyio import wait_readable, wait_writable

from ._waiting import Ticket

if TYPE_CHECKING:
    import socket
    from contextlib import AbstractContextManager


class TrioWaits:
    """Waits by suspending the task; cancelling a scope around it ends the wait."""

    async def readable(self, channel: socket.socket, timeout: float | None = None) -> None:
        if timeout is None:
            await wait_readable(channel)
        else:
            with trio.move_on_after(timeout):
                await wait_readable(channel)

    async def writable(self, channel: socket.socket) -> None:
        await wait_writable(channel)

    def ticket(self) -> Ticket:
        return Ticket((trio.Event(), trio.lowlevel.current_trio_token()), _wake)

    async def settled(self, ticket: Ticket) -> None:
        event, _ = ticket.waiting
        await event.wait()

    def shielded(self) -> AbstractContextManager[object]:
        return trio.CancelScope(shield=True)


def _wake(ticket: Ticket) -> bool:
    event, token = ticket.waiting
    try:
        token.run_sync_soon(event.set)
    except trio.RunFinishedError:
        return False
    return True
