"""TLS of the lean transport, on uvloop as `stepstate serve` runs it."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, Event, StreamEnded
from h2.settings import SettingCodes

from stepstate.h2grpc import H2Server
from stepstate.h2grpc import tls as tls_module
from stepstate.h2grpc.frames import LARGEST_WINDOW, ErrorCode, goaway
from stepstate.h2grpc.lifetime import ConnectionTimes
from tests.certificates import Authority, Certificate
from tests.conformance.handshakes import memory_after
from tests.unit.h2grpc.client import message

ECHO = "/test.Echo/Echo"
WHO = "/test.Echo/Who"
HEADERS = [
    (":method", "POST"),
    (":scheme", "https"),
    (":path", ECHO),
    (":authority", "localhost"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
MIB = 2**20


@pytest.fixture(autouse=True)
def no_errors_logged(caplog: pytest.LogCaptureFixture) -> Any:
    """Whatever a client does, it is no error of the server."""
    yield
    logged = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not logged


# The server.


async def echo(request: bytes, _context: Any) -> bytes:
    return request


async def who(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    """What the context knows of the client, as JSON."""
    known = {
        key: [value.decode() for value in values] for key, values in context.auth_context().items()
    }
    identities = context.peer_identities()
    key = context.peer_identity_key()
    return json.dumps([known, identities and [one.decode() for one in identities], key]).encode()


METHODS = {
    "Echo": grpc.unary_unary_rpc_method_handler(echo),
    "Who": grpc.unary_unary_rpc_method_handler(who),
}


def server_context(certificate: Certificate, authority: Authority | None = None) -> ssl.SSLContext:
    """A server's; with an authority: of clients' certificates, which it then needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.file, certificate.key)
    if authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority.file)
    return context


@asynccontextmanager
async def serving(
    context: ssl.SSLContext | None, times: ConnectionTimes | None = None
) -> AsyncIterator[int]:
    """A server on the lean transport; its port."""
    server = H2Server(times=times)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", METHODS)])
    address = "127.0.0.1:0"
    if context is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, lambda: context)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


