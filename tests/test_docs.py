"""Every Python block of the documentation, and every example, runs as a script of its own."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import RunScript, environment

PROJECT = Path(__file__).parent.parent
DOCS = PROJECT / "docs"
PAGES = [
    PROJECT / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("tutorials/*.md")),
    *sorted(DOCS.glob("how-to/*.md")),
]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _is_slow(page: Path) -> bool:
    return page.parent.name in {"how-to", "tutorials"} and page.name != "script.md"


def _blocks() -> list[object]:
    return [
        pytest.param(
            match.group(1),
            id=f"{page.relative_to(PROJECT)}:{page.read_text()[: match.start()].count(chr(10)) + 1}",
            marks=[pytest.mark.slow] if _is_slow(page) else [],
        )
        for page in PAGES
        for match in _BLOCK.finditer(page.read_text())
    ]


@pytest.mark.parametrize("block", _blocks())
def test_a_block_of_the_documentation_runs(block: str, run_script: RunScript) -> None:
    done = run_script(block)
    assert (done.returncode, done.stderr) == (0, "")


EXAMPLES = PROJECT / "examples"
SERVERS = {"any_asgi.py", "dashboard.py", "fastapi_app.py", "starlette_app.py"}  # in test_servers


LONG = {"demo.py", "compare_servers.py"}


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name in LONG else [])
        for path in sorted(EXAMPLES.glob("*.py"))
        if path.name not in SERVERS
    ],
)
def test_an_example_runs(example: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "module",
    ["", ".executor", ".asgi", ".jobs", ".testing", ".starlette", ".fastapi", ".prometheus", ".opentelemetry"],
)
def test_the_reference_has_every_public_name(module: str) -> None:
    """Under the module's name, or under that of the other one from which it comes."""
    reference = "\n".join(page.read_text() for page in DOCS.glob("*.md"))
    described = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)", reference, re.MULTILINE)}
    assert set(importlib.import_module(f"cpupool{module}").__all__) - {"__version__"} <= described


def test_the_readme_s_two_commands_exist() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (PROJECT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
