"""Fixtures that pytest finds by itself where this package is installed.

It is imported in every run of pytest there: nothing but pytest is loaded before a fixture is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from . import CpuPool
    from .testing import InlinePool


@pytest.fixture
def inline_pool() -> Iterator[InlinePool]:
    """A pool without workers: its calls run at once, in this process; see `cpupool.testing.InlinePool`."""
    from .testing import InlinePool

    pool = InlinePool(name="inline_pool")
    pool._inline.begin()
    yield pool
    pool.close(0)


@pytest.fixture(scope="session")
def _shared_pools() -> Iterator[list[CpuPool]]:
    pools: list[CpuPool] = []
    yield pools
    for pool in pools:
        pool.close(0)


@pytest.fixture
def cpu_pool(_shared_pools: list[CpuPool]) -> CpuPool:
    """A pool with two workers, the same for all tests: workers are not started for each of them.

    If a test closes it, as an application's lifespan does, the next one gets another.
    """
    from . import CpuPool

    if not _shared_pools or _shared_pools[-1].is_closed:
        _shared_pools.append(CpuPool(2, name="cpu_pool"))
        _shared_pools[-1]._start()
    return _shared_pools[-1]


@pytest.fixture
def no_worker_left(_shared_pools: list[CpuPool]) -> Iterator[None]:
    """Fail a test that leaves a pool open that it has made: `@pytest.mark.usefixtures("no_worker_left")`."""
    from . import _pool
    from .testing import InlinePool

    before = _pool.list_pools()
    _pool.take_abandoned()
    yield
    left = [
        pool
        for pool in _pool.list_pools()
        if _pool.is_running(pool) and pool not in (*before, *_shared_pools) and not isinstance(pool, InlinePool)
    ]
    names = [pool.settings.name for pool in left] + _pool.take_abandoned()
    for pool in left:
        pool.close(0)
    if names:
        pytest.fail(f"the test has left pools open: {', '.join(names)}; use them in a 'with' block")
