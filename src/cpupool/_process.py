"""One operating-system process that is to become a worker: start it with its descriptors, kill it, learn how it ended.

Rules: a `WorkerProcess` holds the pool's ends of the worker's channel, liveness pipe and status page, and nobody else
does.  Programs that fork (with `os.fork` or through multiprocessing) copy descriptors into processes that know nothing
of them; in every such child `_forget_all` closes these copies first of all, so that a worker still notices the end of
its real parent.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import marshal
import math
import multiprocessing
import multiprocessing.process
import multiprocessing.spawn
import os
import signal
import socket
import sys
import weakref
from typing import TYPE_CHECKING

from . import _batches, _child, _logs, _replies, _settling, _status, _vigil
from ._files import open_nameless_file
from ._forking import at_fork
from ._journal import read_journal
from ._last_words import STACKS_OFFSET, read_last_words
from ._reports import read_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from multiprocessing.context import BaseContext

_MAX_STACK_BYTES = 64 * 1024
# The files whose frames are not a task's own.
_NO_TASKS = (_child.__file__, _batches.__file__, _replies.__file__, _vigil.__file__)
_live: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()

DEFAULT_START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"


def get_context(context: str | BaseContext | None) -> BaseContext:
    """Return the context itself, or the one of that name; by default one that is safe in a program with threads.

    Raises:
        NotImplementedError: this system has no way to hand descriptors to a new process.
    """
    if not hasattr(socket, "send_fds"):
        raise NotImplementedError("cpupool needs a POSIX system: there is no support for Windows yet, except under WSL")
    if context is None:
        context = DEFAULT_START_METHOD
    return multiprocessing.get_context(context) if isinstance(context, str) else context


class WorkerProcess:
    """A started process, seen from the pool.

    Attributes:
        pid: its process id.
        channel: the pool's end of its socket, non-blocking.
        logs: the pool's end of the socket on which come what it logs, non-blocking; see `_logs`.
        sentinel: a descriptor that becomes readable when the process has ended.
        packed_duties: what has to be sent to it first; None for a forked one, which has it.
    """

    def __init__(
        self, context: BaseContext, name: str, changes: Mapping[str, str | None], duties: _child.Duties
    ) -> None:
        """Start the process; `changes` are those to its environment, as in `begin_life`.

        Raises:
            OSError: no process or descriptor is to be had.
            Exception: whatever pickling the duties raises.
        """
        self._pidfd: int | None = None
        self._is_forgotten = False
        self._is_status_lost = False
        self._descriptors = contextlib.ExitStack()
        with contextlib.ExitStack() as theirs:
            try:
                channel, logs, liveness, status = self._open_descriptors(theirs)
                setup = _child.Setup(channel, logs, liveness, status, changes, duties)
                process_type = context.Process  # type: ignore[attr-defined]  # typeshed has it on the subclasses
                self._process = process_type(target=_child.main, args=(setup,), daemon=False)
                self._process.name = _NameThatBeginsLife(name, changes, liveness)
                _live.add(self)
                with _daemon_may_have_children():
                    self._process.start()
                self.packed_duties = setup.packed_duties
            except BaseException:
                self.close()
                raise
        self.pid: int = self._process.pid
        # multiprocessing would join our workers at exit, and wait for them in passing; they are ours alone to reap.
        multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # gone already, or a kernel without it
                self._pidfd = os.pidfd_open(self.pid)
        self._watched_pid = self._pidfd is not None

    def _open_descriptors(self, theirs: contextlib.ExitStack) -> tuple[socket.socket, socket.socket, int, int]:
        """Open both ends of everything; return the worker's, which `theirs` closes here."""
        self.channel, channel = socket.socketpair()
        self._descriptors.callback(self.channel.close)
        theirs.callback(channel.close)
        self.channel.setblocking(False)
        channel.setblocking(True)  # whatever `socket.setdefaulttimeout` says
        self.logs, logs = _logs.open_sockets()
        self._descriptors.callback(self.logs.close)
        theirs.callback(logs.close)
        liveness, our_liveness = os.pipe()
        self._descriptors.callback(os.close, our_liveness)
        theirs.callback(os.close, liveness)
        self._status = _open_status_file()
        self._descriptors.callback(os.close, self._status)
        status = os.dup(self._status)
        theirs.callback(os.close, status)
        return channel, logs, liveness, status

    @property
    def sentinel(self) -> int:
        return self._process.sentinel if self._pidfd is None else self._pidfd

    def stop_watching_pid(self) -> bool:
        """Make `sentinel` the one that says the exit status is here: a fork server reports it a little later.

        Returns:
            False if it already was that one.
        """
        if self._pidfd is None:
            return False
        os.close(self._pidfd)
        self._pidfd = None
        return True

    @property
    def has_ended(self) -> bool:
        """True if it is known to have ended, though perhaps not how."""
        return self._watched_pid and self._pidfd is None

    def give_up_status(self) -> None:
        """Wait for the exit status no longer: the fork server does not report it."""
        self._is_status_lost = True

    def poll(self) -> int | None:
        """Return the exit status, or None while the process has not ended.

        A negative one is the signal that ended it; `UNKNOWN_STATUS` says that nobody could learn it.
        """
        status: int | None = self._process.exitcode
        return _status.UNKNOWN_STATUS if status is None and self._is_status_lost else status

    def last_task_id(self) -> int:
        """Return the id of the task that the worker last picked up, 0 if none; true after its death too."""
        return self._read_cell(_status.PICKED_UP)

    def stage(self) -> int:
        """Return how far it has come: one of the stages in `_status`."""
        return self._read_cell(_status.STAGE)

    def resident(self) -> int:
        """Return the bytes of memory it held after its last task, if it weighs itself, else 0."""
        return self._read_cell(_status.RESIDENT)

    def has_started(self, task_id: int) -> bool:
        """Return True if that is the last task whose call the worker has received as a whole, and begun."""
        return self._read_cell(_status.STARTED) == task_id

    def has_finished(self, task_id: int) -> bool:
        """Return True if that is the last task that the worker is done with."""
        return self._read_cell(_status.FINISHED) == task_id

    def has_felt_interrupt(self, task_id: int) -> bool:
        """Return True if that is the last task in which `TaskInterrupted` was raised."""
        return self._read_cell(_status.INTERRUPTED) == task_id

    def _read_cell(self, index: int) -> int:
        return int.from_bytes(os.pread(self._status, _status.CELL_SIZE, index * _status.CELL_SIZE), sys.byteorder)

    def items_done(self, task_id: int) -> int | None:
        """Return how many items of a batch are done, which is the number of the one that runs; None before any can."""
        sent = self._read_cell(_status.SENT)
        if sent == _status.NOT_BEGUN or not self.has_started(task_id):
            return None
        return sent + self._read_cell(_status.HELD)

    def running_item(self, task_id: int) -> tuple[int, float] | None:
        """Return the number of a timed batch's running item, and when it began, in monotonic seconds.

        None before any item runs, infinite while results are being sent.
        """
        while (item := self.items_done(task_id)) is not None:
            since = self._read_cell(_status.SINCE)
            if self.items_done(task_id) == item:
                return item, math.inf if since == _status.NOT_NOW else since / 1e9
        return None

    def read_journal(self, task_id: int) -> bytes | None:
        """Return the results of that batch that its worker holds back; None if there are none."""
        if not self.has_started(task_id):
            return None
        return read_journal(self._read_cell, functools.partial(os.pread, self._status))

    def last_report(self) -> int:
        """Return the number of the last report of a task, 0 before any."""
        return self._read_cell(_status.REPORTED)

    def read_report(self, seen: int) -> tuple[int, bytes] | None:
        """Return number and value, pickled, of the last report of a task, unless that is number `seen`."""
        return read_report(self._read_cell, functools.partial(os.pread, self._status), seen)

    def condemn(self, task_id: int, item: int = _status.EVERY_ITEM) -> None:
        """Let that task be interrupted: at its start, if it has not started, else by the next signal.

        Of a batch, only while that item runs.
        """
        if self._is_forgotten:
            return
        self._forget_stacks()  # what follows is of this task
        self._write_cell(_status.CONDEMNED_ITEM, item)
        self._write_cell(_status.CONDEMNED, task_id)

    def cut(self, task_id: int) -> None:
        """Let that batch end after the item that runs, which feels nothing."""
        if not self._is_forgotten:
            self._write_cell(_status.CUT, task_id)
            self.send_interrupt()

    def has_seen_cut(self) -> bool:
        """Return True if the worker knows of the last `cut`."""
        return self._read_cell(_status.CUT) == 0

    def _write_cell(self, index: int, value: int) -> None:
        os.pwrite(self._status, value.to_bytes(_status.CELL_SIZE, sys.byteorder), index * _status.CELL_SIZE)

    def send_interrupt(self) -> None:
        """Send the signal: `TaskInterrupted` is raised in the condemned task, if that runs; see also `cut`."""
        self._send_signal(_status.INTERRUPT_SIGNAL)

    def ask_for_stack(self) -> None:
        """Let `faulthandler` write down where the worker is, even if it runs C code that holds the GIL."""
        self._send_signal(_status.STACK_SIGNAL)

    def ask_task_for_stack(self, number: int) -> None:
        """Let the task write down where it is, at its next step in Python, and say so with that number."""
        if not self._is_forgotten:
            self._write_cell(_status.ASKED, number)
            self.send_interrupt()

    def has_told_stack(self, number: int) -> bool:
        """Return True if it has done so."""
        return self._read_cell(_status.TOLD) == number

    def stacks_end(self) -> int:
        """Return where in its file the next stack will begin."""
        return max(os.fstat(self._status).st_size, STACKS_OFFSET)

    def read_stack(self, start: int) -> str | None:
        """Return the Python stack that was written there; empty if it has nothing of a task in it, None without one."""
        if start > self.stacks_end():  # they were forgotten meanwhile
            start = STACKS_OFFSET
        return _task_stack(os.pread(self._status, _MAX_STACK_BYTES, start).decode("utf-8", "replace"))

    def forget_old_stacks(self) -> None:
        """Keep the file of the stacks small; a crash that is just being written down is lost."""
        if self.stacks_end() > STACKS_OFFSET + _MAX_STACK_BYTES:
            self._forget_stacks()

    def last_words(self) -> str | None:
        """Return the last lines that the running task has written to standard error; None if it has not."""
        return read_last_words(self._read_cell, functools.partial(os.pread, self._status))

    def lost_logs(self) -> int:
        """Return how many records it could not send, of those that it has logged."""
        return self._read_cell(_status.LOGS_LOST)

    def _send_signal(self, number: int) -> None:
        if self._is_forgotten:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            elif self.poll() is None:
                os.kill(self.pid, number)

    def take_stack(self) -> str | None:
        """Return, and forget, the Python stack at a crash, or else the first that was written after an interrupt."""
        stack = self.read_stack(STACKS_OFFSET)
        if stack is not None:
            self._forget_stacks()
        return stack or None

    def _forget_stacks(self) -> None:
        os.ftruncate(self._status, STACKS_OFFSET)
        os.lseek(self._status, STACKS_OFFSET, os.SEEK_SET)  # of the worker too: it is one open file

    def kill(self) -> None:
        """End the process and what it started, at once."""
        if self._is_forgotten:
            return  # it is the parent's
        with contextlib.suppress(ProcessLookupError, PermissionError):  # permission: privileges were dropped
            os.killpg(self.pid, signal.SIGKILL)  # no such group yet while the process is settling in
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)  # never another process with the same number
            else:
                self._process.kill()

    def close(self) -> None:
        """Give the descriptors back.  Twice is allowed."""
        _live.discard(self)
        self.stop_watching_pid()
        self._descriptors.close()
        with contextlib.suppress(ValueError, AttributeError):  # not ended yet, or never started
            self._process.close()

    def forget(self) -> None:
        """Close a forked child's copies of the descriptors, and leave the process alone from now on."""
        self._is_forgotten = True
        self.stop_watching_pid()
        self._descriptors.close()


