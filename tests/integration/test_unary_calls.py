"""Step and CloseSession: their options and their order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

import grpc
import numpy as np
import pytest

from stepstate.server import Server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks.http2 import frame, raw_connection
from tests.integration.wire import (
    TOLERANCE,
    blocker,
    draw,
    largest_difference,
    opened,
    opening,
    queued,
    refusal_of_call,
    refused,
    request,
    where,
)
from tests.networks import Network

pytestmark = pytest.mark.transports

Stub = StepstateServiceStub


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


async def test_a_client_that_leaves_without_its_reply_is_no_error_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
):
    ask = frame(pb.ListModelsRequest())
    async with raw_connection(server.address, window=0) as connection:
        stream = connection.open("/stepstate.v1.StepstateService/ListModels")
        await connection.send(stream, ask, end=True)
        await connection.flush()
        await asyncio.sleep(0.3)
    await asyncio.sleep(0.3)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
