"""Rows that are recognized by their bytes: they keep their place, whatever becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from stepstate.server import Server
from stepstate.transport.shares import LoopShares
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import HANG, draw, opened, refusal_of, request
from tests.property.pipelined import Pipelined, PipelinedCall
from tests.property.requests import UNKNOWN_FIELD

ROWS = draw(50)


@pytest.fixture
async def connection(server: Server) -> AsyncIterator[Pipelined]:
    connected = await Pipelined.connect(server.address)
    yield connected
    await connected.close()


def row(name: str, t: int, *, missing: bool = False) -> bytes:
    """A request for one row."""
    x = ROWS[t].copy()
    if missing:
        x[0] = np.nan
    return request(name, t, x).SerializeToString()


async def begun(connection: Pipelined, name: str) -> PipelinedCall:
    """A call of a session that has one row, so that its next one is recognized."""
    call = connection.begin()
    call.put(row(name, 0))
    connection.flush()
    await call.answered(1)
    return call


def told(replies: list[bytes]) -> list[int | str]:
    """t of each reply, or why it has none."""
    found = map(pb.StepResponse.FromString, replies)
    return [refusal_of(one.error).reason if one.HasField("error") else one.t for one in found]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (pb.MISSING_POLICY_HOLD, [1, 2, 3, 4, 5]),
        (pb.MISSING_POLICY_REJECT, [1, 2, "NON_FINITE_INPUT", "STEP_AHEAD", "STEP_AHEAD"]),
    ],
)
async def test_a_row_that_is_given_back_comes_before_one_that_waits_for_its_turn(
    connection: Pipelined,
    stub: StepstateServiceStub,
    monkeypatch: pytest.MonkeyPatch,
    missing: pb.MissingPolicy,
    expected: list[int | str],
):
    await opened(stub, "a", missing=missing)
    call = await begun(connection, "a")
    turn = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(LoopShares, "take", lambda *_: turn)
    call.put(row("a", 1))
    call.put(row("a", 2, missing=True))
    call.put(row("a", 3))
    call.put(row("a", 4) + UNKNOWN_FIELD)
    connection.flush()
    await call.answered(2)
    await asyncio.sleep(0.1)
    monkeypatch.undo()
    turn.set_result(None)
    await asyncio.wait_for(call.answered(5), HANG)
    assert told(call.replies) == expected


async def test_a_call_ends_whose_last_row_is_given_back_and_refused(
    connection: Pipelined, stub: StepstateServiceStub
):
    await opened(stub, "a")
    call = await begun(connection, "a")
    call.put(row("a", 1, missing=True))
    call.end()
    connection.flush()
    assert await call.ended() == "0"
    assert told(call.replies) == [1, "NON_FINITE_INPUT"]