def _task_stack(text: str) -> str | None:
    """Return the first stack in a text, or the one at a crash, without what is below the task; None if it is empty."""
    if not text:
        return None
    crash = text.find(_status.CRASH_HEADING)
    stacks = text[max(crash, 0) :].split(f"\n{_status.STACK_HEADING}")
    text = f"\n{_status.STACK_HEADING}".join(stacks[: 1 if crash < 0 else 2])  # a crash has a heading of its own
    own = itertools.takewhile(lambda line: not any(map(line.__contains__, _NO_TASKS)), text.splitlines())
    stack = "\n".join(own).strip()
    return "" if stack == _status.STACK_HEADING else stack


class _NameThatBeginsLife(str):
    """The process's name, which takes `begin_life` along.

    A new process unpickles its name before anything else: before multiprocessing makes it import the user's main
    module, which may take long, or fail, or never end.  The function travels as its compiled code, because the way to
    this package may not yet be in the new process's `sys.path`.
    """

    __slots__ = ("_arguments", "_has_travelled")
    _arguments: tuple[Mapping[str, str | None], int]
    _has_travelled: bool

    def __new__(cls, name: str, changes: Mapping[str, str | None], liveness: int) -> _NameThatBeginsLife:
        self = str.__new__(cls, name)
        self._arguments = changes, liveness
        self._has_travelled = False
        return self

    def __reduce__(self) -> tuple[object, ...]:
        if self._has_travelled:
            return str, (str(self),)  # multiprocessing pickles it once more, with the process
        self._has_travelled = True
        changes, liveness = self._arguments
        call = (
            "__import__('types').FunctionType(__import__('marshal').loads(code), {'__builtins__': __builtins__})"
            "(*arguments)"
        )
        arguments = str(self), _main_path_without_file(), dict(changes), _child.TravellingFd(liveness)
        return eval, (call, {"code": marshal.dumps(_settling.begin_life.__code__), "arguments": arguments})


