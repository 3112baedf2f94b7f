"""Tokens and keys are replaced while clients step: nobody notices."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from stepstate.auth.signing_keys import URL_INTERVAL_SECONDS
from stepstate.client import AsyncClient, AsyncSession
from stepstate.config import ServerConfig
from stepstate.server import running_server
from stepstate.v1 import stepstate_pb2 as pb
from tests.certificates import Authority, Certificate
from tests.credentials import AUDIENCE, ISSUER, JwksServer, Provider, bearer, revoke, token
from tests.integration.wire import raw_stub

pytestmark = [pytest.mark.transports(long=True), pytest.mark.long]

STREAMS = 64
RANDOM_KIDS = 10_000
ROW = (0.5, 0.5, 0.5)


class Load:
    """Clients that step one session each until they are told to end; an error ends the test."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._going = True
        self.rows = 0
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, credential: str, count: int) -> None:
        """Adds clients."""
        self._tasks += [asyncio.create_task(self._step(credential)) for _ in range(count)]

    async def _step(self, credential: str) -> None:
        async with AsyncClient(self._address, token=credential) as client:
            session = await client.open("lstm")
            async for _ in client.stream(self._items(session)):
                self.rows += 1

    async def _items(self, session: AsyncSession) -> AsyncIterator[tuple[AsyncSession, object]]:
        while self._going:
            yield session, ROW
            await asyncio.sleep(0.02)

    async def more(self) -> None:
        """Waits until every client has stepped some more rows."""
        wanted = self.rows + 5 * len(self._tasks)
        async with asyncio.timeout(60):
            while self.rows < wanted and not any(task.done() for task in self._tasks):
                await asyncio.sleep(0.05)

    async def end(self) -> None:
        """Ends them.

        Raises:
            StepstateError: that one of them has met.
        """
        self._going = False
        await asyncio.gather(*self._tasks)


async def test_tokens_are_replaced(config: ServerConfig, tmp_path: Path):
    file = tmp_path / "tokens.json"
    old, unused = token(file, "meters"), token(file, "unused")
    async with running_server(replace(config, tokens_file=str(file))) as server:
        assert server.credentials is not None
        load = Load(server.address)
        load.add(old, STREAMS // 2)
        await load.more()
        new = token(file, "meters")
        revoke(file, unused)
        async with asyncio.timeout(20):
            while server.credentials.known([f"Bearer {new}"], {}) is None:
                await asyncio.sleep(0.1)
        load.add(new, STREAMS // 2)
        await load.more()
        await load.end()


async def test_keys_are_replaced_at_their_provider(
    config: ServerConfig,
    certificate: Certificate,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    provider = Provider("first")
    with JwksServer(provider, certificate) as keys:
        settings = {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_jwks": keys.url}
        async with running_server(replace(config, **settings)) as server:
            load = Load(server.address)
            load.add(provider.token("first"), STREAMS // 2)
            await load.more()
            provider.add("second")
            # A client that comes before the keys are read again is told to try later.
            load.add(provider.token("second"), STREAMS // 2)
            await load.more()
            await load.end()
            assert keys.asked == 2


async def test_random_kids_cost_their_senders_alone(
    config: ServerConfig,
    certificate: Certificate,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    provider, numbers = Provider("first"), itertools.count()
    start = time.monotonic()
    with JwksServer(provider, certificate) as keys:
        settings = {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_jwks": keys.url}
        async with running_server(replace(config, **settings)) as server:
            load = Load(server.address)
            load.add(provider.token(), 8)
            await load.more()
            async with raw_stub(server.address) as stub:

                async def attack() -> None:
                    for _ in range(RANDOM_KIDS // 16):
                        kid = f"random-{next(numbers)}"
                        metadata = bearer(provider.token(headers={"kid": kid}))
                        with suppress(grpc.aio.AioRpcError):
                            await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
                            raise AssertionError(kid)

                await asyncio.gather(*(attack() for _ in range(16)))
            await load.more()
            await load.end()
            fetches = 1 + (time.monotonic() - start) // URL_INTERVAL_SECONDS
            assert keys.asked <= 1 + fetches  # the first is the start's own
