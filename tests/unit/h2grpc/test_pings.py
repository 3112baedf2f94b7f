"""How often a client may ping (gRPC's proposal A8)."""

from __future__ import annotations

import pytest

from stepstate.h2grpc.frames import ErrorCode, ping, window_update
from stepstate.h2grpc.limits import Http2Limits
from tests.unit.h2grpc.client import Client
from tests.unit.h2grpc.raw import goaway_of

LIMITS = Http2Limits()
PING = ping(bytes(8), ack=False)


def pinged(client: Client, *intervals: float) -> None:
    """Pings after each interval."""
    for seconds in intervals:
        client.now += seconds
        client.server.receive(PING)


@pytest.mark.parametrize("call", [False, True])
def test_a_ping_every_ten_seconds_is_welcome_with_a_call_or_without(*, call: bool) -> None:
    client = Client()
    if call:
        client.open()
        client.exchange()
    pinged(client, *[10.0] * 1000)
    assert not client.server.ended


def test_pings_that_the_network_moves_together_are_no_reason() -> None:
    """Two early ones and one in time, for weeks: strikes don't add up."""
    client = Client()
    pinged(client, *[16.0, 1.0, 3.0] * 300)
    assert not client.server.ended


def test_three_early_pings_in_a_row_are_too_many() -> None:
    client = Client()
    client.server.take_output()
    pinged(client, 10.0, *[LIMITS.ping_interval_seconds - 0.1] * 2)
    assert not client.server.ended
    pinged(client, 1.0)
    end = goaway_of(client.server.take_output())
    assert end == (ErrorCode.ENHANCE_YOUR_CALM, b"too_many_pings")


def test_a_client_may_ping_after_each_piece_of_a_long_reply() -> None:
    """So it measures how much is on its way, many times a second."""
    client = Client(window=0)
    stream_id = client.open()
    client.exchange()
    stream = client.host.calls[stream_id].stream
    stream.start(b"\x88")
    stream.send(bytes(60_000))
    for _ in range(50):
        client.server.receive(window_update(stream_id, 1000) + PING)
        client.now += 0.01
    assert not client.server.ended
