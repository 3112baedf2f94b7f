"""Header blocks: HPACK's bombs, CONTINUATION floods, and metadata at its limit."""

from __future__ import annotations

import pytest
from h2.settings import SettingCodes
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError
from hypothesis import given
from hypothesis import strategies as st

from stepstate.h2grpc.blocks import HeaderReader
from stepstate.h2grpc.errors import ConnectionFailure
from stepstate.h2grpc.frames import ErrorCode, Flag, FrameType, frame
from stepstate.h2grpc.headers import literal
from stepstate.h2grpc.limits import Http2Limits, WorkMeter
from tests.unit.h2grpc.client import HEADERS, Client
from tests.unit.h2grpc.raw import LAST, block, frames_of, goaway_of, headers

LIMITS = Http2Limits()
COUNTED = sum(len(name) + len(value) + 32 for name, value in HEADERS)


def failed(client: Client) -> ErrorCode:
    """The code of the GOAWAY that ended a connection."""
    assert client.server.ended
    return goaway_of(client.server.take_output())[0]


def send_block(client: Client, data: bytes, *, part: int = 16_384) -> None:
    """Sends a header block in frames of one size."""
    parts = [data[first : first + part] for first in range(0, len(data), part)]
    for place, payload in enumerate(parts):
        kind = FrameType.CONTINUATION if place else FrameType.HEADERS
        flags = Flag.END_HEADERS if payload is parts[-1] else 0
        client.server.receive(frame(kind, flags, 1, payload))


def test_metadata_of_exactly_the_limit_is_taken_and_one_byte_more_refused() -> None:
    client = Client()
    value = "x" * (LIMITS.header_list_bytes - COUNTED - len("long") - 32)
    taken, refused = client.open(("long", value)), client.open(("long", value + "x"))
    other = client.open(end=True)
    client.exchange()
    assert client.host.calls[taken].stream.open_in
    assert refused not in client.host.calls
    assert client.trailers[refused]["grpc-status"] == "8"
    assert client.trailers[other]["grpc-status"] == "0"


def test_continuations_without_end_are_a_flood() -> None:
    client = Client()
    client.server.receive(frame(FrameType.HEADERS, 0, 1, block()))
    for _ in range(LIMITS.header_frames):
        client.server.receive(frame(FrameType.CONTINUATION, 0, 1))
    assert failed(client) is ErrorCode.ENHANCE_YOUR_CALM


def test_a_long_block_ends_its_connection_before_it_is_whole() -> None:
    client = Client()
    client.server.receive(frame(FrameType.HEADERS, 0, 1, bytes(16_384)))
    for _ in range(4):
        client.server.receive(frame(FrameType.CONTINUATION, 0, 1, bytes(16_384)))
    assert failed(client) is ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("other", [FrameType.PING, FrameType.DATA, FrameType.HEADERS, 77])
def test_nothing_may_come_within_a_block(other: FrameType) -> None:
    client = Client()
    client.server.receive(frame(FrameType.HEADERS, 0, 1, block()) + frame(other, 0, 1, bytes(8)))
    assert failed(client) is ErrorCode.PROTOCOL_ERROR


def test_a_continuation_needs_a_beginning() -> None:
    client = Client()
    client.server.receive(frame(FrameType.CONTINUATION, Flag.END_HEADERS, 1, block()))
    assert failed(client) is ErrorCode.PROTOCOL_ERROR


def test_a_bomb_of_references_is_not_expanded() -> None:
    """One entry of 4 KB, referred to by a byte each: 4,000 of them are 16 MB."""
    client = Client()
    entry = b"\x40" + literal(b"bomb", b"x" * 3900)[1:]  # into the dynamic table
    send_block(client, entry + b"\xbe" * 4000)
    assert failed(client) is ErrorCode.ENHANCE_YOUR_CALM
    assert not client.host.calls


