"""The command line: `python -m cpupool domains PATH...`, `doctor [PID]` and `stacks PID`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING

import anyio

from . import CpuPool, CpuPoolError, __version__, _doctor, domains, usable_cpus
from ._door import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OPEN = "has to be started with CPUPOOL_INSPECT=1, or to call cpupool.allow_inspection()"
EXIT_OK, EXIT_PARTIAL, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        usable_cpus()
    except ValueError as error:  # a wrong variable in the environment
        print(f"cpupool: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        status: int = options.command(options)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except CpuPoolError as error:
        print(f"cpupool: {error}", file=sys.stderr)
        return EXIT_PARTIAL
    except BrokenPipeError:  # the reader has what it wanted: `... | head`
        sys.stderr.close()
        return EXIT_OK
    except OSError as error:  # what is printed cannot be written
        print(f"cpupool: {error}", file=sys.stderr)
        return EXIT_PARTIAL
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cpupool", description="CPU-bound Python in worker processes.")
    parser.add_argument("--version", action="version", version=f"cpupool {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "domains",
        help="count the domain names in files, on all CPUs",
        description="Count the domain names in files and folders. Exit status 1 if anything could not be read.",
    )
    command.add_argument("paths", nargs="+", metavar="PATH", help="a file, or a folder to search through")
    command.add_argument("--top", type=_positive, default=None, metavar="N", help="print only the N most frequent")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.add_argument(
        "--workers", type=_positive, default=None, metavar="N", help="worker processes (default: all CPUs)"
    )
    command.add_argument("--no-progress", action="store_true", help="show no progress bar")
    command.set_defaults(command=_domains)

    command = commands.add_parser(
        "doctor",
        help="print what a pool would use here, and why; or how the pools of a running program are",
        description="Print what a pool would use here, and why; or how the pools of a running program are.",
    )
    command.add_argument("pid", nargs="?", type=_positive, metavar="PID", help=f"a program; it {_OPEN}")
    command.set_defaults(command=_doctor_command)

    command = commands.add_parser(
        "stacks",
        help="print where the tasks of a running program are, in Python",
        description=f"Print where the tasks of a running program are, in Python. It {_OPEN}.",
    )
    command.add_argument("pid", type=_positive, metavar="PID", help="the program's process id, not a worker's")
    command.set_defaults(command=_stacks)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


# --- domains ----------------------------------------------------------------------------------------------------------


def _domains(options: argparse.Namespace) -> int:
    found = domains.Extraction()
    files = list(domains.find_files(options.paths, found.unreadable))
    started = time.perf_counter()
    with _progress_bar(sum(size for _, size in files), wanted=not options.no_progress) as show:
        anyio.run(_extract, files, options.workers, found, show)
    seconds = time.perf_counter() - started
    (_print_json if options.json else _print_table)(found, len(files), seconds, options.top)
    for path, reason in found.unreadable.items():
        print(f"cpupool: {path}: {reason}", file=sys.stderr)
    return EXIT_PARTIAL if found.unreadable else EXIT_OK


async def _extract(
    files: list[tuple[str, int]], workers: int | None, found: domains.Extraction, show: Callable[[int], object]
) -> None:
    async with CpuPool(workers) as pool:
        await domains.extract_domains_from_files(pool, files, found, show)


@contextlib.contextmanager
def _progress_bar(total: int, *, wanted: bool) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on standard error if that is a terminal and rich (the extra `cli`) is installed."""
    if not wanted or not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda _: None
        return
    columns = (TextColumn("searching"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("searching", total=total)
        yield lambda done: progress.update(bar, completed=done)


def _ranking(extraction: domains.Extraction, top: int | None) -> list[tuple[str, int]]:
    """Return domains and counts, most frequent first, in a fixed order."""
    ranking = sorted(extraction.counts.items(), key=lambda item: (-item[1], item[0]))
    return ranking[:top]


def _print_table(extraction: domains.Extraction, files: int, seconds: float, top: int | None) -> None:
    for domain, count in _ranking(extraction, top):
        print(f"{count:>9,}  {domain}")
    print(
        f"{extraction.counts.total():,} domains, {len(extraction.counts):,} different, "
        f"in {files:,} files, {extraction.bytes_read:,} bytes, {seconds:.2f} s"
    )


def _print_json(extraction: domains.Extraction, files: int, seconds: float, top: int | None) -> None:
    summary = {
        "domains": dict(_ranking(extraction, top)),
        "total": extraction.counts.total(),
        "different": len(extraction.counts),
        "files": files,
        "bytes": extraction.bytes_read,
        "seconds": round(seconds, 3),
        "unreadable": extraction.unreadable,
    }
    print(json.dumps(summary, indent=2))


# --- doctor -----------------------------------------------------------------------------------------------------------


def _doctor_command(options: argparse.Namespace) -> int:
    if options.pid is None:
        findings = [_doctor.diagnose()]
    else:
        findings = [_doctor.describe_pool(pool) for pool in ask(options.pid, "statistics")]
        if not findings:
            print(f"no pool runs in process {options.pid}")
    for number, finding in enumerate(findings):
        if number:
            print()
        for name, value in finding:
            print(f"{name:16s} {value}")
    return EXIT_OK


# --- stacks -----------------------------------------------------------------------------------------------------------


def _stacks(options: argparse.Namespace) -> int:
    pools = ask(options.pid, "stacks")
    busy = [(pool, worker) for pool in pools for worker in pool["workers"] if str(worker["pid"]) in pool["stacks"]]
    for pool, worker in busy:
        task = f"{worker['task']}, for {worker['seconds']:.3g} s" if worker["task"] else "a task"
        print(f"{pool['name']}: worker {worker['pid']} runs {task}")
        print(pool["stacks"][str(worker["pid"])] + "\n")
    if not busy:
        names = ", ".join(pool["name"] for pool in pools)
        print(f"no worker is busy ({names})" if pools else f"no pool runs in process {options.pid}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
