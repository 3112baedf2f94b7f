"""Whoever asks for the health of a server holds up nobody else."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from stepstate.config import ServerConfig
from stepstate.server import build_server
from tests.attacks.http2 import frame, raw_connection
from tests.integration.wire import HANG, sample, scrape, until

pytestmark = pytest.mark.transports

WATCH = "/grpc.health.v1.Health/Watch"
OPEN_STREAMS = 'stepstate_calls{kind="stream",state="open"}'


async def test_watches_that_end_or_are_not_read_hold_up_no_change_and_no_drain(
    config: ServerConfig,
):
    server = await build_server(config)
    await server.start()

    async def open_streams(count: int) -> None:
        async def so() -> bool:
            return sample(await scrape(server.metrics_address), OPEN_STREAMS) == count

        await until(so)

    try:
        async with (
            raw_connection(server.address, window=0) as hostile,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            unread = hostile.open(WATCH)
            await hostile.send(unread, frame(HealthCheckRequest()), end=True)
            await hostile.flush()
            watches = [HealthStub(channel).Watch(HealthCheckRequest()) for _ in range(2)]
            for watch in watches:
                assert (await watch.read()).status == HealthCheckResponse.SERVING
            await open_streams(3)
            watches.pop().cancel()
            await open_streams(2)
            draining = asyncio.create_task(server.drain())
            reply = await asyncio.wait_for(watches[0].read(), HANG)
            assert reply.status == HealthCheckResponse.NOT_SERVING
            await asyncio.wait_for(draining, HANG)
    finally:
        await server.stop()
