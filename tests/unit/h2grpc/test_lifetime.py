"""What time does to a connection, with a clock that the test moves."""

from __future__ import annotations

import pytest

from stepstate.h2grpc.connection import Http2Connection
from stepstate.h2grpc.frames import (
    CLIENT_PREFACE,
    LARGEST_WINDOW,
    ErrorCode,
    FrameType,
    goaway,
    ping,
)
from stepstate.h2grpc.lifetime import ConnectionTimes, Lifetime
from stepstate.h2grpc.limits import Http2Limits
from tests.unit.h2grpc.client import Client, EchoHost, Room
from tests.unit.h2grpc.raw import frames_of

TIMES = ConnectionTimes()


class Watched:
    """A client whose connection is looked at once a second."""

    def __init__(self, times: ConnectionTimes = TIMES, *, jitter: float = 0.0) -> None:
        self.client = Client()
        self.output = b""
        self._lifetime = Lifetime(self.client.server, times, 0.0, jitter=jitter)

    def wait(self, seconds: float, *, answers: bool = False) -> bool:
        """Waits, perhaps answering pings; returns whether the connection was kept all the time."""
        end, server = self.client.now + seconds, self.client.server
        while self.client.now < end:
            self.client.now += 1.0
            if not self._lifetime.look(self.client.now):
                return False
            output = server.take_output()
            self.output += output
            for sent in frames_of(output) if answers else ():
                if sent.kind == FrameType.PING:
                    server.receive(ping(sent.payload, ack=True))
        return True


@pytest.mark.parametrize("sent", [b"", CLIENT_PREFACE[:10], CLIENT_PREFACE])
def test_a_client_that_does_not_say_what_it_is_is_cut(sent: bytes) -> None:
    server = Http2Connection(EchoHost(), Http2Limits(), lambda: 0.0, Room())
    lifetime = Lifetime(server, TIMES, 0.0, jitter=0.0)
    server.receive(sent)
    assert lifetime.look(TIMES.handshake)
    assert not lifetime.look(TIMES.handshake + 1)


def test_a_client_that_vanished_is_asked_and_then_cut() -> None:
    watched = Watched()
    assert watched.wait(TIMES.keepalive + TIMES.keepalive_answer)
    assert not watched.wait(3)
    assert watched.client.now <= 83


def test_a_client_that_answers_is_kept_for_ever() -> None:
    watched = Watched()
    assert watched.wait(5_000, answers=True)


def test_a_header_block_that_never_ends_is_cut() -> None:
    """Its client can't answer: no frame may come within the block."""
    watched = Watched()
    watched.client.server.receive(b"\0\0\0\1\0\0\0\0\1")
    assert not watched.wait(90)


def test_a_connection_that_has_ended_is_cut_if_its_client_does_not_read() -> None:
    watched = Watched()
    watched.client.server.end(ErrorCode.PROTOCOL_ERROR)
    assert watched.wait(TIMES.last_output)
    assert not watched.wait(2)


def test_the_second_goaway_comes_without_an_answer_too() -> None:
    watched = Watched()
    client = watched.client
    stream_id = client.open()
    client.exchange()
    client.server.drain()
    assert watched.wait(TIMES.drain_answer)
    assert goaway(LARGEST_WINDOW, ErrorCode.NO_ERROR) in watched.output
    assert goaway(stream_id, ErrorCode.NO_ERROR) not in watched.output
    assert watched.wait(3)
    assert watched.output.endswith(goaway(stream_id, ErrorCode.NO_ERROR))
    assert not client.server.ended
    client.host.calls[stream_id].finish()
    assert client.server.ended


def test_an_old_connection_ends_after_its_calls() -> None:
    watched = Watched(ConnectionTimes(age=100.0))
    client = watched.client
    stream_id = client.open()
    client.exchange()
    assert watched.wait(99, answers=True)
    assert not client.server.draining
    assert watched.wait(20, answers=True)
    assert watched.output.endswith(goaway(stream_id, ErrorCode.NO_ERROR))
    assert not client.server.ended
    client.host.calls[stream_id].finish()
    assert client.server.ended
    assert client.host.calls[stream_id].ended == ["finished"]


def test_calls_of_an_old_connection_are_cut_after_the_grace() -> None:
    watched = Watched(ConnectionTimes(age=100.0, age_grace=30.0))
    stream_id = watched.client.open()
    watched.client.exchange()
    assert watched.wait(129, answers=True)
    assert not watched.client.server.ended
    watched.wait(2)
    assert watched.client.server.ended
    assert watched.client.host.calls[stream_id].ended == ["reset"]


@pytest.mark.parametrize(("jitter", "first"), [(-1.0, 90), (1.0, 110)])
def test_ages_differ_by_a_tenth(jitter: float, first: int) -> None:
    watched = Watched(ConnectionTimes(age=100.0), jitter=jitter)
    watched.client.open()
    watched.client.exchange()
    watched.wait(first - 1, answers=True)
    assert not watched.client.server.draining
    watched.wait(2, answers=True)
    assert watched.client.server.draining


def test_without_an_age_a_connection_lives_for_ever() -> None:
    watched = Watched()
    for _ in range(10):
        watched.client.now += 10_000_000
        watched.client.server.receive(ping(bytes(8), ack=False))
        assert watched.wait(1)
    assert not watched.client.server.draining
