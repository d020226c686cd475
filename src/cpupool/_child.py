"""What runs in a worker process.

Theory of operation: the process's one connection to the pool is a socket whose other end only its pool holds.  It reads
a CALL frame, runs it, answers with RESULT, ERROR or INTERRUPTED, and reads the next.  Nothing a task does may unbalance
that: a frame is read whole before it is unpickled, every exception becomes a frame, and standard input, output and
error are never the protocol.

Rules: stdlib and layer 0 only, and nothing of asyncio, so that a worker starts in milliseconds.

The *status page* is one file of memory that both sides hold; its cells are numbered below.  The worker writes which
task it last picked up, so that the pool knows, whatever happened, whether a lost call had begun; which it last started,
when its call was here as a whole; which it has last interrupted; and which it last finished.  The pool writes which
task it has condemned, and then sends the interrupt signal.  Behind that page `faulthandler` appends Python stacks: at a
crash, and at each interrupt, before the task feels it.

How an interrupt can only hit the task it is meant for: see `Interrupts`.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import mmap
import os
import select
import signal
import socket
import sys
import threading

from . import _payload, _roles
from ._current import Task, set_current_task
from ._errors import STAGE_ARGUMENTS, STAGE_RESULT, STAGE_TASK, TaskInterrupted, encode_error
from ._frames import FrameDecoder, Kind, encode_frame, split_call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

    from ._frames import Frame

STATUS_PAGE_SIZE = mmap.PAGESIZE
# Cells of the status page: task ids, each a native unsigned 64-bit number.
PICKED_UP, STARTED, CONDEMNED, INTERRUPTED, FINISHED = range(5)
CELL_SIZE = 8

# Of the real-time signals, one that no C library reserves.  SIGUSR1 and SIGUSR2 stay the users': `faulthandler` is
# often registered for one of them, and that would take the interrupt away.
INTERRUPT_SIGNAL: int = signal.SIGRTMIN + 6 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2

# Threads that numerical libraries start for themselves; each reads its variable once, when it is imported.
THREAD_LIMIT_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

# What faulthandler writes begins with the second, at a crash with the first.
CRASH_HEADING, STACK_HEADING = "Fatal Python error: ", "Stack (most recent call first):"

_RECEIVE_SIZE = 64 * 1024
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # the file name of its frames


class Setup:
    """What a new worker is given: its descriptors and its initializer.

    It is pickled while multiprocessing starts the process, so locks and queues may be among `initargs`.  But these go
    into `initializer_pickle`, which the pool sends over the channel: multiprocessing would block its caller until the
    new process has imported the user's main module and reads them.  One that cannot be rebuilt is reported to the pool
    like an error of the initializer.
    """

    __slots__ = ("channel", "initargs", "initializer", "initializer_pickle", "liveness", "status", "threads")

    def __init__(
        self,
        channel: socket.socket,
        liveness: int,
        status: int,
        threads: int,
        initializer: Callable[..., object] | None,
        initargs: tuple[object, ...],
    ) -> None:
        self.channel = channel
        self.liveness = liveness
        self.status = status
        self.threads = threads
        self.initializer = initializer
        self.initargs = initargs
        self.initializer_pickle: bytes | None = None

    def __reduce__(self) -> Any:
        import operator
        from multiprocessing.reduction import DupFd, ForkingPickler

        self.initializer_pickle = bytes(ForkingPickler.dumps((self.initializer, self.initargs), _payload.PROTOCOL))
        detach = operator.methodcaller("detach")
        liveness, status = (_Unpickled(detach, DupFd(fd)) for fd in (self.liveness, self.status))
        return PickledSetup, (self.channel, liveness, status, self.threads)

    def receive_initializer(self, _: FrameDecoder) -> tuple[Callable[..., object] | None, tuple[object, ...]]:
        return self.initializer, self.initargs


class _Unpickled:
    """Pickles as the call `function(argument)`, made on the other side."""

    def __init__(self, function: Callable[[Any], Any], argument: object) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


class PickledSetup:
    """A `Setup` on the other side of a process start."""

    __slots__ = ("channel", "liveness", "status", "threads")

    def __init__(self, channel: socket.socket, liveness: int, status: int, threads: int) -> None:
        self.channel = channel
        self.liveness = liveness
        self.status = status
        self.threads = threads

    def receive_initializer(self, decoder: FrameDecoder) -> tuple[Callable[..., object] | None, tuple[object, ...]]:
        frame = _next_frame(self.channel, decoder)
        if frame is None:
            raise ConnectionResetError("the pool has gone")
        pair: tuple[Callable[..., object] | None, tuple[object, ...]] = _payload.loads(frame.body)
        return pair


def main(setup: Setup | PickledSetup) -> None:
    """Live as a worker: settle in, run the initializer, then serve calls until BYE or the end of the connection."""
    _roles.become_worker()
    channel = setup.channel
    if isinstance(setup, Setup):
        atexit._clear()  # forked: these are the parent's
    _reset_signals()
    os.setpgid(0, 0)  # Ctrl-C does not reach it, and a kill takes along what a task has started
    _detach_stdin()
    _close_listening_sockets()
    _limit_library_threads(setup.threads)
    _die_with_parent(setup.liveness)
    page = _open_status_page(setup.status)
    interrupts = Interrupts(page)
    os.register_at_fork(after_in_child=lambda: _become_no_worker(channel, interrupts))
    _await_interrupts(interrupts, setup.status)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # whole lines, and none lost in a crash
    decoder = FrameDecoder()
    try:
        initializer, initargs = setup.receive_initializer(decoder)
        if initializer is not None:
            initializer(*initargs)
    except BaseException as error:
        with contextlib.suppress(ConnectionError):  # the pool has gone
            channel.sendall(encode_frame(Kind.ERROR, 0, encode_error(error)))
        return
    _flush_output()
    try:
        channel.sendall(encode_frame(Kind.READY))
        _serve(channel, decoder, interrupts)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the pool has gone
    atexit._run_exitfuncs()  # a forked process ends without them
    _flush_output(load_libc=True)


class Interrupts:
    """Lets the pool's interrupt raise `TaskInterrupted` in the task it is meant for, and never anywhere else.

    Rules: the pool writes the condemned task's id into the page before it sends the signal; a task is armed before it
    looks at the page.  So whichever comes first, the signal or the task, one of the two sees the other.  A signal that
    comes when its task is not armed, be it late or early, does nothing: the page names another task, or none is armed.

    Attributes:
        armed: the id of the task that may be interrupted now, 0 for none.  A task is interrupted once at most.
        hit: True if the task that was armed last has been interrupted.
    """

    __slots__ = ("armed", "hit", "page")

    def __init__(self, page: memoryview) -> None:
        self.page = page
        self.armed = 0
        self.hit = False

    def arm(self, task_id: int) -> None:
        """Let `task_id` be interrupted from now on; raises at once if it is condemned already."""
        self.hit = False
        self.armed = task_id
        self.page[STARTED] = task_id
        self.raise_if_condemned()

    def raise_if_condemned(self, _number: int = 0, frame: FrameType | None = None) -> None:
        """Handle the signal: raise in the task that is armed, if it is the one, and where it can be raised.

        Else it waits for the pool's next signal.
        """
        if self.armed and self.page[CONDEMNED] == self.armed and not _must_not_raise_in(frame):
            self.page[INTERRUPTED] = self.armed
            self.armed = 0
            self.hit = True
            raise TaskInterrupted


def _must_not_raise_in(frame: FrameType | None) -> bool:
    """Return True in a `__del__`, where Python ignores what is raised, and in an import.

    A broken-off import spoils the worker for good: modules that the broken one had imported stay in `sys.modules`, but
    the next try does not bind them in it (`NameError` and `AttributeError` out of nowhere).
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False


