"""Listing sessions page by page."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from stepstate.client._connection import MetadataChannel
from stepstate.config import ServerConfig
from stepstate.server import running_server
from stepstate.sessions import ID_LENGTH
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    opened,
    refused,
)
from tests.redis_process import redis_process
from tests.tenants import SaidTenants, as_tenant

Code = grpc.StatusCode

Stub = StepstateServiceStub


async def pages(stub: Stub, **fields: object) -> list[list[str]]:
    listing = pb.ListSessionsRequest(**fields)
    found = []
    while True:
        reply = await stub.ListSessions(listing)
        found.append([session.session_id for session in reply.sessions])
        if not reply.next_page_token:
            return found
        listing.page_token = reply.next_page_token


async def test_pages_hold_every_session_exactly_once(stub: Stub):
    names = [f"s-{place}" for place in range(230)]
    models = {name: ("lstm", "gru")[place % 2] for place, name in enumerate(names)}
    await asyncio.gather(*(opened(stub, name, models[name]) for name in names))
    for size, lengths in (
        (0, [100, 100, 30]),
        (1, [1] * 230),
        (115, [115, 115]),
        (230, [230]),
        (1000, [230]),
    ):
        found = await pages(stub, page_size=size)
        assert [len(page) for page in found] == lengths
        assert sorted(itertools.chain(*found)) == sorted(names)
    of_gru = await pages(stub, page_size=50, model="gru")
    assert sorted(itertools.chain(*of_gru)) == sorted(
        name for name in names if models[name] == "gru"
    )
    assert await pages(stub, model="nope") == [[]]


async def test_no_sessions_are_one_empty_page(stub: Stub):
    assert await pages(stub) == [[]]


async def test_sessions_that_stay_open_are_listed_once_while_others_come_and_go(stub: Stub):
    names = [f"s-{place}" for place in range(60)]
    for name in names:
        await opened(stub, name)
    stay = set(names[::2])
    listing, seen = pb.ListSessionsRequest(page_size=7), []
    leaving = iter(names[1::2])
    while True:
        reply = await stub.ListSessions(listing)
        seen += [session.session_id for session in reply.sessions]
        if not reply.next_page_token:
            break
        listing.page_token = reply.next_page_token
        for name in (next(leaving), next(leaving)):
            await stub.CloseSession(pb.CloseSessionRequest(session_id=name))
            await opened(stub, f"new-{name}")
    assert sorted(name for name in seen if name in stay) == sorted(stay)


@pytest.mark.parametrize("token", ["a b", "a/b", "é", "\n", "x" * 200])
async def test_a_token_of_no_page_is_an_invalid_field(stub: Stub, token: str):
    refusal = await refused(stub.ListSessions(pb.ListSessionsRequest(page_token=token)))
    assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "page_token")


@pytest.fixture
def store(kind: str, tmp_path: Path) -> Iterator[str]:
    if kind == "redis":
        with redis_process(tmp_path) as redis:
            yield redis.url
    else:
        yield {"memory": "memory:", "sqlite": f"sqlite:{tmp_path / 'long.db'}"}[kind]


@pytest.mark.parametrize("kind", ["memory", "sqlite", "redis"])
@pytest.mark.parametrize("tenant", ["default", "t" * 63])
async def test_the_longest_names_are_listed_page_by_page(
    config: ServerConfig, store: str, tenant: str
):
    names = [f"{place}".ljust(ID_LENGTH, "x") for place in range(3)]
    server_of = running_server(replace(config, store=store), authenticator=SaidTenants())
    async with server_of as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = StepstateServiceStub(MetadataChannel(channel, as_tenant(tenant), None))
        for name in names:
            await opened(stub, name)
        found = await pages(stub, page_size=1)
    assert sorted(found) == [[name] for name in names]


async def test_a_token_past_the_end_is_an_empty_last_page(stub: Stub):
    await opened(stub, "a")
    past = f"{b'default'.hex()}:{b'z'.hex()}"
    reply = await stub.ListSessions(pb.ListSessionsRequest(page_token=past))
    assert (list(reply.sessions), reply.next_page_token) == ([], "")
