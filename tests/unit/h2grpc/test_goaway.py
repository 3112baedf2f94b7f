"""Graceful ends in two GOAWAYs (RFC 9113, section 6.8), and what follows an end."""

from __future__ import annotations

import pytest

from stepstate.h2grpc.connection import Http2Connection
from stepstate.h2grpc.frames import (
    CLIENT_PREFACE,
    LARGEST_WINDOW,
    ErrorCode,
    Flag,
    FrameType,
    frame,
    goaway,
    ping,
    rst_stream,
    settings,
)
from stepstate.h2grpc.limits import Http2Limits
from tests.unit.h2grpc.client import Client, EchoHost, Room, message
from tests.unit.h2grpc.raw import frames_of, headers

ANSWER = ping(b"draining", ack=True)
FIRST = goaway(LARGEST_WINDOW, ErrorCode.NO_ERROR)


def test_a_stream_that_begins_between_the_goaways_is_served() -> None:
    """grpc/grpc-java#5806: it was reset, as its number was higher than the last one's."""
    client = Client()
    client.server.drain()
    crossing = client.open()
    client.server.receive(client.h2.data_to_send() + ANSWER)
    assert client.server.take_output().endswith(goaway(crossing, ErrorCode.NO_ERROR))
    client.server.receive(frame(FrameType.DATA, 0, crossing, message(b"served")))
    client.server.receive(frame(FrameType.DATA, Flag.END_STREAM, crossing))
    assert not client.server.streams
    assert client.host.calls[crossing].messages == [b"served"]
    assert client.server.ended


def test_the_connection_stays_until_the_last_stream() -> None:
    client = Client()
    ids = [client.open() for _ in range(3)]
    client.exchange()
    client.server.drain()
    client.server.receive(ANSWER)
    for stream_id in ids:
        assert not client.server.ended
        client.server.receive(frame(FrameType.DATA, Flag.END_STREAM, stream_id))
    assert client.server.ended


def test_a_reset_may_be_what_ends_the_last_stream() -> None:
    client = Client()
    stream_id = client.open()
    client.exchange()
    client.server.drain()
    client.server.receive(ANSWER)
    client.server.receive(rst_stream(stream_id, ErrorCode.CANCEL))
    assert client.server.ended
    assert client.host.calls[stream_id].ended == ["reset"]


def test_an_idle_connection_ends_when_its_client_has_answered() -> None:
    client = Client()
    client.server.drain()
    assert FIRST in client.server.take_output()
    assert not client.server.ended
    client.server.receive(ANSWER)
    assert client.server.ended


def test_a_connection_that_drains_from_the_beginning_greets_first() -> None:
    """Its first frame must be SETTINGS (RFC 9113, section 3.4)."""
    server = Http2Connection(EchoHost(), Http2Limits(), lambda: 0.0, Room())
    server.drain()
    assert not server.take_output()
    server.receive(CLIENT_PREFACE + settings({}))
    kinds = [one.kind for one in frames_of(server.take_output())]
    assert kinds[0] == FrameType.SETTINGS
    assert FrameType.GOAWAY in kinds


def test_a_drain_is_asked_for_once() -> None:
    client = Client()
    client.open()
    client.exchange()
    client.server.drain()
    client.server.drain()
    assert client.server.take_output().count(FIRST) == 1
    client.server.refuse_more()
    client.server.refuse_more()
    assert client.server.take_output() == goaway(1, ErrorCode.NO_ERROR)


def test_the_last_stream_that_is_served_never_grows() -> None:
    """RFC 9113: "Endpoints MUST NOT increase the value they send"."""
    client = Client()
    client.open()
    client.exchange()
    client.server.refuse_more()
    client.server.take_output()
    client.server.receive(headers(99))
    client.server.end(ErrorCode.PROTOCOL_ERROR)
    assert client.server.take_output() == goaway(1, ErrorCode.PROTOCOL_ERROR)
    assert 99 not in client.host.calls


def test_streams_that_crossed_the_second_goaway_keep_both_sides_in_step() -> None:
    """Their headers are decoded, their data gives the window back, nothing is answered."""
    client = Client(Http2Limits(connection_window=200_000))
    kept = client.open(("x-kept", "table"))
    client.exchange()
    client.server.refuse_more()
    client.server.take_output()
    crossing = client.open(("x-new", "entry"))
    client.server.receive(client.h2.data_to_send())
    for _ in range(20):
        client.server.meter.credit = 100
        client.server.receive(frame(FrameType.DATA, 0, crossing, bytes(16_000)))
    assert not client.server.ended
    client.server.receive(frame(FrameType.DATA, Flag.END_STREAM, kept))
    assert client.host.calls[kept].ended == ["half_closed", "finished"]


@pytest.mark.parametrize("code", [ErrorCode.PROTOCOL_ERROR, ErrorCode.NO_ERROR])
def test_nothing_is_taken_after_the_end(code: ErrorCode) -> None:
    client = Client()
    stream_id = client.open()
    client.exchange()
    client.server.end(code)
    client.server.take_output()
    client.server.receive(headers(stream_id + 2) + headers(stream_id + 4))
    client.server.drain()
    client.server.refuse_more()
    assert client.server.take_output() == b""
    assert client.host.calls[stream_id].ended == ["reset"]
    assert not client.server.streams


def test_the_rest_of_a_read_is_dropped_when_a_call_ends_the_connection() -> None:
    """The last call of a drained connection ends it in the middle of a read."""
    client = Client()
    stream_id = client.open()
    client.exchange()
    client.server.refuse_more()
    end = frame(FrameType.DATA, Flag.END_STREAM, stream_id)
    client.server.receive(end + headers(stream_id + 2) + frame(FrameType.PING, 0, 0, bytes(8)))
    output = client.server.take_output()
    assert client.server.ended
    assert frame(FrameType.PING, Flag.ACK, 0, bytes(8)) not in output
