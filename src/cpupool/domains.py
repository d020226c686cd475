r"""The reference workload: find domain names in text, exactly and in linear time.

A domain here is what the well-known pattern ``([a-zA-Z0-9\-_]+\.){1,}[a-zA-Z0-9\-_]+`` matches: labels of ASCII
letters, digits, hyphens and underscores, joined by single dots, at least two of them.  That pattern itself is
quadratic: on letters without a dot it starts anew at every letter.  `find_domains` starts only where a label begins,
and never gives back what a label has taken (possessive quantifiers, Python 3.11), so it reads each character a fixed
number of times.
"""

from __future__ import annotations

import array
import os
import re
import stat
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import WorkerDied, split_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from . import CpuPool, CpuPoolView

_LABEL = r"[a-zA-Z0-9\-_]++"
_DOMAIN = re.compile(rf"(?<![a-zA-Z0-9\-_]){_LABEL}(?:\.{_LABEL})++")
_NOT_IN_A_DOMAIN = re.compile(r"[^a-zA-Z0-9\-_.]")

# In bytes: a cut inside a UTF-8 sequence harms no domain, there is none in it.
_CUT = re.compile(rb"[^a-zA-Z0-9\-_.]")
_LOOK_AHEAD = 64 * 1024

RANGE_BYTES = 1024 * 1024
PIECE_CHARS = 512 * 1024


def find_domains(text: str) -> list[str]:
    """Return all domain names in a text, in order, repeated as often as they occur."""
    return _DOMAIN.findall(text)


def is_boundary(character: str) -> bool:
    """Return True for a character that is in no domain, so that a text may be cut behind it."""
    return _NOT_IN_A_DOMAIN.match(character) is not None


def split_for_domains(text: str, max_chars: int) -> Iterator[str]:
    """Split a text so that the domains of its pieces are the domains of the whole; see `cpupool.split_text`."""
    return split_text(text, max_chars, _NOT_IN_A_DOMAIN)


async def extract_domains(pool: CpuPool | CpuPoolView, text: str) -> list[str]:
    """Return all domain names in a text, as `find_domains` does, but found by the workers of a pool.

    Raises:
        Exception: as `CpuPool.map`.

    Cancellation: as `CpuPool.map`.
    """
    found: list[str] = []
    async with pool.stream(_find_joined, split_for_domains(text, PIECE_CHARS)) as pieces:
        async for piece in pieces:
            found += piece.split()
    return found


def _find_joined(text: str) -> str:
    """Return the domains in a text as one string: it travels in a third of the time of a list."""
    return " ".join(find_domains(text))


@dataclass(frozen=True, slots=True)
class FileRange:
    """The bytes of a file from `start` up to `stop`, both moved forward to the next place where it may be cut."""

    path: str
    start: int
    stop: int


@dataclass(slots=True)
class Extraction:
    """What was found in some file ranges.

    Attributes:
        counts: how often each domain occurs.
        bytes_read: how many bytes were searched.
        unreadable: why a path could not be read, by path.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, other: Extraction) -> None:
        """Take in what was found elsewhere."""
        self._add(other.counts.items(), other.bytes_read, other.unreadable)

    def _add(self, counts: Iterable[tuple[str, int]], bytes_read: int, unreadable: dict[str, str]) -> None:
        total, known = self.counts, self.counts.get
        for domain, count in counts:
            total[domain] = known(domain, 0) + count
        self.bytes_read += bytes_read
        self.unreadable.update(unreadable)


def find_files(paths: Iterable[str | os.PathLike[str]], unreadable: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Yield the path and size in bytes of each regular file below `paths`, in a fixed order.

    Symbolic links inside folders are not followed, and what is neither file nor folder is passed over there; a path
    that is given is taken at its word.  What cannot be read is added to `unreadable`.
    """
    if isinstance(paths, str | bytes | os.PathLike):
        raise TypeError(f"paths must be several; for one write [{paths!r}]")
    for each in paths:
        given = os.fspath(each)
        # Such a name may mean another file in another process.
        path = os.path.realpath(given) if given.startswith(("/dev/", "/proc/")) else given
        try:
            status = os.stat(path)
            if path.startswith("/proc/"):
                unreadable[path] = "a file of the proc file system has no size"
            elif stat.S_ISDIR(status.st_mode):
                yield from _walk(path, unreadable)
            elif stat.S_ISREG(status.st_mode):
                yield path, status.st_size
            else:
                unreadable[path] = "neither a file nor a folder"
        except OSError as error:
            unreadable[path] = _reason(error)


