"""What the examples run in workers.

Such functions are best kept in a module of their own, which imports little: every worker imports it.
"""

from __future__ import annotations

from cpupool import report, split_text
from cpupool.domains import find_domains


def count_domains(text: str) -> dict[str, int]:
    """Count the domains in a text, piece by piece, and say how far it has come."""
    counts: dict[str, int] = {}
    done = 0
    for piece in split_text(text, 100_000):
        for domain in find_domains(piece):
            counts[domain] = counts.get(domain, 0) + 1
        done += len(piece)
        report({"done": done, "of": len(text)})
    return counts


def count_primes(below: int) -> int:
    """Count the primes below a number, and say how far it has come."""
    primes = 0
    for number in range(2, below):
        primes += all(number % divisor for divisor in range(2, int(number**0.5) + 1))
        if number % 1000 == 0:
            report(number / below)
    return primes


def burn(rounds: int) -> int:
    """Be busy: pure Python, nothing but CPU."""
    total = 0
    for number in range(rounds):
        total += number * number % 7
    return total
