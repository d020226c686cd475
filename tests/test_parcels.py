"""Large values: packed, shipped and unpacked again, without any process."""

from __future__ import annotations

import os
import pickle
import socket
import threading
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpupool import _files, _parcels, _payload
from cpupool._parcels import LARGE, Parcel, TooLarge, pack, unpack

np = pytest.importorskip("numpy")

make_pickler = _payload.BY_NAME.make_pickler

sizes = st.sampled_from([0, 1, 100, 70_000, 200_000, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE])
values = st.recursive(
    st.one_of(
        sizes.map(bytes),
        sizes.map(lambda size: bytearray(b"a" * size)),
        sizes.map(lambda size: "é" * (size // 2)),
        sizes.map(lambda size: memoryview(b"m" * size)),
        sizes.map(lambda size: array("d", [1.5]) * (size // 8)),
        st.integers(),
    ),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.integers(), children, max_size=2),
    max_leaves=6,
)


WAYS = ["stream", "received", "here", "file"]


def _there_and_back(value: object, way: str, pause: Any = None) -> Any:
    """Send a value: through a stream, unpickled while it arrives or received before; in its frame; or in a file."""
    packed = pack(value, make_pickler)
    if isinstance(packed, bytes):
        return unpack(packed, pause=pause)
    if way == "file":
        file = _files.open_memory_file()
        assert file is not None
        body = packed.write_to(file).head
        return unpack(body, memory=memoryview(_files.map_private(file)), pause=pause)
    if way == "here":
        shipment = packed.ship(None)
        body = b"".join((shipment.head, *shipment.tail))
        assert len(body) == len(shipment.head) + shipment.tail_size
        assert _parcels.count_files(body) == len(shipment.descriptors) == 0
        return unpack(body, pause=pause)
    ours, theirs = _files.open_stream()
    sending = _files.Sending(ours, packed.large_pieces())
    thread = threading.Thread(target=sending.send_rest)
    if not sending.send_some():
        thread.start()
    else:
        ours.close()
    shipment = packed.ship(theirs)
    body = shipment.head
    assert not shipment.tail
    assert _parcels.count_files(body) == len(shipment.streams) == 1
    stream = _parcels.find_stream(body, shipment.descriptors)
    assert stream is not None
    if way == "stream":
        found = unpack(body, stream=stream, pause=pause)
    else:
        room = _parcels.make_room(body)
        rest = stream.receive_some(room)
        stream.receive_all(rest)
        found = unpack(body, received=room, pause=pause)
    if thread.ident is not None:
        thread.join()
    stream.close()
    return found


@given(values, st.sampled_from(WAYS), st.booleans())
def test_whatever_is_packed_is_unpacked(value: object, way: str, in_pieces: bool) -> None:
    assert _there_and_back(value, way, pause=bool if in_pieces else None) == value


@given(values)
def test_small_values_are_plain_pickles(value: object) -> None:
    packed = pack(value, make_pickler)
    if isinstance(packed, bytes):
        assert pickle.loads(packed) == value
        assert len(packed) < LARGE
    else:
        assert packed.large_size >= LARGE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(100_000.0),
        lambda: np.asfortranarray(np.arange(120_000.0).reshape(300, 400)),
        lambda: np.arange(200_000.0)[::2],
        lambda: np.arange(100_000, dtype="i2").reshape(10, 10, 1000),
        lambda: np.array([str(number) for number in range(50_000)]),
        lambda: np.zeros(100_000, dtype=[("a", "i4"), ("b", "f8")]),
        lambda: np.zeros(0),
    ],
)
def test_arrays_arrive_writable_and_as_they_were(make: Any, way: str) -> None:
    before = make()
    after = _there_and_back(before, way)
    assert after.dtype == before.dtype
    assert after.flags.f_contiguous == before.flags.f_contiguous or not before.flags.contiguous
    assert np.array_equal(before, after)
    assert after.flags.writeable


@pytest.mark.parametrize("view", [
    memoryview(b"abc"),
    memoryview(b"x" * LARGE),
    memoryview(array("d", range(100_000))),
    memoryview(bytes(range(12))).cast("B", (3, 4)),
    memoryview(b"0123456789")[::3],
    memoryview(b""),
])  # fmt: skip
def test_views_arrive_as_views(view: memoryview) -> None:
    after = _there_and_back([view], "stream")[0]
    assert isinstance(after, memoryview)
    assert after.tolist() == view.tolist()
    assert (after.format, after.shape) == (view.format, view.shape)


def test_large_bytes_and_arrays_are_not_copied_while_they_are_packed() -> None:
    """However large, they cost the event loop nothing: they are not counted, and taken as they are."""
    text, data = b"x" * 50_000_000, np.zeros(10_000_000)
    packed = pack({"text": text, "data": data}, make_pickler, most=1000)
    assert isinstance(packed, Parcel)
    assert any(piece is text for piece in packed._pieces)
    assert np.shares_memory(np.asarray(packed._buffers[0]), data)
    assert packed.size >= len(text) + data.nbytes


def test_a_value_of_many_small_things_is_too_large() -> None:
    with pytest.raises(TooLarge):
        pack([str(number) for number in range(100_000)], make_pickler, most=100_000)


def test_a_copy_holds_on_to_nothing() -> None:
    data, text = np.zeros(100_000), bytearray(b"x" * LARGE)
    packed = pack((data, text), make_pickler, is_copy=True)
    data[0] = 1
    text[0] = 0
    text.clear()  # nobody looks at its memory
    assert isinstance(packed, Parcel)
    found_data, found_text = packed.rebuild()
    assert found_data[0] == 0
    assert found_text == b"x" * LARGE


def test_a_bytearray_that_is_on_its_way_cannot_change_its_size() -> None:
    text = bytearray(b"x" * LARGE)
    packed = pack(text, make_pickler)
    with pytest.raises(BufferError):
        text.clear()
    del packed
    text.clear()


@pytest.mark.parametrize("way", WAYS)
def test_what_the_system_moves_in_parts_is_whole(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the system moves 2 GB at most, and may move less."""

    class Slow(socket.socket):
        def sendmsg(self, views: Any, *args: Any) -> int:
            return super().sendmsg([views[0][:70_001]], *args)

        def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
            return super().recv_into(buffer, min(nbytes, 50_003), flags)

    monkeypatch.setattr(socket, "socket", Slow)
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at, write=os.pwrite: write(fd, view[:70_001], at))
    value = {"a": os.urandom(1_000_000), "b": [os.urandom(300_000)], "c": bytearray(os.urandom(400_000))}
    assert _there_and_back(value, way) == value
    view = memoryview(os.urandom(1_000_000))
    assert _there_and_back([view], way) == [view]


def test_what_is_sent_to_nobody_is_thrown_away() -> None:
    packed = pack(np.zeros(4_000_000), make_pickler)
    assert isinstance(packed, Parcel)
    ours, theirs = _files.open_stream()
    sending = _files.Sending(ours, packed.large_pieces())
    assert not sending.send_some()
    del theirs
    sending.send_rest()
    ours.end()  # does nothing: it is closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        ours.send([memoryview(b"x")])


def test_a_stream_that_ends_too_early_is_an_error() -> None:
    ours, theirs = _files.open_stream()
    packed = pack(np.zeros(1_000_000), make_pickler)
    assert isinstance(packed, Parcel)
    body = packed.ship(theirs).head
    ours.send([memoryview(b"x" * 1000)])
    ours.close()
    stream = _parcels.find_stream(body, [theirs])
    assert stream is not None
    with pytest.raises(EOFError, match="7,999,000 bytes are missing"):
        unpack(body, stream=stream)
    stream.close()


def test_a_stream_whose_descriptor_could_not_be_received_is_an_error_that_says_so() -> None:
    packed = pack(np.zeros(1_000_000), make_pickler)
    ours, theirs = _files.open_stream()
    assert isinstance(packed, Parcel)
    with pytest.raises(OSError, match="too many open files"):
        _parcels.find_stream(packed.ship(theirs).head, [None])
    ours.close()


def test_a_text_that_unicode_does_not_allow_travels() -> None:
    text = "a\ud800b" * 1_000_000
    wrapped = _payload.wrap_text(text)
    assert not isinstance(wrapped, str)
    assert _there_and_back(wrapped, "stream") == text
