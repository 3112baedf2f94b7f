"""Sync sessions that step through an outage of their store, and what must hold of them after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub as Stub
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    draw,
    largest_difference,
    opened,
    raw_stub,
    refusal_of_call,
    request,
    sample,
    scrape,
    until,
)
from tests.networks import Network

SESSIONS = 6
OUTAGE_SECONDS = 4.0
"""Several checks of the store, so that an outage that reads take for ended shows."""
SAMPLES = 50
"""Of the metric during an outage."""


class Stepping:
    """A sync session whose client sends each row until it is answered."""

    def __init__(self, stub: Stub, name: str, *, seed: int, pause: float) -> None:
        self.rows = draw(5000, seed=seed)
        self.outputs: list[float] = []
        self.t = 0
        self.refusals: set[tuple[str, str]] = set()
        self.stopping = False
        self._stub = stub
        self.name = name
        self._pause = pause

    async def run(self) -> None:
        while not self.stopping:
            try:
                reply = await self._stub.Step(request(self.name, self.t, self.rows[self.t]))
            except grpc.aio.AioRpcError as error:
                refusal = refusal_of_call(error)
                assert refusal.code is grpc.StatusCode.UNAVAILABLE
                self.refusals.add((refusal.reason, refusal.metadata.get("cause", "")))
            else:
                assert reply.t == self.t + 1 == reply.durable_t
                self.t += 1
                self.outputs += reply.y
            await asyncio.sleep(self._pause)


class Load:
    """Sessions that step on and on, a list of all of them now and then, and the health."""

    def __init__(self, server: Server, stub: Stub, channel: grpc.aio.Channel, pause: float) -> None:
        self.server = server
        self.sessions = [Stepping(stub, f"s{i}", seed=i, pause=pause) for i in range(SESSIONS)]
        self.healthy: list[bool] = []
        self._stub = stub
        self._health = health_pb2_grpc.HealthStub(channel)

    async def read(self) -> None:
        """Reads succeed where writes do not."""
        question = health_pb2.HealthCheckRequest(service="stepstate.store")
        while True:
            with suppress(grpc.aio.AioRpcError):
                await self._stub.ListSessions(pb.ListSessionsRequest())
            reply = await self._health.Check(question)
            self.healthy.append(reply.status == health_pb2.HealthCheckResponse.SERVING)
            await asyncio.sleep(0.05)

    async def open_more(self, count: int) -> None:
        """Opens sessions that nobody steps, as far as they are not refused."""
        opening = pb.OpenSessionRequest(model="lstm", durability=pb.DURABILITY_SYNC)
        calls = (self._stub.OpenSession(opening) for _ in range(count))
        await asyncio.gather(*map(asyncio.ensure_future, calls), return_exceptions=True)

    async def progress(self, rows: int) -> None:
        """Waits until every session was answered so many times more."""
        goals = [session.t + rows for session in self.sessions]
        async with asyncio.timeout(HANG):
            while any(s.t < goal for s, goal in zip(self.sessions, goals, strict=True)):
                await asyncio.sleep(0.01)

    async def healthy_again(self) -> None:
        """Waits until the store counts as up, in the metrics and in the health."""

        async def so() -> bool:
            text = await scrape(self.server.metrics_address)
            return sample(text, "stepstate_store_up") == 1 and self.healthy[-1]

        await until(so)

    async def stays_away(self) -> None:
        """Waits until steps are refused and health says so; then nothing says otherwise."""
        async with asyncio.timeout(2 * HANG):
            while not self.refusals or self.healthy[-1]:
                await asyncio.sleep(0.01)
        healthy = len(self.healthy)
        for _ in range(SAMPLES):
            text = await scrape(self.server.metrics_address)
            assert sample(text, "stepstate_store_up") == 0
            await asyncio.sleep(OUTAGE_SECONDS / SAMPLES)
        assert not any(self.healthy[healthy:])

    def check(self, network: Network) -> None:
        """Each row was applied once, with the numbers of the offline run."""
        for session in self.sessions:
            want = network.offline(session.rows[: session.t])
            assert largest_difference(np.array(session.outputs), want) <= TOLERANCE

    @property
    def refusals(self) -> set[tuple[str, str]]:
        """Reason and cause of every refusal."""
        return {refusal for session in self.sessions for refusal in session.refusals}


@asynccontextmanager
async def load(
    config: ServerConfig, url: str, *, pause: float = 0.02, **options: int
) -> AsyncIterator[Load]:
    """Sessions of a server on a store; each rests for a while between its steps."""
    async with (
        running_server(replace(config, store=url, **options)) as server,
        raw_stub(server.address) as stub,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        made = Load(server, stub, channel, pause)
        for session in made.sessions:
            await opened(stub, session.name, durability=pb.DURABILITY_SYNC)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(made.read())
            for session in made.sessions:
                group.create_task(session.run())
            await made.progress(3)
            yield made
            for session in made.sessions:
                session.stopping = True
            reading.cancel()


def outages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name == "stepstate.sessions.monitored_store"]
