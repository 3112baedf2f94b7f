"""Whatever a server answers, a client with gRPC's default options can read it.

The stubs here are on plain channels: 4 MiB is the most that they receive.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc import StatusCode as Code

from stepstate.budget import MemoryUse
from stepstate.client import AsyncClient, Client
from stepstate.config import ServerConfig
from stepstate.models import write_model
from stepstate.server import SERVICE, Server, running_server
from stepstate.transport.admission import CALL_BYTES
from stepstate.transport.servicer import MAX_SNAPSHOT_BYTES
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import draw, open_calls, opened, refused, request, sample, scrape, until
from tests.networks import Network, far_back, make_network

pytestmark = pytest.mark.transports(long=True)

DEFAULT_LIMIT = 4 * 2**20
HORIZONS = tuple(range(1, 97))
WIDE = 250
"""Outputs of the wide model: 250 columns."""


def many_horizons() -> Network:
    """A model that tracks 96 horizons: a session's standing takes some 5 KB."""
    network = make_network("tracked", inputs=3, outputs=96)
    network.manifest["inputs"][0]["name"] = "y"
    network.manifest["outputs"] = [
        {"name": "y", "mean": 0.0, "scale": 1.0, "horizons": list(HORIZONS)}
    ]
    network.manifest["tracking"] = {"horizons": list(HORIZONS)}
    return network


def many_inputs(version: int) -> Network:
    network = make_network("many", inputs=4000, hidden=1, layers=1)
    network.manifest["version"] = str(version)
    for number, column in enumerate(network.manifest["inputs"]):
        column["name"] = f"input-{number:04}-" + "x" * 45
    return network


def wide() -> Network:
    return make_network("wide", hidden=32, outputs=WIDE)


@pytest.fixture
async def large(config: ServerConfig, tmp_path: Path) -> AsyncIterator[Server]:
    for network in (many_horizons(), wide()):
        network.write(tmp_path / "large")
    settings = dataclasses.replace(config, models=tmp_path / "large", slots=2_000)
    async with running_server(settings) as server:
        yield server


@pytest.fixture
async def plain(large: Server) -> AsyncIterator[StepstateServiceStub]:
    """A stub as any client in any language has it: no options."""
    async with grpc.aio.insecure_channel(large.address) as channel:
        yield StepstateServiceStub(channel)


@pytest.mark.long
async def test_a_page_of_sessions_ends_early_where_it_would_be_too_large(
    plain: StepstateServiceStub, large: Server
):
    await opened(plain, "s", model="tracked")
    await plain.Step(request("s", 0, draw(150)))  # every horizon has been scored
    snapshot = (await plain.ExportSession(pb.ExportSessionRequest(session_id="s"))).snapshot
    copies = [f"s-{number}" for number in range(999)]
    for name in copies:
        await plain.ImportSession(pb.ImportSessionRequest(snapshot=snapshot, session_id=name))
    names = {"s", *copies}
    listed, token, pages = [], "", 0
    while token or not pages:
        asked = pb.ListSessionsRequest(page_size=1000, page_token=token)
        reply = await plain.ListSessions(asked)
        assert reply.ByteSize() <= 4_000_000
        listed += [session.session_id for session in reply.sessions]
        token, pages = reply.next_page_token, pages + 1
    assert pages > 1
    assert len(listed) == len(names)
    assert set(listed) == names
    async with AsyncClient(large.address) as client:
        assert {info.session_id async for info in client.sessions()} == names


@pytest.mark.long
async def test_models_are_listed_in_pages_that_fit(config: ServerConfig, tmp_path: Path):
    """19 models of 4,000 inputs, each described by 0.25 MB."""
    for version in range(1, 20):
        network = many_inputs(version)
        write_model(tmp_path / "many" / str(version), network.manifest, network.tensors())
    asked, found, pages = pb.ListModelsRequest(), [], 0
    async with running_server(dataclasses.replace(config, models=tmp_path)) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            plain = StepstateServiceStub(channel)
            while asked.page_token or not pages:
                reply = await plain.ListModels(asked)
                assert reply.ByteSize() <= 4_000_000
                found += [(model.name, model.version) for model in reply.models]
                asked.page_token, pages = reply.next_page_token, pages + 1
            few = await plain.ListModels(pb.ListModelsRequest(page_size=2))
            for token in ("x", "-1", "9999999", "\u0663"):
                refusal = await refused(plain.ListModels(pb.ListModelsRequest(page_token=token)))
                assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "page_token")
        assert pages > 1
        assert found == [("many", str(version)) for version in range(1, 20)]
        assert [(model.name, model.version) for model in few.models] == found[:2]
        async with AsyncClient(server.address) as client:
            assert [(model.name, model.version) for model in await client.models()] == found
        with Client(server.address) as client:
            assert len(await asyncio.to_thread(client.models)) == 19


