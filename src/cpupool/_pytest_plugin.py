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
    yield pool
    pool.close(0)


@pytest.fixture(scope="session")
def cpu_pool() -> Iterator[CpuPool]:
    """A pool with two workers, the same for all tests: workers are not started for each of them."""
    from . import CpuPool

    pool = CpuPool(2, name="cpu_pool")
    yield pool
    pool.close(0)


@pytest.fixture
def no_worker_left() -> Iterator[None]:
    """Fail a test that leaves a pool open that it has started: `@pytest.mark.usefixtures("no_worker_left")`."""
    from .testing import list_running_pools

    before = list_running_pools()
    yield
    left = [pool for pool in list_running_pools() if pool not in before and pool.settings.name != "cpu_pool"]
    if left:
        names = ", ".join(map(repr, left))
        for pool in left:
            pool.close(0)
        pytest.fail(f"pools that the test has started and not closed: {names}; use them in a 'with' block")
