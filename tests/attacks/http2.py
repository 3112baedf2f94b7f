"""A gRPC client on bare HTTP/2, for what no gRPC library does: not to read, to reset, to lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from google.protobuf.message import Message
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes

Headers = tuple[tuple[str, str], ...]


def frame(message: Message | bytes, *, compressed: bool = False) -> bytes:
    """A message as gRPC sends it: a flag, its length, its bytes."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return bytes([compressed]) + len(data).to_bytes(4, "big") + data


class RawConnection:
    """One connection. Requests are sent as far as the server's flow control lets them.

    Args:
        window: bytes of each reply that the server may send before it has to wait. 0: the client
            never reads one.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, window: int | None
    ) -> None:
        self.ended: dict[int, str] = {}
        """The grpc-status of streams that have ended; "reset": by the server, without."""
        self.received = 0
        """Bytes of replies."""
        self.closed = False
        """By the server."""
        self._reader, self._writer = reader, writer
        self._reads = window is None
        self._changed = asyncio.Event()
        self._http = H2Connection(H2Configuration(header_encoding="utf-8"))
        self._http.initiate_connection()
        if window is not None:
            self._http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})

    def open(self, path: str, headers: Headers = ()) -> int:
        """Begins a call; returns its stream."""
        stream = self._http.get_next_available_stream_id()
        plain = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
        plain += [("te", "trailers"), ("content-type", "application/grpc"), *headers]
        self._http.send_headers(stream, plain)
        return stream

    async def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Sends bytes of a call when the server allows it; in vain if the call has ended."""
        view = memoryview(data)
        while view:
            if self.closed or stream in self.ended:
                return
            room = self._room(stream)
            if room <= 0:
                await self.flush()
                if self._room(stream) <= 0:
                    self._changed.clear()
                    await self._changed.wait()
                continue
            part, view = view[:room], view[room:]
            self._http.send_data(stream, bytes(part), end_stream=end and not view)
            if self._writer.transport.get_write_buffer_size() < 2**20:
                self._writer.write(self._http.data_to_send())
            else:
                await self.flush()

    async def flush(self) -> None:
        """Hands to the kernel what was sent."""
        self._writer.write(self._http.data_to_send())
        await self._writer.drain()

    async def until_ended(self, streams: Iterable[int]) -> None:
        """Waits until these calls have ended."""
        await self.flush()
        waiting = set(streams)
        while not self.closed and not waiting <= self.ended.keys():
            self._changed.clear()
            await self._changed.wait()

    async def read(self) -> None:
        """Takes what the server sends, until it closes the connection."""
        try:
            while data := await self._reader.read(2**18):
                for event in self._http.receive_data(data):
                    self._handle(event)
                self._writer.write(self._http.data_to_send())
                self._changed.set()
        except OSError:
            pass
        finally:
            self.closed = True
            self._changed.set()

    def _room(self, stream: int) -> int:
        window = self._http.local_flow_control_window(stream)
        return min(window, self._http.max_outbound_frame_size)

    def _handle(self, event: object) -> None:
        if isinstance(event, DataReceived):
            self.received += len(event.data)
            if self._reads:
                self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, TrailersReceived | ResponseReceived):
            if "grpc-status" in (headers := dict(event.headers)):
                self.ended[event.stream_id] = headers["grpc-status"]
        elif isinstance(event, StreamReset):
            self.ended.setdefault(event.stream_id, "reset")
        elif isinstance(event, StreamEnded):
            self.ended.setdefault(event.stream_id, "")
        elif isinstance(event, ConnectionTerminated):
            self.closed = True


@asynccontextmanager
async def raw_connection(
    address: str, *, window: int | None = None
) -> AsyncIterator[RawConnection]:
    """A connection that is read all the time, which does not mean that its replies are."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    connection = RawConnection(reader, writer, window=window)
    await connection.flush()
    reading = asyncio.create_task(connection.read())
    try:
        yield connection
    finally:
        reading.cancel()
        writer.transport.abort()
