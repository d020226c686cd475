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
import time
from functools import partial
from types import MappingProxyType

from . import _payload, _roles, _settling
from ._batches import run_batch
from ._context import in_context, skip_own_frames
from ._current import Task, set_current_task, set_reporter
from ._errors import STAGE_ARGUMENTS, STAGE_RESULT, STAGE_TASK, TaskInterrupted, encode_error, encode_unpicklable
from ._files import ANCILLARY_FLAGS, ANCILLARY_SIZE, disclose, map_private
from ._frames import FrameDecoder, Kind, encode_frame, split_call
from ._interrupts import Interrupts, await_interrupts
from ._last_words import keep_last_words
from ._logs import forward_logs
from ._parcels import check_new_shares, first_file, take_shares, unpack
from ._replies import Arrival, Reply
from ._reports import Reporter
from ._status import (
    FINISHED,
    PICKED_UP,
    RESIDENT,
    SAID,
    SAID_BEFORE,
    STAGE,
    STAGE_INITIALIZING,
    STAGE_READY,
    STATUS_PAGE_SIZE,
)
from ._vigil import open_vigil

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from typing import Any

    from ._frames import Frame
    from ._journal import Journal
    from ._parcels import Parcel
    from ._payload import Serializer

_RECEIVE_SIZE = 64 * 1024


class Duties:
    """What a worker is to do besides its tasks.

    Attributes:
        initializer, initargs: what it calls before its first task.
        finalizer: what it calls before it exits, or None.
        serializer: how it pickles results.
        weighs_itself: True if it writes down how much memory it holds after each task.
        log_levels: see `forward_logs`.
        title: how its process is to be called, or None.
    """

    __slots__ = ("finalizer", "initargs", "initializer", "log_levels", "serializer", "title", "weighs_itself")

    def __init__(
        self,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[object, ...] = (),
        finalizer: Callable[[], object] | None = None,
        serializer: str = "pickle",
        weighs_itself: bool = False,
        log_levels: Mapping[str, int] = MappingProxyType({}),
        title: str | None = None,
    ) -> None:
        self.initializer = initializer
        self.initargs = initargs
        self.finalizer = finalizer
        self.serializer = serializer
        self.weighs_itself = weighs_itself
        self.log_levels = log_levels
        self.title = title

    def __reduce__(self) -> tuple[object, ...]:
        return Duties, (
            self.initializer,
            self.initargs,
            self.finalizer,
            self.serializer,
            self.weighs_itself,
            dict(self.log_levels),
            self.title,
        )


class Setup:
    """What a new worker is given: its descriptors, the changes to its environment, and its duties.

    It is pickled while multiprocessing starts the process, so locks and queues may be among the duties' `initargs`.
    But these go into `packed_duties`, which the pool sends over the channel: multiprocessing would block its caller
    until the new process has imported the user's main module and reads them.  What cannot be rebuilt is reported to the
    pool like an error of the initializer.
    """

    __slots__ = ("changes", "channel", "duties", "liveness", "logs", "packed_duties", "status")

    def __init__(
        self,
        channel: socket.socket,
        logs: socket.socket,
        liveness: int,
        status: int,
        changes: Mapping[str, str | None],
        duties: Duties,
    ) -> None:
        self.channel = channel
        self.logs = logs
        self.liveness = liveness
        self.status = status
        self.changes = changes
        self.duties = duties
        self.packed_duties: bytes | Parcel | None = None

    def __reduce__(self) -> Any:
        packed = _payload.pack_for_start(self.duties, self.duties.serializer)
        if not isinstance(packed, bytes):
            check_new_shares((), packed)
        self.packed_duties = packed
        return PickledSetup, (self.channel, self.logs, TravellingFd(self.status))

    def settle_in(self) -> None:
        """Do in a forked process what it would otherwise have done earlier."""
        atexit._clear()  # these are the parent's
        _settling.begin_life("", None, self.changes, self.liveness)

    def receive_duties(self, _: FrameDecoder, __: dict[int, Any]) -> Duties:
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

    __slots__ = ("channel", "logs", "status")

    def __init__(self, channel: socket.socket, logs: socket.socket, status: int) -> None:
        self.channel = channel
        self.logs = logs
        self.status = status

    def settle_in(self) -> None:
        """Nothing is left to do: its process's name has brought along `begin_life`."""

    def receive_duties(self, decoder: FrameDecoder, shares: dict[int, Any]) -> Duties:
        frame = _next_frame(self.channel, decoder)
        if frame is None:
            raise ConnectionResetError("the pool has gone")
        take_shares(frame.body, frame.files, shares)
        file = first_file(frame.body, frame.files)
        memory = None if file is None else memoryview(map_private(file))  # so that workers share what they only read
        duties: Duties = unpack(frame.body, shares=shares, memory=memory)
        return duties


