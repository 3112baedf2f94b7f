"""Opening sessions, and the models that they are opened with."""

from __future__ import annotations

import dataclasses
import re
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from stepstate.config import ServerConfig
from stepstate.models import write_model
from stepstate.server import Server, running_server
from stepstate.stores.types import LAST_TIME
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    TOLERANCE,
    draw,
    largest_difference,
    opened,
    opening,
    raw_stub,
    refused,
    request,
    where,
)
from tests.networks import Network, make_network

Code = grpc.StatusCode

Stub = StepstateServiceStub


# Opening.


async def test_an_opened_session_says_what_it_is(server: Server, stub: Stub):
    fields = {"idle_timeout": Duration(seconds=90), "start_time": Timestamp(seconds=1_700_000_000)}
    reply = await stub.OpenSession(opening(session_id="A-z_0.9:x", **fields))
    session = reply.session
    assert (session.session_id, session.model, session.version) == ("A-z_0.9:x", "lstm", "1")
    assert re.fullmatch("sha256:[0-9a-f]{64}", session.fingerprint)
    assert (session.t, session.queued_requests) == (0, 0)
    assert session.idle_timeout == fields["idle_timeout"]
    assert session.start_time == fields["start_time"]
    age = datetime.now(UTC).timestamp() - session.open_time.ToNanoseconds() / 1e9
    assert -1 < age < 60
    left = session.expire_time.ToNanoseconds() - session.open_time.ToNanoseconds()
    assert left / 1e9 == pytest.approx(90, abs=5)
    found = await where(stub, "A-z_0.9:x")
    found.expire_time.CopyFrom(session.expire_time)
    assert found == session


async def test_the_server_makes_an_id_where_the_client_gives_none(stub: Stub):
    replies = [await stub.OpenSession(opening()) for _ in range(20)]
    ids = {reply.session.session_id for reply in replies}
    assert len(ids) == 20
    assert all(re.fullmatch(r"s-[0-9a-f]{32}", session_id) for session_id in ids)
    for session_id in ids:
        assert (await stub.Step(request(session_id, 0, draw(1)))).t == 1


async def test_the_longest_id_is_accepted(stub: Stub):
    assert await opened(stub, "x" * 128) == "x" * 128


async def test_an_idle_timeout_has_bounds_and_a_default(config: ServerConfig):
    bounds = dataclasses.replace(config, idle_timeout=30.0, max_idle_timeout=60.0)
    async with running_server(bounds) as server, raw_stub(server.address) as stub:
        assert (await stub.OpenSession(opening())).session.idle_timeout.seconds == 30
        for accepted in (Duration(seconds=60), Duration(nanos=500_000_000)):
            reply = await stub.OpenSession(opening(idle_timeout=accepted))
            assert reply.session.idle_timeout == accepted
        for bad in (
            Duration(),
            Duration(seconds=-5),
            Duration(nanos=-1),
            Duration(seconds=60, nanos=1_000_000),
            Duration(seconds=10**9),
        ):
            refusal = await refused(stub.OpenSession(opening(idle_timeout=bad)))
            assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "idle_timeout")


@pytest.mark.parametrize("bad", [Duration(seconds=2**62), Duration(seconds=-(2**62))])
async def test_an_idle_timeout_that_is_no_duration_is_an_invalid_field(stub: Stub, bad: Duration):
    refusal = await refused(stub.OpenSession(opening(idle_timeout=bad)))
    assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "idle_timeout")


@pytest.mark.parametrize(
    "bad", [Timestamp(seconds=2**62), Timestamp(seconds=-(2**62)), Timestamp(nanos=-1)]
)
async def test_a_start_time_that_is_no_time_is_an_invalid_field(stub: Stub, bad: Timestamp):
    refusal = await refused(stub.OpenSession(opening(start_time=bad)))
    assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "start_time")


@pytest.mark.parametrize("year", [1, 1969, 9999])
async def test_a_start_time_may_be_any_time(stub: Stub, year: int):
    moment = Timestamp()
    moment.FromDatetime(datetime(year, 1, 2, tzinfo=UTC))
    reply = await stub.OpenSession(opening(start_time=moment))
    assert reply.session.start_time == moment


# Models.


def of_day(name: str, version: str, seed: int) -> Network:
    """A network that also sees the hour of the day, as sin and cos."""
    network = make_network(name, inputs=5, seed=seed)
    network.manifest.update(
        version=version,
        inputs=[{"name": f"x{place}", "unit": "MW"} for place in range(3)],
        outputs=[{"name": "load", "unit": "MW", "horizons": [1, 24]}],
        calendar=[{"kind": "fourier", "period_seconds": 86_400, "harmonics": 1}],
        step_interval_seconds=3600,
        description="of the day",
    )
    return network


