"""The wire: length-prefixed frames between a pool and one worker.

A frame is a header (kind, number of descriptors that came with its first byte, task id, length of the body, and for the
answer to a CALL how long the function ran) and the body's bytes.  This module does no I/O: `encode_frame` makes the
bytes to send, `FrameDecoder` takes bytes as they arrive, in pieces of any size, and gives back whole frames.
It runs in the workers too, so it imports nothing that is not already there.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class Kind(enum.IntEnum):
    """What a frame means; the arrow says who sends it."""

    READY = 1  # worker → pool: the initializer has run
    CALL = 2  # pool → worker: run this task (see `encode_call`)
    RESULT = 3  # worker → pool: what the task returned
    ERROR = 4  # worker → pool: an encoded error (see `_errors`); before READY, the initializer's
    BYE = 5  # pool → worker: finish and exit
    INTERRUPTED = 6  # worker → pool: the interrupt has ended the task; and the encoded error that it made of it, if any
    SETUP = 7  # pool → worker, first of all where a new process is not a fork: the initializer and its arguments
    BATCH = 8  # pool → worker: run these items (see `encode_batch`); answered like a CALL, by one frame
    PARTIAL = 9  # worker → pool: some results of a batch; its answer is still to come
    FORGET = 10  # pool → worker: a share has ended; its number, not answered


# One byte of kind, one of descriptors, eight of task id, eight of body length, eight of seconds; little-endian, no
# padding.
_HEADER = struct.Struct("<BBQQd")
HEADER_SIZE = _HEADER.size
# A CALL's body begins with four bytes of attempt, four of label length and four of context length.
_CALL = struct.Struct("<III")
_CALL_SIZE = _CALL.size
_CALL_HEADER = struct.Struct("<BBQQdIII")
_KINDS = {int(kind): kind for kind in Kind}


class ProtocolError(Exception):
    """The bytes received are no frame: the other side is not a cpupool worker, or wrote to the wrong descriptor."""


class Frame:
    """One whole message.

    Attributes:
        kind: what it means.
        task_id: the task it is about, 0 for none.
        seconds: in the answer to a CALL, how long the function ran; else 0.
        body: its bytes.
        files: the descriptors that came with it; None for each that could not be received.
        received: what is large and came through a stream, once that is here.
    """

    __slots__ = ("body", "kind", "seconds", "task_id")

    files: Sequence[Any] = ()
    received: Sequence[Any] = ()

    def __init__(self, kind: Kind, task_id: int, seconds: float, body: memoryview) -> None:
        self.kind = kind
        self.task_id = task_id
        self.seconds = seconds
        self.body = body


class LargeFrame(Frame):
    """A message that brings descriptors."""

    __slots__ = ("files", "received")  # only here, so that all others are spared them

    def __init__(self, kind: Kind, task_id: int, seconds: float, body: memoryview, files: Sequence[Any]) -> None:
        super().__init__(kind, task_id, seconds, body)
        self.files = files
        self.received = ()


def encode_frame(
    kind: Kind, task_id: int = 0, body: bytes = b"", *, files: int = 0, tail: int = 0, seconds: float = 0.0
) -> bytes:
    """Return the bytes of one frame, but for the last `tail` of its body; with so many descriptors."""
    return _HEADER.pack(kind, files, task_id, len(body) + tail, seconds) + body


def encode_call(
    task_id: int, attempt: int, label: bytes, context: bytes, call: bytes, *, files: int = 0, tail: int = 0
) -> bytes:
    """Return the bytes of a CALL frame: which attempt it is, label, context and the packed call; as `encode_frame`."""
    size = _CALL_SIZE + len(label) + len(context) + len(call) + tail
    header = _CALL_HEADER.pack(Kind.CALL, files, task_id, size, 0.0, attempt, len(label), len(context))
    return b"".join((header, label, context, call))


def split_call(body: memoryview) -> tuple[int, bytes, memoryview | bytes, memoryview]:
    """Return the attempt, the label, the context and the pickled call from the body of a CALL frame."""
    attempt, label_size, context_size = _CALL.unpack_from(body)
    if not label_size and not context_size:
        return attempt, b"", b"", body[_CALL_SIZE:]
    label_end = _CALL_SIZE + label_size
    end = label_end + context_size
    return attempt, bytes(body[_CALL_SIZE:label_end]), body[label_end:end], body[end:]


class BatchHead(NamedTuple):
    """How a batch is to be run.

    Attributes:
        attempt: 1, or more if its one item was retried.
        first: the number of its first item in the whole map or stream.
        limit: how many of its items to run at most.
        budget: seconds after which no further item is begun.
        hold: seconds that results are held back, for others to travel with.
        stops_at_error: True if an error ends the batch.
        is_timed: True if it must be known when each item began.
    """

    attempt: int
    first: int
    limit: int
    budget: float
    hold: float
    stops_at_error: bool
    is_timed: bool


# Attempt, first, limit, budget, hold, the two flags; the lengths of label, context and pickled function.
_BATCH = struct.Struct("<IQQdd??IIQ")


def encode_batch(
    task_id: int,
    head: BatchHead,
    label: bytes,
    context: bytes,
    function: bytes,
    items: bytes,
    *,
    files: int = 0,
    tail: int = 0,
) -> bytes:
    """Return the bytes of a BATCH frame: its head, label, context, packed function and items; as `encode_frame`."""
    body = _BATCH.pack(*head, len(label), len(context), len(function)) + label + context + function + items
    return encode_frame(Kind.BATCH, task_id, body, files=files, tail=tail)


def split_batch(body: memoryview) -> tuple[BatchHead, bytes, memoryview, memoryview, memoryview]:
    """Return head, label, context, pickled function and pickled items from the body of a BATCH frame."""
    *head, label_size, context_size, function_size = _BATCH.unpack_from(body)
    label_end = _BATCH.size + label_size
    context_end = label_end + context_size
    function_end = context_end + function_size
    label, context = bytes(body[_BATCH.size : label_end]), body[label_end:context_end]
    return BatchHead(*head), label, context, body[context_end:function_end], body[function_end:]


class FrameDecoder:
    """Turns received bytes into frames.

    Rules: `feed` takes whatever arrived, and the descriptors with it; `next_frame` gives the next whole frame, or None
    while it is incomplete.  Nothing is copied that need not be: a frame that arrives in one piece is given back as a
    view of that piece.

    Attributes:
        missing: how many more bytes `next_frame` wanted at least, when it last had none to give.
    """

    __slots__ = ("_buffer", "_files", "_header", "missing")

    def __init__(self) -> None:
        self.missing = HEADER_SIZE
        self._files: list[Any] = []
        self._buffer: bytes | bytearray = b""
        self._header: tuple[Kind, int, int, int, float] | None = None  # of the frame at the buffer's start; and its end

    def feed(self, data: bytes, files: Sequence[Any] = ()) -> None:
        """Take bytes as they came from the socket, and the descriptors that came with them."""
        if files:
            self._files += files
        if not self._buffer:
            self._buffer = data
            return
        if not isinstance(self._buffer, bytearray):
            self._buffer = bytearray(self._buffer)
        self._buffer += data

    @property
    def has_bytes(self) -> bool:
        """True if it holds something that `next_frame` has not given back."""
        return bool(self._buffer)

    @property
    def incoming_task_id(self) -> int | None:
        """Task id of a frame whose header is here and whose body is not yet complete."""
        return None if self._header is None else self._header[2]

    def drop_body(self) -> None:
        """Throw away what is here of the body of a frame that is not complete: it is not wanted."""
        if self._header is not None:
            kind, files, task_id, end, seconds = self._header
            kept = bytes(self._buffer[:HEADER_SIZE])
            self._header = kind, files, task_id, end - (len(self._buffer) - len(kept)), seconds
            self._buffer = kept

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, or None.

        Raises:
            ProtocolError: the bytes cannot be a frame's header.
        """
        buffer = self._buffer
        size = len(buffer)
        if self._header is None:
            if size < HEADER_SIZE:
                self.missing = HEADER_SIZE - size
                return None
            number, files, task_id, length, seconds = _HEADER.unpack_from(buffer)
            kind, end = _KINDS.get(number), HEADER_SIZE + length
            if kind is None:
                raise ProtocolError(f"not a frame: kind {number}, task {task_id}, {length} bytes")
        else:
            kind, files, task_id, end, seconds = self._header
        if size < end:
            self._header = kind, files, task_id, end, seconds
            self.missing = end - size
            return None
        view = memoryview(buffer)
        rest = b"" if size == end else bytes(view[end:])
        if files:
            lost = [None] * (files - len(self._files))  # none was free to receive them
            frame: Frame = LargeFrame(kind, task_id, seconds, view[HEADER_SIZE:end], self._files[:files] + lost)
            del self._files[:files]
        else:
            frame = Frame(kind, task_id, seconds, view[HEADER_SIZE:end])
        # Now that nothing is called any more no signal handler can raise, and lose the frame that was taken out.
        self.missing = HEADER_SIZE
        self._header = None
        self._buffer = rest
        return frame
