"""How a call waits in a task on trio; see `_asyncio_waits`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio
from anyio import wait_readable, wait_writable

from ._waiting import Ticket

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine
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

    async def open_tasks(self) -> TrioTasks:
        tasks = TrioTasks()
        await tasks.open()
        return tasks

    def shielded(self) -> AbstractContextManager[object]:
        return trio.CancelScope(shield=True)

    def rest(self) -> None:
        """Nothing is kept."""


class TrioTasks:
    """A nursery."""

    async def open(self) -> None:
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()

    def start(self, function: Callable[..., Coroutine[Any, Any, object]], *args: object) -> None:
        self._nursery.start_soon(function, *args)

    async def stop(self) -> None:
        self._nursery.cancel_scope.cancel()
        await self._manager.__aexit__(None, None, None)


def _wake(ticket: Ticket) -> bool:
    event, token = ticket.waiting
    try:
        token.run_sync_soon(event.set)
    except trio.RunFinishedError:
        return False
    return True