@pytest.fixture
def day_config(config: ServerConfig, tmp_path: Path) -> ServerConfig:
    """A server of one model in two versions; 10 is newer than 9."""
    for version in ("9", "10"):
        network = of_day("day", version, int(version))
        write_model(tmp_path / "day" / version, network.manifest, network.tensors())
    return dataclasses.replace(config, models=tmp_path)


async def test_a_model_with_a_calendar_needs_a_start_time_and_uses_it(day_config: ServerConfig):
    x, hours = draw(40), np.arange(40) + 6
    angle = 2 * np.pi * hours / 24
    seen = np.column_stack((x, np.sin(angle), np.cos(angle))).astype(np.float32)
    want = of_day("day", "10", 10).offline(seen)
    async with running_server(day_config) as server, raw_stub(server.address) as stub:
        refusal = await refused(stub.OpenSession(pb.OpenSessionRequest()))
        assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "start_time")
        start = Timestamp(seconds=6 * 3600 + 10 * 86_400)
        reply = await stub.OpenSession(pb.OpenSessionRequest(session_id="a", start_time=start))
        assert reply.session.start_time == start
        got = [*(await stub.Step(request("a", 0, x[:30]))).y]
        for t in range(30, 40):
            got += (await stub.Step(request("a", t, x[t]))).y
    assert largest_difference(got, want.ravel()) <= TOLERANCE


async def test_an_empty_version_is_the_newest_and_pinned_at_open(day_config: ServerConfig):
    start = Timestamp(seconds=0)
    async with running_server(day_config) as server, raw_stub(server.address) as stub:
        for asked, given in (("", "10"), ("9", "9"), ("10", "10")):
            named = f"v{asked}"
            reply = await stub.OpenSession(
                pb.OpenSessionRequest(session_id=named, version=asked, start_time=start)
            )
            model = (await stub.GetModel(pb.GetModelRequest(model="day", version=given))).model
            assert (reply.session.version, model.version) == (given, given)
            assert reply.session.fingerprint == model.fingerprint
        y = {name: list((await stub.Step(request(name, 0, draw(5)))).y) for name in ("v", "v9")}
        assert y["v"] != y["v9"]
        assert y["v"] == list((await stub.Step(request("v10", 0, draw(5)))).y)
        listed = (await stub.ListModels(pb.ListModelsRequest())).models
        assert [(model.name, model.version) for model in listed] == [("day", "9"), ("day", "10")]


async def test_the_only_model_is_the_default(day_config: ServerConfig):
    async with running_server(day_config) as server, raw_stub(server.address) as stub:
        reply = await stub.OpenSession(pb.OpenSessionRequest(start_time=Timestamp()))
        assert (reply.session.model, reply.session.version) == ("day", "10")
        assert (await stub.GetModel(pb.GetModelRequest())).model.version == "10"
        refusal = await refused(stub.GetModel(pb.GetModelRequest(version="11")))
        assert refusal.reason == "MODEL_UNKNOWN"


async def test_a_model_is_described_as_its_manifest_says(day_config: ServerConfig):
    async with running_server(day_config) as server, raw_stub(server.address) as stub:
        model = (await stub.GetModel(pb.GetModelRequest(model="day"))).model
    assert model.description == "of the day"
    assert model.cell == pb.Cell(kind="lstm", hidden_size=16, num_layers=2)
    assert [(column.name, column.unit) for column in model.inputs] == [
        ("x0", "MW"),
        ("x1", "MW"),
        ("x2", "MW"),
    ]
    (output,) = model.outputs
    assert (output.name, output.unit, list(output.horizons)) == ("load", "MW", [1, 24])
    assert (model.step_interval.seconds, model.needs_start_time) == (3600, True)


async def test_every_model_is_listed_once_by_name(stub: Stub, networks: dict[str, Network]):
    listed = (await stub.ListModels(pb.ListModelsRequest())).models
    assert [model.name for model in listed] == sorted(networks)
    for model in listed:
        spec = networks[model.name].manifest["cell"]
        assert (model.cell.kind, model.cell.proj_size) == (spec["kind"], spec["proj_size"])
        assert not model.needs_start_time
        assert not model.HasField("step_interval")


async def test_a_start_time_at_the_end_of_time_is_told_back(server):
    asked = Timestamp()
    asked.FromDatetime(LAST_TIME)
    async with raw_stub(server.address) as stub:
        opened = await stub.OpenSession(pb.OpenSessionRequest(model="lstm", start_time=asked))
        assert opened.session.start_time == asked
        assert len((await stub.ListSessions(pb.ListSessionsRequest())).sessions) == 1