def parts_of(snapshot: bytes, **fields: object) -> Iterable[pb.StreamImportRequest]:
    yield pb.StreamImportRequest(size=len(snapshot), **fields)
    for first in range(0, len(snapshot), 1_000_000):
        yield pb.StreamImportRequest(data=snapshot[first : first + 1_000_000])


@pytest.fixture
async def far(config: ServerConfig, tmp_path: Path) -> AsyncIterator[Server]:
    far_back().write(tmp_path / "far")
    settings = dataclasses.replace(config, models=tmp_path / "far", slots=3)
    async with running_server(settings) as server:
        yield server


async def test_a_large_snapshot_moves_in_parts_and_whole_it_is_refused(far: Server):
    x = draw(6, 50)
    async with grpc.aio.insecure_channel(far.address) as channel:
        plain = StepstateServiceStub(channel)
        await opened(plain, "a", model="far")
        await plain.Step(request("a", 0, x[:5]))
        refusal = await refused(plain.ExportSession(pb.ExportSessionRequest(session_id="a")))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "SNAPSHOT_TOO_LARGE")
        parts = [part async for part in plain.StreamExport(pb.StreamExportRequest(session_id="a"))]
        snapshot = b"".join(part.data for part in parts)
        assert len(snapshot) == parts[0].size > 16 * 2**20
        assert parts[0].session.t == 5
        assert max(part.ByteSize() for part in parts) < DEFAULT_LIMIT
        moved = await plain.StreamImport(parts_of(snapshot, session_id="b"))
        assert (moved.session.session_id, moved.session.t) == ("b", 5)
        again = await plain.Step(request("b", 0, x[:5]))
        assert again.replayed
        replies = [await plain.Step(request(name, 5, x[5])) for name in "ab"]
        assert replies[0].y == replies[1].y


async def test_both_clients_move_a_large_session(far: Server):
    async with AsyncClient(far.address) as client:
        session = await client.open("far", session_id="a")
        await session.step(draw(5, 50))
        snapshot = await client.export("a")
        assert len(snapshot) > 16 * 2**20
        assert (await client.restore(snapshot, session_id="b")).t == 5

    def move() -> int:
        with Client(far.address) as client:
            return client.restore(client.export("b"), session_id="c").t

    assert await asyncio.to_thread(move) == 5


async def test_parts_that_are_no_snapshot_are_refused(plain: StepstateServiceStub):
    await opened(plain, "a", model="wide")
    whole = (await plain.ExportSession(pb.ExportSessionRequest(session_id="a"))).snapshot
    part = pb.StreamImportRequest
    for parts, reason, field in (
        ([], "INVALID_FIELD", "data"),
        ([part(data=whole)], "INVALID_FIELD", "size"),
        ([part(size=2**40)], "INVALID_FIELD", "size"),
        ([part(size=len(whole) + 1, data=whole)], "INVALID_FIELD", "data"),
        ([part(size=5, data=whole)], "INVALID_FIELD", "data"),
        ([part(size=len(whole), data=whole[::-1])], "SNAPSHOT_CORRUPT", None),
        ([part(size=len(whole), data=whole)], "SESSION_EXISTS", None),
    ):
        refusal = await refused(plain.StreamImport(parts))
        assert (refusal.reason, refusal.field) == (reason, field)


