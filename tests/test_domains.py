"""The reference workload: exactly what the pattern finds, in linear time, whole or in pieces, of texts and files."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpupool import CpuPool, domains

REFERENCE = re.compile(r"([a-zA-Z0-9\-_]+\.){1,}[a-zA-Z0-9\-_]+")


def reference(text: str) -> list[str]:
    return [match.group() for match in REFERENCE.finditer(text)]


dense = st.text(st.sampled_from("aZ09-_.. \n\u00e9\u0130@"), max_size=60)
texts = st.one_of(dense, st.text(max_size=60), st.lists(dense).map(" ".join))


@given(texts)
def test_it_finds_exactly_what_the_pattern_finds(text: str) -> None:
    assert domains.find_domains(text) == reference(text)


@given(texts, st.integers(1, 20))
def test_pieces_have_the_domains_of_the_whole(text: str, max_chars: int) -> None:
    pieces = domains.split_for_domains(text, max_chars)
    assert [domain for piece in pieces for domain in domains.find_domains(piece)] == reference(text)


def test_cutting_every_1000_characters_cuts_domains_in_two() -> None:
    """What tutorials do, and why `split_text` exists."""
    text = "www.example.com " * 200
    naive = [domain for start in range(0, len(text), 1000) for domain in reference(text[start : start + 1000])]
    proper = [domain for piece in domains.split_for_domains(text, 1000) for domain in domains.find_domains(piece)]
    assert naive != reference(text)
    assert {"ple.com", "www.exam"} <= set(naive), "halves of domains"
    assert proper == reference(text)


def _seconds(text: str) -> float:
    started = time.process_time()
    domains.find_domains(text)
    return time.process_time() - started


@pytest.mark.parametrize("unit", ["a", "a.", ".", "a-", "a..", ". a"])
def test_it_takes_linear_time(unit: str) -> None:
    """A megabyte of letters takes the pattern minutes; the bound here is a thousand times what it takes."""
    assert _seconds(unit * (1_000_000 // len(unit))) < 5


def test_the_pattern_itself_is_quadratic() -> None:
    """The control: what the bound above would catch."""
    started = time.process_time()
    reference("a" * 4_000)
    small = time.process_time() - started
    started = time.process_time()
    reference("a" * 16_000)
    assert time.process_time() - started > 6 * small


content = st.one_of(
    st.text(st.sampled_from("a9-_.. \n\u00e9"), max_size=300).map(str.encode),
    st.binary(max_size=200),
    st.lists(st.sampled_from([b"a.b", b" ", b"\n", b"\xff", b"\xc3", b"\xa9", b"c.d.e", b"."]), max_size=60).map(
        b"".join
    ),
)


@given(data=content, range_bytes=st.integers(1, 40))
def test_byte_ranges_have_the_domains_of_the_whole_file(
    data: bytes, range_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges"
    path.write_bytes(data)
    found = domains.Extraction()
    for task in domains.plan_ranges([(str(path), len(data))], range_bytes):
        found.add(domains.extract(task))
    assert sorted(found.counts.elements()) == sorted(reference(data.decode("utf-8", "replace")))
    assert found.bytes_read == len(data)


@given(st.lists(st.integers(0, 5000), max_size=30), st.integers(1, 2000))
def test_every_byte_of_every_file_is_planned_once(sizes: list[int], range_bytes: int) -> None:
    files = [(f"file {number}", size) for number, size in enumerate(sizes)]
    planned: dict[str, list[tuple[int, int]]] = {}
    for task in domains.plan_ranges(files, range_bytes):
        assert sum(each.stop - each.start for each in task) <= range_bytes
        for each in task:
            planned.setdefault(each.path, []).append((each.start, each.stop))
    for path, size in files:
        pieces = planned[path]
        assert pieces[0][0] == 0
        assert pieces[-1][1] == size
        assert all(left[1] == right[0] for left, right in itertools.pairwise(pieces))


def test_a_file_without_any_boundary_is_looked_through_once_and_not_once_for_each_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "letters"
    path.write_bytes(b"a" * 3_000_000 + b".b c.d")
    size = path.stat().st_size
    looked_at = 0
    pread = os.pread

    def counting(fd: int, length: int, offset: int) -> bytes:
        nonlocal looked_at
        data = pread(fd, length, offset)
        looked_at += len(data)
        return data

    monkeypatch.setattr(os, "pread", counting)
    found = domains.Extraction()
    for task in domains.plan_ranges([(str(path), size)], 100_000):
        found.add(domains.extract(task))
    assert sorted(found.counts) == ["a" * 3_000_000 + ".b", "c.d"]
    assert looked_at < 4 * size


def test_find_files_is_ordered_and_reports_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("22")
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "fifo")
    unreadable: dict[str, str] = {}
    paths = [str(tmp_path), str(tmp_path / "missing"), str(tmp_path / "fifo"), str(tmp_path / "link.txt")]
    found = [(Path(path).name, size) for path, size in domains.find_files(paths, unreadable)]
    assert found == [("a.txt", 1), ("two.txt", 2), ("link.txt", 1)]
    assert unreadable == {
        str(tmp_path / "missing"): "No such file or directory",
        str(tmp_path / "fifo"): "neither a file nor a folder",
    }


def test_a_file_that_vanished_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("a.b")
    here, gone = (domains.FileRange(str(tmp_path / name), 0, 3) for name in ("here", "gone"))
    found = domains.extract([gone, here])
    assert found.counts == {"a.b": 1}
    assert found.unreadable == {gone.path: "No such file or directory"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_what_may_not_be_read_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "open.txt").write_text("a.b")
    (folder / "secret.txt").write_text("c.d")
    (folder / "secret.txt").chmod(0)
    (folder / "closed").mkdir(mode=0)
    for parent in (folder, *folder.parents[:-1]):
        parent.chmod(parent.stat().st_mode | 0o055)
    source = """
