"""A script: single calls, many items, a time limit, an error.  `python examples/script.py`."""

from __future__ import annotations

import asyncio
import hashlib

import work

import cpupool


async def main() -> None:
    # One call: the default pool starts by itself, and ends with the program.
    digest = await cpupool.run(hashlib.pbkdf2_hmac, "sha256", b"secret", b"salt", 100_000)
    print(f"one call: {digest.hex()[:16]}...")

    async with cpupool.CpuPool() as pool:  # a pool of one's own
        limits = [1_000, 2_000, 5_000, 10_000, 20_000]
        print(f"many items, on {pool.max_workers} workers: {await pool.map(work.count_primes, limits)} primes")

        async with pool.stream(work.count_primes, limits, ordered=False) as results:
            print(f"as they are done: {[primes async for primes in results]}")

        try:
            await pool.options(timeout=0.2).run(work.count_primes, 1_000_000_000)
        except cpupool.TaskTimeout as error:
            print(f"a time limit: {str(error).splitlines()[0]}")

        try:
            await pool.run(work.count_primes, "many")  # type: ignore[arg-type]
        except TypeError as error:
            print(f"an error of its own: {error}")


if __name__ == "__main__":
    asyncio.run(main())
