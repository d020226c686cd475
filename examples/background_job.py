"""Background jobs without a web server: states, progress, a result, a cancellation.

`python examples/background_job.py`; the same over HTTP is in fastapi_app.py.
"""

from __future__ import annotations

import asyncio

import work

from cpupool import CpuPool
from cpupool.jobs import JobCancelled, Jobs


async def main() -> None:
    async with CpuPool(2) as pool:
        jobs = Jobs(pool, max_jobs=100, ttl=600)
        job = jobs.submit(work.count_primes, 200_000)
        endless = jobs.submit(work.count_primes, 1_000_000_000)
        print(f"submitted: {job.state}")

        async for each in jobs.events(job):  # also what a web page would be sent
            progress = "" if each.progress is None else f"{each.progress:4.0%}"
            print(f"  {each.state} {progress}")
        print(f"{job.result:,} primes, in {(job.ended_at or job.created_at) - job.created_at}")

        jobs.cancel(endless)
        try:
            await jobs.wait(endless)
        except JobCancelled:
            print(f"the other one: {endless.state}")


if __name__ == "__main__":
    asyncio.run(main())
