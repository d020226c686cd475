"""Values on their way between processes: small ones as a pickle, large ones as a parcel.

Theory of operation: a value is pickled by protocol 5 into pieces.  Large `bytes` in it are pieces of their own, the
objects themselves, not copied; the memory of arrays and the like is left out of the pickle altogether (PEP 574).  A
small value is then one `bytes`, and rides in its frame.  What is large follows through a stream, a socket whose other
end travels with the frame.  So the bytes of an array are copied twice, into the stream and out of it, at the same time,
each by a few system calls that leave the GIL alone.

A stream needs no memory to speak of.  New memory is dear: 100 MB took 28 ms from an array here to one there, 85 ms in a
file of memory that is mapped over there, and 37 ms if that file was used before, and kept; 523 ms in a
`ProcessPoolExecutor` (2 cores).  What arrives is memory of its own, which can be written, holds no descriptor and is
freed like any other.  Where no descriptor is left for a stream, all of it follows the frame.

A memory that is shared (`_shared`) is not copied: the parcel says where in which file it is.

The body of a frame begins with a pickle's first byte, or with 0 if it is a parcel: a head, a table of the buffers, and
the pickle, if that is small.  It runs in the workers too: stdlib and layer 0 only.
"""

from __future__ import annotations

import itertools
import pickle
import socket
import struct
import sys
from typing import NamedTuple

from . import _files
from ._files import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from typing import Any

    from ._files import Descriptor, Sending

PROTOCOL = 5

# Bytes from which on a value is a parcel, and a buffer in it leaves the pickle.
LARGE = 256 * 1024
# Bytes that may be pickled or unpickled on an event loop: some 1 to 3 ms of it.
MOST_ON_LOOP = 192 * 1024
_OWN_PIECE = 128 * 1024  # what a pickler writes in one piece of this size is an object of the user's, not its own frame
_ALIGNMENT = 64  # bytes; what numerical libraries like
_STEP = 1024 * 1024  # bytes that are copied from memory to memory before others have their turn

# The first byte, which no pickle has; where what is large is; the size of the pickle; how many buffers.
_HEAD = struct.Struct("<BBQI")
_NO_PICKLE = 0
PICKLE = 0x80  # the first byte of a pickle
# Behind the head; or in a stream, or in a file: the buffers, or also the pickle, in a stream as the last.
_HERE, _ELSEWHERE, _ALL_ELSEWHERE = range(3)

# A buffer: where it is; the number of what is shared, or 0; its offset there; its size.
_BUFFER = struct.Struct("<BQQQ")
_OWN, _SHARED, _NEWLY_SHARED = range(3)  # the last brings its descriptor along


class GivenUp(Exception):
    """A value is not pickled any further: it says nothing about the value."""


class TooLarge(GivenUp):
    """A value is larger than what may be pickled here and now."""


class SharedFile:
    """A file that several calls refer to.

    Attributes:
        number: tells it from the others of this process.
        file: where it is.
        view: its memory, read-only.
        is_ended: True once it must not be used by new calls.
    """

    _numbers = itertools.count(1)

    def __init__(self, file: Descriptor) -> None:
        self.number = next(self._numbers)
        self.file = file
        self.view = memoryview(_files.map_shared(file))
        self.is_ended = False


_live_shares: dict[int, SharedFile] = {}  # by their numbers


def add_shared(shared: SharedFile) -> None:
    """Let parcels refer to its memory from now on, instead of copying it."""
    _live_shares[shared.number] = shared


def remove_shared(shared: SharedFile) -> None:
    """Let no new parcel refer to it."""
    shared.is_ended = True
    _live_shares.pop(shared.number, None)


class _Reference(NamedTuple):
    """A buffer that lies in shared memory."""

    shared: SharedFile
    offset: int
    size: int


def _find_shared(raw: memoryview) -> _Reference | None:
    """Return where in shared memory a buffer lies; None if it does not."""
    for shared in list(_live_shares.values()):
        if raw.obj is shared.view:  # the file as a whole, as handles refer to it
            return _Reference(shared, 0, raw.nbytes)
        # An array in it: `memoryview` does not tell addresses, NumPy does.
        where = _address(raw.obj)
        start = None if where is None else _address(sys.modules["numpy"].frombuffer(shared.view, "u1"))
        if where is not None and start is not None and 0 <= where - start <= shared.view.nbytes - raw.nbytes:
            return _Reference(shared, where - start, raw.nbytes)
    return None


