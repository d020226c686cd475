"""What runs in a worker process.

Theory of operation: the process's one connection to the pool is a socket whose other end only its pool holds.  It reads
a CALL frame, runs it, answers with RESULT, ERROR or INTERRUPTED, and reads the next.  Nothing a task does may unbalance
that: a frame is read whole before it is unpickled, every exception becomes a frame, and standard input, output and
error are never the protocol.

Rules: stdlib and lower layers only, and nothing of asyncio, so that a worker starts in milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys

from . import _payload, _roles, _settling
from ._batches import run_batch
from ._current import Task, set_current_task, set_reporter
from ._errors import STAGE_ARGUMENTS, STAGE_RESULT, STAGE_TASK, TaskInterrupted, encode_error, encode_unpicklable
from ._frames import FrameDecoder, Kind, encode_frame, split_call
from ._interrupts import Interrupts, await_interrupts
from ._reports import Reporter
from ._status import FINISHED, PICKED_UP, RESIDENT, STAGE, STAGE_INITIALIZING, STAGE_READY, STATUS_PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from typing import Any

    from ._frames import Frame
    from ._journal import Journal

_RECEIVE_SIZE = 64 * 1024


class Duties:
    """What a worker is to do besides its tasks.

    Attributes:
        initializer, initargs: what it calls before its first task.
        finalizer: what it calls before it exits, or None.
        serializer: how it pickles results.
        weighs_itself: True if it writes down how much memory it holds after each task.
    """

    __slots__ = ("finalizer", "initargs", "initializer", "serializer", "weighs_itself")

    def __init__(
        self,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[object, ...] = (),
        finalizer: Callable[[], object] | None = None,
        serializer: str = "pickle",
        weighs_itself: bool = False,
    ) -> None:
        self.initializer = initializer
        self.initargs = initargs
        self.finalizer = finalizer
        self.serializer = serializer
        self.weighs_itself = weighs_itself

    def __reduce__(self) -> tuple[object, ...]:
        return Duties, (self.initializer, self.initargs, self.finalizer, self.serializer, self.weighs_itself)


class Setup:
    """What a new worker is given: its descriptors, the changes to its environment, and its duties.

    It is pickled while multiprocessing starts the process, so locks and queues may be among the duties' `initargs`.
    But these go into `pickled_duties`, which the pool sends over the channel: multiprocessing would block its caller
    until the new process has imported the user's main module and reads them.  What cannot be rebuilt is reported to the
    pool like an error of the initializer.
    """

    __slots__ = ("changes", "channel", "duties", "liveness", "pickled_duties", "status")

    def __init__(
        self, channel: socket.socket, liveness: int, status: int, changes: Mapping[str, str | None], duties: Duties
    ) -> None:
        self.channel = channel
        self.liveness = liveness
        self.status = status
        self.changes = changes
        self.duties = duties
        self.pickled_duties: bytes | None = None

    def __reduce__(self) -> Any:
        self.pickled_duties = _payload.dumps_for_start(self.duties, self.duties.serializer)
        return PickledSetup, (self.channel, TravellingFd(self.status))

    def settle_in(self) -> None:
        """Do in a forked process what it would otherwise have done earlier."""
        atexit._clear()  # these are the parent's
        _settling.begin_life("", None, self.changes, self.liveness)

    def receive_duties(self, _: FrameDecoder) -> Duties:
        return self.duties


class TravellingFd:
    """A descriptor that is pickled while multiprocessing starts a process, and is a number over there."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> Any:
        import operator
        from multiprocessing.reduction import DupFd

        return operator.methodcaller("detach"), (DupFd(self._fd),)


class PickledSetup:
    """A `Setup` on the other side of a process start."""

    __slots__ = ("channel", "status")

    def __init__(self, channel: socket.socket, status: int) -> None:
        self.channel = channel
        self.status = status

    def settle_in(self) -> None:
        """Nothing is left to do: its process's name has brought along `begin_life`."""

    def receive_duties(self, decoder: FrameDecoder) -> Duties:
        frame = _next_frame(self.channel, decoder)
        if frame is None:
            raise ConnectionResetError("the pool has gone")
        duties: Duties = _payload.loads(frame.body)
        return duties


