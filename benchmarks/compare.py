"""Compare cpupool with other systems: the same work for each, in one run, in turns.

In each round each system is opened in a process of its own, measured, and closed; the order changes from round to
round.  The figures are medians over the rounds, and so are the ratios, of each round's figures.

Usage: python benchmarks/compare.py [--quick] [--only NAME ...] [--rounds N] [--write FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chores import double

# What is large is imported where it is needed: workers import this module.
if TYPE_CHECKING:
    from measures import Figures, Measurement

LOOPS = ("asyncio", "uvloop", "trio")
LONGEST = 150  # seconds that a system may take for all its measurements in a round
LEAVING = 5  # seconds that it may take to close


# --- one system, in a process of its own ---


async def measure(name: str, loop: str, chosen: list[Measurement]) -> None:
    """Print the figures of a system, a line of JSON after each measurement."""
    import anyio
    import measures
    import peers

    began = time.perf_counter()
    async with peers.of_loop(loop)[name](measures.WORKERS) as system:
        await system.call(double, 1)
        print(json.dumps({"first_result": (time.perf_counter() - began) * 1e3}), flush=True)
        if not system.costs_a_pool:  # warm
            for number in range(200):
                await system.call(double, number)
        for measurement in chosen:
            if system.measured is not None and measurement.__name__ not in system.measured:
                continue
            try:
                with anyio.fail_after(measures.PATIENCE):
                    found = await measurement(system)
            except Exception as error:
                found = {f"error in {measurement.__name__}": None}
                print(f"{name}: {measurement.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
            print(json.dumps(found), flush=True)
        if hasattr(signal, "alarm"):
            signal.alarm(LEAVING)  # some never end any more after a crash


def run_one(name: str, loop: str, which: str) -> None:
    import anyio
    import measures

    chosen: dict[str, list[Measurement]] = {
        "quick": [measures.round_trip, measures.gathered, measures.tasks],
        "rounds": measures.IN_ROUNDS,
        "once": measures.ONCE,
        "trip": [measures.round_trip],
    }
    backend = "trio" if loop == "trio" else "asyncio"
    options = {"use_uvloop": True} if loop == "uvloop" else {}
    anyio.run(partial(measure, name, loop, chosen[which]), backend=backend, backend_options=options)


def ask_one(name: str, loop: str, which: str) -> Figures:
    """Measure a system in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--loop", loop, "--which", which]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            print(f"{name}: has not ended in {LONGEST} s", file=sys.stderr)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has left behind
        output, _ = process.communicate()
    found: Figures = {}
    for line in output.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


# --- all of them ---


def compare(rounds: int, only: list[str], which: str) -> dict[str, dict[str, list[Figures]]]:
    """Return the figures of each round, by loop and system."""
    import peers

    found: dict[str, dict[str, list[Figures]]] = {}
    for loop in LOOPS[:1] if which == "quick" else LOOPS:
        names = [name for name in peers.of_loop(loop) if not only or name in only]
        found[loop] = {name: [] for name in names}
        for number in range(rounds):
            start = number * 5 % max(len(names), 1)
            for name in names[start:] + names[:start]:
                print(f"round {number + 1}, {loop}, {name}", file=sys.stderr)
                found[loop][name].append(ask_one(name, loop, which if loop == "asyncio" else "trip"))
    if which == "rounds":
        for name in found["asyncio"]:
            print(f"once, {name}", file=sys.stderr)
            found["asyncio"][name][0] |= ask_one(name, "asyncio", "once")
    return found


def median_of(rounds: list[Figures], figure: str) -> float | None:
    values = [each[figure] for each in rounds if each.get(figure) is not None]
    return statistics.median(value for value in values if value is not None) if values else None


def ratio_of(ours: list[Figures], theirs: list[Figures], figure: str) -> tuple[float, float, float] | None:
    """Return the median ratio of their rounds to ours, the smallest and the largest."""
    pairs = [(our.get(figure), their.get(figure)) for our, their in zip(ours, theirs, strict=True)]
    ratios = [their / our for our, their in pairs if our and their is not None]
    return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def write_tables(found: dict[str, dict[str, list[Figures]]]) -> str:
    from measures import FIGURES
    from peers import OURS

    lines: list[str] = []
    for loop, systems in found.items():
        for figure, about in FIGURES.items():
            rows = []
            for name, rounds in systems.items():
                if not any(figure in each for each in rounds):
                    continue
                ratio = ratio_of(systems.get(OURS, []), rounds, figure) if OURS in systems else None
                rows.append((median_of(rounds, figure), name, ratio))
            if len(rows) < 2:
                continue
            rows.sort(key=lambda row: (row[0] is None, (row[0] or 0) * (-1 if about.more_is_better else 1)))
            where = "" if loop == "asyncio" else f" ({loop})"
            lines += ["", f"### {about.title[0].upper()}{about.title[1:]}{where}", ""]
            lines += [f"| | {about.unit} | beside cpupool |", "|---|---:|---:|"]
            for value, name, ratio in rows:
                shown = "never" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
                beside = "" if ratio is None or name == OURS else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"
                lines.append(f"| {name} | {shown} | {beside} |")
    return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    names = ("cpupool", "aiomultiprocess", "anyio", "deadpool-executor", "joblib", "loky", "mpire", "pebble")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpus": os.cpu_count(),
        "versions": {name: version(name) for name in (*names, "trio", "trio-parallel", "uvloop")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="what matters most, in under two minutes")
    parser.add_argument("--only", nargs="*", default=[], help="these systems")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write all figures there, tables and plots")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--loop", default="asyncio", help=argparse.SUPPRESS)
    parser.add_argument("--which", default="rounds", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one, options.loop, options.which)
        return
    import measures

    found = compare(options.rounds or (2 if options.quick else 3), options.only, "quick" if options.quick else "rounds")
    machine = describe_machine()
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    about = f"{machine['system']}, {machine['cpus']} CPUs, CPython {machine['python']}, {measures.WORKERS} workers"
    tables = f"{about}; {versions}.\n{write_tables(found)}\n"
    print(tables)
    if options.write is not None:
        import plots

        options.write.mkdir(exist_ok=True)
        (options.write / "figures.json").write_text(json.dumps({"machine": machine, "figures": found}, indent=1) + "\n")
        (options.write / "tables.md").write_text(tables)
        plots.draw_all(found["asyncio"], options.write)


if __name__ == "__main__":
    main()
