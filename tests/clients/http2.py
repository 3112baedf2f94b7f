"""A client that sends what it is told to, on one connection: the package `h2` on a socket."""

from __future__ import annotations

import socket
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Self

import h2.config
import h2.connection
import h2.events
from google.protobuf.message import Message

from tests.integration.wire import HANG

Headers = tuple[tuple[str, str], ...]
GRPC: Headers = (("content-type", "application/grpc"), ("te", "trailers"))


def framed(message: Message) -> bytes:
    """A message as gRPC sends it."""
    data = message.SerializeToString()
    return b"\0" + len(data).to_bytes(4, "big") + data


@dataclass
class Response:
    """What has come on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    """Those of trailers too."""
    data: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def grpc(self) -> tuple[int, str]:
        """The status and its text."""
        return int(self.headers["grpc-status"]), self.headers.get("grpc-message", "")


class Http2Client:
    """A connection.

    Args:
        address: host:port of the server.
        window: bytes of each reply that the server may send before it has to wait.
    """

    def __init__(self, address: str, *, window: int | None = None) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=HANG)
        config = h2.config.H2Configuration(
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.http = h2.connection.H2Connection(config)
        self.responses: dict[int, Response] = defaultdict(Response)
        self.goaway: tuple[int, bytes] | None = None
        self.http.initiate_connection()
        if window is not None:
            setting = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE
            self.http.update_settings({setting: window})
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def begin(self, path: str, headers: Headers = GRPC, **pseudo: str) -> int:
        """Sends the headers of a request; returns its stream."""
        stream = self.http.get_next_available_stream_id()
        first = {"method": "POST", "scheme": "http", "path": path, "authority": "test"} | pseudo
        own = [(f":{name}", value) for name, value in first.items() if value]
        self.http.send_headers(stream, [*own, *headers])
        self._write()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Sends data on a stream, of at most one window."""
        size = self.http.max_outbound_frame_size
        for first in range(0, len(data), size):
            self.http.send_data(stream, data[first : first + size])
        if end:
            self.http.end_stream(stream)
        self._write()

    def response(self, stream: int) -> Response:
        """The response, once it has ended."""
        response = self.responses[stream]
        while not response.ended and self._read():
            pass
        return response

    def call(self, path: str, body: bytes, headers: Headers = GRPC, **pseudo: str) -> Response:
        """A request with its response."""
        stream = self.begin(path, headers, **pseudo)
        self.send(stream, body)
        return self.response(stream)

    def read_to_end(self) -> None:
        """Reads until the server closes the connection."""
        while self._read():
            pass

    def _write(self) -> None:
        self.socket.sendall(self.http.data_to_send())

    def _read(self) -> bool:
        """Reads once; False: the server has closed the connection."""
        data = self.socket.recv(65_536)
        for event in self.http.receive_data(data):
            self._take(event)
        self._write()
        return bool(data)

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = int(event.error_code), event.additional_data or b""
            return
        response = self.responses[getattr(event, "stream_id", 0)]
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            response.headers.update(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            response.data += event.data
        elif isinstance(event, h2.events.StreamEnded):
            response.ended = True
        elif isinstance(event, h2.events.StreamReset) and not response.ended:
            response.ended, response.reset = True, int(event.error_code)
