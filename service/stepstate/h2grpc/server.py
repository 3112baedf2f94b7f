"""The shell: listens, moves bytes between sockets and connections, and keeps the time.

An `H2Server` is used like the server that `grpc.aio.server()` makes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import grpc

from stepstate.h2grpc.call import Call
from stepstate.h2grpc.connection import Http2Connection
from stepstate.h2grpc.headers import (
    GRPC_HEADERS,
    STATUS_405,
    STATUS_415,
    Metadata,
    Request,
    encode_status,
    timeout_of,
)
from stepstate.h2grpc.lifetime import ConnectionTimes, Lifetime
from stepstate.h2grpc.limits import Http2Limits
from stepstate.h2grpc.stream import Http2Stream, SilentReceiver, StreamReceiver

if TYPE_CHECKING:
    from stepstate.h2grpc.call import Handler

log = logging.getLogger(__name__)

READ_AHEAD = 2**18
WRITE_BUFFER_BYTES = 2**18
"""What a client may leave unread in the server's own buffer: beyond it, it is not read either."""
UNREAD_BYTES = 2**20
"""What is still read of a client after its connection has ended, and thrown away: with bytes that
are not read the system resets the connection, and the client may not see why it ended."""


class H2Server:
    """A gRPC server.

    Args:
        interceptors: `grpc.aio.ServerInterceptor`s, the first is the outermost.
        limits: what a connection may cost.
        times: when a connection is ended.
    """

    def __init__(
        self,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        *,
        limits: Http2Limits | None = None,
        times: ConnectionTimes | None = None,
    ) -> None:
        self.limits = limits or Http2Limits()
        self.times = times or ConnectionTimes()
        self.connections: set[_ServerProtocol] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.idle = asyncio.Event()
        """There is no connection."""
        self.idle.set()
        self._interceptors = tuple(interceptors)
        self._generic: list[grpc.GenericRpcHandler] = []
        self._sockets: list[tuple[socket.socket, ssl.SSLContext | None]] = []
        self._listeners: list[asyncio.Server] = []
        self._stopped = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    # What is served

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]
    ) -> None:
        """See `grpc.aio.Server`."""
        self._generic += generic_rpc_handlers

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """See `grpc.aio.Server`; generated code calls it beside `add_generic_rpc_handlers`."""

    async def handler(self, path: str, metadata: Metadata) -> Handler | None:
        """The handler of a method, through the interceptors; None: there is none."""
        return await self._intercepted(0, _Details(path, metadata))

    async def _intercepted(self, place: int, details: _Details) -> Handler | None:
        if place == len(self._interceptors):
            return self._find(details)

        async def continuation(details: Any) -> Any:
            return await self._intercepted(place + 1, details)

        return await self._interceptors[place].intercept_service(continuation, details)

    def _find(self, details: _Details) -> Handler | None:
        for generic in self._generic:
            handler = generic.service(details)
            if handler is not None:
                return handler
        return None

    # Life

    def add_insecure_port(self, address: str) -> int:
        """Listens at host:port without TLS; returns the port.

        Raises:
            RuntimeError: it can't.
        """
        return self._listen(address, None)

    def add_secure_port(self, address: str, context: ssl.SSLContext) -> int:
        """Listens at host:port with TLS; returns the port.

        Raises:
            RuntimeError: it can't.
        """
        context.set_alpn_protocols(["h2"])
        return self._listen(address, context)

    def _listen(self, address: str, context: ssl.SSLContext | None) -> int:
        host, _, port = address.rpartition(":")
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(
                host.strip("[]"), int(port), type=socket.SOCK_STREAM
            )[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
        except OSError as error:
            raise RuntimeError(f"can't listen at {address}: {error}") from error
        self._sockets.append((listener, context))
        found: int = listener.getsockname()[1]
        return found

    async def start(self) -> None:
        """Begins to serve."""
        loop = asyncio.get_running_loop()
        for listener, context in self._sockets:
            timeout = None if context is None else self.times.handshake
            self._listeners.append(
                await loop.create_server(
                    lambda: _ServerProtocol(self),
                    sock=listener,
                    ssl=context,
                    backlog=1024,
                    ssl_handshake_timeout=timeout,
                )
            )
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self, grace: float | None) -> None:
        """Accepts no more, and ends what is not done after `grace` seconds.

        Until then clients are served that don't know yet that they shall begin no more calls.
        """
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace or 0):
                await self.idle.wait()
                while self.tasks:
                    await asyncio.wait(list(self.tasks))
        for connection in list(self.connections):
            connection.close()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._keeper is not None:
            self._keeper.cancel()
        self._stopped.set()

    async def wait_for_termination(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Waits until it has stopped; returns whether it timed out."""
        try:
            await asyncio.wait_for(self._stopped.wait(), timeout)
        except TimeoutError:
            return True
        return False

    async def _keep(self) -> None:
        """Looks at all connections now and then."""
        while True:
            await asyncio.sleep(1.0)
            now = asyncio.get_running_loop().time()
            for connection in list(self.connections):
                try:
                    connection.look(now)
                except Exception:
                    log.exception("a connection was not looked at; the next look tries again")


@dataclass(slots=True)
class _Details:
    """`grpc.HandlerCallDetails`."""

    method: str
    invocation_metadata: Metadata


class _Refusal(SilentReceiver):
    """The `StreamReceiver` of a request that is answered without a call, once all of it has come.

    Args:
        stream: its stream.
        block: the header block of the answer.
    """

    __slots__ = ("_block", "_stream")

    def __init__(self, stream: Http2Stream, block: bytes) -> None:
        self._stream = stream
        self._block = block
        stream.discard()

    def half_closed(self) -> None:
        """See `StreamReceiver`."""
        asyncio.get_running_loop().call_soon(self._answer)

    def _answer(self) -> None:
        self._stream.answer(self._block, b"this is a gRPC server\n")


class _ServerProtocol(asyncio.Protocol):
    """One client's connection: the `Host` of its HTTP/2 state, and of its calls."""

    def __init__(self, server: H2Server) -> None:
        self.peer = ""
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._http2 = Http2Connection(self, server.limits, self._loop.time)
        self._lifetime = Lifetime(
            self._http2,
            server.times,
            self._loop.time(),
            jitter=random.uniform(-1, 1),  # noqa: S311 - no secret
        )
        self._unread = UNREAD_BYTES
        self._finishing = False

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = stream = cast("asyncio.Transport", transport)
        self.peer = _peer_of(transport.get_extra_info("peername"))
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._server.connections.add(self)
        self._server.idle.clear()
        self._flush()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._finishing:
            self._unread -= len(data)
            if self._unread < 0:
                self._abort()
            return
        self._http2.receive(data)
        self._flush()

    def connection_lost(self, _error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._server.connections.discard(self)
        if not self._server.connections:
            self._server.idle.set()
        self._transport = None
        self._http2.lose()

    def pause_writing(self) -> None:
        """A client that does not read is not read."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        if self._transport is not None:
            self._transport.resume_reading()

    # The HTTP/2 state: see `Host`

    def accept(self, stream: Http2Stream, request: Request) -> StreamReceiver:
        """See `Host`."""
        if request.method != b"POST":
            return _Refusal(stream, STATUS_405)
        if not _is_grpc(request.field(b"content-type")):
            return _Refusal(stream, STATUS_415)
        stream.gzip = request.field(b"grpc-encoding") == b"gzip"
        timeout = request.field(b"grpc-timeout")
        seconds = timeout_of(timeout) if timeout else None
        if timeout and seconds is None:
            block = GRPC_HEADERS + encode_status(13, "grpc-timeout can't be read")
            return _Refusal(stream, block)
        deadline = None if seconds is None else self._loop.time() + seconds
        return Call(stream, request, self, deadline)

    def write_soon(self) -> None:
        """See `Host`."""
        self._loop.call_soon(self._flush)

    def reserve(self, _stream: Http2Stream, _size: int) -> bool:
        """See `Host`."""
        return True

    def release(self, _size: int) -> None:
        """See `Host`."""

    def _flush(self) -> None:
        output, transport = self._http2.take_output(), self._transport
        if transport is None or self._finishing:
            return
        if output:
            transport.write(output)
        if self._http2.ended:
            self._finish()

    def _finish(self) -> None:
        """Writes what is left; the client closes the connection when it has read it."""
        self._finishing = True
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        elif self._transport is not None:
            self._transport.close()

    # Its calls: see `CallHost`

    async def handler(self, path: str, metadata: Metadata) -> Handler | None:
        """See `CallHost`."""
        return await self._server.handler(path, metadata)

    def running(self, task: asyncio.Task[None]) -> None:
        """See `CallHost`."""
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """See `CallHost`."""
        return {}

    # Its life

    def drain(self) -> None:
        """Asks the client to begin no more calls."""
        self._http2.drain()

    def close(self) -> None:
        """Ends the connection, after what waits to be written."""
        self._http2.end()
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def look(self, now: float) -> None:
        """Does what time brings."""
        kept = self._lifetime.look(now)
        self._flush()
        if not kept:
            self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _is_grpc(content_type: bytes) -> bool:
    """Whether it is gRPC's: "application/grpc", with a coding of messages or parameters."""
    kind = b"application/grpc"
    return content_type.startswith(kind) and content_type[len(kind) : len(kind) + 1] in (
        b"",
        b"+",
        b";",
    )


def _peer_of(name: Any) -> str:
    """A client's address as gRPC writes it."""
    if isinstance(name, tuple) and len(name) == 2:
        return f"ipv4:{name[0]}:{name[1]}"
    if isinstance(name, tuple):
        return f"ipv6:[{name[0]}]:{name[1]}"
    return f"unix:{name or ''}"
