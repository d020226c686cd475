"""What a process uses, as the system counts it.

It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import mmap
import os


def read_resident(process: int | str) -> int | None:
    """Return how many bytes of memory a process holds ("self" is this one); None where that is not to be had."""
    try:
        with open(f"/proc/{process}/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError):
        return None


def read_cpu_seconds(process: int | str) -> float | None:
    """Return the CPU time that a process has used, in user and system mode; None where that is not to be had."""
    try:
        with open(f"/proc/{process}/stat", "rb", buffering=0) as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before may have blanks in it
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return None
