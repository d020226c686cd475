"""What a worker receives and answers that is large.

It runs in the workers: stdlib and lower layers only.
"""

from __future__ import annotations

from ._files import Sending, enclose, open_stream
from ._parcels import find_stream, take_shares, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from typing import Any

    from ._files import Descriptor
    from ._parcels import Parcel


class Arrival:
    """A value that has arrived, or is arriving.

    Rules: it is made where nothing can interrupt it, so that no descriptor is lost; and closed in any case.
    """

    __slots__ = ("_body", "_error", "_shares", "_stream")

    def __init__(self, body: memoryview, files: Sequence[Descriptor | None], shares: dict[int, Any]) -> None:
        """Args: `shares` is what the worker knows, to which is added what the value newly shares."""
        self._body = body
        self._shares = shares
        self._error: OSError | None = None
        self._stream = None
        if files:
            take_shares(body, files, shares)
            try:
                self._stream = find_stream(body, files)
            except OSError as error:
                self._error = error

    def unpack(self) -> Any:
        """Rebuild the value, while what is large of it arrives.

        Raises:
            Exception: whatever rebuilding it raises.
        """
        if self._error is not None:
            raise self._error
        return unpack(self._body, stream=self._stream, shares=self._shares)

    def close(self) -> None:
        """Take no more of it: whoever sends it is told so."""
        if self._stream is not None:
            self._stream.end()
            self._stream.close()


class Reply:
    """A frame that is to be sent, and what belongs to it.

    Attributes:
        frame: the frame, or its beginning.
        tail: the rest of the frame.
        stream: the end of a stream that goes along with it, or None.
        sending: what is sent through that.
    """

    __slots__ = ("frame", "sending", "stream", "tail")

    def __init__(
        self,
        frame: bytes,
        tail: Sequence[Any] = (),
        stream: Descriptor | None = None,
        sending: Sending | None = None,
    ) -> None:
        self.frame = frame
        self.tail = tail
        self.stream = stream
        self.sending = sending

    @classmethod
    def of_parcel(cls, parcel: Parcel, encode: Callable[..., bytes]) -> Reply:
        """Make the reply that brings a parcel.

        Args:
            parcel: the value.
            encode: makes the frame of the parcel's head, the number of descriptors, and the size of the rest.
        """
        stream = sending = None
        if parcel.large_size:
            try:
                ours, stream = open_stream()
                sending = Sending(ours, parcel.large_pieces())
            except OSError:
                pass  # no descriptors are left: it follows the frame
        shipment = parcel.ship(stream)
        frame = encode(shipment.head, files=len(shipment.streams), tail=shipment.tail_size)
        return cls(frame, shipment.tail, stream, sending)

    def send(self, channel: socket.socket) -> None:
        """Send it all."""
        frame = memoryview(self.frame)
        if self.stream is not None and self.sending is not None:
            try:
                self.sending.send_some()  # so that it is there when the frame is read, if it is not too large
                frame = frame[channel.sendmsg((frame,), enclose([self.stream])) :]
            finally:
                self.stream.close()  # or nobody would notice that the other side has closed it
        channel.sendall(frame)
        for piece in self.tail:
            channel.sendall(piece)
        if self.sending is not None:
            self.sending.send_rest()
