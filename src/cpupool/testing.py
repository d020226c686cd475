"""For tests of applications that use a pool.

`InlinePool` runs calls at once, in the test's own process.  `CPUPOOL_MODE=inline` in the environment makes one of every
`CpuPool`.  With pytest, three fixtures come with this package: `inline_pool`; `cpu_pool` for the real thing; and
`no_worker_left`, which fails a test that leaves a pool open.
"""

from __future__ import annotations

from ._inline import InlinePool

__all__ = ["InlinePool"]
