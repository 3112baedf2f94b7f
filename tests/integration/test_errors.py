"""Every refusal has its code, reason and details, as a call and in a stream."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Awaitable, Callable

import grpc
import numpy as np
import pytest

from stepstate.errors import ModelUnknown
from stepstate.server import Server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    Refusal,
    ask,
    draw,
    opened,
    opening,
    refusal_in,
    refused,
    request,
    where,
)

pytestmark = pytest.mark.transports

Code = grpc.StatusCode

Stub = StepstateServiceStub

# The table: situations, each in a server where session "a" of model "lstm" stands at t = 40
# by single rows, "gone" was closed at t = 1, and a server remembers 32 rows.

X = draw(40)


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


async def test_a_name_of_a_megabyte_is_refused_like_a_short_one(client):
    with pytest.raises(ModelUnknown) as refused:
        await client.open("x" * 1_000_000)
    assert refused.value.loaded
    assert len(str(refused.value)) < 2_000