def _address(exporter: object) -> int | None:
    if "numpy" not in sys.modules:
        return None
    interface = getattr(exporter, "__array_interface__", None)
    if not isinstance(interface, dict) or interface.get("strides") is not None:
        return None  # not one block, or in another order: then its first byte is not where its memory begins
    data = interface.get("data")
    return int(data[0]) if isinstance(data, tuple) else None


class Shipment(NamedTuple):
    """A parcel that is ready to go.

    Attributes:
        head: what is part of the frame.
        tail: what follows, if it is not in a stream.
        streams: the ends of streams that travel along, and are nobody else's.
        files: the other descriptors that do, after these.
        shares: what the receiver knows from then on.
        sendings: what is being sent through the streams, until the call is over.
    """

    head: bytes
    tail: Sequence[Any] = ()
    streams: Sequence[Descriptor] = ()
    files: Sequence[Descriptor] = ()
    shares: Sequence[SharedFile] = ()
    sendings: Sequence[Sending] = ()

    @property
    def descriptors(self) -> list[Descriptor]:
        """All that travel along."""
        return [*self.streams, *self.files]

    @property
    def tail_size(self) -> int:
        return sum(map(_files.size_of, self.tail))


class Parcel:
    """A large value, pickled.  Its buffers are still those of the value itself.

    Attributes:
        size: how many bytes have to be copied.
        large_size: how many of them are not part of its head.
    """

    __slots__ = ("_buffers", "_pickle_size", "_pieces", "large_size", "size")

    def __init__(self, pieces: list[Any], pickle_size: int, buffers: list[memoryview | _Reference]) -> None:
        self._pieces = pieces
        self._pickle_size = pickle_size
        self._buffers = buffers
        in_buffers = sum(each.nbytes for each in self._own_buffers())
        self.size = in_buffers + pickle_size
        self.large_size = self.size if pickle_size >= LARGE else in_buffers

    def _own_buffers(self) -> Iterator[memoryview]:
        return (each for each in self._buffers if isinstance(each, memoryview))

    def large_pieces(self) -> list[Any]:
        """Return what goes into a stream, in order."""
        return [*self._own_buffers(), *(self._pieces if self._pickle_size >= LARGE else ())]

    def ship(self, stream: Descriptor | None, known: Collection[int] = (), sending: Sending | None = None) -> Shipment:
        """Make it ready to go.

        Args:
            stream: the receiver's end of the stream; None if what is large is to follow the frame.
            known: the numbers of the shared files that the receiver knows.
            sending: what is still being sent through the stream.
        """
        is_large = self._pickle_size >= LARGE
        where = _HERE if stream is None else _ALL_ELSEWHERE if is_large else _ELSEWHERE
        head, files, shares = self._make_head(where, known, itertools.repeat(0))
        tail: list[Any] = []
        if not is_large:
            head += self._pieces
        elif stream is None:
            tail += self._pieces
        if stream is None:
            tail += self._own_buffers()
        streams = () if stream is None else (stream,)
        sendings = () if sending is None else (sending,)
        return Shipment(b"".join(head), tail, streams, files, shares, sendings)

    def write_to(self, file: Descriptor) -> Shipment:
        """Write what is large into a file that the receivers map, and make the rest ready to go.

        Raises:
            OSError: there is no room.
        """
        is_large = self._pickle_size >= LARGE
        end = _files.write_all(file, self._pieces, 0) if is_large else 0
        offsets = []
        for buffer in self._own_buffers():
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            offsets.append(start)
            end = _files.write_all(file, [buffer], start)
        head, files, shares = self._make_head(_ALL_ELSEWHERE if is_large else _ELSEWHERE, (), offsets)
        head += () if is_large else self._pieces
        return Shipment(b"".join(head), (), (), [file, *files], shares)

    def _make_head(
        self, where: int, known: Collection[int], offsets: Iterable[int]
    ) -> tuple[list[Any], list[Descriptor], list[SharedFile]]:
        """Return head and table; the descriptors that are new to the receiver; and all shares."""
        head: list[Any] = [_HEAD.pack(_NO_PICKLE, where, self._pickle_size, len(self._buffers))]
        files: list[Descriptor] = []
        shares: list[SharedFile] = []
        known, offsets = set(known), iter(offsets)
        for buffer in self._buffers:
            if isinstance(buffer, memoryview):
                head.append(_BUFFER.pack(_OWN, 0, next(offsets), buffer.nbytes))
                continue
            shared = buffer.shared
            place = _SHARED if shared.number in known else _NEWLY_SHARED
            head.append(_BUFFER.pack(place, shared.number, buffer.offset, buffer.size))
            shares.append(shared)
            if place == _NEWLY_SHARED:
                known.add(shared.number)
                files.append(shared.file)
        return head, files, shares

    def is_like(self, other: Parcel) -> bool:
        """Return True if it is of the same objects, so that it need not be written again."""
        ours, theirs = (
            [each if isinstance(each, _Reference) else (id(each.obj), each.nbytes) for each in parcel._buffers]
            for parcel in (self, other)
        )
        return ours == theirs and self._pieces == other._pieces

    def to_bytes(self) -> bytes:
        """Return all of it, as what `unpack` takes."""
        shipment = self.ship(None, known=self._shares())
        return b"".join((shipment.head, *shipment.tail))

    def rebuild(self) -> Any:
        """Return a copy of the value, as a receiver would."""
        return unpack(self.to_bytes(), shares=dict(self._shares()))

    def _shares(self) -> dict[int, memoryview]:
        return {each.shared.number: each.shared.view for each in self._buffers if isinstance(each, _Reference)}


