"""What one client asks for leaves others their share, and a refused call is tried again."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.transport import admission
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    HANG,
    draw,
    opened,
    raw_stub,
    refused,
    request,
    scrape,
    until,
)


@asynccontextmanager
async def open_streams(stub: StepstateServiceStub, count: int) -> AsyncIterator[None]:
    """Streams on which nothing is sent."""
    streams = [stub.StreamSteps() for _ in range(count)]
    for stream in streams:
        await stream.wait_for_connection()
    try:
        yield
    finally:
        for stream in streams:
            stream.cancel()


async def sample(server: Server, series: str) -> int:
    text = await scrape(server.metrics_address)
    return int(float(text.split(f"\n{series} ")[1].split()[0]))


async def test_too_many_open_calls_are_refused_and_others_are_served(
    server: Server, stub: StepstateServiceStub, other_stub: StepstateServiceStub, monkeypatch
):
    monkeypatch.setitem(admission.MAX_OPEN, admission.STREAM, 8)
    await opened(stub, "a")
    async with open_streams(stub, 4):
        refusal = await refused(stub.StreamSteps().read())
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refusal.reason, refusal.quota) == ("TOO_MANY_CALLS", "client:calls")
        assert refusal.retry_seconds
        assert await sample(server, 'stepstate_calls{kind="stream",state="open"}') == 4
        reply = await anext(aiter(other_stub.StreamSteps(iter([request("a", 0, draw(1))]))))
        assert reply.t == 1
        assert (await stub.Step(request("a", 1, draw(1)))).t == 2  # calls of another kind

    async def ended() -> bool:
        return not await sample(server, 'stepstate_calls{kind="stream",state="open"}')

    await until(ended)
    assert await sample(server, 'stepstate_memory_bytes{use="calls"}') == 0
    reply = await anext(aiter(stub.StreamSteps(iter([request("a", 2, draw(1))]))))
    assert reply.t == 3


async def test_the_client_library_tries_a_refused_call_again(server: Server, monkeypatch):
    async with AsyncClient(server.address) as client:
        await client.open("lstm", session_id="a")
        with monkeypatch.context() as patch:
            for kind in (admission.LONG, admission.STREAM):
                patch.setitem(admission.MAX_OPEN, kind, 0)
            session = await client.session("a")
            waiting = asyncio.gather(client.models(), session.step(draw(1)[0]))
            await asyncio.sleep(0.1)
            assert not waiting.done()
        models, _ = await asyncio.wait_for(waiting, HANG)
        assert len(models) == 6
        assert session.t == 1


async def test_a_call_whose_client_is_gone_leaves_the_queue(
    server: Server, stub: StepstateServiceStub
):
    """The first 8 exports wait for a long step of their session, the others for a turn."""
    await opened(stub, "a")
    step = stub.Step(request("a", 0, draw(3_000), inspect=True, last_only=True))
    waits = 'stepstate_calls{kind="long",state="waiting"}'
    exports = [stub.ExportSession(pb.ExportSessionRequest(session_id="a")) for _ in range(20)]

    async def waiting(count: int) -> None:
        async def so() -> bool:
            return await sample(server, waits) == count

        await until(so)

    await waiting(12)
    for export in exports[4:]:
        export.cancel()
    await waiting(0)
    step.cancel()
    await asyncio.wait_for(asyncio.gather(*exports[:4]), HANG)


@pytest.mark.parametrize(("trusted", "peers"), [("127.0.0.0/8", 3), ("10.0.0.0/8", 1), ("", 1)])
async def test_behind_a_trusted_proxy_each_forwarded_address_is_a_client(
    config: ServerConfig, trusted: str, peers: int
):
    """On one connection, as behind Envoy; from anyone else the header means nothing."""
    with_proxy = dataclasses.replace(config, trusted_proxies=trusted)
    async with running_server(with_proxy) as server, raw_stub(server.address) as stub:
        streams = []
        for number in (1, 2, 3, 3):
            forwarded = (("x-forwarded-for", f"198.51.100.9, 203.0.113.{number}"),)
            streams.append(stub.StreamSteps(metadata=forwarded))
        for stream in streams:
            await stream.wait_for_connection()

        async def known() -> bool:
            return await sample(server, 'stepstate_calls{kind="stream",state="open"}') == 4

        await until(known)
        assert await sample(server, "stepstate_peers") == peers
        for stream in streams:
            stream.cancel()


async def test_each_connection_is_a_client(server: Server):
    async with AsyncExitStack() as stack:
        for _ in range(3):
            stub = await stack.enter_async_context(raw_stub(server.address))
            await stack.enter_async_context(open_streams(stub, 2))

        async def known() -> bool:
            return await sample(server, "stepstate_peers") == 3

        await until(known)

    async def none() -> bool:
        return not await sample(server, "stepstate_peers")

    await until(none)