def main(setup: Setup | PickledSetup) -> None:
    """Live as a worker: settle in, run the initializer, serve calls until BYE or the end, clean up."""
    _roles.become_worker()
    setup.settle_in()
    channel = setup.channel
    _settling.reset_signals()
    _settling.detach_stdin()
    _settling.close_listening_sockets()
    journal = _settling.open_status_file(setup.status)
    page = journal.page
    interrupts = Interrupts(page, setup.status)
    os.register_at_fork(after_in_child=lambda: _become_no_worker(channel, interrupts))
    await_interrupts(interrupts, setup.status)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # whole lines, and none lost in a crash
    decoder = FrameDecoder()
    dumps: Callable[[object], bytes] = _payload.dumps
    try:
        duties = setup.receive_duties(decoder)
        dumps = _payload.get_dumps(duties.serializer)
        set_reporter(Reporter(page, setup.status, dumps))
        page[STAGE] = STAGE_INITIALIZING
        if duties.initializer is not None:
            duties.initializer(*duties.initargs)
    except BaseException as error:
        with contextlib.suppress(ConnectionError):  # the pool has gone
            channel.sendall(encode_frame(Kind.ERROR, 0, encode_error(error, dumps=dumps)))
        return
    _flush_output()
    if duties.weighs_itself:
        page[RESIDENT] = _settling.measure_resident()
    page[STAGE] = STAGE_READY
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the pool has gone
        channel.sendall(encode_frame(Kind.READY))
        _serve(channel, decoder, interrupts, journal, dumps, weighs_itself=duties.weighs_itself)
    if duties.finalizer is not None:
        run_finalizer(duties.finalizer)
    atexit._run_exitfuncs()  # a forked process ends without them
    _flush_output(load_libc=True)


def run_finalizer(finalizer: Callable[[], object]) -> None:
    """Run the finalizer; nobody waits for its error, so it is printed."""
    try:
        finalizer()
    except BaseException:
        import traceback

        with contextlib.suppress(Exception):  # standard error may be closed
            print(f"cpupool: the finalizer failed in worker {os.getpid()}", file=sys.stderr)
            traceback.print_exc()


def _become_no_worker(channel: socket.socket, interrupts: Interrupts) -> None:
    """Do in what a task has forked: it must not keep a dead worker's channel open, nor write in its status page."""
    channel.close()
    set_reporter(None)
    interrupts.page = memoryview(bytearray(STATUS_PAGE_SIZE)).cast("Q")


def _serve(
    channel: socket.socket,
    decoder: FrameDecoder,
    interrupts: Interrupts,
    journal: Journal,
    dumps: Callable[[object], bytes],
    *,
    weighs_itself: bool,
) -> None:
    while (frame := _next_call(channel, decoder, interrupts.page)) is not None and frame.kind is not Kind.BYE:
        task_id = frame.task_id
        if frame.kind is Kind.BATCH:
            reply = run_batch(task_id, frame.body, interrupts, journal, dumps, channel.sendall)
        else:
            reply = _run_call(task_id, frame.body, interrupts, dumps)
        del frame  # the next wait may be long: hold neither the arguments nor, below, the result
        set_current_task(None)
        _flush_output()
        if weighs_itself:
            interrupts.page[RESIDENT] = _settling.measure_resident()
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


def _run_call(task_id: int, body: memoryview, interrupts: Interrupts, dumps: Callable[[object], bytes]) -> bytes:
    """Run one task; return the frame that answers it, whatever happens."""
    stage = STAGE_ARGUMENTS
    result: object = None
    try:
        try:
            interrupts.arm(task_id)
            attempt, label, call = split_call(body)
            set_current_task(Task(task_id, label.decode() if label else None, attempt))
            fn, args, kwargs = _payload.loads(call)
            stage = STAGE_TASK
            result = fn(*args, **kwargs)
            stage = STAGE_RESULT
            return encode_frame(Kind.RESULT, task_id, dumps(result))
        finally:
            interrupts.armed = 0  # up to here an interrupt may come; it leads to the next line, even from this one
    except BaseException as error:
        if isinstance(error, TaskInterrupted) and interrupts.hit:
            return encode_frame(Kind.INTERRUPTED, task_id)
        kind = Kind.INTERRUPTED if interrupts.hit else Kind.ERROR
        if stage is STAGE_RESULT:
            return encode_frame(kind, task_id, encode_unpicklable(error, result))
        if stage is STAGE_TASK and error.__traceback__ is not None:
            error = error.with_traceback(error.__traceback__.tb_next)  # from the task's own first line
        return encode_frame(kind, task_id, encode_error(error, stage, dumps=dumps))


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