def main(setup: Setup | PickledSetup) -> None:
    """Live as a worker: settle in, run the initializer, serve calls until BYE or the end, clean up."""
    _roles.become_worker()
    setup.settle_in()
    channel = setup.channel
    _settling.reset_signals()
    _settling.detach_stdin()
    _settling.close_listening_sockets()
    channel.setblocking(True)  # whatever `socket.setdefaulttimeout` the main module has asked for
    journal = _settling.open_status_file(setup.status)
    page = journal.page
    interrupts = Interrupts(page, setup.status)
    when_forked: list[Callable[[], object]] = [lambda: _become_no_worker(channel, interrupts)]
    os.register_at_fork(after_in_child=lambda: [each() for each in when_forked])
    await_interrupts(interrupts, setup.status)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # whole lines, and none lost in a crash
    when_forked.append(keep_last_words(page, setup.status))
    decoder = FrameDecoder()
    serializer = _payload.BY_NAME
    shares: dict[int, Any] = {}
    try:
        duties = setup.receive_duties(decoder, shares)
        serializer = _payload.get_serializer(duties.serializer)
        set_reporter(Reporter(page, setup.status, serializer.dumps))
        setup.logs.setblocking(False)  # whatever is logged, and whoever reads it
        when_forked.append(forward_logs(setup.logs, page, duties.log_levels))
        set_state = _open_title(duties.title)
        set_state("starting")
        page[STAGE] = STAGE_INITIALIZING
        if duties.initializer is not None:
            duties.initializer(*duties.initargs)
    except BaseException as error:
        with contextlib.suppress(ConnectionError):  # the pool has gone
            channel.sendall(encode_frame(Kind.ERROR, 0, encode_error(error, dumps=serializer.dumps)))
        return
    _flush_output()
    if duties.weighs_itself:
        page[RESIDENT] = _settling.measure_resident()
    page[STAGE] = STAGE_READY
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the pool has gone
        channel.sendall(encode_frame(Kind.READY))
        set_state("idle")
        _serve(channel, decoder, interrupts, journal, serializer, shares, set_state, weighs_itself=duties.weighs_itself)
    set_state("leaving")
    if duties.finalizer is not None:
        run_finalizer(duties.finalizer)
    atexit._run_exitfuncs()  # a forked process ends without them
    _flush_output(load_libc=True)


