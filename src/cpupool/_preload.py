"""What runs in a pool's own fork server: import the modules to preload, once, then fork workers.

The serving itself is multiprocessing's.  It runs in the server: stdlib and lower layers only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib

from . import _payload, _roles, _settling
from ._errors import encode_error
from ._frames import Kind, encode_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

MAIN = "__main__"


def serve(listener: int, liveness: int, answer: int, modules: Sequence[str], preparation: dict[str, Any]) -> None:
    """Import the modules, answer READY or ERROR to the pool, and fork workers until the pool's process is gone.

    Args:
        listener: a listening socket, to which multiprocessing connects for each new process.
        liveness: as in `begin_life`.
        answer: the write end of a pipe to the pool.
        modules: their full names; "__main__" stands for the program's main module.
        preparation: what multiprocessing makes of itself in a new process, and where that module is.
    """
    from multiprocessing import forkserver, process, spawn

    _settling.begin_life("", None, {}, liveness)
    if MAIN not in modules:
        preparation = {name: value for name, value in preparation.items() if not name.startswith("init_main_from_")}
    with open(answer, "wb") as pipe, contextlib.suppress(BrokenPipeError):
        module = MAIN if MAIN in modules else ""
        try:
            process.current_process()._inheriting = True  # type: ignore[attr-defined]  # as in its own new processes
            spawn.prepare(preparation)
            del process.current_process()._inheriting  # type: ignore[attr-defined]
            _roles.become_worker()
            for module in modules:
                importlib.import_module(module)
        except BaseException as error:
            pipe.write(encode_frame(Kind.ERROR, 0, _payload.dumps((module, encode_error(error)))))
            return
        importlib.import_module(f"{__package__}._child")  # every worker needs it
        _settling.reset_signals()  # whatever the modules have made of them: the server waits for SIGCHLD
        gc.collect()
        gc.freeze()  # the collector leaves alone what was imported: its pages stay shared
        pipe.write(encode_frame(Kind.READY))
    forkserver.main(listener, liveness, ())