def _become_no_worker(channel: socket.socket, interrupts: Interrupts) -> None:
    """Do in what a task has forked: it must not keep a dead worker's channel open, nor write in its status page."""
    channel.close()
    interrupts.page = memoryview(bytearray(STATUS_PAGE_SIZE)).cast("Q")


def _serve(channel: socket.socket, decoder: FrameDecoder, interrupts: Interrupts) -> None:
    while (frame := _next_call(channel, decoder, interrupts.page)) is not None and frame.kind is not Kind.BYE:
        task_id = frame.task_id
        reply = _run_call(task_id, frame.body, interrupts)
        del frame  # the next wait may be long: hold neither the arguments nor, below, the result
        set_current_task(None)
        _flush_output()
        interrupts.page[FINISHED] = task_id
        channel.sendall(reply)
        del reply


def _next_call(channel: socket.socket, decoder: FrameDecoder, page: memoryview) -> Frame | None:
    """Wait for a whole frame and note its task in the status page; None at the end of the connection."""
    frame = _next_frame(channel, decoder, page)
    if frame is not None:
        page[PICKED_UP] = frame.task_id
    return frame


def _next_frame(channel: socket.socket, decoder: FrameDecoder, page: memoryview | None = None) -> Frame | None:
    while (frame := decoder.next_frame()) is None:
        if decoder.incoming_task_id is not None and page is not None:
            page[PICKED_UP] = decoder.incoming_task_id  # its header is enough: it must not go to another worker now
        data = channel.recv(min(max(decoder.missing, _RECEIVE_SIZE), 16 * _RECEIVE_SIZE))
        if not data:
            return None
        decoder.feed(data)
    return frame


