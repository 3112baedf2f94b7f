"""What a review found by attack, each as the test that it failed."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from datetime import UTC, datetime

import grpc
import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from stepstate.client import AsyncClient
from stepstate.errors import ModelUnknown
from stepstate.server import running_server
from stepstate.transport.stream import StepStream
from stepstate.v1 import stepstate_pb2 as pb
from tests.chaos.faults import relay
from tests.integration.wire import TOLERANCE, draw, largest_difference, raw_stub


async def test_a_stream_goes_on_after_in_band_refusals_of_a_full_queue(config, networks):
    """A cancelled write must not end the feeding of rows."""
    x = draw(300)
    async with (
        running_server(replace(config, queue_requests=20)) as server,
        AsyncClient(server.address, timeout=60) as client,
    ):

        async def run() -> float:
            session = await client.open("lstm")
            got = np.array([y async for y in session.stream(x)])
            return largest_difference(got, networks["lstm"].offline(x))

        async with asyncio.timeout(90):
            differences = await asyncio.gather(*(run() for _ in range(4)))
    assert max(differences) <= TOLERANCE


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


async def test_a_start_time_at_the_end_of_time_is_told_back(server):
    latest = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    asked = Timestamp()
    asked.FromDatetime(latest)
    async with raw_stub(server.address) as stub:
        opened = await stub.OpenSession(pb.OpenSessionRequest(model="lstm", start_time=asked))
        assert opened.session.start_time == asked
        assert len((await stub.ListSessions(pb.ListSessionsRequest())).sessions) == 1


async def test_a_name_of_a_megabyte_is_refused_like_a_short_one(client):
    with pytest.raises(ModelUnknown) as refused:
        await client.open("x" * 1_000_000)
    assert refused.value.loaded
    assert len(str(refused.value)) < 2_000


async def test_an_abandoned_stream_leaves_nothing_to_the_garbage_collector(server):
    gc.collect()
    async with raw_stub(server.address) as stub:
        await stub.OpenSession(pb.OpenSessionRequest(session_id="a", model="lstm"))
        call = stub.StreamSteps()
        for _ in range(50):
            await call.write(pb.StepRequest(session_id="a", x=[0.0] * 3 * 4_000))
        await asyncio.sleep(0.2)
        call.cancel()
        await asyncio.sleep(0.2)
    held = [o for o in gc.get_objects() if type(o) is StepStream]
    assert sum(len(stream._ready) for stream in held) == 0
    assert server._native._outgoing._bytes == 0


async def test_unread_replies_of_a_stream_are_bounded_in_bytes(server):
    rows = 4_000
    async with raw_stub(server.address) as stub:
        await stub.OpenSession(pb.OpenSessionRequest(session_id="a", model="lstm"))
        call = stub.StreamSteps()

        async def flood() -> None:
            for _ in range(2_000):
                await call.write(pb.StepRequest(session_id="a", x=[0.0] * 3 * rows))

        flooding = asyncio.create_task(flood())
        before = -1
        while (after := server._native._outgoing._bytes) != before:
            before = after
            await asyncio.sleep(0.5)
        assert 0 < after < 10 * 2**20
        flooding.cancel()
        call.cancel()


async def test_a_stream_that_comes_while_streams_end_is_refused(server):
    async with raw_stub(server.address) as stub:
        idle = stub.StreamSteps()
        await idle.write(pb.StepRequest(session_id="nobody", x=[0.0]))
        await idle.read()
        server._native._streams.draining = True
        late = stub.StreamSteps()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await late.read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        idle.cancel()
