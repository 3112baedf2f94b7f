"""Replies that wait for a window: data dribble (CVE-2019-9511), and streams without progress."""

from __future__ import annotations

import pytest

from stepstate.h2grpc.frames import (
    DEFAULT_WINDOW,
    ErrorCode,
    Flag,
    FrameType,
    Setting,
    frame,
    window_update,
)
from stepstate.h2grpc.headers import encode_status
from stepstate.h2grpc.limits import CREDIT
from stepstate.h2grpc.stream import PROGRESS_BYTES, Http2Stream
from tests.unit.h2grpc.client import Client, message
from tests.unit.h2grpc.raw import frames_of

SECONDS = 60.0


def waiting(client: Client, *, size: int = 20_000) -> Http2Stream:
    """A stream whose reply waits for a window."""
    stream_id = client.open()
    client.exchange()
    stream = client.host.calls[stream_id].stream
    stream.start(b"\x88")
    stream.send(bytes(size))
    client.exchange()
    return stream


def looked(client: Client, seconds: float) -> dict[int, ErrorCode]:
    """Looks at the streams once a second; returns those that were reset, and why."""
    for _ in range(int(seconds)):
        client.now += 1.0
        client.server.end_stalled(client.now, SECONDS)
    sent = frames_of(client.server.take_output())
    return {it.stream_id: it.code for it in sent if it.kind == FrameType.RST_STREAM}


def test_hundreds_of_streams_with_a_window_of_one_byte_queue_no_pieces() -> None:
    client = Client(window=0)
    streams = [waiting(client) for _ in range(300)]
    before = client.server.sent_others
    client.server.receive(b"".join(window_update(stream.id, 1) for stream in streams))
    assert client.server.sent_others - before == 300  # one byte each, as the client asked
    assert not client.server.end_stalled(client.now, SECONDS)
    assert client.server.sent_others - before == 300


def test_bytes_that_are_dribbled_use_up_the_credit() -> None:
    client = Client(window=0)
    stream = waiting(client)
    count = 0
    while not client.server.ended:
        client.server.receive(window_update(stream.id, 1))
        client.server.take_output()
        count += 1
    assert count <= CREDIT // 3 + 1


def test_credit_that_is_used_up_by_a_reply_ends_the_connection_where_it_is_written() -> None:
    """Nobody who sends a reply is to be told."""
    client = Client(window=1)
    streams = [client.open() for _ in range(2)]
    client.exchange()
    client.server.meter.credit = 1
    for stream_id in streams:
        stream = client.host.calls[stream_id].stream
        stream.start(b"\x88")
        stream.send(b"reply")
    assert not client.server.ended
    client.exchange()
    assert client.server.ended
    assert client.goaway is not None
    assert client.goaway[0] is ErrorCode.ENHANCE_YOUR_CALM
    assert all(client.host.calls[stream_id].ended == ["reset"] for stream_id in streams)


@pytest.mark.parametrize("dribbled", [0, 1, 60])
def test_a_stream_without_progress_ends(dribbled: int) -> None:
    """A byte a second is no progress."""
    client = Client(window=0)
    stream = waiting(client)
    other = client.open()
    client.exchange()
    assert looked(client, 1) == {}
    for second in range(60):
        if second < dribbled:
            client.server.receive(window_update(stream.id, 1))
        assert looked(client, 1) == {}
    assert looked(client, 1) == {stream.id: ErrorCode.ENHANCE_YOUR_CALM}
    assert client.host.calls[stream.id].ended == ["reset"]
    assert other in client.server.streams


def test_some_kilobytes_are_progress_and_so_is_the_whole_of_a_short_reply() -> None:
    client = Client(window=0)
    long, short = waiting(client), waiting(client, size=1)
    for _ in range(4):
        assert looked(client, 50) == {}
        client.server.receive(window_update(long.id, PROGRESS_BYTES))
        client.server.receive(window_update(short.id, 6))
        short.send(b"1")
    assert looked(client, 50) == {}


def test_streams_that_wait_for_the_connection_share_its_progress() -> None:
    """A slow link with many streams: each gets its turn only now and then."""
    client = Client(window=2**20)
    client.h2.acknowledge_received_data = lambda *_: None
    first = waiting(client, size=DEFAULT_WINDOW - 5)  # it takes all of the connection's window
    streams = [waiting(client, size=2**18) for _ in range(50)]
    for _ in range(10):
        assert looked(client, 50) == {}
        client.server.receive(window_update(0, PROGRESS_BYTES))
        client.server.take_output()
    assert not first.queued_bytes
    assert set(looked(client, 62)) == {stream.id for stream in streams}


def test_a_reply_that_never_waits_is_not_looked_at() -> None:
    client = Client()
    waiting(client, size=10)
    assert looked(client, 500) == {}


def test_an_end_goes_out_at_a_window_below_zero() -> None:
    """python-hyper/h2#1314: a window that was lowered in mid-stream held ends back for ever."""
    client = Client()
    stream_id = client.open()
    client.h2.send_data(stream_id, message(bytes(100)))
    client.exchange()
    client.h2.update_settings({Setting.INITIAL_WINDOW_SIZE: 0})
    client.exchange()
    stream = client.host.calls[stream_id].stream
    assert stream.send_window < 0
    stream.finish(encode_status(0))
    client.exchange()
    assert client.trailers[stream_id]["grpc-status"] == "0"


def test_an_end_behind_a_reply_goes_out_with_it() -> None:
    client = Client(window=0)
    stream = waiting(client, size=3)
    stream.finish(encode_status(0))
    client.exchange()
    assert stream.id not in client.trailers or "grpc-status" not in client.trailers[stream.id]
    client.h2.increment_flow_control_window(8, stream.id)
    client.exchange()
    assert client.trailers[stream.id]["grpc-status"] == "0"


def test_an_empty_frame_that_ends_a_stream_needs_no_window_of_the_server() -> None:
    client = Client()
    stream_id = client.open()
    client.exchange()
    client.host.calls[stream_id].stream.receive_window = 0
    client.server.receive(frame(FrameType.DATA, Flag.END_STREAM, stream_id))
    client.exchange()
    assert client.trailers[stream_id]["grpc-status"] == "0"


def test_a_larger_window_for_all_may_end_streams_whose_replies_waited() -> None:
    client = Client(window=0)
    streams = [waiting(client, size=10) for _ in range(3)]
    for stream in streams:
        stream.finish(encode_status(0))
    client.h2.update_settings({Setting.INITIAL_WINDOW_SIZE: 100})
    client.exchange()
    assert [client.trailers[stream.id]["grpc-status"] for stream in streams] == ["0"] * 3
