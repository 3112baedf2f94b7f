"""Fixtures: raw stubs of a server in this process, clients of both kinds, servers to be killed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from stepstate.server import Server
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.chaos.restartable import RestartableServer, restartable_server
from tests.integration.clients import KINDS, Connect
from tests.integration.wire import raw_stub

Mortal = Callable[..., Awaitable[RestartableServer]]


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[StepstateServiceStub]:
    """A stub of `server`."""
    async with raw_stub(server.address) as connected:
        yield connected


@pytest.fixture
async def other_stub(server: Server) -> AsyncIterator[StepstateServiceStub]:
    """A stub on another connection to the same server."""
    async with raw_stub(server.address) as connected:
        yield connected


@pytest.fixture
async def mortal(model_root: Path, tmp_path: Path) -> AsyncIterator[Mortal]:
    """Starts a server with a file as its store, that can be killed and started again."""
    async with AsyncExitStack() as stack:

        async def start(interval: str, *options: str) -> RestartableServer:
            store = ("--store", f"sqlite:{tmp_path / 'mortal.db'}", "--snapshot-interval")
            told = ("--models", str(model_root), *store, interval, *options)
            return await stack.enter_async_context(restartable_server(tmp_path, *told))

        yield start


async def reborn(server: RestartableServer) -> None:
    """kill -9, and a start in the same place."""
    server.kill()
    await server.start()


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Connect:
    return KINDS[request.param]
