"""For the type checker: a call keeps the signature of its function.  `make type` checks it; nothing runs it."""

from __future__ import annotations

from typing import assert_type

import cpupool


def work(number: int, *, text: str = "") -> bytes:
    return text.encode() * number


@cpupool.offload(timeout=1)
def offloaded(number: int, *, text: str = "") -> bytes:
    return work(number, text=text)


async def right(pool: cpupool.CpuPool) -> None:
    assert_type(await pool.run(work, 1), bytes)
    assert_type(await pool.run(work, 1, text="a"), bytes)
    assert_type(await cpupool.run(work, number=1), bytes)
    assert_type(await pool.run(len, "abc"), int)
    assert_type(pool.run_sync(work, 1, text="a"), bytes)
    assert_type(cpupool.run_sync(work, 1), bytes)
    assert_type(await pool.map(work, [1, 2]), list[bytes])
    assert_type(await pool.options(timeout=1).map(work, [1, 2], return_exceptions=True), list[bytes | Exception])
    async with pool.stream(work, [1, 2]) as results:
        assert_type(results, cpupool.Stream[bytes])
        async for result in results:
            assert_type(result, bytes)
    async with pool.stream(work, [1], return_exceptions=True) as outcomes:
        assert_type(await anext(outcomes), bytes | Exception)
    assert_type(await offloaded(1, text="a"), bytes)
    assert_type(cpupool.split_evenly("abc", 2), list[str])
    assert_type(list(cpupool.chunked({1}, 2)), list[list[int]])
    async with pool as entered:
        assert_type(entered, cpupool.CpuPool)
    with pool as entered_in_a_thread:
        assert_type(entered_in_a_thread, cpupool.CpuPool)


async def wrong(pool: cpupool.CpuPool) -> None:
    """Each ignore is an error if its line is none: mypy warns of unused ones."""
    await pool.run(work)  # type: ignore[call-arg]
    await pool.run(work, "one")  # type: ignore[arg-type]
    await pool.run(work, 1, text=2)  # type: ignore[arg-type]
    await pool.run(work, 1, colour="red")  # type: ignore[call-arg]
    await cpupool.run(work, 1, 2)  # type: ignore[call-arg, arg-type]
    pool.run_sync(work, 1, text=2)  # type: ignore[arg-type]
    cpupool.run_sync(work)  # type: ignore[call-arg]
    await offloaded("one")  # type: ignore[arg-type]
    await pool.map(1, [])  # type: ignore[call-overload]
    await pool.map(work, 1)  # type: ignore[call-overload]
    pool.run(1)  # type: ignore[arg-type, unused-coroutine]
    cpupool.CpuPool(2, "spawn")  # type: ignore[call-arg]
