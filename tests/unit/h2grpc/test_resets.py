"""Streams that end before their time: by the client, or because it makes the server end them.

Rapid reset is CVE-2023-44487, MadeYouReset CVE-2025-8671.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stepstate.h2grpc.frames import (
    LARGEST_WINDOW,
    ErrorCode,
    Flag,
    FrameType,
    frame,
    rst_stream,
    window_update,
)
from stepstate.h2grpc.limits import Cost, Http2Limits
from tests.unit.h2grpc.client import Client, message
from tests.unit.h2grpc.raw import LAST, WHOLE, block, data, goaway_of, headers, priority

CREDIT_LEFT = 1000
"""Of the connections here: what takes long with a new one's takes a tenth."""
FIRST = 101
"""Streams before it belong to the test's preparation."""

FORCED: dict[str, Callable[[int], bytes]] = {
    "window update of 0": lambda n: headers(n) + window_update(n, 0),
    "window past 2^31 - 1": lambda n: headers(n) + window_update(n, LARGEST_WINDOW),
    "data after the end": lambda n: headers(n, LAST) + data(n, b""),
    "more data than the content-length": lambda n: (
        headers(n, data=block(("content-length", "3"))) + data(n, b"more")
    ),
    "less data than the content-length": lambda n: (
        headers(n, data=block(("content-length", "99"))) + data(n, b"", Flag.END_STREAM)
    ),
    "a content-length and no data": lambda n: headers(n, LAST, block(("content-length", "9"))),
    "a field in upper case": lambda n: headers(n, data=block(("Upper", "case"))),
    "a pseudo-header missing": lambda n: headers(n, data=block(without=":path")),
    "headers twice": lambda n: headers(n) + headers(n),
    "headers after the end": lambda n: headers(n, LAST) + headers(n, LAST),
    "malformed trailers": lambda n: headers(n) + headers(n, LAST, block(("Upper", "case"))),
    "headers that depend on themselves": lambda n: frame(
        FrameType.HEADERS,
        WHOLE | Flag.PRIORITY,
        n,
        n.to_bytes(4, "big") + b"\x10" + block(),
    ),
    "priority on itself": lambda n: headers(n) + priority(n, n),
    "a priority of 4 bytes": lambda n: headers(n) + frame(FrameType.PRIORITY, 0, n, bytes(4)),
    "more data than the window": lambda n: headers(n) + 5 * data(n, bytes(16_000)),
    "a message that is too large": lambda n: (
        headers(n) + frame(FrameType.DATA, 0, n, b"\0\xff\xff\xff\xff")
    ),
    "a message of an unknown coding": lambda n: (
        headers(n) + frame(FrameType.DATA, 0, n, b"\7\0\0\0\1x")
    ),
}


def repeated(client: Client, attack: Callable[[int], bytes]) -> int:
    """Repeats an attack until it ends the connection; returns how often it could."""
    client.host.answers, client.server.meter.credit = False, CREDIT_LEFT
    for count in range(CREDIT_LEFT):
        client.server.receive(attack(FIRST + 2 * count))
        client.server.take_output() if not client.server.ended else None
        if client.server.ended:
            return count
    return CREDIT_LEFT


@pytest.mark.parametrize("name", FORCED)
def test_resets_that_the_client_forces_are_charged_as_its_own(name: str) -> None:
    client = Client()
    count = repeated(client, FORCED[name])
    assert count <= CREDIT_LEFT // Cost.RESET
    assert goaway_of(client.server.take_output()) == (
        ErrorCode.ENHANCE_YOUR_CALM,
        b"too much work without calls",
    )


@pytest.mark.parametrize("name", FORCED)
def test_they_are_charged_while_the_connection_drains(name: str) -> None:
    client = Client()
    client.open()
    client.exchange()
    client.server.drain()
    client.server.take_output()
    assert repeated(client, FORCED[name]) <= CREDIT_LEFT // Cost.RESET


@pytest.mark.parametrize("name", FORCED)
def test_they_are_charged_after_the_last_goaway(name: str) -> None:
    """Then nothing is answered, and each still costs."""
    client = Client()
    client.open()
    client.exchange()
    client.server.refuse_more()
    client.server.take_output()
    assert repeated(client, FORCED[name]) <= CREDIT_LEFT // Cost.RESET
    assert set(client.host.calls) == {1}


def test_streams_over_the_limit_are_charged() -> None:
    client = Client(Http2Limits(concurrent_streams=1))
    client.open()
    client.exchange()
    assert repeated(client, headers) in range(90, CREDIT_LEFT // Cost.RESET + 1)
    assert set(client.host.calls) == {1}


def test_data_that_follows_a_refused_stream_is_ignored() -> None:
    client = Client(Http2Limits(concurrent_streams=1))
    client.open()
    client.exchange()
    client.server.take_output()
    client.server.receive(headers(3))
    refusal = client.server.take_output()
    assert refusal == rst_stream(3, ErrorCode.REFUSED_STREAM)
    before = client.server.meter.credit
    client.server.receive(data(3, b"sent") + data(3, b"before it was read", Flag.END_STREAM))
    assert client.server.take_output() == b""
    assert before - client.server.meter.credit == 2 * Cost.FRAME


def test_rapid_resets_end_their_connection() -> None:
    client = Client()
    attack = repeated(client, lambda n: headers(n) + rst_stream(n, ErrorCode.CANCEL))
    assert attack <= CREDIT_LEFT // Cost.ABRUPT_RESET
    assert goaway_of(client.server.take_output())[0] is ErrorCode.ENHANCE_YOUR_CALM
    assert not client.server.streams


def test_rapid_resets_in_reads_of_their_own_end_it_too() -> None:
    client = Client()
    client.server.meter.credit = CREDIT_LEFT
    count = 0
    while not client.server.ended:
        client.server.receive(headers(FIRST + 2 * count))
        client.server.receive(rst_stream(FIRST + 2 * count, ErrorCode.CANCEL))
        count += 1
    assert count <= CREDIT_LEFT // Cost.RESET + 1


def test_a_busy_client_whose_deadlines_pass_is_never_ended() -> None:
    """Three of four calls time out after they were waited for; Jetty counted those alone."""
    client = Client()
    client.host.answers = False
    for number in range(FIRST, FIRST + 2 * 4_000, 2):
        client.server.receive(headers(number) + data(number, b"work"))
        if number % 8 == 1:
            client.host.calls[number].finish()
        else:
            client.server.receive(rst_stream(number, ErrorCode.CANCEL))
        client.server.take_output()
    assert not client.server.ended


def test_hundreds_of_deadlines_in_a_row_are_no_reason_either() -> None:
    client = Client()
    client.host.answers = False
    numbers = range(FIRST, FIRST + 2 * 900, 2)
    for number in numbers:
        client.server.receive(headers(number) + data(number, b"work"))
    for number in numbers:
        client.server.receive(rst_stream(number, ErrorCode.CANCEL))
    assert not client.server.ended


def test_messages_after_one_that_is_refused_are_not_delivered() -> None:
    client = Client(Http2Limits(message_bytes=10), window=0)  # its status waits behind a reply
    stream_id = client.open()
    client.exchange()
    client.h2.send_data(stream_id, message(b"one") + message(bytes(11)) + message(b"two"))
    client.exchange()
    client.h2.send_data(stream_id, message(b"three"))
    client.exchange()
    assert client.host.calls[stream_id].messages == [b"one"]
    client.h2.increment_flow_control_window(1000, stream_id)
    client.exchange()
    assert client.trailers[stream_id]["grpc-status"] == "8"