def _run_call(task_id: int, body: memoryview, interrupts: Interrupts) -> bytes:
    """Run one task; return the frame that answers it, whatever happens."""
    stage = STAGE_ARGUMENTS
    subject = ""
    try:
        try:
            interrupts.arm(task_id)
            attempt, label, call = split_call(body)
            set_current_task(Task(task_id, label.decode() if label else None, attempt))
            fn, args, kwargs = _payload.loads(call)
            stage = STAGE_TASK
            result = fn(*args, **kwargs)
            stage = STAGE_RESULT
            subject = f"{type(result).__module__}.{type(result).__qualname__}".removeprefix("builtins.")
            return encode_frame(Kind.RESULT, task_id, _payload.dumps(result))
        finally:
            interrupts.armed = 0  # up to here an interrupt may come; it leads to the next line, even from this one
    except BaseException as error:
        if isinstance(error, TaskInterrupted) and interrupts.hit:
            return encode_frame(Kind.INTERRUPTED, task_id)
        if stage is STAGE_TASK and error.__traceback__ is not None:
            error.__traceback__ = error.__traceback__.tb_next  # from the task's own first line
        elif stage is STAGE_RESULT:
            error = _Reason(error)
        kind = Kind.INTERRUPTED if interrupts.hit else Kind.ERROR
        return encode_frame(kind, task_id, encode_error(error, stage, subject))


class _Reason(Exception):
    """Why a result does not pickle: type and message of pickle's complaint, as one text."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.__traceback__ = error.__traceback__


# --- settling in ------------------------------------------------------------------------------------------------------


def _reset_signals() -> None:
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


def _detach_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    if null != 0:
        os.dup2(null, 0)
        os.close(null)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # as long as the process lives


def _close_listening_sockets() -> None:
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


def _limit_library_threads(threads: int) -> None:
    """Give numerical libraries this worker's share of the CPUs, unless the user decided otherwise."""
    for variable in THREAD_LIMIT_VARIABLES:
        os.environ.setdefault(variable, str(threads))


def _die_with_parent(liveness: int) -> None:
    """Let the kernel end this process when the pool's process is gone, even in C code that holds the GIL.

    `liveness` is the read end of a pipe whose write end only that process holds.  On Linux its end of file is turned
    into SIGKILL, which no task can block or ignore.  Elsewhere a thread waits for it.
    """
    import fcntl

    if not hasattr(fcntl, "F_SETSIG"):
        threading.Thread(target=_exit_at_end_of_file, args=(liveness,), name="cpupool-liveness", daemon=True).start()
        return
    fcntl.fcntl(liveness, fcntl.F_SETOWN, -os.getpgrp())  # the group: what the task has started dies too
    fcntl.fcntl(liveness, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(liveness, fcntl.F_SETFL, fcntl.fcntl(liveness, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(liveness)
    if poll.poll(0):  # it died before this was set up
        os._exit(1)


def _exit_at_end_of_file(liveness: int) -> None:
    os.read(liveness, 1)
    os._exit(1)


def _open_status_page(status: int) -> memoryview:
    os.lseek(status, STATUS_PAGE_SIZE, os.SEEK_SET)
    faulthandler.enable(status, all_threads=False)
    return memoryview(mmap.mmap(status, STATUS_PAGE_SIZE)).cast("Q")


def _await_interrupts(interrupts: Interrupts, status: int) -> None:
    """Handle the interrupt signal: first `faulthandler` writes the stack, then Python runs the handler."""
    signal.signal(INTERRUPT_SIGNAL, interrupts.raise_if_condemned)
    faulthandler.register(INTERRUPT_SIGNAL, status, all_threads=False, chain=True)


_flush_libc: Callable[[None], object] | None = None


def _flush_output(load_libc: bool = False) -> None:
    """Write out what the task printed, from C too where ctypes is at hand: a kill would lose it."""
    global _flush_libc  # noqa: PLW0603  # found once
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except Exception:
            pass  # no stream, or closed, or not read, or one of the task's own making: not the task's failure
    if _flush_libc is None and (load_libc or "ctypes" in sys.modules):
        try:
            import ctypes

            _flush_libc = ctypes.CDLL(None).fflush
        except (ImportError, OSError, TypeError, AttributeError):
            return  # no ctypes here
    if _flush_libc is not None:
        _flush_libc(None)
