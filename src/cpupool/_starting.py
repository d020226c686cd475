"""How one worker process after another is started, as the pool's settings say."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import sys
from typing import TYPE_CHECKING

from . import _roles
from ._sizing import measure_limits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.context import BaseContext

    from ._fork_server import ForkServer
    from ._parcels import Parcel, Shipment
    from ._process import WorkerProcess
    from ._settings import Settings


class WorkerStarter:
    """Starts workers; the supervisor's thread calls it.

    It loads multiprocessing only there, when the first worker is started: that takes milliseconds.

    Attributes:
        max_workers: how many there may be at most.
        server: the fork server that must be ready before; None for other start methods, and for a context of the
            user's own.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        limits = measure_limits()
        need = settings.hard_memory_per_child or settings.max_memory_per_child
        self.max_workers = settings.max_workers or max(limits.suggest_workers(need), settings.min_workers or 0)
        self._threads = max(limits.suggest_workers() // self.max_workers, 1)
        self._context: BaseContext | ForkServer | None = None
        self._numbers = itertools.count(1)
        self._server_environment: dict[str, str] = {}
        self.server: ForkServer | None = None
        self._packed: Parcel | None = None
        self._shipment: Shipment | None = None

    def prepare(self) -> None:
        """Load what it needs; from then on `server` says whether there is to be one."""
        if self._context is not None:
            return
        from ._process import get_context

        given, preload = self._settings.mp_context, self._settings.preload
        context = get_context("forkserver" if preload else given)
        if preload or (context.get_start_method() == "forkserver" and context is not given):
            from ._fork_server import ForkServer

            self._context = self.server = ForkServer(preload)
        else:
            self._context = context

    def start_server(self, server: ForkServer) -> int:
        """Start the server; its imports go on, and their outcome can be read from the descriptor that is returned."""
        self._server_environment = self._environment()
        return server.start(self._server_environment)

    def __call__(self) -> WorkerProcess:
        """Start a worker process; `prepare` comes before."""
        from ._child import Duties
        from ._logs import collect_levels
        from ._process import WorkerProcess

        settings = self._settings
        duties = Duties(
            settings.initializer,
            settings.initargs,
            settings.finalizer,
            settings.serializer,
            weighs_itself=(settings.max_memory_per_child or settings.hard_memory_per_child) is not None,
            log_levels=collect_levels(),
            title=f"cpupool {settings.name}" if _has_setproctitle() else None,
        )
        name = f"{_roles.NAME_PREFIX}{next(self._numbers)}"
        with _main_module_with_file():
            return WorkerProcess(self._context, name, self._changes(), duties)  # type: ignore[arg-type]

    def ship_duties(self, packed: bytes | Parcel) -> tuple[bytes, Shipment | None]:
        """Return the frame that brings a new worker its duties.

        What is large among `initargs` is written once, into a file that all workers map.
        """
        from ._files import open_memory_file
        from ._frames import Kind, encode_frame

        if isinstance(packed, bytes):
            return encode_frame(Kind.SETUP, 0, packed), None
        if self._packed is None or not packed.is_like(self._packed):
            self._packed, self._shipment = packed, None
            file = open_memory_file() if packed.large_size else None
            if file is not None:
                with contextlib.suppress(OSError):  # no room for it
                    self._shipment = packed.write_to(file)
        shipment = self._shipment or packed.ship(None)  # through the socket, each time
        frame = encode_frame(Kind.SETUP, 0, shipment.head, files=len(shipment.descriptors), tail=shipment.tail_size)
        return frame, shipment

    def _environment(self) -> dict[str, str]:
        """Return a worker's environment: the program's, with each numerical library's share of the CPUs."""
        from ._settling import OPENMP, THREAD_LIMIT_VARIABLES

        given = {**os.environ, **(self._settings.env or {})}
        for name in _WITHHELD:
            given.pop(name, None)
        limits = dict.fromkeys(THREAD_LIMIT_VARIABLES, str(self._threads))
        if OPENMP in given:
            limits = {}  # the other libraries follow it, unless they are told more
        return {**limits, **given}

    def _changes(self) -> dict[str, str | None]:
        """Return what a new process must change in its environment; what preloaded modules have set in it stays."""
        if self.server is not None:
            before = self._server_environment
        elif getattr(self._context, "_name", "") == "forkserver":
            before = {}  # multiprocessing's server, of which nothing is known
        else:
            before = dict(os.environ)
        after = self._environment()
        changes: dict[str, str | None] = {name: value for name, value in after.items() if before.get(name) != value}
        return changes | dict.fromkeys(before.keys() - after.keys())

    def close(self) -> None:
        """Stop the server, if there is one, and free what was large among `initargs`."""
        self._packed = self._shipment = None
        if self.server is not None:
            self.server.stop()


# Where the metrics of server processes are kept, in a file of each process that has any; those of workers would remain.
_WITHHELD = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")

_main_file: str | None = getattr(sys.modules.get("__main__"), "__file__", None)


@functools.cache
def _has_setproctitle() -> bool:
    return importlib.util.find_spec("setproctitle") is not None


@contextlib.contextmanager
def _main_module_with_file() -> Iterator[None]:
    """Let workers import the main module even when the program's script has ended and its exit handlers run.

    Python deletes the module's `__file__` then, and multiprocessing takes it for one that cannot be imported.
    """
    main = sys.modules.get("__main__")
    if main is None or _main_file is None or hasattr(main, "__file__"):
        yield
        return
    main.__file__ = _main_file
    try:
        yield
    finally:
        del main.__file__
