"""A refused, failed or cancelled request leaves state and `t` as they were."""

from __future__ import annotations

import asyncio
import math

import grpc
import numpy as np
import pytest

from stepstate.config import ServerConfig
from stepstate.engine.network import Network as EngineNetwork
from stepstate.engine.runtimes import OnnxStepper
from stepstate.server import running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    BLOCKER_ROWS,
    STEEP,
    TOLERANCE,
    Refusal,
    ask,
    blocker,
    draw,
    largest_difference,
    opened,
    outputs,
    queued,
    raw_stub,
    refusal_in,
    refused,
    request,
    streamed,
    unary,
    where,
)
from tests.networks import Network


def refused_requests() -> list[tuple[str, pb.StepRequest]]:
    """Reasons, and requests that a session at t = 5 must refuse for them."""
    good = draw(10) / STEEP
    spoiled, overflowing = good.copy(), good.copy()
    spoiled[-1, -1] = math.nan
    overflowing[-1] = (3e38, -3e38, 3e38)
    return [
        ("INVALID_FIELD", pb.StepRequest(session_id="a", t=5, x=[0.001] * 4)),
        ("INVALID_FIELD", pb.StepRequest(session_id="a", t=5)),
        ("INVALID_FIELD", request("a", 5, np.zeros((5_000, 3)), inspect=True)),
        ("NON_FINITE_INPUT", request("a", 5, spoiled)),
        ("NON_FINITE_INPUT", request("a", 5, spoiled, inspect=True)),
        ("STEP_AHEAD", request("a", 6, good)),
        ("STEP_AHEAD", request("a", 2**64 - 1, good)),
        ("STEP_MISMATCH", request("a", 4, good[:1])),
        ("NON_FINITE_RESULT", request("a", 5, overflowing)),
        ("NON_FINITE_RESULT", request("a", 5, overflowing, inspect=True)),
        ("NON_FINITE_RESULT", request("a", 5, overflowing[-1:])),
    ]


async def test_a_refused_request_leaves_state_and_t(
    steep_config: ServerConfig, steep: dict[str, Network]
):
    network, x = steep["steep-relu"], draw(40) / STEEP  # its state has no bound
    got = []
    async with running_server(steep_config) as server, raw_stub(server.address) as stub:
        await opened(stub, "a", network.name)
        got.append(await stub.Step(request("a", 0, x[:5])))
        for reason, sent in refused_requests():
            for send in (unary, streamed):
                refusal = await send_refused(send, stub, sent)
                assert refusal.reason == reason
                assert (await where(stub, "a")).t == 5
        got.append(await stub.Step(request("a", 5, x[5:])))
    assert largest_difference(outputs(got), network.offline(x).ravel()) <= TOLERANCE


async def send_refused(send, stub: StepstateServiceStub, sent: pb.StepRequest) -> Refusal:
    if send is unary:
        return await refused(stub.Step(sent))
    return refusal_in(await streamed(stub, sent))


@pytest.mark.parametrize("rows", [1, 20])
async def test_a_forward_that_fails_leaves_state_and_t(
    stub: StepstateServiceStub,
    networks: dict[str, Network],
    caplog: pytest.LogCaptureFixture,
    rows: int,
):
    x = draw(5 + rows)
    await opened(stub, "a")
    first = await stub.Step(request("a", 0, x[:5]))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(OnnxStepper, "step")
        patch.delattr(EngineNetwork, "sequence")
        refusals = [await refused(stub.Step(request("a", 5, x[5:])))]
        refusals += map(refusal_in, await ask(stub, [request("a", 5, x[5:])]))

    for refusal in refusals:
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert any(
            getattr(record, "error_id", "") == refusal.metadata["error_id"] and record.exc_info
            for record in caplog.records
        )
    assert (await where(stub, "a")).t == 5
    got = outputs((first, await stub.Step(request("a", 5, x[5:]))))
    assert largest_difference(got, networks["lstm"].offline(x).ravel()) <= TOLERANCE


async def test_a_cancelled_request_that_waits_leaves_state_and_t(
    stub: StepstateServiceStub, networks: dict[str, Network]
):
    await opened(stub, "a")
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=BLOCKER_ROWS)))
    await queued(stub, "a", 1)
    waiting = stub.Step(request("a", None, draw(1)))
    waiting_long = stub.Step(request("a", None, draw(50)))
    stream = stub.StreamSteps()
    await stream.write(request("a", None, draw(1)))
    await queued(stub, "a", 4)
    for call in (waiting, waiting_long, stream):
        call.cancel()
    await long

    x = np.concatenate((draw(BLOCKER_ROWS, seed=99), draw(1, seed=5)))
    last = await stub.Step(request("a", BLOCKER_ROWS, x[-1]))
    assert largest_difference(last.y, networks["lstm"].offline(x)[-1]) <= TOLERANCE


@pytest.mark.parametrize("path", ["unary", "stream"])
async def test_a_long_request_cancelled_in_the_middle_leaves_state_and_t(
    stub: StepstateServiceStub, networks: dict[str, Network], path: str
):
    x = draw(6)
    await opened(stub, "a")
    await stub.Step(request("a", 0, x[:5]))
    sent = blocker("a", 5, rows=100_000)
    if path == "unary":
        call = stub.Step(sent)
    else:
        call = stub.StreamSteps()
        await call.write(sent)
    await queued(stub, "a", 1)
    call.cancel()
    await queued(stub, "a", 0)

    assert (await where(stub, "a")).t == 5
    last = await stub.Step(request("a", 5, x[5]))
    assert largest_difference(last.y, networks["lstm"].offline(x)[-1]) <= TOLERANCE
