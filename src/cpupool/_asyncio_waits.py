"""How a call waits in a task on asyncio, whatever the event loop's implementation.

Apart from `_waiting`, so that what never awaits, and above all a worker that imports the user's modules, does not load
asyncio.  Other threads wake a task by its loop's own thread-safe call, which never blocks them.
"""

from __future__ import annotations

import asyncio
import contextvars
import select
import sys
import weakref
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from ._forking import at_fork
from ._waiting import Ticket

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Coroutine
    from contextlib import AbstractContextManager

_ONCE = select.EPOLLIN | select.EPOLLONESHOT if hasattr(select, "epoll") else 0


class AsyncioWaits:
    """Waits by suspending the task; cancelling the task ends the wait."""

    async def readable(self, channel: socket.socket, timeout: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        lookout = _find_lookout(loop) or _open_lookout(loop)
        future = loop.create_future()
        fd = channel.fileno()
        timer = None
        try:
            if lookout is None:
                loop.add_reader(fd, _resolve, future)
            else:
                lookout.watch(fd, future)
            if timeout is not None:
                timer = loop.call_later(timeout, _resolve, future)
            await future
        finally:
            if lookout is None:
                loop.remove_reader(fd)
            else:
                lookout.forget(fd, future)
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
        return _LoopTicket(asyncio.get_running_loop().create_future(), _wake)

    def settled(self, ticket: Ticket) -> Awaitable[object]:
        future: asyncio.Future[None] = ticket.waiting
        return future

    async def open_tasks(self) -> AsyncioTasks:
        return AsyncioTasks()

    def shielded(self) -> AbstractContextManager[object]:
        anyio = sys.modules.get("anyio")  # without it there are no scopes
        return nullcontext() if anyio is None else anyio.CancelScope(shield=True)

    def rest(self) -> None:
        loop = asyncio.get_running_loop()
        lookout = _find_lookout(loop)
        if lookout is not None and lookout.is_idle:
            del _lookouts[loop]
            lookout.close(loop)


class _LoopTicket(Ticket):
    """A ticket of a task, which waits for a future.

    Once it follows a channel, it knows that future only weakly: the loop holds it, and when that is closed and gone, so
    is the task, which gives its call up.
    """

    __slots__ = ("_fd",)

    @property
    def is_here(self) -> bool:
        future = self.waiting
        return future.get_loop() is asyncio._get_running_loop() and not future.done()  # done: cancelled, just now

    def withdraw(self) -> bool:
        is_withdrawn = super().withdraw()
        future = _future_of(self) if hasattr(self, "_fd") else None
        if future is not None and (lookout := _find_lookout(future.get_loop())) is not None:
            lookout.forget(self._fd, future)
        return is_withdrawn

    def follow(self, channel: socket.socket, take: Callable[[], bool]) -> None:
        future: asyncio.Future[None] = self.waiting
        loop = future.get_loop()
        lookout = _find_lookout(loop) or _open_lookout(loop)
        fd = channel.fileno()
        try:
            if lookout is not None:
                lookout.watch(fd, future, take)
        except OSError:
            lookout = None
        if lookout is None:  # it cannot be watched: whoever waits will see that
            self.settle()
            return
        self._fd = fd
        self.waiting = weakref.ref(future)


class _Lookout:
    """Watches the channels of workers for an event loop.

    To register a channel with the loop for each wait, and to take it out again, costs a tenth of a trivial call (5 of
    50 microseconds on one CPU).  So the loop watches an epoll object, and that watches the channels: one system call
    arms it for one event.  A channel that is closed leaves it by itself, so whoever closes one need not know.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._epoll = select.epoll()
        self._waiting: dict[int, tuple[asyncio.Future[None], Callable[[], bool] | None]] = {}
        self._is_inherited = False
        # In a context of its own: that of the call which comes first would live as long as the loop.
        contextvars.Context().run(loop.add_reader, self._epoll.fileno(), self._tell)

    @property
    def is_idle(self) -> bool:
        """True if nobody waits."""
        return not self._waiting

    def watch(self, fd: int, future: asyncio.Future[None], take: Callable[[], bool] | None = None) -> None:
        """Resolve the future as soon as this can be read, and `take()` says that all is read, or somewhat earlier.

        Who gives up waiting for that calls `forget`.
        """
        self._waiting[fd] = future, take
        try:
            try:
                self._epoll.modify(fd, _ONCE)
            except FileNotFoundError:
                self._epoll.register(fd, _ONCE)
        except OSError:
            self.forget(fd, future)
            raise

    def forget(self, fd: int, future: asyncio.Future[None]) -> None:
        """Note that nobody waits for it any more.  If it is still armed, its event will mean nothing."""
        entry = self._waiting.get(fd)
        if entry is not None and entry[0] is future:
            self._waiting.pop(fd, None)

    def _tell(self) -> None:
        if self._is_inherited:
            return
        future = None
        try:
            for fd, _ in self._epoll.poll(0):
                entry = self._waiting.get(fd)
                if entry is None:
                    continue
                future, take = entry
                if take is not None and not future.done() and not take():
                    with suppress(OSError):  # it is closed: whoever did that has told its owner
                        self._epoll.modify(fd, _ONCE)
                    continue
                _resolve(future)
                if self._waiting.get(fd) is entry:  # else somebody waits for it anew
                    del self._waiting[fd]
        except BaseException:  # a signal handler's: the events are gone, so let everybody see for himself
            for each in (future, *(waiting for waiting, _ in self._waiting.values())):
                if each is not None:
                    _resolve(each)
            self._waiting.clear()
            raise

    def inherit(self) -> None:
        """Leave the events to the parent of this forked process: what the kernel holds is the same for both."""
        self._is_inherited = True

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch nothing any more."""
        loop.remove_reader(self._epoll.fileno())
        self._epoll.close()


# The loop owns its lookout, and with it the tasks that wait: when it is closed they are gone.
_lookouts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_Lookout]] = weakref.WeakKeyDictionary()


def _find_lookout(loop: asyncio.AbstractEventLoop) -> _Lookout | None:
    found = _lookouts.get(loop)
    return None if found is None else found()


def _open_lookout(loop: asyncio.AbstractEventLoop) -> _Lookout | None:
    """Open one for the loop; None where there is no epoll, or no descriptor is left."""
    try:
        lookout = _Lookout(loop)
    except (AttributeError, OSError):
        return None
    _lookouts[loop] = weakref.ref(lookout)
    return lookout


def _begin_anew() -> None:
    for found in _lookouts.values():
        if (lookout := found()) is not None:
            lookout.inherit()
    _lookouts.clear()


at_fork(after_in_child=_begin_anew)


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


def _future_of(ticket: Ticket) -> asyncio.Future[None] | None:
    """Return what its task waits for; None if that has gone."""
    waiting = ticket.waiting
    future: asyncio.Future[None] | None = waiting() if isinstance(waiting, weakref.ref) else waiting
    return future


def _wake(ticket: Ticket) -> bool:
    future = _future_of(ticket)
    if future is None:
        return False
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
