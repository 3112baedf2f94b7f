"""One-row messages as bytes are those of protobuf, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepstate.transport.row_codec import RowCodec, saved, varint
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import packed_header, put_floats
from tests.hypothesis_profiles import examples

X, Y = pb.StepRequest.X_FIELD_NUMBER, pb.StepResponse.Y_FIELD_NUMBER
LARGEST = 2**64 - 1
ENDS = sorted({2 ** (7 * bytes_) + more for bytes_ in range(1, 10) for more in (-1, 0, 1)})

ids = st.from_regex(r"\A[A-Za-z0-9._:-]{1,128}\Z") | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128
)
times = st.integers(0, 300) | st.sampled_from([*ENDS, LARGEST]) | st.integers(0, LARGEST)
floats = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40).map(
    lambda bits: np.array(bits, "<u4").tobytes()
)
"""One float32 or more, of any bits, as bytes."""


def request(session_id: str, t: int | None, x: bytes, **more: object) -> bytes:
    message = pb.StepRequest(session_id=session_id, t=t, **more)
    put_floats(message, X, x)
    return message.SerializeToString()


@examples(400)
@given(session_id=ids, t=times, x=floats)
@example("s" * 128, LARGEST, bytes(4 * 10_000))
def test_the_request_for_a_row_is_foretold(session_id: str, t: int, x: bytes) -> None:
    codec = RowCodec(session_id, len(x) // 4, 1)
    assert request(session_id, t, x) == codec.heads(t)[1] + x
    assert codec.x_bytes == len(x)


@examples(400)
@given(session_id=ids, t=st.integers(1, 300) | times.filter(bool), y=floats, durable_t=times)
@example("s" * 128, LARGEST, bytes(4 * 10_000), LARGEST)
def test_a_reply_is_protobufs(session_id: str, t: int, y: bytes, durable_t: int) -> None:
    codec = RowCodec(session_id, 1, len(y) // 4)
    message = pb.StepResponse(session_id=session_id, t=t, durable_t=durable_t)
    put_floats(message, Y, y)
    end = saved(durable_t) if durable_t else b""
    assert codec.heads(t)[0] + y + end == message.SerializeToString()


@pytest.mark.parametrize("n", [0, 1, *ENDS, LARGEST])
def test_a_number_has_the_shortest_form(n: int) -> None:
    assert varint(n) == pb.StepRequest(t=n).SerializeToString()[1:]


SESSION, T, WIDTH = "abc", 300, 2
ROW = np.arange(1, WIDTH + 1, dtype="<f4").tobytes()
CODEC = RowCodec(SESSION, WIDTH, 1)
FORETOLD = CODEC.heads(T)[1]


def is_recognized(payload: bytes) -> bool:
    return payload[: -CODEC.x_bytes] == FORETOLD


def assert_means_the_row(payload: bytes) -> None:
    """Protobuf finds the session, t and one row in it, and nothing else."""
    message = pb.StepRequest.FromString(payload)
    assert [field.name for field, _ in message.ListFields()] == ["session_id", "t", "x"]
    assert (message.session_id, message.t) == (SESSION, T)
    bare = pb.StepRequest()
    put_floats(bare, X, payload[-CODEC.x_bytes :])
    assert len(bare.x) == WIDTH
    assert np.array(message.x, "<f4").tobytes() == np.array(bare.x, "<f4").tobytes()
    assert message.ByteSize() == len(payload)  # no unknown field either


def long_varint(n: int, more: int) -> bytes:
    """A number with so many bytes more than it needs."""
    return (
        varint(n)
        if not more
        else varint(n)[:-1] + bytes([varint(n)[-1] | 128, *[128] * (more - 1), 0])
    )


def text(value: str) -> bytes:
    return packed_header(1, len(value.encode())) + value.encode()


rows = st.binary(min_size=4, max_size=4 * WIDTH + 4) | st.just(ROW)
parts = st.one_of(
    st.just(text(SESSION)),
    st.sampled_from([text("ab"), text("abcd"), text("")]),
    st.builds(lambda n, more: b"\x10" + long_varint(n, more), st.sampled_from([T, T + 1, 0]),
              st.sampled_from([0, 0, 1, 3])),
    st.builds(lambda x: packed_header(X, len(x)) + x, rows),
    st.just(b"".join(b"\x1d" + ROW[at : at + 4] for at in range(0, len(ROW), 4))),  # not packed
    st.sampled_from([b"\x20\x01", b"\x28\x01", b"\x30\x02", b"\x20\x00"]),  # the other fields
    st.sampled_from([b"\xc0\x3e\x01", b"\xc2\x3e\x01a"]),  # an unknown one
)  # fmt: skip
canonical = st.binary(min_size=len(ROW), max_size=len(ROW)).map(FORETOLD.__add__)


def cut(payload: bytes, spans: Iterable[tuple[int, bytes]]) -> bytes:
    """With some bytes replaced."""
    changed = bytearray(payload)
    for at, data in spans:
        place = at % (len(changed) + 1)
        changed[place : place + len(data)] = data
    return bytes(changed)


payloads = st.one_of(
    canonical,
    st.permutations([text(SESSION), b"\x10" + varint(T), packed_header(X, len(ROW)) + ROW]).map(
        b"".join
    ),
    st.lists(parts, min_size=1, max_size=5).map(b"".join),
    st.builds(
        cut, canonical, st.lists(st.tuples(st.integers(0), st.binary(max_size=2)), max_size=2)
    ),
)


@examples(2_000)
@given(payload=payloads)
@example(FORETOLD + ROW)
def test_what_is_recognized_means_the_same_to_protobuf(payload: bytes) -> None:
    if is_recognized(payload):
        assert_means_the_row(payload)


@given(row=st.binary(min_size=len(ROW), max_size=len(ROW)))
@example(np.full(WIDTH, np.nan, "<f4").tobytes())
@example(np.full(WIDTH, -np.inf, "<f4").tobytes())
def test_a_row_of_any_bits_is_recognized(row: bytes) -> None:
    assert is_recognized(FORETOLD + row)
    assert_means_the_row(FORETOLD + row)


@pytest.mark.parametrize(
    "other",
    [
        request(SESSION, T + 1, ROW),
        request(SESSION, None, ROW),
        request(SESSION, T, ROW + ROW),
        request(SESSION, T, ROW[:4]),
        request(SESSION, T, b""),
        request("abd", T, ROW),
        request(SESSION, T, ROW, inspect=True),
        request(SESSION, T, ROW, last_only=True),
        request(SESSION, T, ROW, advance=1),
        request(SESSION, T, ROW) + b"\xc0\x3e\x01",
        text(SESSION) + b"\x10" + long_varint(T, 1) + packed_header(X, len(ROW)) + ROW,
        packed_header(X, len(ROW)) + ROW + text(SESSION) + b"\x10" + varint(T),
        FORETOLD,
        FORETOLD[: CODEC.x_bytes],
        b"",
    ],
)
def test_another_request_is_not_recognized(other: bytes) -> None:
    assert not is_recognized(other)
