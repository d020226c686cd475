"""`cpupool.asgi`: a pool around any ASGI application, driven by the protocol itself."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

import items
import tasks
from conftest import is_gone
from cpupool import CpuPool, InitializerFailed
from cpupool.asgi import PoolLifespan

pytestmark = pytest.mark.anyio

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Life:
    """Leads an application through its life, as a server does.

    Attributes:
        answers: what the application has sent, without "lifespan.".
        state: the scope's.
    """

    def __init__(self, app: PoolLifespan, *, has_state: bool = True) -> None:
        self._app = app
        self.answers: list[str] = []
        self.state: dict[str, Any] = {}
        self._scope: Message = {"type": "lifespan", **({"state": self.state} if has_state else {})}
        self._answered = anyio.Event()
        self.text = ""

    @asynccontextmanager
    async def lead(self) -> AsyncIterator[Life]:
        """Start the application, and shut it down at the end of the block."""
        questions, receiver = anyio.create_memory_object_stream[Message](2)
        with questions, receiver:
            async with anyio.create_task_group() as group:
                group.start_soon(self._app, self._scope, receiver.receive, self._take)
                questions.send_nowait({"type": "lifespan.startup"})
                await self._answered.wait()
                yield self
                questions.send_nowait({"type": "lifespan.shutdown"})

    async def _take(self, message: Message) -> None:
        self.answers.append(message["type"].removeprefix("lifespan."))
        self.text += message.get("message", "")
        self._answered.set()

    async def request(self, kind: str = "http") -> list[Message]:
        """Send a request; its scope has the lifespan's state, as servers do it."""
        answers: list[Message] = []

        async def receive() -> Message:
            raise AssertionError("it does not read")

        async def send(message: Message) -> None:
            answers.append(message)

        await self._app({"type": kind, "path": "/", "state": dict(self.state)}, receive, send)
        return answers


async def answer_with_pid(scope: Message, receive: Receive, send: Send) -> None:
    """Be an application that knows nothing of lifespans, and does not even look."""
    assert scope["type"] in ("http", "websocket"), "what is that?"
    await send({"pid": await scope["state"]["pool"].run(tasks.get_pid)})


async def test_the_pool_is_ready_before_the_application_starts_and_gone_before_the_server_hears_of_its_end() -> None:
    pids: list[int] = []
    seen: list[str] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        pool = scope["state"]["pool"]
        assert (await receive())["type"] == "lifespan.startup"
        assert "2 idle" in repr(pool)
        seen.append("started")
        scope["state"]["mine"] = await pool.run(tasks.get_pid)
        pids.append(scope["state"]["mine"])
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        seen.append(str(await pool.run(tasks.add, 1, 2)))  # it still works
        await send({"type": "lifespan.shutdown.complete"})
        assert is_gone(pids[0])

    pool = CpuPool(2)
    async with Life(PoolLifespan(app, pool)).lead() as life:
        assert life.state == {"pool": pool, "mine": pids[0]}
        assert life.answers == ["startup.complete"]
        assert not is_gone(pids[0])
    assert life.answers == ["startup.complete", "shutdown.complete"]
    assert seen == ["started", "3"]


async def leave_in_silence(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "lifespan":
        await answer_with_pid(scope, receive, send)


async def leave_after_the_start(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
    else:
        await answer_with_pid(scope, receive, send)


async def leave_before_the_last_answer(scope: Message, receive: Receive, send: Send) -> None:
    await leave_after_the_start(scope, receive, send)
    if scope["type"] == "lifespan":
        await receive()


@pytest.mark.parametrize(
    "app", [answer_with_pid, leave_in_silence, leave_after_the_start, leave_before_the_last_answer]
)
async def test_an_application_that_does_not_answer_is_answered_for(app: Any) -> None:
    async with Life(PoolLifespan(app, CpuPool(1), state_key="pool")).lead() as life:
        (answer,) = await life.request()
        assert await life.request("websocket") == [answer]
        assert not is_gone(answer["pid"])
        assert life.answers == ["startup.complete"]
    assert life.answers == ["startup.complete", "shutdown.complete"]
    assert is_gone(answer["pid"])


async def test_a_server_without_state_or_without_lifespan_serves_the_pool_too() -> None:
    pool = CpuPool(1)
    app = PoolLifespan(answer_with_pid, pool)
    async with Life(app, has_state=False).lead() as life:
        assert [set(each) for each in await life.request()] == [{"pid"}]
    async with pool:
        assert [set(each) for each in await Life(app).request()] == [{"pid"}]


async def test_an_application_may_live_several_times() -> None:
    app = PoolLifespan(answer_with_pid, CpuPool(1))
    pids = set()
    for _ in range(3):
        async with Life(app).lead() as life:
            pids.add((await life.request())[0]["pid"])
    assert len(pids) == 3
    assert all(map(is_gone, pids))


async def test_a_failing_initializer_fails_the_start_with_the_real_error() -> None:
    life = Life(PoolLifespan(answer_with_pid, CpuPool(1, initializer=items.fail, initargs=("no model",))))
    with pytest.raises(ExceptionGroup) as caught:
        async with life.lead():
            pass
    (error,) = caught.value.exceptions
    assert isinstance(error, InitializerFailed)
    assert life.answers == ["startup.failed"]
    assert "no model" in life.text
    assert "in fail" in life.text, "the traceback in the worker"


async def test_a_start_that_the_application_reports_as_failed_stops_the_pool() -> None:
    pids = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        pids.append(await scope["state"]["pool"].run(os.getpid))
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    async with Life(PoolLifespan(app, CpuPool(1))).lead() as life:
        assert (life.answers, life.text) == (["startup.failed"], "no database")
        assert is_gone(pids[0])


async def test_a_start_that_raises_is_no_want_of_a_lifespan() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        raise ZeroDivisionError("no database")

    life = Life(PoolLifespan(app, CpuPool(1)))
    with pytest.raises(ExceptionGroup) as caught:
        async with life.lead():
            pass
    assert [type(each) for each in caught.value.exceptions] == [ZeroDivisionError]
    assert life.answers == ["startup.failed"]
    assert "no database" in life.text


@pytest.mark.parametrize("is_shutting_down", [False, True])
async def test_an_application_that_fails_later_fails_with_its_own_error(is_shutting_down: bool) -> None:
    pids = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        pids.append(await scope["state"]["pool"].run(os.getpid))
        await send({"type": "lifespan.startup.complete"})
        if is_shutting_down:
            await receive()
        raise ZeroDivisionError

    life = Life(PoolLifespan(app, CpuPool(1)))

    async def lead() -> None:
        async with life.lead():
            if not is_shutting_down:
                await anyio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await lead()
    assert [type(each) for each in caught.value.exceptions] == [ZeroDivisionError]
    assert life.answers == ["startup.complete"]
    assert is_gone(pids[0])
