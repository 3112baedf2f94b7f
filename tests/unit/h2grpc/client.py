"""A client for a connection without sockets: the package `h2` makes and reads its bytes."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings

from stepstate.h2grpc.connection import Http2Connection
from stepstate.h2grpc.frames import ErrorCode
from stepstate.h2grpc.headers import GRPC_HEADERS, Request, encode_status
from stepstate.h2grpc.limits import Http2Limits
from stepstate.h2grpc.stream import Http2Stream, StreamReceiver

HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/echo"),
    (":authority", "test"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


def message(payload: bytes) -> bytes:
    """A gRPC message that is not compressed."""
    return struct.pack(">BI", 0, len(payload)) + payload


class Echo:
    """Answers each message with itself, and ends the stream when the client does.

    Args:
        stream: its stream.
        answers: if not, it only takes what comes within the window.
    """

    def __init__(self, stream: Http2Stream, *, answers: bool = True) -> None:
        self.stream = stream
        self._answers = answers
        if not answers:
            stream.pause()
        self.messages: list[bytes] = []
        self.ended: list[str] = []

    def message(self, payload: bytes) -> None:
        self.messages.append(payload)
        if self._answers:
            self.stream.start(GRPC_HEADERS)
            self.stream.send(payload)

    def half_closed(self) -> None:
        self.ended.append("half_closed")
        if self._answers:
            self.finish()

    def finish(self) -> None:
        self.stream.start(GRPC_HEADERS)
        self.stream.finish(encode_status(0))

    def unreadable(self, reason: str, *, too_large: bool) -> None:
        self.ended.append(f"unreadable: {reason}")
        self.stream.start(GRPC_HEADERS)
        self.stream.finish(encode_status(8 if too_large else 13, reason))

    def refused(self, error: Exception) -> None:
        self.ended.append(f"refused: {error}")
        self.stream.start(GRPC_HEADERS)
        self.stream.finish(encode_status(8))

    def reset(self) -> None:
        self.ended.append("reset")

    def writable(self) -> None:
        pass

    def finished(self) -> None:
        self.ended.append("finished")


@dataclass
class EchoHost:
    """A `Host` of echoes."""

    answers: bool = True
    calls: dict[int, Echo] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)
    asked: int = 0

    def accept(self, stream: Http2Stream, request: Request) -> StreamReceiver:
        self.requests[stream.id] = request
        self.calls[stream.id] = echo = Echo(stream, answers=self.answers)
        return echo

    def write_soon(self) -> None:
        self.asked += 1


@dataclass
class Room:
    """A `ConnectionMemory` with so many bytes left."""

    left: int = 2**40
    contended: bool = False
    waiting: tuple[int, Callable[[], None]] | None = None

    def reserve(self, size: int) -> bool:
        fits = size <= self.left
        self.left -= size if fits else 0
        return fits

    reserve_rest = reserve

    def release(self, size: int, rest: int = 0) -> None:
        self.left += size + rest

    def wait_for(self, size: int, then: Callable[[], None]) -> None:
        assert self.waiting is None
        self.waiting = size, then

    def grow(self, left: int) -> None:
        """There is so much now: who waits goes on, if that is enough."""
        self.left = left
        if self.waiting is not None and self.waiting[0] <= left:
            then, self.waiting = self.waiting[1], None
            then()

    def refusal(self, size: int) -> Exception:
        return MemoryError(f"{size} bytes")

    def close(self) -> None:
        pass


class Client:
    """A client and its server, in memory.

    Args:
        limits: of the server.
        window: of each of the client's streams.
    """

    def __init__(self, limits: Http2Limits | None = None, *, window: int = 65_535) -> None:
        self.now = 0.0
        self.host = EchoHost()
        self.memory = Room()
        self.server = Http2Connection(
            self.host, limits or Http2Limits(), lambda: self.now, self.memory
        )
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.h2.initiate_connection()
        self.data: dict[int, bytes] = defaultdict(bytes)
        self.trailers: dict[int, dict[str, str]] = {}
        self.resets: dict[int, ErrorCode] = {}
        self.goaway: tuple[ErrorCode, int, bytes] | None = None
        self.pongs = 0
        self.exchange()

    def exchange(self) -> None:
        """Moves bytes until neither side has any."""
        while self._to_server() | self._to_client():
            pass

    def send(self, data: bytes) -> None:
        """Sends bytes past `h2`, and what they bring about."""
        self.exchange()
        self.server.receive(data)
        self.exchange()

    def open(self, *extra: tuple[str, str], end: bool = False) -> int:
        """Begins a stream."""
        stream_id: int = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, [*HEADERS, *extra], end_stream=end)
        return stream_id

    def _to_server(self) -> bool:
        data = self.h2.data_to_send()
        if data and not self.server.ended:
            self.server.receive(data)
        return bool(data)

    def _to_client(self) -> bool:
        data = self.server.take_output()
        for event in self.h2.receive_data(data) if data else ():
            self._note(event)
        return bool(data)

    def _note(self, event: Any) -> None:
        if isinstance(event, h2.events.DataReceived):
            self.data[event.stream_id] += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            self.trailers[event.stream_id] = dict(event.headers)
        elif isinstance(event, h2.events.StreamReset):
            self.resets.setdefault(event.stream_id, ErrorCode(event.error_code))
        elif isinstance(event, h2.events.ConnectionTerminated):
            data = event.additional_data or b""
            self.goaway = ErrorCode(event.error_code), event.last_stream_id, data
        elif isinstance(event, h2.events.PingAckReceived):
            self.pongs += 1
