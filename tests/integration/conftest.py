"""Fixtures: raw stubs of a server in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from stepstate.server import Server
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import raw_stub


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
