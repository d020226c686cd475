"""How a call waits in a task on asyncio, whatever the event loop's implementation.

Apart from `_waiting`, so that what never awaits, and above all a worker that imports the user's modules, does not load
asyncio.  Other threads wake a task by its loop's own thread-safe call, which never blocks them.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ._waiting import Ticket

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Coroutine
    from contextlib import AbstractContextManager


class AsyncioWaits:
    """Waits by suspending the task; cancelling the task ends the wait."""

    async def readable(self, channel: socket.socket, timeout: float | None = None) -> None:
        # What anyio.wait_readable does, less its table of who else waits: only the owner of a channel ever does.  It is
        # worth a seventh of the calls per second (benchmarks/round_trip.py), and spares the first call a large import.
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        fd = channel.fileno()
        loop.add_reader(fd, _resolve, future)
        timer = None if timeout is None else loop.call_later(timeout, _resolve, future)
        try:
            await future
        finally:
            loop.remove_reader(fd)
            if timer is not None:
                timer.cancel()

    async def writable(self, channel: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        fd = channel.fileno()
        loop.add_writer(fd, _resolve, future)
        try:
            await future
        finally:
            loop.remove_writer(fd)

    def ticket(self) -> Ticket:
        return Ticket(asyncio.get_running_loop().create_future(), _wake)

    def settled(self, ticket: Ticket) -> Awaitable[object]:
        future: asyncio.Future[None] = ticket.waiting
        return future

    async def open_tasks(self) -> AsyncioTasks:
        return AsyncioTasks()

    def shielded(self) -> AbstractContextManager[object]:
        anyio = sys.modules.get("anyio")  # without it there are no scopes
        return nullcontext() if anyio is None else anyio.CancelScope(shield=True)


class AsyncioTasks:
    """Tasks of the running loop.

    No task group: that belongs to the task that has opened it, and asyncio closes a generator that was left early, with
    all blocks in it, in another one.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def start(self, function: Callable[..., Coroutine[Any, Any, object]], *args: object) -> None:
        task = asyncio.get_running_loop().create_task(function(*args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        cancelled = None
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            try:
                await asyncio.wait(self._tasks)
            except asyncio.CancelledError as error:
                cancelled = error  # they are as good as gone: it can wait that long
        if cancelled is not None:
            raise cancelled


def _wake(ticket: Ticket) -> bool:
    future = ticket.waiting
    loop = future.get_loop()
    if loop is asyncio._get_running_loop():
        _resolve(future)
        return True
    try:
        loop.call_soon_threadsafe(_resolve, future)
    except RuntimeError:  # the loop is closed
        return False
    return True


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():  # it may have been cancelled
        future.set_result(None)