def _walk(top: str, unreadable: dict[str, str]) -> Iterator[tuple[str, int]]:
    def note(error: OSError) -> None:
        unreadable[str(error.filename)] = _reason(error)

    for folder, subfolders, names in os.walk(top, onerror=note):
        subfolders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
            except OSError as error:
                note(error)
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, status.st_size


def plan_ranges(files: Iterable[tuple[str, int]], range_bytes: int = RANGE_BYTES) -> Iterator[list[FileRange]]:
    """Group files into tasks of about `range_bytes`: large files are cut up, small ones go together."""
    task: list[FileRange] = []
    room = range_bytes
    for path, size in files:
        start = 0
        while start < size:
            stop = min(start + room, size)
            task.append(FileRange(path, start, stop))
            room -= stop - start
            start = stop
            if room <= 0:
                yield task
                task, room = [], range_bytes
        if size == 0:
            task.append(FileRange(path, 0, 0))  # nothing to read, but whether it can be read is asked for
    if task:
        yield task


def extract(ranges: list[FileRange]) -> Extraction:
    """Count the domains in some file ranges: one task for a worker, which reads the files itself.

    Bytes that are not UTF-8 are replaced.
    """
    found = Extraction()
    for each in ranges:
        try:
            data = _read_range(each)
        except OSError as error:
            found.unreadable[each.path] = _reason(error)
            continue
        found.bytes_read += len(data)
        found.counts.update(find_domains(data.decode("utf-8", "replace")))
    return found


async def extract_domains_from_paths(
    pool: CpuPool | CpuPoolView,
    paths: Iterable[str | os.PathLike[str]],
    on_progress: Callable[[int], object] | None = None,
) -> Extraction:
    """Count the domain names in files and folders, on all workers of a pool.

    The workers read the files, piece by piece, so memory does not grow with their size.  What cannot be read, or costs
    its worker its life, is noted in `unreadable`.

    Args:
        pool: the pool, or a view of it.
        paths: files, and folders to search through.
        on_progress: called with the number of bytes that are done, each time some are.

    Raises:
        CpuPoolError: the pool can run nothing.
        Exception: as `CpuPool.map`.

    Cancellation: as `CpuPool.map`.
    """
    found = Extraction()
    await extract_domains_from_files(pool, find_files(paths, found.unreadable), found, on_progress)
    return found


async def extract_domains_from_files(
    pool: CpuPool | CpuPoolView,
    files: Iterable[tuple[str, int]],
    found: Extraction,
    on_progress: Callable[[int], object] | None = None,
) -> None:
    """Do as `extract_domains_from_paths`, with paths and sizes as `find_files` gives them, and add to `found`."""
    running: deque[list[FileRange]] = deque()  # in the order in which their results come
    done = 0

    def tasks() -> Iterator[list[tuple[str, int, int]]]:
        for task in plan_ranges(files):
            running.append(task)
            yield [(each.path, each.start, each.stop) for each in task]

    async with pool.stream(_extract_packed, tasks(), return_exceptions=True) as results:
        async for result in results:
            task = running.popleft()
            if not isinstance(result, Exception):
                names, counts, bytes_read, unreadable = result
                found._add(zip(names.split(), counts, strict=True), bytes_read, unreadable)
            elif isinstance(result, WorkerDied):
                found.unreadable.update({each.path: str(result).splitlines()[0] for each in task})
            else:
                raise result
            done += sum(each.stop - each.start for each in task)
            if on_progress is not None:
                on_progress(done)


def _extract_packed(ranges: list[tuple[str, int, int]]) -> tuple[str, array.array[int], int, dict[str, str]]:
    """Do as `extract`, and return all domains in one string and their counts in one array.

    They travel, and are added, in a third of the time that so many strings and numbers take; as tuples do, beside
    `FileRange`.
    """
    found = extract([FileRange(*each) for each in ranges])
    return " ".join(found.counts), array.array("Q", found.counts.values()), found.bytes_read, found.unreadable


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _read_range(wanted: FileRange) -> bytes:
    with open(wanted.path, "rb") as file:
        start = _next_cut(file.fileno(), wanted.start, wanted.stop)
        if start >= wanted.stop > 0:
            return b""  # without a cut, it belongs to the range before
        stop = _next_cut(file.fileno(), wanted.stop, None)
        file.seek(start)
        return file.read(max(stop - start, 0))


def _next_cut(fd: int, position: int, limit: int | None) -> int:
    """Return the first place at or behind `position` where the file may be cut: 0, its end, or behind a boundary.

    It is not sought beyond `limit`.
    """
    if position == 0:
        return 0
    offset = position - 1
    while data := os.pread(fd, _LOOK_AHEAD, offset):
        if found := _CUT.search(data):
            return offset + found.end()
        offset += len(data)
        if limit is not None and offset >= limit:
            return offset
    return offset
