"""Rows that are recognized by their bytes: they keep their place, whatever becomes of them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from stepstate.budget import MemoryUse
from stepstate.config import ServerConfig
from stepstate.engine import Engine
from stepstate.server import Server, running_server
from stepstate.sessions import SingleRow, types
from stepstate.sessions.rows import RowBatcher
from stepstate.transport import bidi
from stepstate.transport.row_stream import RowStream
from stepstate.transport.shares import LoopShares
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import HANG, draw, opened, raw_stub, refusal_of, request, until, where
from tests.property.pipelined import Pipelined, PipelinedCall
from tests.property.requests import UNKNOWN_FIELD

ROWS = draw(600)


@asynccontextmanager
async def pipelined(address: str, **options: int) -> AsyncIterator[Pipelined]:
    connected = await Pipelined.connect(address, **options)
    try:
        yield connected
    finally:
        await connected.close()


@pytest.fixture
async def connection(server: Server) -> AsyncIterator[Pipelined]:
    async with pipelined(server.address) as connected:
        yield connected


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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("model", ["lstm", "gru", "tanh", "relu", "projected"])
async def test_a_row_that_is_not_finite_is_refused_and_changes_nothing(
    connection: Pipelined, stub: StepstateServiceStub, model: str, value: float
):
    """Also where the outputs would be finite: the gates of an LSTM are, of any sum."""
    await opened(stub, "a", model)
    call = await begun(connection, "a")
    bad = ROWS[1].copy()
    bad[0] = value
    call.put(request("a", 1, bad).SerializeToString())
    call.put(row("a", 1))
    connection.flush()
    await call.answered(3)
    assert told(call.replies) == [1, "NON_FINITE_INPUT", 2]


@pytest.mark.transports
async def test_rows_whose_replies_are_not_read_are_taken_as_far_as_a_stream_may(
    server: Server, stub: StepstateServiceStub, monkeypatch: pytest.MonkeyPatch
):
    """A row that is taken is applied at once, so t says how many were."""
    monkeypatch.setattr(bidi, "MAX_UNANSWERED", 16)
    await opened(stub, "a")

    async def stands() -> bool:
        before = (await where(stub, "a")).t
        await asyncio.sleep(0.2)
        return before > 0 and (await where(stub, "a")).t == before

    async with pipelined(server.address, window=0) as unread:
        call = unread.begin()
        for t in range(400):
            call.put(row("a", t))
        unread.flush()
        await until(stands)
        taken = (await where(stub, "a")).t
        assert taken <= 16
        assert server.memory.used < 2**17
        assert (await stub.Step(request("a", taken, ROWS[taken]))).t == taken + 1  # of another call
        call.take_replies(2**16)
        call.end()
        unread.flush()
        assert await call.ended() == "0"
    assert told(call.replies) == list(range(1, 401))


async def test_a_drain_answers_the_rows_that_were_taken(config: ServerConfig):
    """The session is saved with exactly the rows that were answered."""
    replies: dict[str, list[pb.StepResponse]] = {}
    async with running_server(config) as server, raw_stub(server.address) as stub:
        calls = {}
        for name in "abcd":
            await opened(stub, name)
            calls[name] = stub.StreamSteps()
        for t in range(300):
            for name, call in calls.items():
                await call.write(request(name, t, ROWS[t]))
        for name, call in calls.items():
            replies[name] = [await call.read()]
        drained = asyncio.create_task(server.drain())
        for name, call in calls.items():
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                while True:
                    replies[name].append(await call.read())
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        await drained
    async with running_server(config) as server, raw_stub(server.address) as stub:
        for name, some in replies.items():
            answered = [reply.t for reply in some if not reply.HasField("error")]
            assert answered == list(range(1, len(answered) + 1))
            assert (await where(stub, name)).t == len(answered)


async def test_rows_that_are_done_make_room_for_others(
    connection: Pipelined,
    server: Server,
    stub: StepstateServiceStub,
    monkeypatch: pytest.MonkeyPatch,
):
    """A client may have few requests in the engine, and few waiting."""
    monkeypatch.setattr(bidi, "MAX_SOURCE_RUNNING", 4)
    monkeypatch.setattr(types, "MAX_SOURCE_RUNNING", 4)
    await opened(stub, "a")
    call = await begun(connection, "a")
    for t in range(1, 300):
        call.put(row("a", t))
    connection.flush()
    await call.answered(300)
    assert told(call.replies) == list(range(1, 301))
    assert server.sessions.queued_rows == 0
    assert not server.memory.by_use[MemoryUse.REQUESTS]
    assert not server.memory.by_use[MemoryUse.REPLIES]


class Forwards:
    """Counts forwards, and for one session those from the arrival of a row to its reply."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, session_id: str) -> None:
        self.count = 0
        self.waited: list[int] = []
        self._arrived: dict[int, int] = {}
        self._session_id = session_id
        for owner, name, before in (
            (RowBatcher, "add", self._add),
            (Engine, "step_rows", self._step),
            (RowStream, "deliver_row", self._deliver),
        ):
            method = getattr(owner, name)
            monkeypatch.setattr(owner, name, self._noting(before, method))

    @staticmethod
    def _noting(before: Callable[..., None], method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            before(*arguments[1:])
            return method(*arguments)

        return noted

    def _add(self, row: SingleRow) -> None:
        if row.session.session_id == self._session_id and row.t is not None:
            self._arrived[row.t] = self.count

    def _step(self, _: object) -> None:
        self.count += 1

    def _deliver(self, row: SingleRow, *_: object) -> None:
        if row.session.session_id == self._session_id and row.t is not None:
            self.waited.append(self.count - self._arrived[row.t])


async def test_a_flood_costs_a_row_of_another_client_two_forwards_at_most(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
):
    """The one that is being done, and its own."""
    forwards = Forwards(monkeypatch, "other")
    names = [f"flood-{place}" for place in range(64)]
    small = dataclasses.replace(config, batch_rows=8)
    async with running_server(small) as server, raw_stub(server.address) as stub:
        for name in (*names, "other"):
            await opened(stub, name)
        async with pipelined(server.address) as flood, pipelined(server.address) as other:
            calls = [await begun(flood, name) for name in names]
            alone = await begun(other, "other")
            for t in range(1, 20):
                for name, call in zip(names, calls, strict=True):
                    call.put(row(name, t))
            flood.flush()
            for t in range(1, 20):
                alone.put(row("other", t))
                other.flush()
                await alone.answered(t + 1)
            assert any(len(call.replies) < 20 for call in calls), "the flood was over before"
            for call in calls:
                await call.answered(20)
                assert told(call.replies) == list(range(1, 21))
    assert len(forwards.waited) == 19
    assert max(forwards.waited) <= 2
