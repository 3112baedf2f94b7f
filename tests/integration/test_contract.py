"""Every RPC's answers and refusals, as the contract and the table of DESIGN have them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from stepstate.config import ServerConfig
from stepstate.errors import ModelUnknown
from stepstate.models import write_model
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    TOLERANCE,
    Refusal,
    ask,
    blocker,
    draw,
    largest_difference,
    opened,
    queued,
    raw_stub,
    refusal_in,
    refusal_of_call,
    refused,
    request,
    where,
)
from tests.networks import Network, make_network

Code = grpc.StatusCode
Stub = StepstateServiceStub

# The table: situations, each in a server where session "a" of model "lstm" stands at t = 40
# by single rows, "gone" was closed at t = 1, and a server remembers 32 rows.

X = draw(40)


def opening(**fields: object) -> pb.OpenSessionRequest:
    return pb.OpenSessionRequest(**{"model": "lstm", **fields})


def stepping(t: int | None, x: np.ndarray, session_id: str = "a", **options: bool):
    return lambda stub: stub.Step(request(session_id, t, x, **options))


def with_nan() -> np.ndarray:
    x = draw(4)
    x[2, 1] = math.nan
    return x


@dataclasses.dataclass(frozen=True)
class Situation:
    call: Callable[[Stub], Awaitable[object]]
    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    field: str | None = None
    told: str = ""


SITUATIONS = {
    "id open already": Situation(
        lambda stub: stub.OpenSession(opening(session_id="a")),
        Code.ALREADY_EXISTS,
        "SESSION_EXISTS",
        {"session_id": "a", "t": "40"},
        told="already open at t=40",
    ),
    "id open already, of another model": Situation(
        lambda stub: stub.OpenSession(opening(session_id="a", model="gru")),
        Code.ALREADY_EXISTS,
        "SESSION_EXISTS",
        {"session_id": "a", "t": "40"},
    ),
    "open: bad id": Situation(
        lambda stub: stub.OpenSession(opening(session_id="a b")),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "session_id"},
        field="session_id",
        told="'a b' (3 characters)",
    ),
    "open: long id": Situation(
        lambda stub: stub.OpenSession(opening(session_id="x" * 129)),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "session_id"},
        field="session_id",
        told="129 characters",
    ),
    "open: id ends a line": Situation(
        lambda stub: stub.OpenSession(opening(session_id="a\n")),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "session_id"},
        field="session_id",
    ),
    "open: unknown model": Situation(
        lambda stub: stub.OpenSession(opening(model="nope")),
        Code.NOT_FOUND,
        "MODEL_UNKNOWN",
        {"model": "nope", "version": ""},
        told="lstm/1",
    ),
    "open: unknown version": Situation(
        lambda stub: stub.OpenSession(opening(version="2")),
        Code.NOT_FOUND,
        "MODEL_UNKNOWN",
        {"model": "lstm", "version": "2"},
        told="'lstm/2' is not loaded",
    ),
    "open: huge model": Situation(
        lambda stub: stub.OpenSession(opening(model="x" * 100_000)),
        Code.NOT_FOUND,
        "MODEL_UNKNOWN",
        {},
    ),
    "open: huge version": Situation(
        lambda stub: stub.OpenSession(opening(version="1" * 100_000)),
        Code.NOT_FOUND,
        "MODEL_UNKNOWN",
        {"model": "lstm"},
    ),
    "open: no model, of several": Situation(
        lambda stub: stub.OpenSession(opening(model="")),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "model"},
        field="model",
        told="gru, lstm, projected",
    ),
    "get: unknown": Situation(
        lambda stub: stub.GetSession(pb.GetSessionRequest(session_id="nope")),
        Code.NOT_FOUND,
        "SESSION_UNKNOWN",
        {"session_id": "nope"},
    ),
    "get: bad id": Situation(
        lambda stub: stub.GetSession(pb.GetSessionRequest(session_id="a/b")),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "session_id"},
        field="session_id",
    ),
    "get: no id": Situation(
        lambda stub: stub.GetSession(pb.GetSessionRequest()),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "session_id"},
        field="session_id",
    ),
    "get: closed": Situation(
        lambda stub: stub.GetSession(pb.GetSessionRequest(session_id="gone")),
        Code.NOT_FOUND,
        "SESSION_CLOSED",
        {"session_id": "gone", "t": "1"},
    ),
    "close: closed": Situation(
        lambda stub: stub.CloseSession(pb.CloseSessionRequest(session_id="gone")),
        Code.NOT_FOUND,
        "SESSION_CLOSED",
        {"session_id": "gone", "t": "1"},
    ),
    "close: unknown": Situation(
        lambda stub: stub.CloseSession(pb.CloseSessionRequest(session_id="nope")),
        Code.NOT_FOUND,
        "SESSION_UNKNOWN",
        {"session_id": "nope"},
    ),
    "list: large page": Situation(
        lambda stub: stub.ListSessions(pb.ListSessionsRequest(page_size=1001)),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "page_size"},
        field="page_size",
        told="1001, expected at most 1000",
    ),
    "model: unknown": Situation(
        lambda stub: stub.GetModel(pb.GetModelRequest(model="nope", version="7")),
        Code.NOT_FOUND,
        "MODEL_UNKNOWN",
        {"model": "nope", "version": "7"},
        told="nope/7",
    ),
    "model: huge name": Situation(
        lambda stub: stub.GetModel(pb.GetModelRequest(model="x" * 100_000)),
        Code.NOT_FOUND,
        "MODEL_UNKNOWN",
        {},
    ),
    "step: unknown": Situation(
        stepping(0, draw(1), "nope"), Code.NOT_FOUND, "SESSION_UNKNOWN", {"session_id": "nope"}
    ),
    "step: closed": Situation(
        stepping(1, draw(1), "gone"),
        Code.NOT_FOUND,
        "SESSION_CLOSED",
        {"session_id": "gone", "t": "1"},
        told="was closed at t=1",
    ),
    "step: bad id": Situation(
        stepping(0, draw(1), "ä"),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "session_id"},
        field="session_id",
    ),
    "step: huge id": Situation(
        stepping(0, draw(1), "x" * 1_000_000),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "session_id"},
        field="session_id",
        told="(1000000 characters)",
    ),
    "step: no rows": Situation(
        stepping(40, draw(0)),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "x"},
        field="x",
        told="holds 0 values",
    ),
    "step: half a row": Situation(
        lambda stub: stub.Step(pb.StepRequest(session_id="a", t=40, x=[1.0] * 5)),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        {"field": "x"},
        field="x",
        told="rows of 3 (x0, x1, x2)",
    ),
    "step: NaN": Situation(
        stepping(40, with_nan()),
        Code.INVALID_ARGUMENT,
        "NON_FINITE_INPUT",
        {"session_id": "a", "row": "2", "column": "x1", "value": "nan"},
        field="x",
        told="row 2, input 'x1'",
    ),
    "step: infinity": Situation(
        stepping(40, np.array([1.0, 2.0, -math.inf])),
        Code.INVALID_ARGUMENT,
        "NON_FINITE_INPUT",
        {"session_id": "a", "row": "0", "column": "x2", "value": "-inf"},
        field="x",
    ),
    "step: infinity among many": Situation(
        stepping(40, np.array([1.0] * 89 + [math.inf])),
        Code.INVALID_ARGUMENT,
        "NON_FINITE_INPUT",
        {"session_id": "a", "row": "29", "column": "x2", "value": "inf"},
        field="x",
    ),
    "step: ahead": Situation(
        stepping(41, draw(1)),
        Code.ABORTED,
        "STEP_AHEAD",
        {"session_id": "a", "t": "41", "expected_t": "40"},
        told="send the rows from t=40 on first",
    ),
    "step: far ahead": Situation(
        stepping(2**64 - 1, draw(1)),
        Code.ABORTED,
        "STEP_AHEAD",
        {"session_id": "a", "t": str(2**64 - 1), "expected_t": "40"},
    ),
    "step: another payload": Situation(
        stepping(39, draw(1, seed=8)),
        Code.INVALID_ARGUMENT,
        "STEP_MISMATCH",
        {"session_id": "a", "t": "39", "expected_t": "40"},
        field="x",
    ),
    "step: more rows than were sent": Situation(
        stepping(38, X[38:]),
        Code.INVALID_ARGUMENT,
        "STEP_MISMATCH",
        {"session_id": "a", "t": "38", "expected_t": "40"},
        field="x",
    ),
    "step: another option": Situation(
        stepping(39, X[39], inspect=True),
        Code.INVALID_ARGUMENT,
        "STEP_MISMATCH",
        {"session_id": "a", "t": "39", "expected_t": "40"},
        field="x",
    ),
    "step: too old": Situation(
        stepping(7, X[7]),
        Code.OUT_OF_RANGE,
        "STEP_TOO_OLD",
        {"session_id": "a", "t": "7", "expected_t": "40"},
        told="go on from t=40",
    ),
}


@pytest.fixture
async def at_forty(stub: Stub) -> Stub:
    await opened(stub, "a")
    await ask(stub, [request("a", t, row) for t, row in enumerate(X)])
    await opened(stub, "gone")
    await stub.Step(request("gone", 0, draw(1)))
    await stub.CloseSession(pb.CloseSessionRequest(session_id="gone"))
    return stub


async def test_every_situation_has_its_code_reason_and_details(at_forty: Stub):
    for name, situation in SITUATIONS.items():
        refusal = await refused(situation.call(at_forty))
        check(name, situation, refusal)
    assert (await where(at_forty, "a")).t == 40


async def test_a_stream_answers_every_situation_in_band_as_a_call_would(at_forty: Stub):
    class Sent:
        """Takes the request that a situation makes."""

        def Step(self, sent: pb.StepRequest) -> pb.StepRequest:  # noqa: N802
            return sent

    steps = {name: it for name, it in SITUATIONS.items() if name.startswith("step:")}
    replies = await ask(at_forty, [it.call(Sent()) for it in steps.values()])
    assert len(replies) == len(steps) >= 15
    for (name, situation), reply in zip(by_session(steps), by_reply(replies), strict=True):
        check(name, situation, refusal_in(reply))
    assert (await where(at_forty, "a")).t == 40


def by_session(steps: dict[str, Situation]) -> list[tuple[str, Situation]]:
    """In order within each session, which is all that a stream promises."""
    return sorted(steps.items(), key=lambda item: item[1].metadata.get("session_id", "a") != "a")


def by_reply(replies: list[pb.StepResponse]) -> list[pb.StepResponse]:
    known = {"nope", "gone"}
    return sorted(replies, key=lambda reply: reply.session_id in known)


def check(name: str, situation: Situation, refusal: Refusal) -> None:
    assert (refusal.code, refusal.reason) == (situation.code, situation.reason), name
    assert refusal.metadata.items() >= situation.metadata.items(), name
    assert refusal.field == situation.field, name
    assert situation.told in refusal.message, name
    assert len(refusal.message) < 500, name
    assert (refusal.quota, refusal.retry_seconds) == (None, None), name


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
    moment.FromDatetime(datetime(year, 1, 1, tzinfo=UTC))
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


# Listing.


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


async def test_a_token_past_the_end_is_an_empty_last_page(stub: Stub):
    await opened(stub, "a")
    reply = await stub.ListSessions(pb.ListSessionsRequest(page_token="z" * 128))
    assert (list(reply.sessions), reply.next_page_token) == ([], "")


# Stepping and closing.


async def test_a_step_without_t_is_applied_to_the_session_as_it_stands(
    stub: Stub, networks: dict[str, Network]
):
    await opened(stub, "a")
    x = draw(6)
    replies = [await stub.Step(request("a", None, row)) for row in x]
    assert [reply.t for reply in replies] == [1, 2, 3, 4, 5, 6]
    got = [value for reply in replies for value in reply.y]
    assert largest_difference(got, networks["lstm"].offline(x).ravel()) <= TOLERANCE
    again = await stub.Step(request("a", None, x[-1]))
    assert (again.t, again.replayed) == (7, False)


TRACED = {
    "lstm": "ifgocmh",
    "projected": "ifgocmh",
    "gru": "rznh",
    "tanh": "h",
    "relu": "h",
}


@pytest.mark.parametrize("model", TRACED)
async def test_inspect_returns_each_layer_as_the_cell_computed_it(
    stub: Stub, networks: dict[str, Network], model: str
):
    x, network = draw(4), networks[model]
    await opened(stub, "a", model)
    reply = await stub.Step(request("a", 0, x, inspect=True))
    assert largest_difference(reply.y, network.offline(x).ravel()) <= TOLERANCE
    assert len(reply.layers) == 2
    hidden = network.module.hidden_size
    for layer in reply.layers:
        parts = {field.name: np.array(values) for field, values in layer.ListFields()}
        assert set(parts) == set(TRACED[model])
        width = network.module.proj_size or hidden
        assert {name: part.size for name, part in parts.items()} == {
            name: 4 * (width if name == "h" else hidden) for name in parts
        }
        if model == "lstm":
            assert np.allclose(parts["o"] * parts["m"], parts["h"], atol=1e-6)
            assert np.allclose(np.tanh(parts["c"]), parts["m"], atol=1e-6)
            first = parts["i"][:hidden] * parts["g"][:hidden]  # c was zero before
            assert np.allclose(first, parts["c"][:hidden], atol=1e-6)
    top = np.array(reply.layers[1].h).reshape(4, -1)
    head = network.head.weight.detach().numpy(), network.head.bias.detach().numpy()
    assert np.allclose(top @ head[0].T + head[1], np.array(reply.y).reshape(4, -1), atol=1e-5)


async def test_last_only_returns_the_last_row_of_the_same_run(
    stub: Stub, networks: dict[str, Network]
):
    x = draw(300)
    await opened(stub, "a")
    plain = await stub.Step(request("a", 0, x[:200], last_only=True))
    traced = await stub.Step(request("a", 200, x[200:], last_only=True, inspect=True))
    want = networks["lstm"].offline(x)
    assert largest_difference(plain.y, want[199]) <= TOLERANCE
    assert largest_difference(traced.y, want[299]) <= TOLERANCE
    assert {len(layer.h) for layer in traced.layers} == {16}


async def test_closing_tells_how_the_session_stood(stub: Stub):
    await opened(stub, "a")
    await stub.Step(request("a", 0, draw(7)))
    closed = (await stub.CloseSession(pb.CloseSessionRequest(session_id="a"))).session
    assert (closed.session_id, closed.t, closed.queued_requests) == ("a", 7, 0)


async def test_two_clients_that_close_one_session_are_both_answered(stub: Stub):
    await opened(stub, "a")
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=1_500)))
    await queued(stub, "a", 1)
    closings = [stub.CloseSession(pb.CloseSessionRequest(session_id="a")) for _ in range(2)]
    outcomes = await asyncio.gather(*map(outcome, closings))
    assert sorted(map(str, outcomes)) == ["1500", "SESSION_CLOSED"]
    assert (await long).t == 1_500


async def outcome(call: Awaitable[pb.CloseSessionResponse]) -> int | str:
    try:
        return (await call).session.t
    except grpc.aio.AioRpcError as error:
        return refusal_of_call(error).reason


async def test_an_open_waits_for_the_close_of_its_id_that_came_before(stub: Stub):
    await opened(stub, "a")
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=1_500)))
    await queued(stub, "a", 1)
    closing = asyncio.ensure_future(stub.CloseSession(pb.CloseSessionRequest(session_id="a")))
    opened_again = await stub.OpenSession(opening(session_id="a"))
    assert (await closing).session.t == (await long).t == 1_500
    assert opened_again.session.t == 0
    assert (await where(stub, "a")).t == 0


async def test_a_close_that_is_cancelled_still_closes(stub: Stub):
    await opened(stub, "a")
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=1_500)))
    await queued(stub, "a", 1)
    closing = stub.CloseSession(pb.CloseSessionRequest(session_id="a"))
    while (await stub.ListSessions(pb.ListSessionsRequest())).sessions:
        await asyncio.sleep(0.001)
    closing.cancel()
    await long
    refusal = await refused(stub.GetSession(pb.GetSessionRequest(session_id="a")))
    assert (refusal.reason, refusal.metadata["t"]) in {
        ("SESSION_CLOSED", "0"),  # while it is closing
        ("SESSION_CLOSED", "1500"),
    }


async def test_a_call_of_no_rpc_is_unimplemented(server: Server):
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await channel.unary_unary("/stepstate.v1.StepstateService/Nope")(b"")
        assert failure.value.code() == Code.UNIMPLEMENTED


async def test_a_surprise_in_a_handler_is_internal_with_an_id_of_the_log(
    server: Server, stub: Stub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(server.sessions, "page", fail)
    refusal = await refused(stub.ListSessions(pb.ListSessionsRequest()))
    assert (refusal.code, refusal.reason) == (Code.INTERNAL, "INTERNAL")
    assert "secret" not in refusal.message
    error_id = refusal.metadata["error_id"]
    logged = [record for record in caplog.records if getattr(record, "error_id", "") == error_id]
    assert [record.levelname for record in logged] == ["ERROR"]
    assert logged[0].exc_info is not None


async def test_a_refusal_is_logged_without_a_traceback(
    stub: Stub, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "stepstate")
    await refused(stub.GetSession(pb.GetSessionRequest(session_id="nope")))
    (record,) = (r for r in caplog.records if getattr(r, "reason", "") == "SESSION_UNKNOWN")
    assert (record.levelname, record.exc_info) == ("INFO", None)


async def test_a_start_time_at_the_end_of_time_is_told_back(server):
    latest = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    asked = Timestamp()
    asked.FromDatetime(latest)
    async with raw_stub(server.address) as stub:
        opened = await stub.OpenSession(pb.OpenSessionRequest(model="lstm", start_time=asked))
        assert opened.session.start_time == asked
        assert len((await stub.ListSessions(pb.ListSessionsRequest())).sessions) == 1


async def test_a_name_of_a_megabyte_is_refused_like_a_short_one(client):
    with pytest.raises(ModelUnknown) as refused:
        await client.open("x" * 1_000_000)
    assert refused.value.loaded
    assert len(str(refused.value)) < 2_000