import os, sys
from cpupool import domains
os.setuid(65534)
found = domains.Extraction()
for task in domains.plan_ranges(domains.find_files(sys.argv[1:], found.unreadable)):
    found.add(domains.extract(task))
print(dict(found.counts), sorted(found.unreadable.items()))
"""
    done = subprocess.run([sys.executable, "-c", source, str(folder)], capture_output=True, text=True, check=True)
    denied = [(str(folder / name), "Permission denied") for name in ("closed", "secret.txt")]
    assert done.stdout == f"{{'a.b': 1}} {denied}\n"


def test_in_workers_as_in_this_process(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("see www.example.com and a.b-c.d_e, not this one. " * 2000)
    tasks = list(domains.plan_ranges([(str(path), path.stat().st_size)], 10_000))
    found = domains.Extraction()
    with CpuPool(2) as pool:
        for task in tasks:
            found.add(pool.run_sync(domains.extract, task))
    assert len(tasks) > 5
    assert sorted(found.counts.elements()) == sorted(reference(path.read_text()))


async def _extract(text: str) -> list[str]:
    async with CpuPool(2) as pool:
        return await domains.extract_domains(pool, text)


def test_a_text_in_workers_as_in_this_process() -> None:
    text = " ".join(f"www.example{number}.com, a.b and not this one" for number in range(20_000))
    assert asyncio.run(_extract(text)) == reference(text)
    assert asyncio.run(_extract("")) == []


def test_a_text_without_a_boundary_is_looked_through_once() -> None:
    """The reference takes a quarter of an hour for it."""
    started = time.perf_counter()
    assert asyncio.run(_extract("a" * 4_000_000 + ".b")) == ["a" * 4_000_000 + ".b"]
    assert time.perf_counter() - started < 20


async def _extract_from(paths: Any, said: list[int]) -> domains.Extraction:
    async with CpuPool(2) as pool:
        return await domains.extract_domains_from_paths(pool, paths, said.append)


def test_files_in_workers_as_in_this_process_and_in_the_same_order(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"www.example{number}.com and z{9 - number}.example " * 40_000)
    here = domains.Extraction()
    for task in domains.plan_ranges(domains.find_files([tmp_path], here.unreadable)):
        here.add(domains.extract(task))
    said: list[int] = []
    found = asyncio.run(_extract_from([tmp_path, tmp_path / "missing"], said))
    assert list(found.counts.items()) == list(here.counts.items())
    assert said == sorted(said)
    assert said[-1] == found.bytes_read == here.bytes_read
    assert found.unreadable == {str(tmp_path / "missing"): "No such file or directory"}


def test_one_path_instead_of_several_is_an_error() -> None:
    for path in ("/etc/hosts", Path("/etc/hosts")):
        with pytest.raises(TypeError, match="several"):
            asyncio.run(_extract_from(path, []))
