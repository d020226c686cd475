"""How this program's pools can be looked at from outside: by `python -m cpupool stacks PID` and `doctor PID`.

Theory of operation: a thread answers on a socket in a folder that only this user may enter, one question at a time: a
word, and a line of JSON in return.  There is no such thread unless the program, or its environment, asks for it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import socket
import stat
import struct
import tempfile
import threading
from pathlib import Path
from typing import Any

from ._events import logger
from ._forking import at_fork

VARIABLE = "CPUPOOL_INSPECT"
_LONGEST_QUESTION, _LONGEST_ANSWER = 1.0, 10.0  # seconds
_MOST_BYTES = 4096  # of a question


def allow_inspection() -> None:
    """Let this user look into this program's pools from outside, until it ends: `python -m cpupool stacks PID`.

    The environment variable `CPUPOOL_INSPECT=1` does the same for a program whose pools run.  Where a worker is, and
    what it runs, can be seen, and nothing be changed; only processes of the same user (and root) can ask.  Calling it
    again does nothing.

    Raises:
        PermissionError: the folder for the socket belongs to somebody else, or others may enter it.
        OSError: there can be no socket.
    """
    global _door  # noqa: PLW0603  # a process has one
    with _lock:
        if _door is None:
            _door = _Door()


def allow_inspection_if_wanted() -> None:
    """Do so if the environment asks for it; what goes wrong is logged, and no more."""
    if os.environ.get(VARIABLE, "").strip() in ("", "0"):
        return
    try:
        allow_inspection()
    except Exception as error:
        logger.warning("%s is set, but this program cannot be looked into: %s", VARIABLE, error)


def ask(pid: int, question: str) -> Any:
    """Return what the program with that process id answers.

    Raises:
        OSError: it cannot be asked; the message says why.
    """
    user = _user_of(pid)
    refused = ""
    for folder in dict.fromkeys(_folders(user)):
        path = folder / f"{pid}.socket"
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(_LONGEST_ANSWER)
            try:
                _check(folder, user)
                channel.connect(str(path))
                channel.sendall(question.encode() + b"\n")
                with channel.makefile("rb") as answer:
                    line = answer.readline()
            except FileNotFoundError:
                continue
            except PermissionError as error:
                refused = str(error)
                continue
            except ConnectionRefusedError:
                refused = f"there is no program with process id {pid} any more"
                continue
        try:
            return json.loads(line)
        except ValueError:
            raise OSError(f"the program with process id {pid} has not answered") from None
    raise OSError(refused or _explain(pid))


def _user_of(pid: int) -> int:
    """Return the effective user id of a process; this one's if it has gone, or this is not Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("\nUid:")[1].split()[1])
    except (OSError, IndexError, ValueError):
        return os.geteuid()


def _explain(pid: int) -> str:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, 0)
        return (
            f"the program with process id {pid} does not let itself be looked into: start it with {VARIABLE}=1, or let "
            "it call cpupool.allow_inspection()"
        )
    return f"there is no program with process id {pid}, or it is not yours"


def _folders(user: int) -> list[Path]:
    """Return where the socket of a program of that user may be; its own choice is the first that there is."""
    runtimes = [Path(each) for each in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}") if each]
    return [
        *(runtime / "cpupool" for runtime in runtimes),
        *(Path(folder) / f"cpupool-{user}" for folder in (tempfile.gettempdir(), "/tmp")),
    ]


def _make_folder() -> Path:
    """Return the folder for this program's socket.

    Raises:
        PermissionError: others have made it, or may enter it.
    """
    folder = next(each for each in _folders(os.geteuid()) if each.parent.is_dir() and os.access(each.parent, os.W_OK))
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _check(folder, os.geteuid())
    return folder


def _check(folder: Path, user: int) -> None:
    """Raise PermissionError unless the folder is that user's alone."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder that belongs to you, and that nobody else may enter")


class _Door:
    def __init__(self) -> None:
        self._path = _make_folder() / f"{os.getpid()}.socket"
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._path.unlink(missing_ok=True)  # of a process that had this number before
            self._socket.bind(str(self._path))
            self._socket.listen()
            threading.Thread(target=self._serve, name="cpupool-inspection", daemon=True).start()
        except BaseException:
            self._socket.close()
            self._path.unlink(missing_ok=True)
            raise

    def _serve(self) -> None:
        while True:
            try:
                channel, _ = self._socket.accept()
            except OSError:
                return  # closed
            with channel, contextlib.suppress(Exception):  # who has asked gets no answer; others will
                channel.settimeout(_LONGEST_QUESTION)
                if _is_ours(channel):
                    with channel.makefile("rb") as lines:
                        question = lines.readline(_MOST_BYTES).decode().strip()
                    channel.sendall(json.dumps(_answer(question)).encode() + b"\n")

    def close(self, *, is_copy: bool = False) -> None:
        """Close it; `is_copy` says that it is a forked child's."""
        if not is_copy:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # else the thread would go on waiting
        self._socket.close()


def _is_ours(channel: socket.socket) -> bool:
    """Return True if who asks is this user, or root."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # the folder has seen to that
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] in (os.geteuid(), 0)


def _answer(question: str) -> Any:
    from ._pool import is_running, list_pools

    pools = sorted((pool for pool in list_pools() if is_running(pool)), key=lambda pool: pool.settings.name)
    found = [dataclasses.asdict(pool.statistics()) for pool in pools]
    if question == "stacks":
        for pool, each in zip(pools, found, strict=True):
            each["stacks"] = pool.dump_stacks()
    return found


def _close() -> None:
    _close_door(is_copy=False)


def _close_in_child() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    _close_door(is_copy=True)


def _close_door(*, is_copy: bool) -> None:
    global _door
    door, _door = _door, None
    if door is not None:
        door.close(is_copy=is_copy)


_lock = threading.Lock()
_door: _Door | None = None
atexit.register(_close)
at_fork(after_in_child=_close_in_child)
