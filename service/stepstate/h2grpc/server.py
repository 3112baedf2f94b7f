"""The shell: listens, moves bytes between sockets and connections, and keeps the time.

An `H2Server` is used like the server that `grpc.aio.server()` makes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import grpc

from stepstate.h2grpc.call import Call
from stepstate.h2grpc.connection import STREAMS_AT_ONCE, Http2Connection
from stepstate.h2grpc.frames import ErrorCode
from stepstate.h2grpc.headers import (
    GRPC_HEADERS,
    STATUS_405,
    STATUS_415,
    Metadata,
    Request,
    encode_status,
    literal,
    timeout_of,
)
from stepstate.h2grpc.lifetime import ConnectionTimes, Lifetime
from stepstate.h2grpc.limits import Http2Limits
from stepstate.h2grpc.listening import BACKLOG, listen
from stepstate.h2grpc.memory import ConnectionMemory, UncountedMemory
from stepstate.h2grpc.stream import Http2Stream, SilentReceiver, StreamReceiver
from stepstate.h2grpc.tls import ALPN, INSECURE, TlsListener, auth_context_of

if TYPE_CHECKING:
    from stepstate.h2grpc.call import Handler

log = logging.getLogger(__name__)

NOT_GRPC = b"this is a gRPC server\n"
IDENTITY = b"identity"
ENCODINGS = (IDENTITY, b"gzip", b"deflate")
"""Of requests: how their messages may be compressed."""
LOOK_SECONDS = 1.0
"""After so long, all connections are looked at again."""
LOOKS_AT_ONCE = 200
"""Connections that are looked at in one turn of the loop: half a millisecond."""
WRITE_BUFFER_BYTES = 2**16
"""What a client may leave unread in the server's own buffer: beyond it, it gets no more messages,
and is not read either. The buffer may pass it by what one read and one write bring about."""
UNREAD_BYTES = 2**20
"""What is still read of a client after its connection has ended, and thrown away: with bytes that
are not read the system resets the connection, and the client may not see why it ended."""
IPV4_MAPPED = "::ffff:"
"""What an address of IPv4 begins with on a socket of IPv6 (RFC 4291, section 2.5.5.2)."""


class H2Server:
    """A gRPC server.

    Args:
        interceptors: `grpc.aio.ServerInterceptor`s, the first is the outermost.
        compressed_requests: whether requests may be compressed, by gzip or deflate.
        limits: what a connection may cost.
        times: when a connection is ended.
        memory: makes the account of what a connection may keep; None: without a limit.
        is_outdated: whether the certificates of clients that a context has verified may not count
            any more. Those connections then end as if they had reached their age.
    """

    def __init__(
        self,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        *,
        compressed_requests: bool = True,
        limits: Http2Limits | None = None,
        times: ConnectionTimes | None = None,
        memory: Callable[[], ConnectionMemory] | None = None,
        is_outdated: Callable[[ssl.SSLContext], bool] | None = None,
    ) -> None:
        self.compressed_requests = compressed_requests
        self.limits = limits or Http2Limits()
        self.times = times or ConnectionTimes()
        self.memory = memory or UncountedMemory
        self.is_outdated = is_outdated or (lambda _: False)
        self.connections: set[_ServerProtocol] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.idle = asyncio.Event()
        """There is no connection."""
        self.idle.set()
        self.stopping = False
        self._behind: deque[_ServerProtocol] = deque()
        self._lost: deque[_ServerProtocol] = deque()
        if not all(isinstance(one, grpc.aio.ServerInterceptor) for one in interceptors):
            raise ValueError("interceptors must be of the class grpc.aio.ServerInterceptor")
        self._interceptors = tuple(interceptors)
        self._generic: list[grpc.GenericRpcHandler] = []
        self._sockets: list[tuple[socket.socket, Callable[[], ssl.SSLContext] | None]] = []
        self._listeners: list[asyncio.Server] = []
        self._tls_listeners: list[TlsListener] = []
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

        Args:
            address: see `listen`.

        Raises:
            RuntimeError: it can't.
        """
        return self._listen(address, None)

    def add_secure_port(self, address: str, context: Callable[[], ssl.SSLContext]) -> int:
        """Listens at host:port with TLS; returns the port.

        Args:
            address: see `listen`.
            context: gives that of a server, with its certificate, for each connection: another
                one when the certificate changes. It is set up for HTTP/2.

        Raises:
            RuntimeError: it can't.
        """
        return self._listen(address, context)

    def _listen(self, address: str, context: Callable[[], ssl.SSLContext] | None) -> int:
        listeners = listen(address)
        self._sockets += ((listener, context) for listener in listeners)
        port: int = listeners[0].getsockname()[1]
        return port

    async def start(self) -> None:
        """Begins to serve, once.

        Raises:
            grpc.aio.UsageError: it was stopped.
        """
        if self._stopped.is_set():
            raise grpc.aio.UsageError("Server not in ready state")
        if self._keeper is not None:
            return
        self._keeper = asyncio.create_task(self._keep())
        loop = asyncio.get_running_loop()
        for listener, context in self._sockets:
            if context is None:
                self._listeners.append(
                    await loop.create_server(self._protocol, sock=listener, backlog=BACKLOG)
                )
            else:
                self._tls_listeners.append(
                    TlsListener(listener, context, self.times.handshake, self._protocol)
                )
        self._sockets.clear()

    def _protocol(self) -> asyncio.Protocol:
        return _ServerProtocol(self)

    async def stop(self, grace: float | None) -> None:
        """Accepts no more, and ends what is not done after `grace` seconds.

        Until then clients are served that don't know yet that they shall begin no more calls.
        """
        self.stopping = True
        await self._stop_listening()
        for connection in list(self.connections):
            connection.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace or 0):
                await self._until_done()
        await self._end_all()
        if self._keeper is not None:
            self._keeper.cancel()
        self._stopped.set()

    async def _stop_listening(self) -> None:
        for unused, _ in self._sockets:
            unused.close()
        for listener in self._listeners:
            listener.close()
        for tls_listener in self._tls_listeners:
            await tls_listener.close()

    async def _until_done(self) -> None:
        """Waits until there are no handshakes, no connections and no calls."""
        for tls_listener in self._tls_listeners:
            await tls_listener.handshakes_done()
        await self.idle.wait()
        while self.tasks:
            await asyncio.wait(list(self.tasks))

    async def _end_all(self) -> None:
        """Ends handshakes, connections and calls. Clients have a moment to take the last output."""
        for tls_listener in self._tls_listeners:
            await tls_listener.end_handshakes()
        for connection in list(self.connections):
            connection.close()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.times.last_output):
                await self.idle.wait()
        for connection in list(self.connections):
            connection.abort()

    async def wait_for_termination(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Waits until it has stopped; returns whether it timed out."""
        try:
            await asyncio.wait_for(self._stopped.wait(), timeout)
        except TimeoutError:
            return True
        return False

    def go_on_later(self, connection: _ServerProtocol) -> None:
        """Lets a connection take more of what was read: one of them in each turn of the loop.

        Many connections with much to take delay the others no longer than one does.
        """
        self._behind.append(connection)
        if len(self._behind) == 1:
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        try:
            self._behind[0].go_on()
        finally:
            self._behind.popleft()
            if self._behind:
                asyncio.get_running_loop().call_soon(self._go_on)

    def end_streams_later(self, connection: _ServerProtocol) -> None:
        """Ends the streams of a lost connection, in turn with those of others that were lost.

        A few end in each turn of the loop, whether one connection was lost or a thousand.
        """
        self._lost.append(connection)
        if len(self._lost) == 1:
            asyncio.get_running_loop().call_soon(self._end_streams)

    def _end_streams(self) -> None:
        room = STREAMS_AT_ONCE
        try:
            while self._lost and room > 0:
                connection = self._lost.popleft()
                ended = connection.end_streams(room)
                if ended == room:  # it may have more
                    self._lost.append(connection)
                room -= max(ended, 1)
        finally:
            if self._lost:
                asyncio.get_running_loop().call_soon(self._end_streams)

    async def _keep(self) -> None:
        """Looks at all connections now and then."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._look()  # a call of its own: between two looks, no name holds a connection

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for place, connection in enumerate(list(self.connections)):
            if place % LOOKS_AT_ONCE == LOOKS_AT_ONCE - 1:
                await asyncio.sleep(0)
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
    """The `StreamReceiver` of a request that is answered without a call.

    Args:
        stream: its stream.
        block: the header block of the answer.
        body: what follows it, once all of the request has come; empty: the answer is sent at once.
    """

    __slots__ = ("_block", "_body", "_stream")

    def __init__(self, stream: Http2Stream, block: bytes, body: bytes = b"") -> None:
        self._stream = stream
        self._block = block
        self._body = body
        stream.discard()
        if not body:  # soon, when the stream has its receiver
            asyncio.get_running_loop().call_soon(stream.finish, block)

    def half_closed(self) -> None:
        """See `StreamReceiver`."""
        if self._body:
            asyncio.get_running_loop().call_soon(self._stream.answer, self._block, self._body)


class _ServerProtocol(asyncio.Protocol):
    """One client's connection: the `Host` of its HTTP/2 state, and of its calls."""

    def __init__(self, server: H2Server) -> None:
        self.peer = ""
        self._auth_context = INSECURE
        self._verified_by: ssl.SSLContext | None = None  # the client's certificate, if it has one
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._memory = server.memory()
        self._buffered = 0  # reserved for what is written and not read
        self._http2 = Http2Connection(self, server.limits, self._loop.time, self._memory)
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
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None:
            self._auth_context = auth_context_of(tls)
            self._verified_by = tls.context if tls.getpeercert(binary_form=True) else None
            if tls.selected_alpn_protocol() != ALPN:
                self._http2.end(ErrorCode.PROTOCOL_ERROR, "TLS without h2 by ALPN: no HTTP/2")
        self._server.idle.clear()
        if self._server.stopping:
            self.drain()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._finishing:
            self._unread -= len(data)
            if self._unread < 0:
                self.abort()
            return
        self._receive(data)

    def _receive(self, data: bytes) -> None:
        http2 = self._http2
        http2.receive(data)
        self._flush()
        if self._transport is None or self._transport.is_closing():
            return
        if http2.behind:
            self._transport.pause_reading()
            self._server.go_on_later(self)
        elif not data and not http2.held:
            self._transport.resume_reading()

    def go_on(self) -> None:
        """Takes more of what was read."""
        self._receive(b"")

    def connection_lost(self, _error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._server.connections.discard(self)
        if not self._server.connections:
            self._server.idle.set()
        self._transport = None
        self._server.end_streams_later(self)

    def end_streams(self, most: int) -> int:
        """Ends at most so many streams of the connection, which is lost; returns how many.

        Fewer: these were all.
        """
        ended = self._http2.lose(most)
        if ended < most:
            self._release_buffer()
            self._memory.close()
        return ended

    def pause_writing(self) -> None:
        """A client that does not read gets no more messages, and is not read."""
        assert self._transport is not None, "it writes"
        size = self._transport.get_write_buffer_size()
        if not self._memory.reserve(size):
            self.abort()
            return
        self._buffered = size
        self._http2.hold()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._release_buffer()
        if self._transport is not None:
            if not self._http2.behind:
                self._transport.resume_reading()
            self._http2.go_on()

    @property
    def unread_bytes(self) -> int:
        """What waits in the socket's buffer because the client does not read; 0: it does."""
        if not self._http2.held or self._transport is None:
            return 0
        return self._transport.get_write_buffer_size()

    def _release_buffer(self) -> None:
        size, self._buffered = self._buffered, 0
        if size:
            self._memory.release(size)

    # The HTTP/2 state: see `Host`

    def accept(self, stream: Http2Stream, request: Request) -> StreamReceiver:
        """See `Host`."""
        if request.method != b"POST":
            return _Refusal(stream, STATUS_405, b"" if request.method == b"HEAD" else NOT_GRPC)
        if not _is_grpc(request.field(b"content-type")):
            return _Refusal(stream, STATUS_415, NOT_GRPC)
        encoding = request.field(b"grpc-encoding", IDENTITY)
        accepted = ENCODINGS if self._server.compressed_requests else (IDENTITY,)
        if encoding not in accepted:
            return _Refusal(stream, _unknown_encoding(encoding, accepted))
        stream.inflates = encoding != IDENTITY
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
            with suppress(OSError):  # the client is gone already
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
        return self._auth_context

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
        if self._verified_by is not None and self._server.is_outdated(self._verified_by):
            self._lifetime.grow_old_at(now)
        kept = self._lifetime.look(now, self.unread_bytes)
        self._flush()
        if not kept:
            self.abort()

    def abort(self) -> None:
        """Ends the connection at once."""
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


def _unknown_encoding(encoding: bytes, accepted: tuple[bytes, ...]) -> bytes:
    """What refuses compressed messages, with the codings that the client may use instead."""
    state = "disabled" if encoding in ENCODINGS else "not known"
    text = f"Compression algorithm '{encoding[:32].decode('latin-1')}' is {state}"
    unimplemented: int = grpc.StatusCode.UNIMPLEMENTED.value[0]
    return (
        GRPC_HEADERS
        + literal(b"grpc-accept-encoding", b",".join(accepted))
        + encode_status(unimplemented, text)
    )


def _peer_of(name: Any) -> str:
    """A client's address as gRPC writes it."""
    if isinstance(name, tuple) and (len(name) == 2 or name[0].startswith(IPV4_MAPPED)):
        return f"ipv4:{name[0].removeprefix(IPV4_MAPPED)}:{name[1]}"
    if isinstance(name, tuple):
        return f"ipv6:[{name[0]}]:{name[1]}"
    return f"unix:{name or ''}"