def check_new_shares(known: Collection[int], *parcels: Parcel) -> None:
    """Raise ValueError if there is more to be shared than can travel with one frame."""
    numbers = {each.shared.number for parcel in parcels for each in parcel._buffers if isinstance(each, _Reference)}
    if len(numbers.difference(known)) > _files.MOST_SHARES:
        raise ValueError(
            f"a call can bring no more than {_files.MOST_SHARES} shares along that its worker does not know"
        )


def pack(
    value: object,
    make_pickler: Callable[[Any, Callable[[Any], object]], Any],
    *,
    most: float = float("inf"),
    pause: Callable[[], object] | None = None,
    is_copy: bool = False,
    large: int = LARGE,
    refers: bool = True,
) -> bytes | Parcel:
    """Pickle a value.

    Args:
        value: the value.
        make_pickler: makes the pickler of a file and a callback for buffers.
        most: how many bytes to pickle at most, those aside that are not copied.
        pause: called after each piece.
        is_copy: True if nothing of the value itself must be held on to.
        large: from how many bytes on a buffer leaves the pickle.
        refers: True if it may refer to what is shared.

    Raises:
        TooLarge: it takes more than `most`.
        Exception: whatever the value's reducers raise.
    """
    pieces = _Pieces(most, pause, is_copy=is_copy)
    buffers: list[memoryview | _Reference] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if _live_shares and refers and (reference := _find_shared(raw)) is not None:
            buffers.append(reference)
            return False
        if raw.nbytes < large or is_copy:
            return True  # into the pickle
        buffers.append(raw)
        return False

    make_pickler(pieces, keep).dump(value)
    if not buffers and pieces.size < LARGE:
        return pieces.all[0] if len(pieces.all) == 1 else b"".join(pieces.all)
    return Parcel(pieces.all, pieces.size, buffers)


class _Pieces:
    """A file for a pickler: keeps what it writes, and large objects as they are."""

    __slots__ = ("_is_copy", "_left", "_pause", "all", "size")

    def __init__(self, most: float, pause: Callable[[], object] | None, *, is_copy: bool) -> None:
        self.all: list[Any] = []
        self.size = 0
        self._left = most
        self._pause = pause
        self._is_copy = is_copy

    def write(self, data: Any) -> None:
        if type(data) is not bytes:
            raw = data.raw() if isinstance(data, pickle.PickleBuffer) else memoryview(data).cast("B")
            data = bytes(raw) if self._is_copy else raw  # which keeps its size
        size = len(data)
        if size < _OWN_PIECE:
            self._left -= size
            if self._left < 0:
                raise TooLarge
        self.all.append(data)
        self.size += size
        if self._pause is not None:
            self._pause()


