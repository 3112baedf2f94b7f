"""Calls with bearer tokens: who gets in, what those who don't are told, and how streams end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.errors import PermissionDenied, Unauthenticated
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.credentials import bearer, revoke, token

pytestmark = pytest.mark.transports

SOON = timedelta(seconds=1.5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.json"
    token(path, "first")
    return path


@pytest.fixture
async def server(config: ServerConfig, file: Path) -> AsyncIterator[Server]:
    async with running_server(replace(config, tokens_file=str(file))) as running:
        yield running


async def step(server: Server, *metadata: tuple[str, str]) -> None:
    async with AsyncClient(server.address, metadata=metadata) as client:
        session = await client.open("lstm")
        await session.step((0.5, 0.5, 0.5))


async def cause_of(server: Server, *metadata: tuple[str, str]) -> str:
    with pytest.raises(Unauthenticated) as refused:
        await step(server, *metadata)
    return refused.value.cause


async def reread(server: Server) -> None:
    assert server.credentials is not None
    await server.credentials.refresh()


async def test_a_token_lets_in_what_its_scopes_allow(server: Server, file: Path):
    good, reader = token(file), token(file, "reader", scopes="read")
    await reread(server)
    await step(server, *bearer(good))
    async with AsyncClient(server.address, metadata=bearer(reader)) as client:
        assert await client.models()
        with pytest.raises(PermissionDenied, match=r"reader#\w+ lacks the scope step"):
            await client.open("lstm")


async def test_everyone_else_is_told_why(server: Server, file: Path):
    gone, old = token(file, "gone"), token(file, "old", expires=datetime.now(UTC))
    revoke(file, gone)
    other = token(file.with_name("other.json"))
    await reread(server)
    assert await cause_of(server) == "missing"
    assert await cause_of(server, *bearer(gone)) == "revoked"
    assert await cause_of(server, *bearer(old)) == "expired"
    assert await cause_of(server, *bearer(other)) == "unknown_token"
    assert await cause_of(server, *bearer(other[:-1] + "!")) == "malformed"
    assert await cause_of(server, *bearer(other), *bearer(other)) == "malformed"
    assert await cause_of(server, ("authorization", f"Basic {other}")) == "malformed"


async def test_what_is_public_needs_no_token(server: Server):
    async with grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1


@pytest.mark.parametrize("way", ["revoked", "expired"])
async def test_open_streams_end_with_their_token(server: Server, file: Path, way: str):
    text = token(file, expires=datetime.now(UTC) + SOON if way == "expired" else None)
    await reread(server)
    await step(server, *bearer(text))
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = StepstateServiceStub(channel)
        await stub.OpenSession(
            pb.OpenSessionRequest(session_id="a", model="lstm"), metadata=bearer(text)
        )
        calls = [
            stub.StreamSteps(metadata=bearer(text)),
            stub.StreamPacked(metadata=bearer(text)),
            stub.StreamImport(metadata=bearer(text)),
        ]
        await calls[0].write(pb.StepRequest(session_id="a", x=(0.5, 0.5, 0.5)))
        assert (await calls[0].read()).t == 1
        if way == "revoked":
            revoke(file, text)
        async with asyncio.timeout(20):
            for call in calls:
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
                assert way in await call.details()
