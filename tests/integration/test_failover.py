"""Sync sessions through a failover of Redis, and whatever else makes it refuse writes.

Each outage lasts for several sweeps of the server, so that one that reads take for an end shows.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub as Stub
from tests.contract.proxy import Proxy, proxy
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
from tests.redis_process import RedisProcess, free_port, redis_process, redis_sentinel

SESSIONS = 6
OUTAGE_SECONDS = 4.0
KEEPS = ("--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync-delay", "0")


class Stepping:
    """A sync session whose client sends each row until it is answered."""

    def __init__(self, stub: Stub, name: str, seed: int) -> None:
        self.rows = draw(5000, seed=seed)
        self.outputs: list[float] = []
        self.t = 0
        self.refusals: set[tuple[str, str]] = set()
        self.stopping = False
        self._stub = stub
        self._name = name

    async def run(self) -> None:
        while not self.stopping:
            try:
                reply = await self._stub.Step(request(self._name, self.t, self.rows[self.t]))
            except grpc.aio.AioRpcError as error:
                refusal = refusal_of_call(error)
                assert refusal.code is grpc.StatusCode.UNAVAILABLE
                self.refusals.add((refusal.reason, refusal.metadata.get("cause", "")))
            else:
                assert reply.t == self.t + 1 == reply.durable_t
                self.t += 1
                self.outputs += reply.y
            await asyncio.sleep(0.02)


class Load:
    """Sessions that step on and on, a list of all of them now and then, and the health."""

    def __init__(self, server: Server, stub: Stub, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.sessions = [Stepping(stub, f"s{i}", i) for i in range(SESSIONS)]
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
async def load(config: ServerConfig, url: str) -> AsyncIterator[Load]:
    async with (
        running_server(replace(config, store=url)) as server,
        raw_stub(server.address) as stub,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        made = Load(server, stub, channel)
        for session in made.sessions:
            await opened(stub, session._name, durability=pb.DURABILITY_SYNC)
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
    return [r.message for r in caplog.records if r.name == "stepstate.sessions.link"]


@pytest.fixture
def network(networks: dict[str, Network]) -> Network:
    return networks["lstm"]


@pytest.fixture
def first(tmp_path: Path) -> Iterator[RedisProcess]:
    with redis_process(tmp_path / "first", *KEEPS) as server:
        yield server


@pytest.fixture
def second(tmp_path: Path, first: RedisProcess) -> Iterator[RedisProcess]:
    """Its replica."""
    of = ("--replicaof", f"127.0.0.1 {first.port}")
    with redis_process(tmp_path / "second", *KEEPS, *of) as server:
        yield server


async def in_step(replica: RedisProcess) -> None:
    """Waits until a replica has all of its primary."""

    async def so() -> bool:
        with replica.client() as client:
            return client.info("replication")["master_link_status"] == "up"

    await until(so)


def hand_over(old: RedisProcess, new: RedisProcess) -> None:
    """The old primary takes no more writes, and the new one gets all of it."""
    old.command("CLIENT", "PAUSE", int(HANG * 1000), "WRITE")
    while offset(old) != offset(new):
        pass


def offset(redis: RedisProcess) -> int:
    with redis.client() as client:
        return client.info("replication")["master_repl_offset"]


def fail_over(old: RedisProcess, new: RedisProcess) -> None:
    """The new one leads and the old one follows it."""
    hand_over(old, new)
    new.command("REPLICAOF", "NO", "ONE")
    old.command("REPLICAOF", "127.0.0.1", new.port)
    old.command("CLIENT", "UNPAUSE")


async def test_after_a_failover_behind_a_proxy_steps_go_on_over_a_new_connection(
    config: ServerConfig,
    network: Network,
    first: RedisProcess,
    second: RedisProcess,
    caplog: pytest.LogCaptureFixture,
):
    """The proxy sends new connections to the new primary, and leaves the old ones as they are."""
    await in_step(second)
    async with (
        proxy(first.port) as between,
        load(config, f"redis://127.0.0.1:{between.port}/0") as clients,
    ):
        fail_over(first, second)
        await asyncio.sleep(OUTAGE_SECONDS)  # the proxy has not noticed
        between.redis_port = second.port
        await clients.progress(20)
        await clients.healthy_again()
        clients.check(network)
        assert clients.refusals == {("STORE_UNAVAILABLE", "readonly")}
        assert clients.healthy.count(False) > 0
    assert outages(caplog) == ["the store is away", "the store is back"]


async def test_a_failover_that_the_proxy_follows_at_once_is_not_noticed(
    config: ServerConfig,
    network: Network,
    first: RedisProcess,
    second: RedisProcess,
    caplog: pytest.LogCaptureFixture,
):
    await in_step(second)
    async with (
        proxy(first.port) as between,
        load(config, f"redis://127.0.0.1:{between.port}/0") as clients,
    ):
        between.redis_port = second.port
        fail_over(first, second)
        await clients.progress(20)
        clients.check(network)
        assert clients.refusals == set()
    assert outages(caplog) == []


@pytest.fixture
async def sentinel(
    tmp_path: Path, first: RedisProcess, second: RedisProcess
) -> AsyncIterator[RedisProcess]:
    """It watches both."""
    await in_step(second)
    with redis_sentinel(tmp_path / "sentinel", first) as started:

        async def knows_both() -> bool:
            with started.client() as client:
                return client.sentinel_masters()["sessions"]["num-slaves"] == 1

        await until(knows_both)
        yield started


async def test_the_primary_that_sentinel_names_is_followed(
    config: ServerConfig,
    network: Network,
    first: RedisProcess,
    second: RedisProcess,
    sentinel: RedisProcess,
):
    """The Sentinel that the URL names first is away."""
    url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/sessions/0"
    async with load(config, url) as clients:
        hand_over(first, second)
        first.kill()
        await clients.progress(20)
        await clients.healthy_again()
        clients.check(network)
        assert clients.healthy.count(False) > 0
    with second.client() as client:
        assert client.info("replication")["role"] == "master"


Fault = Callable[[RedisProcess, Proxy], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def setting(redis: RedisProcess, name: str, bad: object, good: object) -> AsyncIterator[None]:
    redis.command("CONFIG", "SET", name, bad)
    yield
    redis.command("CONFIG", "SET", name, good)


def oom(redis: RedisProcess, _: Proxy) -> AbstractAsyncContextManager[None]:
    return setting(redis, "maxmemory", 1, 0)


def noreplicas(redis: RedisProcess, _: Proxy) -> AbstractAsyncContextManager[None]:
    return setting(redis, "min-replicas-to-write", 1, 0)


@asynccontextmanager
async def misconf(redis: RedisProcess, _: Proxy) -> AsyncIterator[None]:
    """It can't save a dump, as a folder is in the way."""
    in_the_way = redis.folder / "dump.rdb"
    in_the_way.mkdir()
    redis.command("CONFIG", "SET", "save", "3600 1")
    redis.command("BGSAVE")
    with redis.client() as client:
        while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
            await asyncio.sleep(0.01)
    yield
    in_the_way.rmdir()
    redis.command("BGSAVE")


