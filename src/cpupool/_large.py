"""What is large of calls and answers, seen from the pool: how it is sent and received, and how the loop is spared.

Theory of operation: what is large goes through a stream of its own, beside the frame.  As much as the stream takes at
once is sent before the frame, on the event loop; a thread sends the rest, and ends with it: it is sent at the pace at
which the worker reads, or thrown away when the call is over.  An answer is received as a whole before its worker is
lent to the next call, apart from the loop if that may take a while; then it is unpickled, likewise.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from . import _payload
from ._apart import collector_off, pause, run_apart
from ._files import Sending, open_stream
from ._parcels import MOST_ON_LOOP, check_new_shares, count_bytes, is_parcel, make_room, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from ._files import Stream
    from ._parcels import Parcel, Shipment
    from ._waiting import ChannelWaits

MOST_COPIED_ON_LOOP = 1024 * 1024  # bytes; that takes less than a millisecond
_COLLECTOR_OFF_FROM = 1024 * 1024  # bytes that are unpickled; some 20,000 objects


def send_off(parcel: Parcel, known: Collection[int]) -> Shipment:
    """Begin to send what is large, and return what the worker is to be sent in the frame.

    Args:
        parcel: the value.
        known: the numbers of the shared files that the worker knows.
    """
    check_new_shares(known, parcel)
    if not parcel.large_size:
        return parcel.ship(None, known)
    try:
        stream, theirs = open_stream()
    except OSError:
        return parcel.ship(None, known)  # no descriptors are left: it follows the frame
    sending = Sending(stream, parcel.large_pieces())
    if parcel.large_size <= MOST_COPIED_ON_LOOP and sending.send_some():
        stream.close()
        return parcel.ship(theirs, known)
    try:
        threading.Thread(target=sending.send_rest, name="cpupool-sender", daemon=True).start()
    except RuntimeError:  # no more threads, or the program is ending
        stream.close()
        return parcel.ship(None, known)
    return parcel.ship(theirs, known, sending)


async def receive(body: memoryview, stream: Stream, waits: ChannelWaits) -> list[Any]:
    """Receive all that comes through the stream of an answer.

    Raises:
        EOFError, OSError: the worker has gone.

    Cancellation: the caller returns at once, and the rest is thrown away.
    """
    if count_bytes(body) <= MOST_COPIED_ON_LOOP:
        try:
            room = make_room(body)
            rest = stream.receive_some(room)
        except BaseException:
            stream.close()
            raise
        if not rest:
            stream.close()
            return room
        await run_apart(lambda _: stream.receive_all(rest), waits, in_own_thread=True)
        return room

    def make_room_and_receive(_: Callable[[], bool]) -> list[Any]:
        try:
            return stream.receive_all(make_room(body))
        finally:
            stream.close()

    return await run_apart(make_room_and_receive, waits, in_own_thread=True)


def is_light(body: memoryview | bytes) -> bool:
    """Return True if what has arrived can be unpickled on an event loop."""
    return len(body) <= MOST_ON_LOOP and (not is_parcel(body) or sizes_of(body)[0] <= MOST_ON_LOOP)


async def unload(body: memoryview | bytes, received: Sequence[Any], waits: ChannelWaits) -> Any:
    """Unpickle an answer that is not light, apart from the event loop.

    Raises:
        RebuildFailed: as `loads_result`.
    """
    return await run_apart(lambda _: unpickle_apart(body, received), waits)


def unpickle_apart(body: memoryview | bytes, received: Sequence[Any]) -> Any:
    """Unpickle an answer so that other threads have their turns.  Raises `RebuildFailed`, as `loads_result`."""
    is_large = sizes_of(body)[0] >= _COLLECTOR_OFF_FROM
    with collector_off() if is_large else contextlib.nullcontext():
        return _payload.loads_result(body, received, pause)
