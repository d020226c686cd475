"""How a new process settles in as a worker: what it leaves behind of its parent, and what it lets the system do for it.

It runs in the workers: stdlib and layer 0 only.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys

from ._journal import Journal, open_journal
from ._last_words import STACKS_OFFSET
from ._usage import read_resident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Threads that numerical libraries start for themselves; each reads its variable once, when it is imported.
OPENMP = "OMP_NUM_THREADS"
THREAD_LIMIT_VARIABLES = (
    OPENMP,
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def begin_life(name: str, main: str | None, changes: Mapping[str, str | None], liveness: int) -> str:
    """Do what must be done before the user's main module is imported; return `name`.

    Its code travels alone into a new process, before this package can be imported there, so it uses nothing of this
    module.

    - Ctrl-C does not reach the process, nor does a terminal's hang-up: it leads a group of its own.  A kill takes along
      what a task has started.
    - The kernel ends it when the pool's process is gone, even in C code that holds the GIL.  `liveness` is the read
      end of a pipe whose write end only that process holds.  On Linux its end of file is turned into SIGKILL, which no
      task can block or ignore.  Elsewhere a thread waits for it.
    - It makes the changes to its environment that the pool wants; None removes a variable.  The main module is where
      NumPy is usually imported, which reads its thread limits then; and a fork server's environment is as old as it is.
    - A main module that has no file (a program read from standard input) is not imported again: with `main` as its
      path it looks to multiprocessing as if it had been.
    """
    import fcntl
    import os
    import select
    import signal
    import sys
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)

    def exit_at_end_of_file() -> None:
        os.read(liveness, 1)
        os._exit(1)

    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(liveness, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(liveness, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(liveness, fcntl.F_SETFL, fcntl.fcntl(liveness, fcntl.F_GETFL) | os.O_ASYNC)
        poll = select.poll()
        poll.register(liveness)
        if poll.poll(0):  # it died before this was set up
            os._exit(1)
    else:
        threading.Thread(target=exit_at_end_of_file, name="cpupool-liveness", daemon=True).start()
    for variable, value in changes.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value
    if main is not None:
        sys.modules["__main__"].__file__ = main
    return name


def reset_signals() -> None:
    """Undo what a fork brought along, and leave Ctrl-C to the program."""
    signal.set_wakeup_fd(-1)
    ignored = {signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ}  # the last two by Python itself
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        ignored.add(signal.SIGHUP)  # as nohup asked
    for number in signal.valid_signals() - ignored:
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTTOU, signal.SIGTTIN):  # a worker is a background job: without the latter
        signal.signal(number, signal.SIG_IGN)  # two, a terminal would stop it for ever for printing or for asking
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def detach_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    if null != 0:
        os.dup2(null, 0)
        os.close(null)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # as long as the process lives


def close_listening_sockets() -> None:
    """Close the server sockets that a fork brought along, so that a restarted server can bind its port at once."""
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return  # not Linux: only fork inherits them, and it is not the default there
    for number in numbers:
        try:
            inherited = socket.socket(fileno=number)
        except OSError:
            continue  # no socket
        try:
            listening = inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            listening = 0
        if listening:
            inherited.close()
        else:
            inherited.detach()


def open_status_file(status: int) -> Journal:
    """Return the journal, and with it the status page."""
    os.lseek(status, STACKS_OFFSET, os.SEEK_SET)
    faulthandler.enable(status, all_threads=False)
    return open_journal(status)


def measure_resident() -> int:
    """Return how many bytes of memory this process holds now; where that is not to be had, the most it ever held."""
    resident = read_resident("self")
    if resident is not None:
        return resident
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
