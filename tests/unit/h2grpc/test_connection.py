"""The HTTP/2 state of a connection, against the package `h2` as its client."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstate.h2grpc.connection import MESSAGES_AT_ONCE
from stepstate.h2grpc.frames import (
    LARGEST_WINDOW,
    ErrorCode,
    Flag,
    FrameType,
    Setting,
    frame,
    goaway,
    ping,
    rst_stream,
    settings,
    window_update,
)
from stepstate.h2grpc.limits import CREDIT, Cost, Http2Limits
from tests.unit.h2grpc.client import HEADERS, Client, message

LIMITS = Http2Limits(concurrent_streams=10, message_bytes=2**20)


def recorded(payloads: list[list[bytes]], *, padded: bool) -> bytes:
    """What a client sends for some calls whose messages come in turn, before it reads anything."""
    client = Client()
    client.h2.data_to_send()
    ids = [client.open() for _ in payloads]
    for turn in range(max(map(len, payloads), default=0)):
        for stream_id, messages in zip(ids, payloads, strict=True):
            if turn < len(messages):
                pad = 3 if padded else None
                client.h2.send_data(stream_id, message(messages[turn]), pad_length=pad)
    for stream_id in ids:
        client.h2.end_stream(stream_id)
    return bytes(client.h2.data_to_send())


@given(
    payloads=st.lists(st.lists(st.binary(max_size=300), max_size=5), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 60), min_size=1),
    padded=st.booleans(),
)
def test_bytes_may_be_cut_anywhere(
    payloads: list[list[bytes]], cuts: list[int], *, padded: bool
) -> None:
    data, client = recorded(payloads, padded=padded), Client()
    position = turn = 0
    while position < len(data):
        size = cuts[turn % len(cuts)]
        client.server.receive(data[position : position + size])
        position, turn = position + size, turn + 1
    calls = client.host.calls.values()
    assert [call.messages for call in calls] == payloads
    assert all(call.ended == ["half_closed", "finished"] for call in calls)
    assert not client.server.ended
    assert not client.server.streams


@given(st.binary(max_size=400))
def test_whatever_comes_ends_at_worst_the_connection(data: bytes) -> None:
    client = Client()
    client.open()
    client.exchange()
    client.server.receive(data)
    client.server.receive(data)
    client.server.take_output()
    client.server.lose()
    assert all("reset" in call.ended for call in client.host.calls.values())


@given(st.integers(1, 200), st.lists(st.binary(max_size=3000), min_size=1, max_size=6))
def test_replies_wait_for_the_windows_of_the_client(window: int, payloads: list[bytes]) -> None:
    client = Client(window=window)
    stream_id = client.open()
    for payload in payloads:
        client.h2.send_data(stream_id, message(payload))
    client.h2.end_stream(stream_id)
    client.exchange()
    assert client.data[stream_id] == b"".join(map(message, payloads))
    assert client.trailers[stream_id]["grpc-status"] == "0"
    assert not client.server.streams


def test_many_half_sent_messages_do_not_stop_the_connection() -> None:
    client = Client(Http2Limits(connection_window=1_000_000))
    data = message(bytes(100_000))
    ids = [client.open() for _ in range(40)]
    for first in range(0, len(data), 10_000):
        for stream_id in ids:
            client.h2.send_data(stream_id, data[first : first + 10_000])
            client.exchange()
    assert all(client.host.calls[stream_id].messages for stream_id in ids)


@pytest.mark.parametrize("ended", ["reset", "answered", "refused"])
def test_the_window_of_the_connection_comes_back_whatever_ends_a_stream(ended: str) -> None:
    client = Client(Http2Limits(connection_window=200_000, concurrent_streams=1))
    if ended == "refused":
        client.open()
    client.server.receive(client.h2.data_to_send())
    block = client.h2.encoder.encode(HEADERS)
    for stream_id in range(1001, 1101, 2):
        client.server.meter.credit = CREDIT
        client.server.receive(frame(FrameType.HEADERS, Flag.END_HEADERS, stream_id, block))
        if ended == "reset":
            client.server.receive(rst_stream(stream_id, ErrorCode.CANCEL))
        elif ended == "answered":
            client.host.calls[stream_id].half_closed()
        data = bytes((200,)) + bytes(10_000)
        client.server.receive(frame(FrameType.DATA, Flag.PADDED, stream_id, data))
        assert not client.server.ended  # 50 times 10,000 bytes are more than the window


def test_an_end_needs_no_window() -> None:
    client = Client(window=0)
    stream_id = client.open(end=True)
    client.exchange()
    assert client.trailers[stream_id]["grpc-status"] == "0"


def test_a_window_may_be_lowered_below_what_is_sent() -> None:
    client = Client()
    stream_id = client.open()
    client.h2.send_data(stream_id, message(bytes(50)))
    client.exchange()
    client.h2.update_settings({Setting.INITIAL_WINDOW_SIZE: 10})
    client.exchange()
    assert client.server.streams[stream_id].send_window < 0
    client.h2.send_data(stream_id, message(b"later"))
    client.exchange()
    assert not client.data[stream_id].endswith(b"later")
    client.h2.increment_flow_control_window(1000, stream_id)
    client.exchange()
    assert client.data[stream_id].endswith(b"later")


FLOODS = {
    "ping": (ping(bytes(8), ack=False), 3),
    "settings": (settings({}), CREDIT),
    "priority": (frame(FrameType.PRIORITY, 0, 1, bytes(5)), CREDIT),
    "empty data": (frame(FrameType.DATA, 0, 1), CREDIT),
    "unknown type": (frame(77, 0, 0), CREDIT),  # type: ignore[arg-type]
    "window updates": (window_update(1, 1), CREDIT),
    "window updates of an ended stream": (window_update(3, 1), CREDIT),
    "resets of an ended stream": (rst_stream(3, ErrorCode.CANCEL), CREDIT),
    "settings by the hundred": (settings(dict.fromkeys(range(7, 107), 1)), CREDIT // 100),  # type: ignore[arg-type]
    "goaways": (goaway(0, ErrorCode.NO_ERROR), CREDIT),
    "answers to no ping": (ping(bytes(8), ack=True), CREDIT),
    "data of a byte": (frame(FrameType.DATA, 0, 5, b"\0"), CREDIT + 10),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_its_connection_alone(name: str) -> None:
    raw, allowed = FLOODS[name]
    client = Client()
    client.open()
    client.open(end=True)
    client.h2.send_data(client.open(), b"\0\0\1\0\0")  # the beginning of a message of 64 KiB
    client.exchange()
    for count in range(2 * CREDIT):  # noqa: B007
        client.server.receive(raw)
        client.server.take_output() if not client.server.ended else None
        if client.server.ended:
            break
    assert client.server.ended
    assert count <= allowed + 1
    client.exchange()
    assert client.goaway is not None
    assert client.goaway[0] is ErrorCode.ENHANCE_YOUR_CALM


def test_resets_in_the_same_read_cost_most() -> None:
    client = Client()
    for count in range(CREDIT):  # noqa: B007
        stream_id = client.open()
        client.h2.reset_stream(stream_id)
        client.server.receive(client.h2.data_to_send())
        if client.server.ended:
            break
    assert count in range(CREDIT // Cost.ABRUPT_RESET - 5, CREDIT // Cost.ABRUPT_RESET + 1)


def test_faults_that_make_the_server_reset_are_charged_too() -> None:
    client = Client()
    for count in range(CREDIT):  # noqa: B007
        stream_id = client.open()
        client.exchange()
        client.server.receive(window_update(stream_id, 0))
        client.h2.receive_data(client.server.take_output())
        if client.server.ended:
            break
    assert count in range(CREDIT // (Cost.RESET + 2), CREDIT // Cost.RESET + 1)


def test_calls_that_are_cancelled_after_their_work_never_end_a_connection() -> None:
    client = Client()
    for _ in range(1500):
        stream_id = client.open()
        client.h2.send_data(stream_id, message(b"work"))
        client.exchange()
        client.h2.send_data(stream_id, message(b"more"))
        client.exchange()
        client.h2.reset_stream(stream_id)
        client.exchange()
    assert not client.server.ended


def test_pings_beside_calls_are_welcome_and_pings_alone_only_now_and_then() -> None:
    client = Client()
    stream_id = client.open()
    for _ in range(100):
        client.h2.send_data(stream_id, message(b"work"))
        client.h2.ping(bytes(8))
        client.exchange()
    for _ in range(20):
        client.now += 10.0
        client.h2.ping(bytes(8))
        client.exchange()
    assert client.pongs == 120
    for _ in range(3):
        client.now += 1.0
        client.h2.ping(bytes(8))
        client.exchange()
    assert client.goaway == (ErrorCode.ENHANCE_YOUR_CALM, stream_id, b"too_many_pings")


def test_a_graceful_end_serves_what_was_on_its_way() -> None:
    client = Client()
    before = client.open()
    client.exchange()
    client.server.drain()
    crossing = client.open()
    client.server.receive(client.h2.data_to_send())
    first = client.server.take_output()
    client.server.receive(ping(b"draining", ack=True))
    client.server.receive(
        frame(FrameType.HEADERS, 5, crossing + 2, client.h2.encoder.encode(HEADERS))
    )
    assert set(client.host.calls) == {before, crossing}
    assert goaway(LARGEST_WINDOW, ErrorCode.NO_ERROR) in first
    assert goaway(crossing, ErrorCode.NO_ERROR) in client.server.take_output()
    client.host.calls[before].half_closed()
    assert client.server.take_output().endswith(rst_stream(before, ErrorCode.NO_ERROR))


def test_calls_with_many_headers_begin_in_several_turns() -> None:
    """A header of 4 bytes takes as long as one of 100; 400 in each call took milliseconds."""
    client = Client()
    calls = [client.open(*[("x", "")] * 400) for _ in range(6)]
    client.server.receive(client.h2.data_to_send())
    turns = 1
    while client.server.behind:
        client.server.receive(b"")
        turns += 1
    assert turns >= 3
    assert list(client.host.calls) == calls


@pytest.mark.parametrize("in_a_frame", [1, 1_000])
def test_many_messages_are_taken_in_several_turns(in_a_frame: int) -> None:
    """A read of a quarter of a megabyte may have 10,000 of them, which take 50 ms."""
    client = Client()
    stream_id = client.open()
    client.exchange()
    sent = [b"%d" % number for number in range(3_000)]
    for first in range(0, len(sent), in_a_frame):
        some = b"".join(map(message, sent[first : first + in_a_frame]))
        client.h2.send_data(stream_id, some)
    received = client.host.calls[stream_id].messages
    data, most = client.h2.data_to_send(), 0
    while data or client.server.behind:
        before = len(received)
        client.server.receive(data)
        data, most = b"", max(most, len(received) - before)
    assert received == sent
    assert most < MESSAGES_AT_ONCE + in_a_frame
