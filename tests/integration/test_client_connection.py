"""How both clients reach a server: a wrong address, a restart, TLS and credentials on the way."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from stepstate import errors
from stepstate.client import AsyncClient, Client
from stepstate.client._connection import CHANNEL_OPTIONS, channel_options
from stepstate.server import Server
from tests.chaos.faults import relay
from tests.chaos.restartable import RestartableServer, free_port
from tests.integration.clients import Connect
from tests.integration.restarts import StartRestartable
from tests.integration.wire import HANG, TOLERANCE, draw, largest_difference
from tests.networks import Network

TOKEN = "Bearer a-token-of-this-test"
METADATA = [("authorization", TOKEN)]


# A wrong address, and a server that is away for a while.


async def test_a_wrong_address_is_told_within_the_connect_timeout(connect: Connect):
    async with connect(f"127.0.0.1:{free_port()}", timeout=HANG, connect_timeout=0.5) as client:
        async with asyncio.timeout(HANG / 2):
            with pytest.raises(errors.ServerUnreachable, match="no server has answered there yet"):
                await client.open("lstm")


async def test_an_address_that_takes_connections_and_never_answers_is_told_too(connect: Connect):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        async with connect(address, timeout=HANG, connect_timeout=0.5) as client:
            async with asyncio.timeout(HANG / 2):
                with pytest.raises(errors.ServerUnreachable, match="no server has answered"):
                    await client.models()


async def test_a_client_may_be_there_before_its_server(
    connect: Connect, restartable: StartRestartable
):
    server = await restartable("60")
    server.kill()
    async with connect(server.address, connect_timeout=HANG) as client:
        models = asyncio.ensure_future(client.models())
        await asyncio.sleep(0.3)
        await server.start()
        assert len(await models) == 6


async def killed(server: RestartableServer) -> None:
    server.kill()


async def stopped(server: RestartableServer) -> None:
    await server.drained()


OLD_TIMEOUT = 10.0
"""Seconds: the default that did not survive a restart."""


@pytest.mark.parametrize(
    ("end", "away"),
    [pytest.param(killed, OLD_TIMEOUT + 2, marks=pytest.mark.long), (stopped, 0)],
)
async def test_clients_step_on_through_a_restart_with_their_defaults(
    end: Callable, away: float, restartable: StartRestartable, networks: dict[str, Network]
):
    x = draw(40)
    server = await restartable("0.1")
    async with AsyncClient(server.address) as one, AsyncClient(server.address) as streaming:
        with Client(server.address) as other:
            a, b = await one.open("lstm"), await asyncio.to_thread(other.open, "lstm")
            c = await streaming.open("lstm")
            gone = asyncio.Event()

            async def rows() -> AsyncIterator[np.ndarray]:
                for place, row in enumerate(x):
                    if place == 10:
                        await gone.wait()
                    yield row

            async def streamed() -> list[np.ndarray]:
                return [y async for y in c.stream(rows())]

            stream = asyncio.ensure_future(streamed())
            ys = [[await a.step(row) for row in x[:10]]]
            ys.append([await asyncio.to_thread(b.step, row) for row in x[:10]])
            await end(server)
            going = [asyncio.ensure_future(a.step(x[10]))]
            going.append(asyncio.ensure_future(asyncio.to_thread(b.step, x[10])))
            gone.set()
            await asyncio.sleep(away)
            await server.start()
            for found, step in zip(ys, going, strict=True):
                found.append(await step)
            ys[0] += [await a.step(row) for row in x[11:]]
            ys[1] += [await asyncio.to_thread(b.step, row) for row in x[11:]]
            ys.append(await stream)
    for found in ys:
        assert largest_difference(np.array(found), networks["lstm"].offline(x)) <= TOLERANCE


# Protected ways.


@dataclass(frozen=True)
class Certificate:
    """Of a server, signed by itself, as PEM."""

    key: bytes
    certificate: bytes


@pytest.fixture
def certificate(tmp_path: Path, program: Callable[[str], str]) -> Certificate:
    command = f"{program('openssl')} req -x509 -nodes -keyout key.pem -out cert.pem -days 2"
    subject = ["-subj", "/CN=stepstate.test", "-addext", "subjectAltName=DNS:stepstate.test"]
    subprocess.run([*command.split(), *subject], cwd=tmp_path, check=True, capture_output=True)
    return Certificate((tmp_path / "key.pem").read_bytes(), (tmp_path / "cert.pem").read_bytes())


class Gate(grpc.GenericRpcHandler):
    """A proxy that lets calls with the right token through, as bytes, and notes what came."""

    def __init__(self, upstream: grpc.aio.Channel) -> None:
        self._upstream = upstream
        self.refused = 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        if details.method.endswith("/StreamSteps") or details.method.endswith("/StreamPacked"):
            return grpc.stream_stream_rpc_method_handler(self._streams(details.method))
        return grpc.unary_unary_rpc_method_handler(self._unary(details.method))

    async def _check(self, context: grpc.aio.ServicerContext) -> None:
        if ("authorization", TOKEN) not in tuple(context.invocation_metadata() or ()):
            self.refused += 1
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token of this test")

    def _unary(self, method: str) -> Callable:
        async def call(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            await self._check(context)
            return await self._upstream.unary_unary(method)(request)

        return call

    def _streams(self, method: str) -> Callable:
        async def call(requests, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            await self._check(context)
            async for reply in self._upstream.stream_stream(method)(requests):
                yield reply

        return call


@pytest.fixture
async def guarded(server: Server, certificate: Certificate) -> AsyncIterator[tuple[str, Gate]]:
    """The address of a proxy with TLS before a server, and the proxy."""
    tls = grpc.ssl_server_credentials([(certificate.key, certificate.certificate)])
    async with grpc.aio.insecure_channel(server.address) as channel:
        proxy, gate = grpc.aio.server(), Gate(channel)
        proxy.add_generic_rpc_handlers([gate])
        port = proxy.add_secure_port("127.0.0.1:0", tls)
        await proxy.start()
        try:
            yield f"127.0.0.1:{port}", gate
        finally:
            await proxy.stop(None)


@pytest.fixture
def tls(certificate: Certificate) -> dict[str, object]:
    """What a client needs to trust the gate."""
    return {
        "credentials": grpc.ssl_channel_credentials(certificate.certificate),
        "options": [("grpc.ssl_target_name_override", "stepstate.test")],
        "connect_timeout": HANG,
    }


def with_token(tls: dict[str, object]) -> dict[str, object]:
    """The token as gRPC's call credentials, which may refresh it."""
    token = grpc.access_token_call_credentials(TOKEN.removeprefix("Bearer "))
    both = grpc.composite_channel_credentials(tls["credentials"], token)
    return {**tls, "credentials": both}