def _main_path_without_file() -> str | None:
    """Return the path by which multiprocessing would import the main module, if there is no file."""
    path: str | None = multiprocessing.spawn.get_preparation_data("").get("init_main_from_path")
    return None if path is None or os.path.exists(path) else path


@contextlib.contextmanager
def _daemon_may_have_children() -> Iterator[None]:
    """Let multiprocessing start a process in one that is daemonic, as hypercorn's are.

    It refuses, because they would be left behind when that one is killed; ours end with their parent.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    is_daemon = config.pop("daemon", False)
    try:
        yield
    finally:
        if is_daemon:
            config["daemon"] = True


def _open_status_file() -> int:
    """Make a file without a name, for the worker's status page, its journal, and stacks."""
    number = open_nameless_file("cpupool-status").detach()
    os.truncate(number, STACKS_OFFSET)
    return number


def _forget_all() -> None:
    for process in list(_live):
        process.forget()
    _live.clear()
    _forget_fork_server()


def _forget_fork_server() -> None:
    """Let a forked child have a fork server of its own: multiprocessing would take its parent's for its own child."""
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    if server is not None and server._forkserver_pid is not None:
        os.close(server._forkserver_alive_fd)  # or the parent's server would wait for this process's end too
        server._forkserver_pid = server._forkserver_alive_fd = server._forkserver_address = None


at_fork(after_in_child=_forget_all)
