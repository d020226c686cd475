"""Streams and files of memory without a name, and how their descriptors travel from one process to another.

Nothing here has a name in the file system, not even in /dev/shm: whatever process dies, the kernel frees what it held.
It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import mmap
import os
import socket
import threading
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

MOST_DESCRIPTORS = 252  # that travel with one frame; the kernel takes 253 at once
MOST_SHARES = 250  # so many of them; the others are streams
ANCILLARY_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # what is received is not passed on to other programs
ANCILLARY_SIZE = socket.CMSG_SPACE(MOST_DESCRIPTORS * 4) if hasattr(socket, "CMSG_SPACE") else 0
ANSWER_ANCILLARY_SIZE = socket.CMSG_SPACE(4) if ANCILLARY_SIZE else 0  # an answer brings one along at most

_HUGE = 2 * 1024 * 1024  # bytes; from there on the kernel can be asked for large pages
_MOST_PIECES = 512  # that are sent at once; the system takes 1,024
_STREAM_BUFFER = 4 * 1024 * 1024  # bytes; the kernel gives as much as net.core.wmem_max allows
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)
_WAIT_FOR_ALL = getattr(socket, "MSG_WAITALL", 0)


class Descriptor:
    """An open file: closed when nobody holds it any more."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def detach(self) -> int:
        """Return its number, which is the caller's to close."""
        number, self.number = self.number, -1
        return number

    def close(self) -> None:
        number = self.detach()
        if number >= 0:
            os.close(number)

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        if self.number >= 0:
            _close(self.number)


def open_memory_file(name: str = "cpupool") -> Descriptor | None:
    """Make a file of memory; None where that cannot be, or no descriptor is left.  The name is for those who look."""
    try:
        return Descriptor(os.memfd_create(name))
    except (AttributeError, OSError):
        return None


def open_nameless_file(name: str = "cpupool") -> Descriptor:
    """Do as `open_memory_file`; where that cannot be, make one on disk that has lost its name at once."""
    file = open_memory_file(name)
    if file is None:
        import tempfile

        with tempfile.TemporaryFile() as unnamed:
            file = Descriptor(os.dup(unnamed.fileno()))
    return file


def size_of(data: Any) -> int:
    """Return how many bytes a buffer has."""
    return len(data) if type(data) is bytes else memoryview(data).nbytes


def write_all(file: Descriptor, pieces: Iterable[Any], offset: int) -> int:
    """Write pieces one behind another, and return where they end; the GIL is free meanwhile.

    Raises:
        OSError: there is no room.
    """
    for piece in pieces:
        view = memoryview(piece).cast("B") if size_of(piece) else memoryview(b"")
        while view:
            written = os.pwrite(file.number, view, offset)
            view = view[written:]
            offset += written
    return offset


class Stream:
    """One end of a socket for what is large; it blocks.

    Rules: a thread may be reading or writing while another one ends it.  So it is closed under a lock, by whoever reads
    or writes; it is ended under the same lock.
    """

    __slots__ = ("_is_closed", "_lock", "_socket")

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.RLock()  # it may be taken again by a garbage collection
        self._is_closed = False

    def send(self, views: list[memoryview], flags: int = 0) -> int:
        """Send what the system takes of them; return how many bytes."""
        return self._socket.sendmsg(views, (), flags | _NO_SIGNAL)

    def receive_into(self, memory: Any) -> None:
        """Read so many bytes as `memory` has; the GIL is free meanwhile.

        Raises:
            EOFError, OSError: it has ended before.
        """
        view = memoryview(memory)
        while view:
            count = self._socket.recv_into(view, len(view), _WAIT_FOR_ALL)
            if not count:
                raise EOFError(f"{len(view):,} bytes are missing")
            view = view[count:]

    def receive_some(self, room: list[Any]) -> list[memoryview]:
        """Read what is there; return the memory that is still to be filled.

        Raises:
            EOFError, OSError: it has ended before.
        """
        views = [memoryview(each) for each in room]
        with contextlib.suppress(BlockingIOError):
            while views:
                count = self._socket.recv_into(views[0], len(views[0]), _DONT_WAIT)
                if not count:
                    raise EOFError(f"{sum(map(len, views)):,} bytes are missing")
                views[0] = views[0][count:]
                if not views[0]:
                    del views[0]
        return views

    def receive_all(self, room: list[Any]) -> list[Any]:
        """Fill all memory, and close the stream.

        Raises:
            EOFError, OSError: it has ended before.
        """
        try:
            for memory in room:
                self.receive_into(memory)
        finally:
            self.close()
        return room

    def end(self) -> None:
        """Let nobody wait for it any more, neither here nor there."""
        with self._lock:
            if not self._is_closed:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._socket.close()


def open_stream() -> tuple[Stream, Descriptor]:
    """Make a stream for what is large: our end, and the one that travels.

    Raises:
        OSError: no descriptors are left.
    """
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(True)  # whatever `socket.setdefaulttimeout` says
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _STREAM_BUFFER)
    return Stream(ours), Descriptor(theirs.detach())


class Sending:
    """Large pieces on their way into a stream."""

    __slots__ = ("_stream", "_views")

    def __init__(self, stream: Stream, pieces: Iterable[Any]) -> None:
        self._stream = stream
        self._views = deque(memoryview(piece).cast("B") for piece in pieces if size_of(piece))

    def send_some(self) -> bool:
        """Send what the system takes at once; returns True if that was all."""
        with contextlib.suppress(BlockingIOError):
            while self._views:
                self._send(_DONT_WAIT)
        return not self._views

    def send_rest(self) -> None:
        """Send the rest, and close the stream; the GIL is free meanwhile.

        If nobody takes it any more, it is thrown away.
        """
        try:
            while self._views:
                self._send(0)
        except OSError:
            self._views.clear()  # who was to get it has gone, or does not want it
        self._stream.close()

    def end(self) -> None:
        """Throw away what has not been sent: nobody wants it any more."""
        self._stream.end()

    def _send(self, flags: int) -> None:
        views = self._views
        sent = self._stream.send(list(itertools.islice(views, _MOST_PIECES)), flags)
        while sent:
            first = views.popleft()
            if sent < len(first):
                views.appendleft(first[sent:])
                break
            sent -= len(first)


def allocate(size: int) -> Any:
    """Return private memory that can be written; in large pages, if it is large: they are faster to come by."""
    if size < _HUGE:
        return bytearray(size)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {size:,} bytes") from error
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        try:
            memory.madvise(advice)
        except OSError:
            pass  # a kernel without them
    return memory


def map_private(file: Descriptor) -> mmap.mmap:
    """Return the memory of a file; what is written to it is copied first, page by page, and nobody else's."""
    return mmap.mmap(file.number, 0, flags=mmap.MAP_PRIVATE)


def map_shared(file: Descriptor) -> mmap.mmap:
    """Return the memory of a file itself, which cannot be written."""
    return mmap.mmap(file.number, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def enclose(files: Sequence[Descriptor]) -> list[tuple[int, int, array.array[int]]]:
    """Return what `socket.sendmsg` sends descriptors as."""
    if not files:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.number for file in files]))]


def disclose(ancillary: list[tuple[int, int, bytes]]) -> list[Descriptor]:
    """Return the descriptors that `socket.recvmsg` has brought along; once, or they would be closed twice."""
    found: list[Descriptor] = []
    while ancillary:
        level, kind, data = ancillary.pop()
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            found += map(Descriptor, numbers)
    return found
