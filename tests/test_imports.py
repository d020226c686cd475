"""What importing costs, and which way imports point."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cpupool
import tasks
from conftest import START_METHODS, RunScript, environment

SOURCE = Path(cpupool.__file__).parent

# The map in the package's docstring.  A module may import from lower layers, and from its own, but never upwards.
LAYERS = [
    {
        "_frames",
        "_payload",
        "_errors",
        "_current",
        "_journal",
        "_reports",
        "_pace",
        "_sources",
        "_roles",
        "_waiting",
        "_forking",
        "_settings",
        "_chunks",
        "_sizing",
        "_checks",
        "_status",
        "_settling",
        "_environment",
        "_files",
        "_shared",
        "_parcels",
        "_apart",
        "_large",
        "_statistics",
        "_usage",
        "_events",
        "_logs",
        "_last_words",
        "_context",
        "_vigil",
    },
    {"_interrupts", "_replies", "_batches", "_child", "_preload", "_asyncio_waits", "_trio_waits"},
    {"_process", "_fork_server", "_lease", "_gate", "_dispatch"},
    {"_worker", "_starting", "_outcomes"},
    {"_crew", "_inspection"},
    {"_serving", "_births", "_stopping", "_memory", "_stacks", "_log_keeper"},
    {"_supervisor"},
    {"_call", "_segments", "_map", "_stream", "_driver", "_executor"},
    {"_calls", "_share", "_door", "_pool", "_protocol", "_inline", "_default", "_offload"},
    {"__init__"},
    {"executor", "domains", "progress", "asgi", "testing", "_job", "jobs", "_doctor", "prometheus", "opentelemetry"},
    {"_answers", "_pytest_plugin", "__main__"},
    {"_job_routes", "_dashboard"},
    {"starlette"},
    {"fastapi"},
]


def _layer(module: str) -> int:
    return next(number for number, modules in enumerate(LAYERS) if module in modules)


def _imports(path: Path) -> set[str]:
    """Return the modules of this package that a module imports; the package itself as `__init__`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = {alias.name for alias in node.names}
            found |= (
                {node.module}
                if node.module
                else {name if (SOURCE / f"{name}.py").exists() else "__init__" for name in names}
            )
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_only_downward(path: Path) -> None:
    if path.stem != "__init__":  # it names every public module, lazily
        assert all(_layer(name) <= _layer(path.stem) for name in _imports(path))


@pytest.mark.parametrize(
    "adapter",
    ["asgi", "starlette", "fastapi", "jobs", "domains", "progress", "prometheus", "opentelemetry", "_dashboard"],
)
def test_adapters_use_public_names_only(adapter: str) -> None:
    private = {name for name in _imports(SOURCE / f"{adapter}.py") if name.startswith("_") and name != "__init__"}
    assert private <= {"_answers", "_job", "_job_routes", "_dashboard"}  # parts of adapters themselves


def test_every_public_name_exists_and_is_listed() -> None:
    for name in cpupool.__all__:
        assert getattr(cpupool, name) is not None
    assert set(cpupool.__all__) <= set(dir(cpupool))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        getattr(cpupool, "nonsense")  # noqa: B009


def _loaded_by(source: str) -> set[str]:
    source = f"import sys; before = set(sys.modules); {source}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, env=environment())
    return set(done.stdout.split())


def test_importing_cpupool_loads_neither_anyio_nor_multiprocessing() -> None:
    loaded = _loaded_by("import cpupool")
    assert "cpupool" in loaded
    assert not {name for name in loaded if name.split(".")[0] in {"anyio", "asyncio", "multiprocessing", "trio"}}


def test_neither_does_making_a_pool() -> None:
    loaded = _loaded_by("import cpupool; pool = cpupool.CpuPool(2)")
    assert not {name for name in loaded if name.split(".")[0] in {"anyio", "asyncio", "multiprocessing", "trio"}}


@pytest.mark.parametrize("method", START_METHODS)
def test_a_worker_loads_neither_anyio_nor_asyncio(method: str, run_script: RunScript) -> None:
    """Even when the user's main module, which it imports, makes a pool and calls it by `from cpupool import ...`."""
    done = run_script(
        """
import sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from cpupool import CpuPool, WorkerDied, default_pool, run, run_sync
import tasks

if __name__ == "__main__":
    with CpuPool(1, mp_context=sys.argv[1]) as pool:
        print(*pool.run_sync(tasks.loaded_modules))
""",
        method,
    )
    loaded = set(done.stdout.split())
    assert done.stderr == ""
    assert "cpupool._child" in loaded
    assert not {name for name in loaded if name.split(".")[0] in {"anyio", "asyncio", "trio"}}


def test_a_worker_of_this_suite_loads_the_least() -> None:
    with cpupool.CpuPool(1, mp_context="spawn") as pool:
        loaded = pool.run_sync(tasks.loaded_modules)
    engine = {name.removeprefix("cpupool.") for name in loaded if name.startswith("cpupool.")}
    assert engine == {
        "_batches",
        "_child",
        "_context",
        "_current",
        "_errors",
        "_files",
        "_frames",
        "_interrupts",
        "_last_words",
        "_logs",
        "_journal",
        "_reports",
        "_parcels",
        "_payload",
        "_replies",
        "_roles",
        "_settling",
        "_status",
        "_usage",
        "_vigil",
    }