BROKEN = {
    "a table larger than allowed": b"\x3f\xe2\x1f",  # 4097
    "an index that is not there": b"\xff\x80\x01",
    "an index of 0": b"\x80",
    "an integer without end": b"\xff" * 100,
    "a string that is cut": b"\0\x04na",
    "Huffman code without end": b"\0\1x\x85" + b"\xff" * 5,
    "updates of the table in the middle": b"\x83\x20",
    "updates of the table without end": b"\x20" * 10_000,
    "long updates of the table without end": b"\x3f\x01" * 5_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_block_that_is_broken_ends_its_connection(name: str) -> None:
    client = Client()
    client.server.receive(headers(1, LAST, BROKEN[name]))
    assert failed(client) is ErrorCode.COMPRESSION_ERROR


def test_a_clients_encoder_may_resize_its_table() -> None:
    """Down and up again, in one block (RFC 7541, section 4.2)."""
    client, encoder = Client(), Encoder()
    for stream_id, size in ((1, 4096), (3, 0), (5, 1000)):
        encoder.header_table_size = 0
        encoder.header_table_size = size
        client.server.receive(headers(stream_id, LAST, encoder.encode(HEADERS)))
    ends = [it.stream_id for it in frames_of(client.server.take_output()) if it.flags & 1]
    assert ends == [1, 3, 5]


def test_huffman_code_is_charged_by_the_byte() -> None:
    client = Client()
    before = client.server.meter.credit
    client.server.receive(headers(1, data=block(("long", "x" * 10_000))))
    assert before - client.server.meter.credit == 10_000 // 512


def test_a_client_may_keep_no_table_for_what_it_is_sent() -> None:
    """Its decoder then asks for an update of the table's size in the next block."""
    client = Client()
    client.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: 0})
    client.exchange()
    ids = [client.open(end=True) for _ in range(2)]
    client.exchange()
    assert [client.trailers[stream_id]["grpc-status"] for stream_id in ids] == ["0", "0"]


parts = st.one_of(
    st.sampled_from([b"\x82", b"\x86", b"\xbe", b"\xbf", b"\xc0", b"\xff\x00"]),  # of the tables
    st.binary(max_size=2).map(lambda value: b"\x40" + literal(b"new", value)[1:]),  # into the table
    st.binary(max_size=2).map(lambda value: literal(b"other", value)),
    st.integers(0, 400).map(lambda size: literal(b"x" * size, b"\x80" * size)),
    st.binary(max_size=2).map(lambda value: b"\x10" + literal(b"never", value)[1:]),
    st.sampled_from([b"\x0f\x2f\x01v", b"\x1f\x2f\x01v", b"\x02\x82\x1f\xff"]),  # by name
    st.just(b"\x20"),  # an empty table
)
one_block = st.lists(parts, max_size=2).map(b"".join)


@given(blocks=st.lists(st.tuples(one_block, st.integers(1, 3)), max_size=12))
def test_a_block_that_repeats_the_one_before_has_the_same_fields(
    blocks: list[tuple[bytes, int]],
) -> None:
    three = b"".join(b"\x40" + literal(name, b"")[1:] for name in (b"a", b"b", b"c"))
    reader = HeaderReader(LIMITS, WorkMeter())
    decoder = Decoder(LIMITS.header_block_bytes)
    for block_, times in [(three, 1), *blocks]:
        for _ in range(times):
            try:
                expected = decoder.decode(block_, raw=True)
            except HPACKError:
                with pytest.raises(ConnectionFailure):
                    reader.headers(Flag.END_HEADERS, 1, block_)
                return
            found = reader.headers(Flag.END_HEADERS, 1, block_)
            assert found is not None
            assert list(found.fields) == [tuple(field) for field in expected]


@pytest.mark.parametrize("size", [1, 59, 2000])
def test_the_token_of_a_call_is_not_decoded_for_each_call(size: int) -> None:
    reader = HeaderReader(LIMITS, WorkMeter())
    calls = b"\x82" + literal(b"authorization", b"x" * size) + b"\x86"
    found = [reader.headers(Flag.END_HEADERS, 1, calls) for _ in range(3)]
    assert found[1] is not None
    assert found[1].fields is reader.last_fields
    assert found[1].fields[1] == (b"authorization", b"x" * size)


def test_calls_with_the_same_headers_are_told_apart_from_those_with_others() -> None:
    client = Client()
    calls = [client.open(("n", name), end=True) for name in "aaabbba"]
    client.exchange()
    fields = [client.host.requests[call].fields for call in calls]
    assert [dict(found)[b"n"] for found in fields] == [*[b"a"] * 3, *[b"b"] * 3, b"a"]
