"""The health service: each watch is told the status of now."""

from __future__ import annotations

import asyncio

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from stepstate.transport import HealthService
from tests.unit.transport.contexts import CallContext

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN


async def test_a_watch_is_told_each_change_and_of_many_the_last():
    health = HealthService()
    watches = [health.Watch(HealthCheckRequest(service="a"), CallContext("peer")) for _ in range(2)]

    async def told() -> list[int]:
        return [(await anext(watch)).status for watch in watches]

    assert await told() == [UNKNOWN] * 2
    later = asyncio.create_task(told())
    await asyncio.sleep(0)
    health.set("b", SERVING)
    health.set("a", SERVING)
    assert await later == [SERVING] * 2
    for status in (NOT_SERVING, SERVING, NOT_SERVING):
        health.set("a", status)
    assert await told() == [NOT_SERVING] * 2
    health.set("a", SERVING)
    assert await told() == [SERVING] * 2


async def test_once_it_is_shut_down_nothing_serves_again():
    health = HealthService()
    health.set("a", SERVING)
    health.shut_down()
    health.set("a", SERVING)
    reply = await health.Check(HealthCheckRequest(service="a"), CallContext("peer"))
    assert reply.status == NOT_SERVING
