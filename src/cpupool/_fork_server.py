"""A fork server of one pool's own, from which its workers are forked.

multiprocessing's own server is one for the whole program.  What it preloads is settled when it first starts, by whoever
came first; it swallows import errors; before Python 3.12.4 it does not know the program's `sys.path`, and newer ones
import the main module in it, before our part of the settling in.  So this one is started here, speaks multiprocessing's
protocol from then on, and its processes are multiprocessing's too.

Rules: the supervisor's thread alone uses it.  It never waits for the imports: `answer` becomes readable when they are
done, or have failed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.spawn
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from multiprocessing import popen_forkserver, reduction, resource_tracker, util
from multiprocessing.forkserver import read_signed
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

from . import _payload, _preload
from ._errors import decode_error, describe_exit
from ._forking import at_fork
from ._frames import FrameDecoder, Kind
from ._status import SENT_BY_OTHERS, UNKNOWN_STATUS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PROGRAM = (
    "import pickle, sys; file = open({}, 'rb'); sys.path[:] = pickle.load(file); serve = pickle.load(file); "
    "file.close(); serve()"
)
_ADDRESS = "listener"  # of the server's socket, in its folder
_LONGEST_FORK = 5.0  # seconds that a server may take to answer; it takes milliseconds
_RECEIVE_SIZE = 64 * 1024
_live: weakref.WeakSet[ForkServer] = weakref.WeakSet()


class ServerKilled(ConnectionError):
    """Somebody has killed the server."""


class ServerSilent(ConnectionError):
    """The server does not answer: it was stopped, or hangs."""


class PreloadFailed(Exception):
    """The server could not be set up, or its modules not be imported; the error itself, if any, is `__cause__`."""


class ForkServer:
    """Starts a server process, and processes from it.

    Attributes:
        answer: a descriptor that becomes readable when the server has news; None unless it is starting.
        is_ready: True while it can start processes, as far as is known.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self._preload = tuple(preload)
        self.answer: int | None = None
        self.is_ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""
        self._descriptors = contextlib.ExitStack()
        _live.add(self)

    def start(self, environment: Mapping[str, str]) -> int:
        """Start the server; its imports go on behind the caller's back.

        Returns:
            The descriptor that `answer` is from now on.

        Raises:
            OSError: no process or descriptor is to be had.
        """
        with contextlib.ExitStack() as theirs:
            try:
                return self._start(environment, theirs)
            except BaseException:
                self.stop()
                raise

    def _start(self, environment: Mapping[str, str], theirs: contextlib.ExitStack) -> int:
        self._folder = tempfile.mkdtemp(prefix="cpupool-")  # only this user may enter it
        self._descriptors.callback(self._remove_folder)
        listener = theirs.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(os.path.join(self._folder, _ADDRESS))
        listener.listen()
        liveness, our_liveness = os.pipe()
        theirs.callback(os.close, liveness)
        self._descriptors.callback(os.close, our_liveness)
        self.answer, their_answer = os.pipe()
        theirs.callback(os.close, their_answer)
        self._descriptors.callback(os.close, self.answer)
        self._decoder = FrameDecoder()
        orders = theirs.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        pickle.dump(sys.path, orders)
        preparation = multiprocessing.spawn.get_preparation_data("cpupool-fork-server")
        del preparation["authkey"]  # the workers' own
        serve = functools.partial(_preload.serve, listener.fileno(), liveness, their_answer, self._preload, preparation)
        pickle.dump(serve, orders)
        orders.seek(0)
        executable = os.fsdecode(multiprocessing.spawn.get_executable())
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        self._process = subprocess.Popen(
            [executable, *flags, "-c", _PROGRAM.format(orders.fileno())],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=(listener.fileno(), liveness, their_answer, orders.fileno()),
            process_group=0,  # Ctrl-C does not reach it
        )
        return self.answer

    def read_answer(self) -> None:
        """Read what the server has said; from READY on it is ready.

        Raises:
            PreloadFailed: it never will be.
            ServerKilled: this one never will be, but the next may.
        """
        if self.answer is None:
            return
        data = os.read(self.answer, _RECEIVE_SIZE)
        self._decoder.feed(data)
        frame = self._decoder.next_frame()
        if frame is None and data:
            return
        self.answer = None  # its descriptor is closed with the others
        if frame is None:
            status = self._wait()
            exitcode, signal = (None, -status) if status < 0 else (status, None)
            doing = f"imported {', '.join(self._preload)}" if self._preload else "started"
            text = f"the fork server {describe_exit(exitcode, signal)} while it {doing}"
            raise ServerKilled(text) if signal in SENT_BY_OTHERS else PreloadFailed(text)
        if frame.kind is not Kind.READY:
            module, body = _payload.loads(frame.body)
            what = f"{module!r}, which is to be preloaded, cannot be imported" if module else "it cannot be set up"
            raise PreloadFailed(what) from decode_error(body, f"import {module}")
        self.is_ready = True

    def connect(self, descriptors: Sequence[int]) -> tuple[int, int]:
        """Have the server fork, and give the new process these descriptors.

        Returns:
            A descriptor from which its process id and later its exit status can be read, and one to which its
            preparation data are to be written.

        Raises:
            OSError: the server is gone.
        """
        tracker = resource_tracker.getfd()
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            unused = os.open(os.devnull, os.O_RDONLY)  # multiprocessing would keep its server alive by it
            theirs.callback(os.close, unused)
            status, child_status = os.pipe()
            ours.callback(os.close, status)
            theirs.callback(os.close, child_status)
            child_data, data = os.pipe()
            theirs.callback(os.close, child_data)
            ours.callback(os.close, data)
            client = theirs.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(_LONGEST_FORK)
            # last: a server to which nothing is sent then breaks off
            client.connect(os.path.join(self._folder, _ADDRESS))
            client.setblocking(True)
            reduction.sendfds(client, [child_data, child_status, unused, tracker, *descriptors])  # type: ignore[list-item]
            ours.pop_all()
        return status, data

    def stop(self) -> None:
        """End the server at once; it can be started again."""
        self.is_ready = False
        self.answer = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, SIGKILL)  # with what its modules have started
            self._process.kill()
            self._wait()
        self._descriptors.close()

    def _wait(self) -> int:
        process, self._process = self._process, None
        return 0 if process is None else process.wait()

    def forget(self) -> None:
        """Close a forked child's copies of the descriptors, and leave the process alone: it is the parent's."""
        if self._process is not None:
            self._process.returncode = 0  # or it would warn that it still runs
            self._process = None
        self.is_ready = False
        self.answer = None
        self._folder = ""  # the parent's too
        self._descriptors.close()

    def _remove_folder(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def make_process(self, **arguments: Any) -> multiprocessing.context.ForkServerProcess:
        """Make a process that this server will start; the arguments are those of `multiprocessing.Process`."""
        return _ServedProcess(self, **arguments)

    Process = make_process  # as a context of multiprocessing has it


class _ServedProcess(multiprocessing.context.ForkServerProcess):
    """A process that is started by a server of ours; on the other side it is an ordinary one."""

    def __init__(self, server: ForkServer, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._server = server

    def _Popen(self, process_obj: Any) -> Any:  # type: ignore[override]  # noqa: N802  # multiprocessing's name
        return _Popen(process_obj, self._server)

    def __reduce__(self) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_server"}
        plain = multiprocessing.context.ForkServerProcess
        return object.__new__, (plain,), state


class _Popen(popen_forkserver.Popen):
    def __init__(self, process_obj: Any, server: ForkServer) -> None:
        self._server = server
        super().__init__(process_obj)

    def _launch(self, process_obj: Any) -> None:
        """Do as multiprocessing does, with this server instead of its own."""
        file = io.BytesIO()
        multiprocessing.context.set_spawning_popen(self)
        try:
            reduction.dump(multiprocessing.spawn.get_preparation_data(process_obj._name), file)
            reduction.dump(process_obj, file)
        finally:
            multiprocessing.context.set_spawning_popen(None)
        self.sentinel, data = self._server.connect(self._fds)  # type: ignore[attr-defined]
        parent_sentinel = os.dup(data)  # the new process takes its end for the end of this one
        self.finalizer = util.Finalize(self, util.close_fds, (parent_sentinel, self.sentinel))  # type: ignore[attr-defined]
        with open(data, "wb") as pipe:
            if not multiprocessing.connection.wait([self.sentinel], _LONGEST_FORK):
                self.finalizer()
                raise ServerSilent(f"the pool's fork server has not answered for {_LONGEST_FORK:g} s")
            self.pid = read_signed(self.sentinel)
            pipe.write(file.getbuffer())

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Do as multiprocessing does, but do not make up a status when the server has died."""
        if self.returncode is None and (flag != os.WNOHANG or multiprocessing.connection.wait([self.sentinel], 0)):
            try:
                self.returncode = read_signed(self.sentinel)
            except (OSError, EOFError):
                self.returncode = UNKNOWN_STATUS
        return self.returncode


def _forget_all() -> None:
    for server in list(_live):
        server.forget()
    _live.clear()


at_fork(after_in_child=_forget_all)