@asynccontextmanager
async def readonly(redis: RedisProcess, _: Proxy) -> AsyncIterator[None]:
    redis.command("REPLICAOF", "127.0.0.1", free_port())
    yield
    redis.command("REPLICAOF", "NO", "ONE")


@asynccontextmanager
async def masterdown(redis: RedisProcess, between: Proxy) -> AsyncIterator[None]:
    async with setting(redis, "replica-serve-stale-data", "no", "yes"), readonly(redis, between):
        yield


@asynccontextmanager
async def loading(redis: RedisProcess, _: Proxy) -> AsyncIterator[None]:
    """It starts, and takes a fifth of a second for each of 100 keys."""
    with redis.client() as client:
        for i in range(100):
            client.set(f"ballast-{i}", secrets.token_hex(2000))
        client.bgrewriteaof()  # while it reads a dump it answers
        while client.info("persistence")["aof_rewrite_in_progress"]:
            await asyncio.sleep(0.01)
    redis.kill()
    slowly = ("--key-load-delay", "200000", "--loading-process-events-interval-bytes", "1024")
    redis.launch(*slowly)
    yield
    redis.kill()
    redis.start()


@pytest.mark.parametrize("fault", [oom, noreplicas, misconf, readonly, masterdown, loading])
async def test_a_redis_that_refuses_is_away_once_and_back_once(
    config: ServerConfig,
    network: Network,
    first: RedisProcess,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
):
    """Sync steps are refused with the cause and change nothing; they go on when it has passed."""
    cause = fault.__name__
    async with (
        proxy(first.port) as between,
        load(config, f"redis://127.0.0.1:{between.port}/0") as clients,
    ):
        async with fault(first, between):
            await asyncio.sleep(OUTAGE_SECONDS)
            assert ("STORE_UNAVAILABLE", cause) in clients.refusals
            text = await scrape(clients.server.metrics_address)
            assert sample(text, f'stepstate_store_failures_total{{cause="{cause}"}}') > 0
            assert sample(text, "stepstate_store_up") == 0
        await clients.progress(20)
        await clients.healthy_again()
        clients.check(network)
    assert outages(caplog) == ["the store is away", "the store is back"]
