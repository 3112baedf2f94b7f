"""Sync sessions through a failover of Redis, and whatever else makes it refuse writes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from stepstate.config import ServerConfig
from tests.contract.proxy import Proxy, proxy
from tests.integration.outage import OUTAGE_SECONDS, load, outages
from tests.integration.wire import (
    HANG,
    sample,
    scrape,
    until,
)
from tests.networks import Network
from tests.redis_process import RedisProcess, free_port, redis_process, redis_sentinel

KEEPS = ("--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync-delay", "0")


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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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
            await clients.stays_away()
            assert ("STORE_UNAVAILABLE", cause) in clients.refusals
            text = await scrape(clients.server.metrics_address)
            assert sample(text, f'stepstate_store_failures_total{{cause="{cause}"}}') > 0
        await clients.progress(20)
        await clients.healthy_again()
        clients.check(network)
    assert outages(caplog) == ["the store is away", "the store is back"]
