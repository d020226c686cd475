"""A pool for any ASGI application: it is started before the application, and drained after it.

    app = PoolLifespan(app, pool)

It works with whatever speaks ASGI, on any server, on asyncio and trio, and needs nothing but this package.  For
Starlette and FastAPI, `cpupool.starlette` and `cpupool.fastapi` do more.

A server that is told to stop, by SIGTERM or Ctrl-C, first waits for the requests that it has, however long they take;
only then does it tell the application.  So that it comes to that, the pool learns of the signal at once
(`closing_on_signals`): a request whose work is not done `drain` seconds later gets `PoolClosed`.

Theory of operation: the server tells an application to start and to shut down by messages (the lifespan protocol).
They are passed on, each a little later: the start when the workers are ready, the end of the shutdown when they are
gone.  An application that does not know the protocol leaves before it has read the first message, by an exception or in
silence; then it is answered for.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, MutableMapping
    from types import FrameType
    from typing import TypeAlias

    from . import CpuPool

    Message: TypeAlias = MutableMapping[str, Any]
    Receive: TypeAlias = Callable[[], Awaitable[Message]]
    Send: TypeAlias = Callable[[Message], Awaitable[None]]
    Application: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

__all__ = ["PoolLifespan", "closing_on_signals"]

_logger = logging.getLogger("cpupool")


@contextlib.contextmanager
def closing_on_signals(pool: CpuPool) -> Iterator[None]:
    """Let a signal that tells the server to stop reach the pool too.

    Within the block, SIGTERM and SIGINT do what they did before, and `pool.close_soon()` besides.  That is done where a
    server handles them, in its main thread; elsewhere, and for signals that nobody handles, it does nothing.  A handler
    that does not end the program is left with a closed pool.  In a lifespan of one's own, the pool is entered within:
    `with closing_on_signals(pool): async with pool: ...`.
    """
    changed: dict[int, Any] = {}
    number: int

    def close_soon(number: int, frame: FrameType | None) -> None:
        pool.close_soon()
        before = changed[number]
        if callable(before):
            before(number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if callable(before) and before is not signal.default_int_handler:
                changed[number] = before
                signal.signal(number, close_soon)
    try:
        yield
    finally:
        for number, before in changed.items():
            if signal.getsignal(number) is close_soon:
                signal.signal(number, before)


class PoolLifespan:
    """An ASGI application around another one, with a pool that lives as long as it is served.

    The pool stands in the `state` of each request's scope (`scope["state"]["pool"]`; Starlette's `request.state.pool`),
    and in that of the lifespan, where the application finds it when it starts.

    Args:
        app: the application; one without support for the lifespan protocol too.
        pool: the pool; nothing is started before the server starts.
        state_key: its name in the state.

    What the pool's start raises (`InitializerFailed`, `PoolBroken`) makes the server's start fail, with its traceback.
    """

    def __init__(self, app: Application, pool: CpuPool, state_key: str = "pool") -> None:
        self.app = app
        self.pool = pool
        self.state_key = state_key

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a request or a websocket, or live the application's life."""
        scope.setdefault("state", {})[self.state_key] = self.pool
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _live(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        startup = await receive()
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(closing_on_signals(self.pool))
            try:
                await stack.enter_async_context(self.pool)
            except Exception:
                await send({"type": "lifespan.startup.failed", "message": traceback.format_exc()})
                raise
            between = _Between(startup, receive, send, self.pool)
            try:
                await self.app(scope, between.receive, between.send)
            except Exception as error:
                if between.has_started:
                    raise
                if between.has_asked:
                    await send({"type": "lifespan.startup.failed", "message": traceback.format_exc()})
                    raise
                _logger.info("the application seems to have no lifespan: %s: %s", type(error).__name__, error)
            await between.finish()


class _Between:
    """Stands between server and application while it lives.

    Attributes:
        has_asked: True if the application has taken the message that it is to start.
        has_started: True if it has answered that it has started, or failed to.
    """

    def __init__(self, startup: Message, receive: Receive, send: Send, pool: CpuPool) -> None:
        self.has_asked = False
        self.has_started = False
        self._startup = startup
        self._is_shutting_down = False
        self._has_ended = False
        self._receive = receive
        self._send = send
        self._pool = pool

    async def receive(self) -> Message:
        """Give the application the server's next message."""
        if not self.has_asked:
            self.has_asked = True
            return self._startup
        message = await self._receive()
        self._is_shutting_down = True
        return message

    async def send(self, message: Message) -> None:
        """Give the server what the application answers; its last answer, when the pool has closed."""
        self.has_started = True
        if message["type"] != "lifespan.startup.complete":
            await self._pool.aclose()
            self._has_ended = True
        await self._send(message)

    async def finish(self) -> None:
        """Answer what the application has left unanswered."""
        if self._has_ended:
            return
        if not self.has_started:
            await self.send({"type": "lifespan.startup.complete"})
        if not self._is_shutting_down:
            await self._receive()
        await self.send({"type": "lifespan.shutdown.complete"})
