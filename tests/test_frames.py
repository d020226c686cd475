"""The wire: whatever is encoded is decoded, however the bytes arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpupool._frames import HEADER_SIZE, Frame, FrameDecoder, Kind, ProtocolError, encode_call, encode_frame, split_call

frames = st.tuples(st.sampled_from(Kind), st.integers(0, 2**64 - 1), st.binary(max_size=300))


def _decode(decoder: FrameDecoder, pieces: list[bytes]) -> list[tuple[Kind, int, bytes]]:
    found: list[Frame] = []
    for piece in pieces:
        decoder.feed(piece)
        while (frame := decoder.next_frame()) is not None:
            found.append(frame)
    return [(frame.kind, frame.task_id, bytes(frame.body)) for frame in found]


@given(st.lists(frames, max_size=5), st.data())
def test_frames_arrive_whole_however_the_bytes_are_cut(
    wanted: list[tuple[Kind, int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(encode_frame(*frame) for frame in wanted)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert _decode(FrameDecoder(), pieces) == wanted


@given(st.lists(frames, max_size=3))
def test_frames_arrive_byte_by_byte(wanted: list[tuple[Kind, int, bytes]]) -> None:
    stream = b"".join(encode_frame(*frame) for frame in wanted)
    assert _decode(FrameDecoder(), [stream[i : i + 1] for i in range(len(stream))]) == wanted


@given(frames, st.binary(max_size=HEADER_SIZE - 1))
def test_trailing_bytes_wait_for_the_rest(frame: tuple[Kind, int, bytes], rest: bytes) -> None:
    decoder = FrameDecoder()
    assert _decode(decoder, [encode_frame(*frame) + rest]) == [frame]
    assert decoder.missing == HEADER_SIZE - len(rest)


@given(st.integers(0, 255).filter(lambda number: number not in set(Kind)))
def test_unknown_kind_is_an_error_and_not_a_frame(number: int) -> None:
    decoder = FrameDecoder()
    decoder.feed(bytes([number]) + bytes(HEADER_SIZE))
    with pytest.raises(ProtocolError, match=f"kind {number}"):
        decoder.next_frame()


def test_task_is_known_as_soon_as_the_header_is_here() -> None:
    """The worker marks a task as picked up before its body has arrived."""
    decoder = FrameDecoder()
    frame = encode_frame(Kind.CALL, 7, b"body")
    decoder.feed(frame[:HEADER_SIZE])
    assert decoder.next_frame() is None
    assert decoder.incoming_task_id == 7
    assert decoder.missing == 4


def test_body_is_not_changed_by_what_arrives_later() -> None:
    decoder = FrameDecoder()
    decoder.feed(encode_frame(Kind.RESULT, 1, b"first"))
    first = decoder.next_frame()
    decoder.feed(encode_frame(Kind.RESULT, 2, b"other"))
    second = decoder.next_frame()
    assert first is not None
    assert second is not None
    assert (bytes(first.body), bytes(second.body)) == (b"first", b"other")


@given(st.lists(frames, min_size=1, max_size=4), st.data())
def test_a_body_that_is_thrown_away_as_it_comes_does_not_disturb_the_next_frame(
    wanted: list[tuple[Kind, int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(encode_frame(*frame) for frame in wanted)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = FrameDecoder()
    found: list[tuple[Kind, int]] = []
    for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoder.feed(stream[a:b])
        while (frame := decoder.next_frame()) is not None:
            found.append((frame.kind, frame.task_id))
        decoder.drop_body()
        assert len(decoder._buffer) <= HEADER_SIZE
    assert found == [(kind, task_id) for kind, task_id, _ in wanted]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(1, 2**32 - 1),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.binary(max_size=100),
)
def test_a_call_carries_its_attempt_label_and_context(
    task_id: int, attempt: int, label: str, context: bytes, call: bytes
) -> None:
    decoder = FrameDecoder()
    decoder.feed(encode_call(task_id, attempt, label.encode(), context, call))
    frame = decoder.next_frame()
    assert frame is not None
    assert (frame.kind, frame.task_id) == (Kind.CALL, task_id)
    got_attempt, got_label, got_context, got_call = split_call(frame.body)
    assert (got_attempt, got_label.decode(), bytes(got_context), bytes(got_call)) == (attempt, label, context, call)
