"""The command line, as programs of their own; the progress bar on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import environment
from cpupool import usable_cpus

TEXT = "see www.example.com and example.org, example.org again; not this one.\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "inner").mkdir(parents=True)
    (folder / "one.txt").write_text(TEXT * 1000)
    (folder / "inner" / "two.txt").write_bytes(b"\xff\xfe bytes.example \xc3 that are not UTF-8\n")
    (folder / "empty").touch()
    return folder


def cpupool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "cpupool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)


def test_domains_counts_in_files_and_folders(tree: Path) -> None:
    done = cpupool("domains", tree)
    assert (done.returncode, done.stderr) == (0, "")
    *table, summary = done.stdout.splitlines()
    assert [line.split() for line in table] == [
        ["2,000", "example.org"],
        ["1,000", "www.example.com"],
        ["1", "bytes.example"],
    ]
    assert summary.startswith("3,001 domains, 3 different, in 3 files, 70,038 bytes, ")


def test_top_limits_what_is_printed_and_not_what_is_counted(tree: Path) -> None:
    done = cpupool("domains", tree, "--top", "1")
    table = done.stdout.splitlines()
    assert table[0].split() == ["2,000", "example.org"]
    assert table[1].startswith("3,001 domains, 3 different")
    assert len(table) == 2


def test_json_is_one_object(tree: Path) -> None:
    done = cpupool("domains", "--json", "--workers", "1", tree / "one.txt", tree / "inner")
    found = json.loads(done.stdout)
    assert found["domains"] == {"example.org": 2000, "www.example.com": 1000, "bytes.example": 1}
    assert (found["total"], found["different"], found["files"], found["unreadable"]) == (3001, 3, 2, {})
    assert found["bytes"] == 70_038


def test_one_worker_and_many_find_the_same(tree: Path) -> None:
    big = tree / "big.txt"
    big.write_text(TEXT * 60_000)  # several ranges
    one, many = (cpupool("domains", "--json", "--workers", workers, tree) for workers in ("1", "3"))
    assert json.loads(one.stdout)["domains"] == json.loads(many.stdout)["domains"]
    assert json.loads(one.stdout)["domains"]["example.org"] == 122_000


def test_what_cannot_be_read_is_reported_and_skipped(tree: Path) -> None:
    missing = tree / "missing"
    done = cpupool("domains", missing, tree)
    assert done.returncode == 1
    assert done.stderr == f"cpupool: {missing}: No such file or directory\n"
    assert "3,001 domains" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["domains"], "the following arguments are required: PATH"),
        (["domains", ".", "--workers", "0"], "argument --workers: must be a whole number of at least 1, not '0'"),
        (["domains", ".", "--top", "few"], "argument --top: must be a whole number of at least 1, not 'few'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments: list[str], message: str) -> None:
    done = cpupool(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def _on_a_terminal(arguments: Sequence[str | Path]) -> tuple[str, str]:
    """Run the command with standard error on a terminal; return standard output and what the terminal got."""
    command = [sys.executable, "-m", "cpupool", *map(str, arguments)]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment(TERM="xterm")
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 65536):
                shown += data
        except OSError:
            pass  # a terminal's way to say that the other side has closed it
        os.close(ours)
        assert process.stdout is not None
        return process.stdout.read(), shown.decode()


def test_a_terminal_gets_a_progress_bar_and_the_output_stays_clean(tree: Path) -> None:
    out, shown = _on_a_terminal(["domains", tree, "--top", "1"])
    assert "searching" in shown
    assert "70.0/70.0 kB" in shown
    assert "example.org" in out
    assert "searching" not in out


def test_no_progress_shows_none(tree: Path) -> None:
    out, shown = _on_a_terminal(["domains", tree, "--no-progress"])
    assert shown == ""
    assert "example.org" in out


def test_a_reader_that_has_enough_is_no_error(tree: Path) -> None:
    (tree / "many.txt").write_text("\n".join(f"host{number}.example" for number in range(20_000)))
    command = f"{sys.executable} -m cpupool domains --no-progress {tree} | head -1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=environment(), timeout=60, check=False
    )
    assert (done.stdout.split(), done.stderr) == (["2,000", "example.org"], "")


def test_doctor_says_what_and_why() -> None:
    done = cpupool("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(
        line.split(None, 1)
        for line in done.stdout.splitlines()
        if not line.startswith(("start ", "end ", "crash ", "cgroup "))
    )
    assert facts["workers"].startswith(f"{usable_cpus()} by default: ")
    assert facts["CPUs"] == str(os.cpu_count())
    for subject in ("affinity", "cgroup quota", "memory", "start method     forkserver by default", "Python", "anyio"):
        assert subject in done.stdout


def test_a_worker_that_dies_is_reported_like_an_unreadable_file(tree: Path) -> None:
    """As the kernel kills one for want of memory: its files are named, the others counted."""
    source = f"""
import os, sys
from cpupool import __main__, domains

def die(task):
    os._exit(9)

if __name__ == "__main__":
    domains._extract_packed = die
    sys.exit(__main__.main(["domains", {str(tree)!r}]))
"""
    script = tree.parent / "script.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment(), timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("exited with status 9 while it ran __main__.die") == 3


def test_standard_input_from_a_file_is_that_file(tree: Path) -> None:
    """Each worker has an empty standard input of its own, so the name must not reach it."""
    command = [sys.executable, "-m", "cpupool", "domains", "/dev/stdin"]
    with open(tree / "one.txt") as stdin:
        done = subprocess.run(
            command, stdin=stdin, capture_output=True, text=True, env=environment(), timeout=60, check=False
        )
    assert done.returncode == 0
    assert "3,000 domains" in done.stdout


def test_a_file_without_a_size_is_reported() -> None:
    done = cpupool("domains", "/proc/version")
    assert (done.returncode, done.stderr) == (1, "cpupool: /proc/version: a file of the proc file system has no size\n")


def test_output_that_cannot_be_written_is_no_traceback(tree: Path) -> None:
    command = [sys.executable, "-m", "cpupool", "domains", str(tree)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60, check=False
        )
    assert done.returncode != 0
    assert "No space left on device" in done.stderr


def test_a_path_that_is_no_text_is_reported(tree: Path) -> None:
    command = [os.fsencode(sys.executable), b"-m", b"cpupool", b"domains", b"--json", os.fsencode(tree), b"nope\xff"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(PYTHONIOENCODING="utf-8:strict"),
        timeout=60,
        check=False,
    )
    assert (done.returncode, json.loads(done.stdout)["unreadable"]) == (1, {"nope\udcff": "No such file or directory"})


def test_a_wrong_variable_is_no_traceback() -> None:
    command = [sys.executable, "-m", "cpupool", "doctor"]
    environ = environment(CPUPOOL_MAX_WORKERS="many")
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("cpupool: the environment variable CPUPOOL_MAX_WORKERS must be")


def test_doctor_names_the_reason_for_a_limit() -> None:
    command = [sys.executable, "-m", "cpupool", "doctor"]
    environ = environment(CPUPOOL_MAX_WORKERS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)
    assert "1 by default: CPUPOOL_MAX_WORKERS says so" in done.stdout
