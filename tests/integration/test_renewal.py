"""A certificate and the credentials of clients are renewed while 64 streams step: no errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stepstate import tls as server_tls
from stepstate.client import AsyncClient, Tls
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from tests.certificates import Authority, install
from tests.credentials import AUDIENCE, ISSUER, Provider, revoke, token
from tests.integration.wire import HANG, TOLERANCE, draw, largest_difference
from tests.networks import Network

pytestmark = [pytest.mark.transports, pytest.mark.long]

STREAMS = 64
ROWS = 400
PAUSE = 0.005
"""Between two rows of a stream: it lasts 2 s at least, and all is replaced meanwhile."""


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_tls, "POLL_SECONDS", 0.05)


async def rows(x: np.ndarray) -> AsyncIterator[np.ndarray]:
    for row in x:
        yield row
        await asyncio.sleep(PAUSE)


class Load:
    """64 streams, and new connections as fast as they come, with a token of a file each."""

    def __init__(self, target: str, tls: Tls, token_file: Path) -> None:
        self.connections = 0
        self._target = target
        self._options = {"tls": tls, "token": token_file, "connect_timeout": HANG}
        self._done = asyncio.Event()

    def client(self) -> AsyncClient:
        return AsyncClient(
            self._target, **self._options, options=[("grpc.use_local_subchannel_pool", 1)]
        )

    async def run(self, x: np.ndarray) -> list[np.ndarray]:
        """The outputs of each stream."""
        connecting = asyncio.create_task(self._connect())
        async with self.client() as client:
            sessions = [await client.open("lstm") for _ in range(STREAMS)]

            async def stepped(session) -> np.ndarray:
                return np.array([y async for y in session.stream(rows(x))])

            try:
                return await asyncio.gather(*map(stepped, sessions))
            finally:
                self._done.set()
                await connecting

    async def _connect(self) -> None:
        while not self._done.is_set():
            async with self.client() as client:
                assert len(await client.models()) == 6
            self.connections += 1


async def replace_certificate(server: Server, authority: Authority) -> None:
    before = server.tls.current
    files = before.files
    made = authority.issue("renewed", "DNS:localhost,IP:127.0.0.1")
    install(made, files.certificate, files.key)
    while server.tls.current is before:
        await asyncio.sleep(0.02)


class TokenRotation:
    """A bearer token, whose successor is there when it is revoked."""

    def __init__(self, folder: Path) -> None:
        self.tokens = folder / "tokens.json"
        self.settings = {"tokens_file": str(self.tokens)}
        self.first = token(self.tokens)
        self.second = token(self.tokens)

    def withdraw(self) -> None:
        revoke(self.tokens, self.first)


class KeyRotation:
    """A JWT, and one of the next key, which is there when the first key is withdrawn."""

    def __init__(self, folder: Path) -> None:
        self.jwks, self.provider = folder / "jwks.json", Provider("first", "second")
        self.jwks.write_bytes(self.provider.jwks())
        self.settings = {
            "jwt_issuer": ISSUER,
            "jwt_audience": AUDIENCE,
            "jwt_jwks": str(self.jwks),
        }
        self.first, self.second = self.provider.token("first"), self.provider.token("second")

    def withdraw(self) -> None:
        del self.provider.keys["first"]
        self.jwks.write_bytes(self.provider.jwks())


@pytest.mark.parametrize("rotation", [TokenRotation, KeyRotation])
async def test_certificate_and_credential_are_replaced_under_load(
    rotation: type[TokenRotation | KeyRotation],
    with_tls: ServerConfig,
    authority: Authority,
    networks: dict[str, Network],
    tmp_path: Path,
):
    """Streams that were begun with the old credential end with it, and go on with the new one."""
    credential, file, x = rotation(tmp_path), tmp_path / "credential", draw(ROWS)
    file.write_text(credential.first)
    async with running_server(replace(with_tls, **credential.settings)) as server:
        load = Load(server.address, Tls(authority.file), file)
        running = asyncio.create_task(load.run(x))
        await asyncio.sleep(0.5)
        await replace_certificate(server, authority)
        new = tmp_path / "new"
        new.write_text(credential.second)
        new.rename(file)
        credential.withdraw()
        await server.credentials.refresh()
        assert not running.done()
        found = await running
    expected = networks["lstm"].offline(x)
    assert all(largest_difference(ys, expected) <= TOLERANCE for ys in found)
    assert load.connections > 3