def packed_size(packed: bytes | Parcel) -> int:
    """Return how many bytes `pack` has made of a value."""
    return len(packed) if isinstance(packed, bytes) else packed.size


def is_parcel(body: memoryview | bytes) -> bool:
    """Return True for a parcel, False for a pickle."""
    return body[0] == _NO_PICKLE


def _buffers(body: memoryview | bytes, count: int) -> Iterable[tuple[int, int, int, int]]:
    return _BUFFER.iter_unpack(memoryview(body)[_HEAD.size : _HEAD.size + count * _BUFFER.size])


def count_files(body: memoryview | bytes) -> int:
    """Return how many descriptors a value brings along."""
    if not is_parcel(body):
        return 0
    _, where, _, count = _HEAD.unpack_from(body)
    return int(where != _HERE) + sum(place == _NEWLY_SHARED for place, _, _, _ in _buffers(body, count))


def sizes_of(body: memoryview | bytes) -> tuple[int, int]:
    """Return how many bytes of what has arrived have to be unpickled, and how many are in buffers."""
    if not is_parcel(body):
        return len(body), 0
    _, _, pickle_size, count = _HEAD.unpack_from(body)
    return pickle_size, sum(size for place, _, _, size in _buffers(body, count) if place == _OWN)


def first_file(body: memoryview | bytes, files: Sequence[Descriptor | None]) -> Descriptor | None:
    """Return the descriptor of what is large in a parcel, and not in its frame; None if there is nothing.

    Raises:
        OSError: there is, but no descriptor was free to receive it.
    """
    if not is_parcel(body) or body[1] == _HERE:
        return None
    return _check(files[0])


def find_stream(body: memoryview | bytes, files: Sequence[Descriptor | None]) -> Stream | None:
    """Do as `first_file`, and return it as the stream that it is."""
    file = first_file(body, files)
    if file is None:
        return None
    end = socket.socket(fileno=file.detach())
    end.setblocking(True)
    return Stream(end)


def _check(file: Descriptor | None) -> Descriptor:
    if file is None:
        raise OSError("too many open files: no descriptor is left for a large value")
    return file


def take_shares(body: memoryview | bytes, files: Sequence[Descriptor | None], shares: dict[int, Any]) -> None:
    """Note what a parcel newly shares, before anything can go wrong with it."""
    if not is_parcel(body):
        return
    _, where, _, count = _HEAD.unpack_from(body)
    new = iter(files[where != _HERE :])
    for place, number, _, _ in _buffers(body, count):
        if place == _NEWLY_SHARED and (file := next(new)) is not None:
            shares[number] = file


def count_bytes(body: memoryview | bytes) -> int:
    """Return how many bytes are in a parcel's stream."""
    pickled, in_buffers = sizes_of(body)
    return in_buffers + (pickled if body[1] == _ALL_ELSEWHERE else 0)


def make_room(body: memoryview | bytes) -> list[Any]:
    """Return memory for all that is in a parcel's stream, in order."""
    _, where, pickle_size, count = _HEAD.unpack_from(body)
    memory = [_files.allocate(size) for place, _, _, size in _buffers(body, count) if place == _OWN]
    return [*memory, _files.allocate(pickle_size)] if where == _ALL_ELSEWHERE else memory


