"""StreamSteps calls on a connection whose frames leave when they are told to, in one write."""

from __future__ import annotations

import asyncio

import h2.events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes

from tests.attacks.http2 import frame
from tests.integration.wire import HANG, STREAM

PREFIX_BYTES = 5
"""Before each message: a flag, and its length."""
CANCEL = 8
"""RFC 9113, section 7."""


class Pipelined:
    """A connection. What its calls send leaves with the next `flush`, all at once.

    Args:
        window: bytes of replies that the server may send on each stream before it has to wait.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int
    ) -> None:
        self.changed = asyncio.Event()
        self.http = H2Connection(H2Configuration(header_encoding="utf-8"))
        self.http.initiate_connection()
        self.http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self._calls: dict[int, PipelinedCall] = {}
        self._reader, self._writer = reader, writer
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, address: str, *, window: int = 65_535) -> Pipelined:
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)), window)

    def begin(self) -> PipelinedCall:
        """Begins a call."""
        stream: int = self.http.get_next_available_stream_id()
        pseudo = [(":method", "POST"), (":scheme", "http"), (":path", STREAM), (":authority", "x")]
        grpc = [("te", "trailers"), ("content-type", "application/grpc")]
        self.http.send_headers(stream, [*pseudo, *grpc])
        self._calls[stream] = call = PipelinedCall(self, stream)
        return call

    def flush(self) -> None:
        """Sends all that was put."""
        self._writer.write(self.http.data_to_send())

    async def next_read(self) -> None:
        """Waits until something has come."""
        assert not self._reading.done(), "the connection has ended"
        self.changed.clear()
        await self.changed.wait()

    async def close(self) -> None:
        self._reading.cancel()
        self._writer.close()
        await self._writer.wait_closed()

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(2**16):
                for event in self.http.receive_data(data):
                    call = self._calls.get(getattr(event, "stream_id", 0))
                    if call is not None:
                        call.take(event)
                self.flush()
                self.changed.set()
        finally:
            self.changed.set()


class PipelinedCall:
    """One call."""

    def __init__(self, connection: Pipelined, stream: int) -> None:
        self.connection = connection
        self.replies: list[bytes] = []
        """The messages that have come."""
        self.status: str | None = None
        """The grpc-status, when it has ended."""
        self._stream = stream
        self._partial = b""

    def put(self, message: bytes) -> None:
        """A request, of less than a frame."""
        self.connection.http.send_data(self._stream, frame(message))

    def end(self) -> None:
        """Half-closes the call."""
        self.connection.http.end_stream(self._stream)

    def reset(self) -> None:
        """Cancels the call."""
        self.connection.http.reset_stream(self._stream, CANCEL)

    def take_replies(self, size: int) -> None:
        """Lets the server send so many more bytes."""
        self.connection.http.increment_flow_control_window(size, self._stream)

    async def answered(self, count: int) -> None:
        """Waits until so many replies have come in all."""
        async with asyncio.timeout(HANG):
            while len(self.replies) < count:
                assert self.status is None, f"the call has ended: {self.status}"
                await self.connection.next_read()

    async def ended(self) -> str:
        """Its status."""
        async with asyncio.timeout(HANG):
            while self.status is None:
                await self.connection.next_read()
        return self.status

    def take(self, event: h2.events.Event) -> None:
        """Something has come of it."""
        if isinstance(event, h2.events.DataReceived):
            size = event.flow_controlled_length
            self.connection.http.acknowledge_received_data(size, self._stream)
            self._collect(event.data)
        elif isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
            self.status = dict(event.headers).get("grpc-status", self.status)

    def _collect(self, data: bytes) -> None:
        data = self._partial + data
        while len(data) >= PREFIX_BYTES:
            end = PREFIX_BYTES + int.from_bytes(data[1:PREFIX_BYTES], "big")
            if len(data) < end:
                break
            self.replies.append(data[PREFIX_BYTES:end])
            data = data[end:]
        self._partial = data