@asynccontextmanager
async def under_way(
    context: ssl.SSLContext,
) -> AsyncIterator[tuple[H2Server, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A server, and a connection to it that has been accepted and has sent nothing."""
    server = H2Server(times=ConnectionTimes(handshake=60.0))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", METHODS)])
    port = server.add_secure_port("127.0.0.1:0", lambda: context)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(0.1)
    try:
        yield server, reader, writer
    finally:
        writer.transport.abort()
        await server.stop(None)


# Clients.


async def call_aio(
    port: int, credentials: grpc.ChannelCredentials | None, path: str, host: str
) -> bytes:
    address = f"{host}:{port}"
    async with (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials)
    ) as channel:
        return await channel.unary_unary(path)(b"abc", timeout=20.0)


async def call_sync(
    port: int, credentials: grpc.ChannelCredentials | None, path: str, host: str
) -> bytes:
    def call() -> bytes:
        address = f"{host}:{port}"
        with (
            grpc.insecure_channel(address)
            if credentials is None
            else grpc.secure_channel(address, credentials)
        ) as channel:
            found: bytes = channel.unary_unary(path)(b"abc", timeout=20.0)
            return found

    return await asyncio.to_thread(call)


@pytest.fixture(params=["sync", "aio"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a method in a connection of its own, with grpcio."""
    chosen = {"sync": call_sync, "aio": call_aio}[request.param]

    async def calling(
        port: int,
        credentials: grpc.ChannelCredentials | None,
        path: str = ECHO,
        host: str = "localhost",
    ) -> bytes:
        return await chosen(port, credentials, path, host)

    return calling


@pytest.fixture
def trusting(authority: Authority) -> grpc.ChannelCredentials:
    """Of a client that has no certificate."""
    return grpc.ssl_channel_credentials(authority.file.read_bytes())


def naming(authority: Authority, own: Certificate) -> grpc.ChannelCredentials:
    """Of a client that has one."""
    return grpc.ssl_channel_credentials(
        authority.file.read_bytes(), own.key.read_bytes(), own.file.read_bytes()
    )


@pytest.fixture
def stranger(program: Callable[[str], str], tmp_path: Path) -> Authority:
    """Another authority, which nobody trusts."""
    return Authority(tmp_path, program("openssl"))


class RawClient:
    """HTTP/2 over TLS by the package `h2`, for what no gRPC library does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.http2 = H2Connection(H2Configuration(header_encoding="utf-8"))
        self.http2.local_settings[SettingCodes.INITIAL_WINDOW_SIZE] = 2**31 - 1
        self.http2.initiate_connection()
        self.http2.increment_flow_control_window(2**31 - 1 - 65_535)

    def request(self, message: bytes) -> int:
        """Begins a call and ends its requests."""
        stream_id: int = self.http2.get_next_available_stream_id()
        self.http2.send_headers(stream_id, HEADERS)
        framed = b"\0" + len(message).to_bytes(4, "big") + message
        self.http2.send_data(stream_id, framed, end_stream=True)
        return stream_id

    async def flush(self) -> None:
        self.writer.write(self.http2.data_to_send())
        await self.writer.drain()

    async def events(self) -> AsyncIterator[Event]:
        """What the server sends, until it ends the connection."""
        try:
            while data := await self.reader.read(2**16):
                for event in self.http2.receive_data(data):
                    yield event
        except ConnectionResetError:
            pass


@asynccontextmanager
async def raw_client(port: int, authority: Authority, *alpn: str) -> AsyncIterator[RawClient]:
    context = ssl.create_default_context(cafile=authority.file)
    if alpn:
        context.set_alpn_protocols(alpn)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="localhost"
    )
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()


class PacketTls:
    """A client's TLS apart from its connection, which says when what is sent.

    Args:
        authority: of the server's certificate.
    """

    def __init__(self, authority: Authority) -> None:
        context = ssl.create_default_context(cafile=authority.file)
        context.set_alpn_protocols(["h2"])
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    async def shake_hands(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> PacketTls:
        """The handshake, but for its last message, which goes with the first data."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                writer.write(self._outgoing.read())
                self._incoming.write(await reader.read(2**16))
            else:
                return self

    def encrypt(self, data: bytes) -> bytes:
        self._tls.write(data)
        return self._outgoing.read()

    def decrypt(self, data: bytes) -> bytes:
        self._incoming.write(data)
        found = b""
        try:
            while part := self._tls.read(2**16):
                found += part
        except ssl.SSLWantReadError:
            pass
        return found


# Calls.


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_clients_call_over_tls(call, certificate, trusting, version: ssl.TLSVersion):
    context = server_context(certificate)
    context.minimum_version = context.maximum_version = version
    async with serving(context) as port:
        assert await call(port, trusting) == b"abc"
        known, identities, key = json.loads(await call(port, trusting, WHO))
    assert known["transport_security_type"] == ["ssl"]
    assert not [name for name in known if name.startswith(("x509", "peer"))]
    assert identities is key is None


async def test_a_call_without_tls_says_so(call):
    async with serving(None) as port:
        known, identities, key = json.loads(await call(port, None, WHO))
    assert known["transport_security_type"] == ["insecure"]
    assert identities is key is None


@pytest.mark.parametrize(
    "names",
    ["", "DNS:robot.example,URI:spiffe://plant/robot,IP:10.0.0.7,IP:fd00::7,email:a@b.example"],
    ids=["common name", "alternative names"],
)
async def test_a_clients_certificate_says_who_it_is(call, certificate, authority, names: str):
    """The same as grpcio's server tells, but for what few ask for."""
    own = authority.issue("robot", names)
    credentials = naming(authority, own)
    theirs = grpc.aio.server()
    theirs.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", METHODS)])
    pair = (certificate.key.read_bytes(), certificate.file.read_bytes())
    asking = grpc.ssl_server_credentials(
        [pair], authority.file.read_bytes(), require_client_auth=True
    )
    their_port = theirs.add_secure_port("127.0.0.1:0", asking)
    await theirs.start()
    expected, *expected_identity = json.loads(await call(their_port, credentials, WHO))
    await theirs.stop(None)
    async with serving(server_context(certificate, authority)) as port:
        known, *identity = json.loads(await call(port, credentials, WHO))
    assert identity == expected_identity
    assert known == {
        key: value
        for key, value in expected.items()
        if key not in ("x509_subject", "peer_spiffe_id")
    }
    assert known["x509_common_name"] == ["robot"]


# Refusals.


async def be_refused(calling: Any) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        await calling
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_without_a_certificate_is_refused_where_one_is_needed(
    call, certificate, authority, trusting
):
    async with serving(server_context(certificate, authority)) as port:
        await be_refused(call(port, trusting))
        assert await call(port, naming(authority, certificate)) == b"abc"


async def test_a_certificate_of_an_unknown_authority_is_refused(
    call, certificate, authority, stranger
):
    async with serving(server_context(certificate, authority)) as port:
        await be_refused(call(port, naming(authority, stranger.issue("robot"))))
        assert await call(port, naming(authority, certificate)) == b"abc"


async def test_a_client_refuses_a_server_of_an_unknown_authority(
    call, certificate, stranger, trusting
):
    async with serving(server_context(certificate)) as port:
        await be_refused(call(port, grpc.ssl_channel_credentials(stranger.file.read_bytes())))
        assert await call(port, trusting) == b"abc"


async def test_a_client_refuses_a_server_of_another_name(call, authority, trusting):
    other = authority.issue("other", "DNS:other.example")
    async with serving(server_context(other)) as port:
        await be_refused(call(port, trusting))


async def test_a_client_without_tls_is_refused_at_once(call, certificate, trusting):
    async with serving(server_context(certificate)) as port:
        await be_refused(call(port, None))
        assert await call(port, trusting) == b"abc"


async def test_a_client_with_tls_is_refused_at_once_by_a_plain_port(call, trusting):
    async with serving(None) as port:
        await be_refused(call(port, trusting))
        assert await call(port, None) == b"abc"


@pytest.mark.parametrize("alpn", [(), ("http/1.1",)])
async def test_a_client_that_does_not_negotiate_h2_is_told(certificate, authority, alpn):
    """Even if it speaks HTTP/2 then."""
    async with (
        serving(server_context(certificate)) as port,
        raw_client(port, authority, *alpn) as client,
    ):
        client.request(b"abc")
        await client.flush()
        events = [event async for event in client.events()]
    *_, last = events
    assert isinstance(last, ConnectionTerminated)
    assert b"ALPN" in last.additional_data
    assert not [event for event in events if isinstance(event, DataReceived)]


# After the handshake.


async def test_a_burst_in_the_packet_of_the_handshake_is_answered(certificate, authority):
    """The client's last message of the handshake and 100 calls, in one packet.

    In that moment uvloop's connections once failed with an IndexError (tarasko/picows#40).
    """
    async with serving(server_context(certificate)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        tls = await PacketTls(authority).shake_hands(reader, writer)
        client = RawClient(reader, writer)
        calls = {client.request(bytes([place]) * 300) for place in range(100)}
        writer.write(tls.encrypt(client.http2.data_to_send()))
        while calls:
            data = tls.decrypt(await asyncio.wait_for(reader.read(2**16), 20))
            events = client.http2.receive_data(data)
            calls -= {one.stream_id for one in events if isinstance(one, StreamEnded)}
        writer.transport.abort()


async def test_large_messages_right_after_the_handshake_arrive(certificate, trusting):
    """The windows are full in both directions while a connection is new."""
    messages = [bytes([place]) * (MIB + place) for place in range(16)]
    async with serving(server_context(certificate)) as port:
        for _ in range(3):
            async with grpc.aio.secure_channel(f"localhost:{port}", trusting) as channel:
                ask = channel.unary_unary(ECHO)
                assert await asyncio.gather(*map(ask, messages)) == messages


# The end.


@pytest.mark.parametrize("begun", [b"", b"\x16\x03\x01"])
async def test_a_server_that_stops_ends_handshakes_that_do_not_end(certificate, begun: bytes):
    async with under_way(server_context(certificate)) as (server, reader, writer):
        writer.write(begun)
        await server.stop(0.1)
        assert await asyncio.wait_for(reader.read(), 20) == b""


async def test_a_handshake_that_ends_while_the_server_stops_is_of_use(certificate, authority):
    """Its client has a call answered, and is told to make no more."""
    async with under_way(server_context(certificate)) as (server, reader, writer):
        stopping = asyncio.create_task(server.stop(20.0))
        await asyncio.sleep(0.1)
        assert not stopping.done()
        tls = await PacketTls(authority).shake_hands(reader, writer)
        client = RawClient(reader, writer)
        client.request(b"abc")
        writer.write(tls.encrypt(client.http2.data_to_send()))
        received = b""
        while message(b"abc") not in received:
            received += tls.decrypt(await asyncio.wait_for(reader.read(2**16), 20))
        assert goaway(LARGEST_WINDOW, ErrorCode.NO_ERROR) in received
        writer.transport.abort()
        await stopping


# Limits.


@pytest.mark.long
def test_handshakes_leave_no_memory(authority):
    """Finished, cut and slow ones (MagicStack/uvloop#565, python/cpython#109534).

    A leak of 0.7 KiB for each of the last 4,800 would show; 15,000 are counted by hand.
    """
    first, *others = memory_after(6_000, uvloop.new_event_loop, authority)
    assert max(others) - first < 3, others


async def test_a_handshake_that_does_not_end_is_ended(certificate):
    async with serving(server_context(certificate), ConnectionTimes(handshake=0.3)) as port:
        for begun in (b"", b"\x16\x03\x01"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begun)
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()
            await writer.wait_closed()


async def test_handshakes_of_silent_clients_have_a_limit(
    certificate, trusting, monkeypatch: pytest.MonkeyPatch
):
    """One more ends the oldest, so that whoever goes on with it gets in."""
    monkeypatch.setattr(tls_module, "MAX_HANDSHAKES", 3)
    monkeypatch.setattr(tls_module, "MIN_HANDSHAKE_SECONDS", 0.1)
    async with serving(server_context(certificate)) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        for reader, _ in silent[:2]:
            assert await asyncio.wait_for(reader.read(), 10) == b""
        assert await call_aio(port, trusting, ECHO, "localhost") == b"abc"
        assert await asyncio.wait_for(silent[2][0].read(), 10) == b""
        assert [reader.at_eof() for reader, _ in silent[3:]] == [False, False]
        for _, writer in silent:
            writer.transport.abort()


async def test_a_burst_of_clients_is_served_beyond_the_limit_of_handshakes(
    certificate, authority, monkeypatch: pytest.MonkeyPatch
):
    """They wait for each other, and do not end each other."""
    monkeypatch.setattr(tls_module, "MAX_HANDSHAKES", 5)
    monkeypatch.setattr(tls_module, "MIN_HANDSHAKE_SECONDS", 20.0)
    context = ssl.create_default_context(cafile=authority.file)
    async with serving(server_context(certificate)) as port:
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        begun = [writer.start_tls(context, server_hostname="localhost") for _, writer in opened]
        await asyncio.gather(*begun)
        for _, writer in opened:
            writer.transport.abort()


async def test_a_client_that_does_not_end_its_tls_is_cut(certificate, authority):
    """It has been told that its connection ends, and neither closes it nor TLS."""
    async with serving(server_context(certificate), ConnectionTimes(last_output=0.1)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        tls = await PacketTls(authority).shake_hands(reader, writer)
        writer.write(tls.encrypt(b"GET / HTTP/1.1\r\n\r\n"))
        assert b"HTTP/2 alone" in tls.decrypt(await asyncio.wait_for(reader.read(), 20))
        writer.close()
        await writer.wait_closed()


async def test_a_flood_of_resets_ends_its_connection_over_tls(certificate, authority, trusting):
    async with (
        serving(server_context(certificate)) as port,
        raw_client(port, authority, "h2") as client,
    ):
        for _ in range(1_000):
            client.http2.reset_stream(client.request(b"abc"))
        await client.flush()
        *_, last = [event async for event in client.events()]
        assert isinstance(last, ConnectionTerminated)
        assert last.error_code.name == "ENHANCE_YOUR_CALM"
        assert await call_aio(port, trusting, ECHO, "localhost") == b"abc"


async def test_a_client_that_does_not_read_is_not_read_over_tls(certificate, authority, trusting):
    """What the server holds for it is what both buffers of the socket take, and its own bounds."""
    async with serving(server_context(certificate)) as port:
        async with raw_client(port, authority, "h2") as client:
            client.reader._transport.pause_reading()  # noqa: SLF001 - it has no method for that
            client.http2.outbound_flow_control_window = 2**31 - 1  # nothing is told to it
            sent = 0
            with pytest.raises(TimeoutError):
                while sent < 64 * MIB:
                    client.request(bytes(16_000))
                    sent += 16_000
                    await asyncio.wait_for(client.flush(), 1.0)
            assert await call_aio(port, trusting, ECHO, "localhost") == b"abc"
        assert await call_aio(port, trusting, ECHO, "localhost") == b"abc"