@pytest.mark.parametrize("how", ["metadata", "call credentials"])
async def test_clients_go_through_a_proxy_with_tls_and_a_token(
    how: str, connect: Connect, guarded: tuple[str, Gate], tls, networks: dict[str, Network]
):
    x, (address, gate) = draw(20), guarded
    options = with_token(tls) if how == "call credentials" else {**tls, "metadata": METADATA}
    async with connect(address, **options) as client:
        session = await client.open("lstm")
        ys = [await session.step(x[0])]
        ys += [y async for y in session.stream(x[1:10])]
        async with client.packed([session]) as pack:
            ys += [(await pack.step(row[None])).y[0] for row in x[10:]]
        await session.close()
    assert gate.refused == 0
    assert largest_difference(np.array(ys), networks["lstm"].offline(x)) <= TOLERANCE


async def test_a_proxy_that_wants_a_token_says_so(connect: Connect, guarded: tuple[str, Gate], tls):
    address, gate = guarded
    async with connect(address, **tls) as client:
        with pytest.raises(errors.UnexpectedStatus, match="no token of this test") as refused:
            await client.open("lstm")
    assert "UNAUTHENTICATED" in str(refused.value)
    assert "metadata" in str(refused.value)
    assert gate.refused == 1


async def test_plain_text_to_a_port_with_tls_is_told(connect: Connect, guarded: tuple[str, Gate]):
    async with connect(guarded[0], connect_timeout=0.5) as client:
        with pytest.raises(errors.ServerUnreachable, match="the server speaks TLS there"):
            await client.models()


def test_options_take_the_place_of_those_of_the_same_name():
    mine = {"grpc.keepalive_time_ms": 1, "grpc.primary_user_agent": "x"}
    assert dict(channel_options(list(mine.items()))) == dict(CHANNEL_OPTIONS) | mine
    assert len(channel_options(list(mine.items()))) == len(CHANNEL_OPTIONS) + 1


async def test_a_stream_reconnects_however_long_ago_its_last_reply_was(server, networks):
    x = draw(4)

    async def seldom():
        for row in x:
            yield row
            await asyncio.sleep(0.6)

    async with relay(server.address) as way, AsyncClient(way.address, timeout=0.5) as client:
        session = await client.open("lstm")
        got = []
        async for y in session.stream(seldom()):
            got.append(y)
            way.cut()
    assert largest_difference(np.array(got), networks["lstm"].offline(x)) <= TOLERANCE
