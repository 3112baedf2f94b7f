"""What a connection keeps of messages is reserved first, and released on every path."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stepstate.h2grpc.connection import OUTPUT_BYTES
from stepstate.h2grpc.frames import DEFAULT_WINDOW, ErrorCode, window_update
from stepstate.h2grpc.headers import GRPC_HEADERS
from stepstate.h2grpc.limits import Http2Limits
from stepstate.h2grpc.memory import PATIENCE_SECONDS
from stepstate.h2grpc.stream import KEPT_BYTES
from tests.unit.h2grpc.client import Client, message

LIMITS = Http2Limits(message_bytes=2**20)
SIZE = 300_000
LONG = message(bytes(SIZE))


def send(client: Client, stream_id: int, data: bytes) -> bytes:
    """Sends as much as the windows allow, until the stream ends; returns the rest."""
    client.exchange()
    while data and stream_id in client.server.streams:
        part = data[: min(client.h2.local_flow_control_window(stream_id), 16_384)]
        if not part:
            break
        client.h2.send_data(stream_id, part)
        data = data[len(part) :]
        client.exchange()
    return data


def open_many(client: Client, count: int) -> list[int]:
    return [client.open() for _ in range(count)]


def test_long_messages_wait_for_memory_in_their_order_and_go_on() -> None:
    client = Client(LIMITS)
    client.memory.left = 3 * DEFAULT_WINDOW
    rest = {stream_id: send(client, stream_id, LONG) for stream_id in open_many(client, 3)}
    assert {len(LONG) - len(data) for data in rest.values()} == {DEFAULT_WINDOW}
    assert client.memory.left == 0
    for stream_id, data in rest.items():
        client.memory.grow(client.memory.left + len(LONG) - DEFAULT_WINDOW)
        client.exchange()
        others = [other for other in rest if other > stream_id]
        assert not any(client.h2.local_flow_control_window(other) for other in others)
        assert not send(client, stream_id, data)
        assert client.host.calls[stream_id].messages == [bytes(SIZE)]
        client.memory.left -= len(LONG) - DEFAULT_WINDOW  # somebody else takes it
    assert client.memory.left == 3 * DEFAULT_WINDOW


def test_nobody_gets_ahead_of_those_who_wait() -> None:
    client = Client(LIMITS)
    client.memory.contended = True
    stream_id = client.open()
    rest = send(client, stream_id, LONG)
    assert len(LONG) - len(rest) == DEFAULT_WINDOW
    client.memory.grow(2**20)
    client.exchange()
    assert not send(client, stream_id, rest)


def test_the_part_of_a_message_that_does_not_fit_ends_its_stream_alone() -> None:
    client = Client(LIMITS)
    client.memory.left = 70_000
    streams = open_many(client, 3)
    for stream_id in streams:
        send(client, stream_id, message(bytes(30_000))[:20_000])
    assert [client.host.calls[one].ended for one in streams] == [
        [], [], ["refused: 30005 bytes", "finished"],
    ]  # fmt: skip
    assert not client.server.ended
    send(client, streams[0], message(bytes(30_000))[20_000:])
    assert client.host.calls[streams[0]].messages == [bytes(30_000)]


def test_messages_that_come_although_the_stream_is_paused_are_counted_until_it_resumes() -> None:
    client = Client(LIMITS)
    client.memory.left = 1000
    stream_id = client.open()
    client.exchange()
    echo = client.host.calls[stream_id]
    send(client, stream_id, message(b"free"))
    assert client.memory.left == 1000
    echo.stream.pause()
    for size in (100, 200, 0):
        send(client, stream_id, message(bytes(size)))
    assert client.memory.left == 1000 - 300 - 3 * KEPT_BYTES
    echo.stream.resume()
    assert client.memory.left == 1000
    echo.stream.pause()
    send(client, stream_id, 20 * message(b""))
    assert echo.ended == ["refused: 5 bytes", "finished"]
    assert client.memory.left == 1000


def test_a_message_that_makes_its_receiver_pause_is_counted_until_it_resumes() -> None:
    client = Client(LIMITS)
    client.memory.left = 2**20
    stream_id = client.open()
    client.exchange()
    echo = client.host.calls[stream_id]
    received = echo.message
    echo.message = lambda payload: (received(payload), echo.stream.pause())  # type: ignore[method-assign,assignment,func-returns-value]
    send(client, stream_id, LONG)
    assert echo.messages == [bytes(SIZE)]
    assert client.memory.left == 2**20 - len(LONG)
    echo.stream.resume()
    assert client.memory.left == 2**20


def test_slow_messages_give_way_only_when_others_wait() -> None:
    client = Client(LIMITS)
    slow, fast = open_many(client, 2)
    send(client, slow, LONG[:20_000])
    client.now += PATIENCE_SECONDS
    client.server.partial.end_slow()
    send(client, fast, LONG[:20_000])
    client.memory.contended = True
    client.server.partial.end_slow()
    assert client.host.calls[slow].ended == ["refused: 300005 bytes", "finished"]
    assert client.host.calls[fast].ended == []
    client.now += 1.0
    send(client, fast, LONG[20_000:])
    client.now += 100.0
    client.server.partial.end_slow()
    assert client.host.calls[fast].messages == [bytes(SIZE)]


def test_output_is_bounded_and_stops_while_nobody_reads() -> None:
    client = Client(window=2**24)
    client.server.receive(window_update(0, 2**24))
    stream_id = client.open()
    client.exchange()
    stream = client.host.calls[stream_id].stream
    stream.start(GRPC_HEADERS)
    for _ in range(10):
        stream.send(bytes(OUTPUT_BYTES))
    client.server.hold()
    held = client.server.take_output()
    assert not client.server.take_output()
    client.server.go_on()
    output = [held]
    while part := client.server.take_output():
        output.append(part)
    assert sum(map(len, output)) > 10 * OUTPUT_BYTES
    assert max(map(len, output)) < 2 * OUTPUT_BYTES + 1000


@given(st.data())
def test_everything_is_released_whatever_happens(data: st.DataObject) -> None:
    """Streams are paused, resumed, reset, end in the middle of messages, and run out of memory."""
    client = Client(LIMITS)
    total = client.memory.left = data.draw(st.sampled_from((100_000, 500_000, 2**40)))
    streams: dict[int, bytes] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        if not streams or data.draw(st.integers(0, 3)) == 0:
            sizes = data.draw(st.lists(st.sampled_from((0, 50, 20_000, SIZE)), max_size=4))
            streams[client.open()] = b"".join(message(bytes(size)) for size in sizes)
            client.exchange()
        stream_id = data.draw(st.sampled_from(sorted(streams)))
        if stream_id not in client.server.streams:
            del streams[stream_id]
            continue
        stream = client.host.calls[stream_id].stream
        match data.draw(st.sampled_from(("send", "pause", "resume", "reset", "end", "room"))):
            case "send":
                size = data.draw(st.sampled_from((3, 1000, 70_000)))
                rest = send(client, stream_id, streams[stream_id][:size])
                streams[stream_id] = rest + streams[stream_id][size:]
            case "pause":
                stream.pause()
            case "resume":
                stream.resume()
            case "reset":
                stream.reset(ErrorCode.CANCEL)
            case "end":
                client.h2.end_stream(stream_id)
            case "room":
                client.memory.grow(client.memory.left)
        client.exchange()
        assert 0 <= client.memory.left <= total
    client.server.lose()
    assert client.memory.left == total


def test_a_message_waits_in_its_stream_while_nobody_reads() -> None:
    client = Client(LIMITS)
    stream_id = client.open()
    client.exchange()
    stream = client.host.calls[stream_id].stream
    stream.start(GRPC_HEADERS)
    client.exchange()
    client.server.hold()
    assert not stream.send(b"wait")
    assert not client.server.take_output()
    client.server.go_on()
    client.exchange()
    assert client.data[stream_id] == message(b"wait")
