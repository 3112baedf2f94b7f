"""What only real sockets show: how connections end, and what gRPC's own client makes of it."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection

from stepstate.h2grpc import ConnectionTimes, H2Server, Http2Limits
from stepstate.h2grpc.call import Call
from stepstate.h2grpc.connection import MESSAGES_AT_ONCE, STREAMS_AT_ONCE, Http2Connection
from stepstate.h2grpc.frames import (
    CLIENT_PREFACE,
    ErrorCode,
    FrameType,
    frame,
    ping,
    settings,
    window_update,
)
from stepstate.h2grpc.lifetime import Lifetime
from stepstate.h2grpc.memory import PartialMessages
from stepstate.h2grpc.server import LOOK_SECONDS
from stepstate.h2grpc.waiting import WaitingStreams
from tests.certificates import Certificate
from tests.unit.h2grpc.client import HEADERS
from tests.unit.h2grpc.raw import goaway_of

HANG = 30.0
BEGINNING = CLIENT_PREFACE + settings({})
SHORT = ConnectionTimes(handshake=0.5, last_output=0.5)


async def _echo(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def _who(_request: bytes, context: Any) -> bytes:
    """The client's address: it changes with its connection."""
    return str(context.peer()).encode()


@asynccontextmanager
async def _running(
    times: ConnectionTimes = SHORT,
    limits: Http2Limits | None = None,
    who: Any = _who,
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[H2Server, int]]:
    server = H2Server(times=times, limits=limits)
    methods = {
        "Echo": grpc.stream_stream_rpc_method_handler(_echo),
        "Who": grpc.unary_unary_rpc_method_handler(who),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", methods)])
    address = "127.0.0.1:0"
    if context is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, lambda: context)
    await server.start()
    try:
        yield server, port
    finally:
        await server.stop(None)


async def _come(server: H2Server) -> None:
    async with asyncio.timeout(HANG):
        while not server.connections:
            await asyncio.sleep(0.01)


async def _gone(server: H2Server) -> None:
    async with asyncio.timeout(HANG):
        await server.idle.wait()


@pytest.mark.parametrize("sent", [b"no HTTP/2 at all", BEGINNING + window_update(0, 0)])
async def test_a_fault_is_told_and_then_the_connection_is_closed(sent: bytes) -> None:
    async with _running() as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        async with asyncio.timeout(HANG):
            output = await reader.read()
        assert goaway_of(output)[0] is ErrorCode.PROTOCOL_ERROR
        writer.close()
        await _gone(server)


async def test_a_client_that_sends_on_reads_why_it_was_ended() -> None:
    """With bytes unread, the system would reset the connection, and lose what was written."""
    async with _running() as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(BEGINNING + 50_000 * ping(bytes(8), ack=False))
        async with asyncio.timeout(HANG):
            output = await reader.read()
        assert goaway_of(output) == (ErrorCode.ENHANCE_YOUR_CALM, b"too_many_pings")
        writer.close()
        await _gone(server)


async def test_a_client_that_neither_reads_nor_closes_is_cut() -> None:
    async with _running() as (server, port):
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"no HTTP/2 at all, and no end")
        await _come(server)
        await _gone(server)
        writer.close()


@pytest.mark.parametrize("sent", [b"", CLIENT_PREFACE])
async def test_half_open_connections_are_cut(sent: bytes) -> None:
    async with _running() as (server, port):
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        await _come(server)
        await _gone(server)
        writer.close()


