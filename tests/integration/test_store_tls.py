"""Redis with TLS: one server, a cluster, a primary that Sentinels name; and what is told if not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.errors import StoreOpenError
from stepstate.server import running_server
from stepstate.stores import open_store
from tests.certificates import Authority, Certificate
from tests.redis_process import (
    RedisProcess,
    redis_cluster,
    redis_process,
    redis_sentinel,
    tls_options,
)

SECRET = "s3cret-of-this-test"


@pytest.fixture
def options(authority: Authority, certificate: Certificate) -> tuple[str, ...]:
    return tls_options(authority, certificate)


@pytest.fixture
def redis(options: tuple[str, ...], tmp_path: Path) -> Iterator[RedisProcess]:
    with redis_process(tmp_path / "redis", "--appendonly", "yes", *options) as server:
        server.command("CONFIG", "SET", "requirepass", SECRET)
        yield server


async def used(url: str, authority: Authority, password: str = SECRET) -> None:
    """It takes writes."""
    store = await open_store(url, clock=lambda: 0.0, password=password, ca_file=str(authority.file))
    await store.probe()
    await store.close()


async def refused(url: str, ca_file: Path) -> str:
    """What is told about a store that can't be opened."""
    with pytest.raises(StoreOpenError) as told:
        await open_store(url, clock=lambda: 0.0, password=SECRET, ca_file=str(ca_file))
    assert SECRET not in str(told.value) + repr(told.value)
    return str(told.value)


async def test_a_server_keeps_its_sessions_there(
    redis: RedisProcess, config: ServerConfig, authority: Authority, tmp_path: Path
):
    (tmp_path / "password").write_text(SECRET)
    there = replace(
        config,
        store=f"rediss://localhost:{redis.tls_port}/0",
        store_password_file=str(tmp_path / "password"),
        store_ca_file=str(authority.file),
    )
    async with running_server(there) as server, AsyncClient(server.address) as client:
        session = await client.open("lstm", durability="sync")
        await session.step([0.1, 0.2, 0.3])
        assert session.durable_t == 1


async def test_sentinels_have_tls_too(
    redis: RedisProcess, options: tuple[str, ...], authority: Authority, tmp_path: Path
):
    with redis_sentinel(tmp_path / "sentinel", redis, *options) as sentinel:
        sentinel.command("SENTINEL", "SET", "sessions", "auth-pass", SECRET)
        await used(f"rediss+sentinel://127.0.0.1:{sentinel.tls_port}/sessions/2", authority)


@pytest.mark.long
async def test_all_nodes_of_a_cluster_have_tls(
    options: tuple[str, ...], authority: Authority, tmp_path: Path
):
    with redis_cluster(tmp_path, tls=options) as nodes:
        hosts = ",".join(f"127.0.0.1:{node.tls_port}" for node in nodes)
        await used(f"rediss+cluster://{hosts}", authority, password="")


async def test_an_authority_that_is_missing_or_another_is_told(redis: RedisProcess, tmp_path: Path):
    (tmp_path / "other").mkdir()
    stranger, missing = Authority(tmp_path / "other").file, tmp_path / "missing"
    url = f"rediss://127.0.0.1:{redis.tls_port}/0"
    assert f"--store-ca-file {missing}: No such file" in await refused(url, missing)
    assert "its certificate can't be verified" in await refused(url, stranger)
