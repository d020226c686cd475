"""The matrix: tests on each Python that is here, the lowest dependencies, lint, typing and docs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
SUPPORTED = ("3.11", "3.12", "3.13")

nox.options.default_venv_backend = "venv"
nox.options.download_python = "never"
nox.options.reuse_existing_virtualenvs = True


def find_python(version: str) -> Path | None:
    """Return the interpreter of that version, or None.

    Being on the PATH is not enough: pyenv puts a script there for every version it has, and those that are not switched
    on only say so.  Hence each candidate is run.
    """
    name = f"python{version}"
    on_path = shutil.which(name)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [Path(on_path)] if on_path else []
    candidates += sorted(pyenv.glob(f"versions/{version}*/bin/{name}"), reverse=True)
    program = "import ensurepip, sys; print(sys.implementation.name, '%d.%d' % sys.version_info[:2], sys.executable)"
    for candidate in candidates:
        answer = subprocess.run([candidate, "-c", program], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.startswith(f"cpython {version} "):
            return Path(answer.stdout.split(maxsplit=2)[2].rstrip("\n"))
    return None


PYTHONS = {version: path for version in SUPPORTED if (path := find_python(version)) is not None}
for python in PYTHONS.values():  # nox looks nowhere else
    os.environ["PATH"] = os.pathsep.join([str(python.parent), os.environ["PATH"]])


def run_pytest(session: nox.Session) -> None:
    session.run("python", "-m", "pytest", *(session.posargs or ["-m", "not slow"]))


def group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(PROJECT, name))


@nox.session(python=list(PYTHONS))
def tests(session: nox.Session) -> None:
    """Run the tests, all but the slow ones, on each Python that is here."""
    session.install("-e", ".[cli]", *group("test"))
    run_pytest(session)


@nox.session(python=list(PYTHONS)[:1])
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest versions that the package says it runs with."""
    project = PROJECT["project"]
    lowest = [
        requirement.replace(">=", "==")
        for requirement in [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    ]
    session.install("-e", ".[cli]", *group("test"), *lowest)
    run_pytest(session)


@nox.session
def package(session: nox.Session) -> None:
    """Build the sdist, and from it the wheel; test the wheel in an environment without the source."""
    session.install("build", "twine")
    folder = Path(session.create_tmp()) / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder))
    session.run("twine", "check", "--strict", *map(str, folder.iterdir()))
    (wheel,) = folder.glob("*.whl")
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install(f"{wheel}[cli]", *group("test"))
    where = "import cpupool, sys; sys.exit(not cpupool.__file__.startswith(sys.prefix) and cpupool.__file__)"
    session.run("python", "-c", where)
    session.run("python", "-m", "cpupool", "doctor")
    few = ["calls", "cli", "docs", "domains", "imports", "map", "prometheus", "testing"]
    session.run("python", "-m", "pytest", "-m", "not slow", *(f"tests/test_{name}.py" for name in few))


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and formatting."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of everything, and that every public name has one."""
    session.install("-e", ".[cli]", *group("test"), *group("lint"))
    session.run("mypy")
    session.run("basedpyright", "--verifytypes", "cpupool", "--ignoreexternal")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; any warning is an error."""
    session.install("-e", ".", *group("docs"))
    session.run("sphinx-build", "-W", "-n", "--keep-going", "-b", "html", "docs", "docs/_build/html")