async def test_a_stream_is_served_while_the_server_stops() -> None:
    async with (
        _running() as (server, port),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stream = channel.stream_stream("/test/Echo")()
        await stream.write(b"before")
        assert await stream.read() == b"before"
        stopping = asyncio.create_task(server.stop(HANG))
        for number in range(20):
            await stream.write(b"%d" % number)
            assert await stream.read() == b"%d" % number
        assert not stopping.done()
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK
        await asyncio.wait_for(stopping, HANG)


async def test_an_old_connection_is_left_without_an_error() -> None:
    """Each call is answered, and sooner or later on another connection."""
    async with (
        _running(replace(SHORT, age=1.0)) as (_server, port),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        asyncio.timeout(HANG),
    ):
        ask = channel.unary_unary("/test/Who")
        first = await ask(b"")
        while await ask(b"") == first:
            await asyncio.sleep(0.001)


@pytest.mark.long
async def test_grpcs_client_pings_less_often_after_the_goaway() -> None:
    """One that pings every second is told so, connects again, and pings every two seconds."""
    limits = Http2Limits(ping_interval_seconds=1.5)
    options = [
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with (
        _running(limits=limits) as (_server, port),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel,
    ):
        ask = channel.unary_unary("/test/Who")
        peers = []
        for _ in range(3):
            peers.append(await ask(b""))
            await asyncio.sleep(8.0)
        assert peers[0] != peers[1] == peers[2]


class _Turns:
    """Counts the turns of the loop."""

    def __init__(self) -> None:
        self.count = 0
        self._next()

    def _next(self) -> None:
        self.count += 1
        self._handle = asyncio.get_running_loop().call_soon(self._next)

    def stop(self) -> None:
        self._handle.cancel()


@pytest.mark.parametrize("connections", [1, 20])
async def test_calls_that_come_together_begin_and_end_in_several_turns_of_the_loop(
    connections: int,
) -> None:
    """Others come in between: clients with a thousand streams do not delay them."""
    begun: list[int] = []
    ended: list[int] = []
    turns = _Turns()

    async def wait(_request: bytes, _context: Any) -> bytes:
        begun.append(turns.count)
        try:
            await asyncio.sleep(HANG)
        finally:
            ended.append(turns.count)
        return b""

    calls = 10 * STREAMS_AT_ONCE
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    for place in range(calls // connections):
        stream_id = 2 * place + 1
        client.send_headers(stream_id, [*HEADERS[:2], (":path", "/test/Who"), *HEADERS[3:]])
        client.send_data(stream_id, bytes(5), end_stream=True)
    sent = client.data_to_send()
    async with _running(who=wait) as (server, port), asyncio.timeout(HANG):
        writers = [
            (await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(connections)
        ]
        for writer in writers:
            writer.write(sent)
        while len(begun) < calls:
            await asyncio.sleep(0.01)
        for writer in writers:
            writer.transport.abort()
        while len(ended) < calls:
            await asyncio.sleep(0.01)
        turns.stop()
        await _gone(server)
    for places in (ended,) if connections > 1 else (begun, ended):
        assert max(Counter(places).values()) <= STREAMS_AT_ONCE


async def test_connections_with_many_messages_take_them_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them together hold up the loop as long as one does."""
    connections, messages, taken, turns = 8, 10 * MESSAGES_AT_ONCE, Counter[int](), _Turns()

    def count_message(call: Call, payload: bytes) -> None:
        taken[turns.count] += 1
        take(call, payload)

    take = Call.message
    monkeypatch.setattr(Call, "message", count_message)
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    client.send_headers(1, [*HEADERS[:2], (":path", "/test/Echo"), *HEADERS[3:]])
    burst = client.data_to_send() + messages * frame(FrameType.DATA, 0, 1, bytes(5))
    async with _running() as (server, port):
        writers = [
            (await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(connections)
        ]
        for writer in writers:
            writer.write(burst)
        async with asyncio.timeout(HANG):
            while taken.total() < connections * messages:
                await asyncio.sleep(0.01)
        turns.stop()
        for writer in writers:
            writer.transport.abort()
        await _gone(server)
    shares = taken.total() / MESSAGES_AT_ONCE
    assert len(taken) > shares / 2  # all of them may read at first, and then one goes on in a turn


async def _leave_at_once(port: int) -> None:
    """Without a word."""
    _reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await writer.wait_closed()


async def _break_the_rules(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(BEGINNING + ping(b"", ack=False))
    await reader.read()
    writer.close()
    await writer.wait_closed()


async def _be_cut_within_a_call(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream = channel.stream_stream("/test/Echo")()
        await stream.write(b"before")
        await stream.read()


async def _stay_until_it_is_looked_at(port: int) -> None:
    _reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(1.5 * LOOK_SECONDS)
    writer.close()
    await writer.wait_closed()


@asynccontextmanager
async def _nothing_left() -> AsyncIterator[None]:
    """After this, nothing of the connections that began in it is left to the cycle collector."""
    kinds = {Http2Connection, Lifetime, PartialMessages, WaitingStreams}
    gc.collect()
    before = [one for one in gc.get_objects() if type(one) in kinds]  # of other tests
    gc.disable()
    try:
        yield
        async with asyncio.timeout(HANG):
            while sum(type(one) in kinds for one in gc.get_objects()) > len(before):
                await asyncio.sleep(0.01)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "leave",
    [_leave_at_once, _break_the_rules, _be_cut_within_a_call, _stay_until_it_is_looked_at],
)
async def test_a_connection_leaves_nothing_to_the_garbage_collector(leave: Any) -> None:
    async with _running(ConnectionTimes()) as (_server, port), _nothing_left():
        await leave(port)


@pytest.mark.parametrize("sent", [b"no TLS at all", b""])
async def test_nor_does_a_tls_handshake_that_fails(sent: bytes, certificate: Certificate) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.file, certificate.key)
    async with _running(SHORT, context=context) as (_server, port), _nothing_left():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        await reader.read()
        writer.close()