async def test_every_rpc_at_its_largest_is_read_or_refused_in_words(
    plain: StepstateServiceStub, large: Server
):
    """Replies that would be too large are refused by the server, with the field that asks so."""
    await opened(plain, "a", model="wide")
    await opened(plain, "t", model="tracked")
    x = draw(100_000)
    tried = {
        "Step": (
            plain.Step(request("a", None, x[:3_999])),
            plain.Step(request("a", None, x[:100_000])),
        ),
        "Forecast": (
            plain.Forecast(pb.ForecastRequest(session_id=["t"] * 7_000, horizon=96)),
            plain.Forecast(pb.ForecastRequest(session_id=["t"] * 10_000, horizon=96)),
        ),
    }
    tried["Step with inspect"] = (
        plain.Step(request("a", None, x[:600], inspect=True)),
        plain.Step(request("a", None, x[:9_000], inspect=True)),
    )
    for name, (fits, too_large) in tried.items():
        reply = await fits
        assert 500_000 < reply.ByteSize() < DEFAULT_LIMIT, name
        assert (await refused(too_large)).code is Code.INVALID_ARGUMENT, name
    packed = pb.StreamPackedRequest(
        bindings=[pb.Binding(handle=0, session_id="a")],
        handles=np.zeros(4_096, "<u4").tobytes(),
        x=x[:4_096].tobytes(),
    )
    stream = plain.StreamPacked()
    await stream.write(packed)
    reply = await stream.read()
    assert "at most 3933 a message" in reply.errors[0].status.message
    assert reply.ByteSize() < DEFAULT_LIMIT
    known = {method.name for method in SERVICE.methods}
    assert known == {
        *("OpenSession", "GetSession", "CloseSession", "ForkSession"),  # one session
        *("ListSessions", "ListModels", "ExportSession", "StreamExport"),  # above
        *("ImportSession", "StreamImport", "GetModel"),  # one session, one model
        "ListTenants",  # at most 1,000 a page, of some 400 bytes
        *("RestoreSession", "ResetAccuracy"),  # one session
        *("Step", "StreamSteps", "StreamPacked", "Forecast"),  # here
    }


async def test_a_snapshot_that_is_announced_and_does_not_come_holds_up_no_steps(
    plain: StepstateServiceStub, large: Server, caplog, monkeypatch: pytest.MonkeyPatch
):
    """What has come is counted, not what is announced."""
    part = b"a part"
    await opened(plain, "a", model="wide")
    async with grpc.aio.insecure_channel(large.address) as channel:
        calls = [StepstateServiceStub(channel).StreamImport() for _ in range(2)]
        for call in calls:
            await call.write(pb.StreamImportRequest(size=MAX_SNAPSHOT_BYTES, data=part))
        assert (await plain.Step(request("a", 0, draw(1)))).t == 1
        snapshot = (await plain.ExportSession(pb.ExportSessionRequest(session_id="a"))).snapshot
        await until(lambda: only_calls(large, len(calls)))
        # The snapshot is there twice when it is put together; and as much must be free as is held.
        whole = 2 * (len(snapshot) + large.memory.used + CALL_BYTES)
        monkeypatch.setattr(large.memory, "little", 0)
        monkeypatch.setattr(large.memory, "shared", whole - 1)
        refusal = await refused(plain.StreamImport(parts_of(snapshot, session_id="b")))
        assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "MEMORY_LIMIT")
        monkeypatch.setattr(large.memory, "shared", whole)
        moved = await plain.StreamImport(parts_of(snapshot, session_id="b"))
        assert moved.session.t == 1
        for call in calls:
            call.cancel()
        await until(lambda: no_more_of(large, "StreamImport"))
        monkeypatch.setattr(large.memory, "shared", 2 * (len(snapshot) + CALL_BYTES))
        assert (await plain.StreamImport(parts_of(snapshot, session_id="c"))).session.t == 1
    assert "Traceback" not in caplog.text


async def only_calls(server: Server, count: int) -> bool:
    return server.memory.by_use[MemoryUse.CALLS] == count * CALL_BYTES


async def no_more_of(server: Server, method: str) -> bool:
    return await open_calls(server.metrics_address, method) == 0


async def cancelled_exports(server: Server) -> float:
    text = await scrape(server.metrics_address)
    name = 'grpc_server_handled_total{grpc_code="Canceled",grpc_method="StreamExport"'
    return sample(text, name)


async def test_a_client_that_goes_while_a_snapshot_is_sent_is_no_error_of_the_server(
    far: Server, caplog
):
    # Otherwise the client's windows grow, until it takes a whole snapshot that nobody reads.
    small_windows = [("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(far.address, options=small_windows) as channel:
        plain = StepstateServiceStub(channel)
        await opened(plain, "a", model="far")
        await plain.Step(request("a", 0, draw(5, 50)))
        for number in range(1, 6):
            call = plain.StreamExport(pb.StreamExportRequest(session_id="a"))
            await call.read()
            await asyncio.sleep(0.05)  # the server waits for the client to read on
            call.cancel()
            while await cancelled_exports(far) < number:
                await asyncio.sleep(0.01)
        assert (await plain.Step(request("a", 5, draw(1, 50)))).t == 6
    assert "Traceback" not in caplog.text
