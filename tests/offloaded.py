"""Functions and methods that are offloaded; workers import them by their names."""

from __future__ import annotations

import os
from typing import Any

import cpupool

pool: cpupool.CpuPool | None = None


def get_pool() -> cpupool.CpuPool:
    assert pool is not None
    return pool


@cpupool.offload(get_pool)
def where(one: int, *, two: str = "") -> tuple[int, int, str]:
    """Say where it runs."""
    return os.getpid(), one, two


@cpupool.offload(get_pool)
def nested(one: int) -> Any:
    return where(one, two="nested")


class Scale:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    @cpupool.offload(get_pool)
    def apply(self, number: int) -> int:
        return self.factor * number

    @classmethod
    @cpupool.offload(get_pool)
    def make(cls, factor: int) -> tuple[int, str]:
        return cls(factor).factor, cls.__name__

    @cpupool.offload(get_pool)
    def __multiply(self, number: int) -> int:
        return self.factor * number

    async def apply_privately(self, number: int) -> int:
        return await self.__multiply(number)

    @cpupool.offload(get_pool)
    def die(self) -> None:
        os._exit(1)

    @staticmethod
    @cpupool.offload(get_pool)
    def parse(text: str) -> int:
        return int(text)


@cpupool.offload(get_pool, timeout=0.1, label="a spin")
def spin() -> None:
    while True:
        pass


@cpupool.offload(get_pool)
def die() -> None:
    os._exit(1)