def unpack(
    body: memoryview | bytes,
    *,
    received: Sequence[Any] = (),
    stream: Stream | None = None,
    memory: memoryview | None = None,
    shares: dict[int, Any] | None = None,
    pause: Callable[[], object] | None = None,
) -> Any:
    """Rebuild a value from what arrived.

    Args:
        body: its pickle, or its parcel's head and what follows.
        received: what was received from its stream, into `make_room`;
        stream: or the stream itself;
        memory: or the memory of a file that was written by `write_to`, which is used as it is.
        shares: what is shared, by number: descriptors, which become read-only memory when they are needed.
        pause: called after each piece that is unpickled.

    Raises:
        EOFError, OSError: the stream has ended.
        Exception: whatever rebuilding the value raises.
    """
    if body[0] == PICKLE and pause is None:
        return pickle.loads(body)
    if not is_parcel(body):
        return pickle.Unpickler(_Reader(_from_memory(memoryview(body)), pause)).load()
    _, where, pickle_size, count = _HEAD.unpack_from(body)
    rest = memoryview(body)[_HEAD.size + count * _BUFFER.size :]
    own = iter(received)
    end = pickle_size
    buffers: list[Any] = []
    for place, number, offset, size in _buffers(body, count):
        if place != _OWN:
            buffers.append(_view_shared(shares or {}, number)[offset : offset + size])
        elif where == _HERE:
            buffers.append(bytearray(rest[end : end + size]))
            end += size
        elif memory is not None:
            buffers.append(memory[offset : offset + size])
        elif stream is not None:
            buffers.append(_files.allocate(size))
            stream.receive_into(buffers[-1])
        else:
            buffers.append(next(own))
    if where == _ALL_ELSEWHERE:
        if stream is not None:
            return pickle.Unpickler(_Reader(_from_stream(stream), pause), buffers=buffers).load()
        rest = memoryview(next(own)) if memory is None else memory
    if pause is None:
        return pickle.loads(rest[:pickle_size], buffers=buffers)
    return pickle.Unpickler(_Reader(_from_memory(rest[:pickle_size]), pause), buffers=buffers).load()


def _view_shared(shares: dict[int, Any], number: int) -> memoryview:
    known = shares.get(number)
    if not isinstance(known, memoryview):
        known = shares[number] = memoryview(_files.map_shared(_check(known)))
    return known


class _Reader:
    """A file for an unpickler, which reads a frame of some 64 kB at a time, and large objects into their own memory."""

    __slots__ = ("_at", "_pause", "_read")

    def __init__(self, read: Callable[[int, memoryview | int], Any], pause: Callable[[], object] | None) -> None:
        """Args: `read(offset, size)` returns so many bytes, `read(offset, memory)` fills the memory."""
        self._at = 0
        self._read = read
        self._pause = pause

    def read(self, size: int) -> bytes:
        if self._pause is not None:
            self._pause()
        data: bytes = bytes(self._read(self._at, size))
        self._at += len(data)
        return data

    def readinto(self, memory: memoryview) -> int:
        if self._pause is not None:
            self._pause()
        self._read(self._at, memory)
        self._at += len(memory)
        return len(memory)

    def readline(self) -> bytes:
        line = b""
        while not line.endswith(b"\n") and (byte := self.read(1)):
            line += byte
        return line


def _from_stream(stream: Stream) -> Callable[[int, memoryview | int], Any]:
    def read(_: int, what: memoryview | int) -> bytearray | memoryview:
        memory = bytearray(what) if isinstance(what, int) else what
        stream.receive_into(memory)
        return memory

    return read


def _from_memory(data: memoryview) -> Callable[[int, memoryview | int], Any]:
    def read(offset: int, what: memoryview | int) -> bytes | None:
        if isinstance(what, int):
            return bytes(data[offset : offset + what])
        for at in range(0, len(what), _STEP):  # the GIL is not free while memory is copied
            step = what[at : at + _STEP]
            step[:] = data[offset + at : offset + at + len(step)]
        return None

    return read


def reduce_view(view: memoryview) -> tuple[Any, ...]:
    """Reduce a `memoryview`, which pickle itself does not."""
    whole = view if view.c_contiguous else view.tobytes()
    return rebuild_view, (pickle.PickleBuffer(whole), view.format, view.shape)


def rebuild_view(buffer: Any, format: str, shape: tuple[int, ...]) -> memoryview:  # noqa: A002  # as memoryview has it
    """Rebuild a `memoryview`."""
    view = memoryview(buffer)
    if not view.nbytes or (format, len(shape)) == ("B", 1):
        return view
    rebuilt: memoryview = view.cast("B").cast(format, shape)  # type: ignore[call-overload]
    return rebuilt