def _open_title(title: str | None) -> Callable[[str], object]:
    """Return what shows a state in the process's title, for `ps` and `top`; it does nothing without setproctitle."""
    if title is None:
        return bool  # it does nothing
    try:
        from setproctitle import setproctitle
    except ImportError:
        return bool  # the worker runs elsewhere than its program
    return lambda state: setproctitle(f"{title}: {state}")


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
    serializer: Serializer,
    shares: dict[int, Any],
    set_state: Callable[[str], object],
    *,
    weighs_itself: bool,
) -> None:
    wait = open_vigil(channel)
    while (frame := _next_call(channel, decoder, wait, interrupts.page)) is not None and frame.kind is not Kind.BYE:
        if frame.kind is Kind.FORGET:
            shares.pop(int.from_bytes(frame.body, "little"), None)
            continue
        task_id = frame.task_id
        set_state("busy")
        interrupts.page[SAID_BEFORE] = interrupts.page[SAID]
        if frame.kind is Kind.BATCH:
            reply: bytes | Reply = run_batch(frame, interrupts, journal, serializer, shares, channel)
        else:
            reply = _run_call(frame, interrupts, serializer, shares)
        del frame  # the next wait may be long: hold neither the arguments nor, below, the result
        set_current_task(None)
        _flush_output()
        if weighs_itself:
            interrupts.page[RESIDENT] = _settling.measure_resident()
        interrupts.page[FINISHED] = task_id
        if isinstance(reply, bytes):
            channel.sendall(reply)
        else:
            reply.send(channel)
        del reply
        set_state("idle")


def _next_call(
    channel: socket.socket, decoder: FrameDecoder, wait: Callable[[], object], page: memoryview
) -> Frame | None:
    """Wait for a whole frame and note its task in the status page; None at the end of the connection."""
    if not decoder.has_bytes:
        wait()
    frame = _next_frame(channel, decoder, page)
    if frame is not None:
        page[PICKED_UP] = frame.task_id
    return frame


def _next_frame(channel: socket.socket, decoder: FrameDecoder, page: memoryview | None = None) -> Frame | None:
    frame = decoder.next_frame() if decoder.has_bytes else None
    while frame is None:
        if decoder.incoming_task_id is not None and page is not None:
            page[PICKED_UP] = decoder.incoming_task_id  # its header is enough: it must not go to another worker now
        size = min(max(decoder.missing, _RECEIVE_SIZE), 16 * _RECEIVE_SIZE)
        data, ancillary, _, _ = channel.recvmsg(size, ANCILLARY_SIZE, ANCILLARY_FLAGS)
        if not data:
            return None
        decoder.feed(data, disclose(ancillary) if ancillary else ())
        frame = decoder.next_frame()
    return frame


def _run_call(frame: Frame, interrupts: Interrupts, serializer: Serializer, shares: dict[int, Any]) -> bytes | Reply:
    """Run one task; return the frame that answers it, whatever happens."""
    task_id, files = frame.task_id, frame.files
    stage = STAGE_ARGUMENTS
    result: object = None
    began = seconds = 0.0
    attempt, label, context, call = split_call(frame.body)
    arrival = Arrival(call, files, shares) if files else None
    try:
        try:
            interrupts.arm(task_id)
            set_current_task(Task(task_id, label.decode() if label else None, attempt))
            fn, args, kwargs = unpack(call, shares=shares) if arrival is None else arrival.unpack()
            if context:
                fn = in_context(context, fn)
            stage = STAGE_TASK
            began = time.perf_counter()
            result = fn(*args, **kwargs)
            seconds = time.perf_counter() - began
            stage = STAGE_RESULT
            packed = _payload.pack_result(result, serializer)
        finally:
            interrupts.armed = 0  # up to here an interrupt may come; it leads to the next line, even from this one
            if arrival is not None:
                arrival.close()
    except BaseException as error:
        if isinstance(error, TaskInterrupted) and interrupts.hit:
            return encode_frame(Kind.INTERRUPTED, task_id)
        kind = Kind.INTERRUPTED if interrupts.hit else Kind.ERROR
        if stage is STAGE_RESULT:
            return encode_frame(kind, task_id, encode_unpicklable(error, result), seconds=seconds)
        if stage is STAGE_TASK:
            seconds = time.perf_counter() - began
            error = error.with_traceback(skip_own_frames(error.__traceback__, __file__))
        return encode_frame(kind, task_id, encode_error(error, stage, dumps=serializer.dumps), seconds=seconds)
    if isinstance(packed, bytes):
        return encode_frame(Kind.RESULT, task_id, packed, seconds=seconds)
    return Reply.of_parcel(packed, partial(encode_frame, Kind.RESULT, task_id, seconds=seconds))


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
