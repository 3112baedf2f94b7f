"""StreamPacked: what is refused, row by row or whole, and streams that are cut."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

import grpc
import numpy as np
import pytest

from stepstate.server import Server, running_server
from stepstate.transport.shares import PACKED_ROW_COST, REFUSAL_COST, LoopShares
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.packed import (
    Conversation,
    ask_packed,
    crowd,
    packed,
    series,
)
from tests.integration.wire import (
    BLOCKER_ROWS,
    GARBAGE,
    TOLERANCE,
    blocker,
    draw,
    largest_difference,
    opened,
    queued,
    raw_stub,
    sample,
    scrape,
    unary,
    until,
    where,
)
from tests.networks import Network

Stub = StepstateServiceStub

PACKED = "/stepstate.v1.StepstateService/StreamPacked"


async def test_each_row_is_refused_alone_and_the_others_are_applied(
    stub: Stub, networks: dict[str, Network]
):
    names, x = await crowd(stub, 6), series(6, 2)
    await opened(stub, "gone")
    await stub.CloseSession(pb.CloseSessionRequest(session_id="gone"))
    await opened(stub, "other", "gru")
    names |= {6: "gone", 7: "never", 8: "other", 9: "no id!"}
    talk = Conversation(stub)
    before = await talk.ask(packed(range(6), [0] * 6, x[:, 0], bind=names))
    rows = np.concatenate((x[:, 1], draw(4)))
    rows[1, 1], rows[2, 0] = math.nan, math.inf
    t = [1, 1, 1, 5, 0, 1, 0, 0, 0, 0]
    told = await talk.ask(packed(range(10), t, rows))
    reasons = {row: refusal.reason for row, refusal in told.errors.items()}
    assert reasons == {
        1: "NON_FINITE_INPUT",
        2: "NON_FINITE_INPUT",
        3: "STEP_AHEAD",
        4: "STEP_MISMATCH",
        6: "SESSION_CLOSED",
        7: "SESSION_UNKNOWN",
        8: "INVALID_FIELD",
        9: "INVALID_FIELD",
    }
    assert told.errors[3].metadata["expected_t"] == "1"
    assert "gru" in told.errors[8].message
    fine = [0, 5]
    assert told.t.tolist() == [2, 0, 0, 0, 0, 2, 0, 0, 0, 0]
    assert np.isfinite(told.y).all(axis=1).tolist() == [row in fine for row in range(10)]
    for row in fine:
        y = np.stack((before.y[row], told.y[row]))
        assert largest_difference(y, networks["lstm"].offline(x[row])) <= TOLERANCE
    assert [(await where(stub, f"s{row}")).t for row in range(6)] == [2, 1, 1, 1, 1, 2]


async def test_rows_that_overflow_are_refused_alone(stub: Stub):
    names, x = await crowd(stub, 3), series(3, 1)[:, 0]
    x[1] = 3e38
    (told,) = await ask_packed(stub, [packed(range(3), [0] * 3, x, bind=names)])
    assert {row: one.reason for row, one in told.errors.items()} == {1: "NON_FINITE_RESULT"}
    assert told.t.tolist() == [1, 0, 1]
    assert np.isnan(told.y[1]).all()
    assert (await where(stub, "s1")).t == 0


MALFORMED: dict[str, tuple[str, Callable[[pb.StreamPackedRequest], None]]] = {
    "handles of odd length": ("handles", lambda m: setattr(m, "handles", m.handles[:-1])),
    "t of odd length": ("t", lambda m: setattr(m, "t", m.t[:-1])),
    "x of odd length": ("x", lambda m: setattr(m, "x", m.x[:-1])),
    "t for fewer rows": ("t", lambda m: setattr(m, "t", m.t[:-8])),
    "x for fewer rows": ("x", lambda m: setattr(m, "x", m.x[:-4])),
    "no x": ("x", lambda m: setattr(m, "x", b"")),
    "x without handles": ("x", lambda m: (setattr(m, "handles", b""), setattr(m, "t", b""))),
    "a handle that is not bound": (
        "handles",
        lambda m: setattr(m, "handles", np.array([0, 1, 7], "<u4").tobytes()),
    ),
    "a handle beyond the table": (
        "handles",
        lambda m: setattr(m, "handles", np.array([0, 1, 2**32 - 1], "<u4").tobytes()),
    ),
    "a binding beyond the table": (
        "bindings",
        lambda m: m.bindings.add(handle=262_144, session_id="s0"),
    ),
    "too many bindings": (
        "bindings",
        lambda m: m.bindings.extend([pb.Binding(handle=2, session_id="s0")] * 16_383),
    ),
    "an id that is too long": (
        "bindings",
        lambda m: m.bindings.add(handle=2, session_id="s" * 129),
    ),
    "too many rows": (
        "handles",
        lambda m: (
            setattr(m, "handles", bytes(4 * 4097)),
            setattr(m, "t", b""),
            setattr(m, "x", bytes(4 * 3 * 4097)),
        ),
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
async def test_a_malformed_message_is_refused_whole_and_the_stream_goes_on(stub: Stub, what):
    field, spoil = MALFORMED[what]
    names, x = await crowd(stub, 3), series(3, 2)
    talk = Conversation(stub)
    await talk.ask(packed(range(3), [0] * 3, x[:, 0], bind={**names, 9: "s0"}))
    message = packed(range(3), [1] * 3, x[:, 1], id=5, bind={1: "s2", 2: "s1"})
    spoil(message)
    told = await talk.ask(message)
    assert told.error is not None
    assert (told.id, told.error.reason, told.error.field) == (5, "INVALID_FIELD", field)
    after = await talk.ask(packed(range(3), [1] * 3, x[:, 1]))
    assert after.t.tolist() == [2] * 3, "no row and no binding of it was applied"


async def test_rows_of_another_width_are_refused_one_by_one(stub: Stub):
    names = await crowd(stub, 2)
    talk = Conversation(stub)
    for _ in range(2):  # the sessions are looked up, then seated
        told = await talk.ask(packed([0, 1], None, draw(2, 4), bind=names))
        assert {row: one.field for row, one in told.errors.items()} == {0: "x", 1: "x"}
        assert told.y.size == 0
        assert "takes rows of 3" in told.errors[0].message
    assert (await talk.ask(packed([0, 1], None, draw(2)))).t.tolist() == [1, 1]


async def test_a_message_is_of_one_model_also_when_its_sessions_are_known(
    stub: Stub, networks: dict[str, Network]
):
    x = series(2, 2)
    await opened(stub, "a")
    await opened(stub, "b", "gru")
    talk = Conversation(stub)
    await talk.ask(packed([], None, draw(0), bind={0: "a", 1: "b"}))
    own = [await talk.ask(packed([handle], [0], x[handle, :1])) for handle in (0, 1)]
    both = await talk.ask(packed([0, 1], [1, 1], x[:, 1]))
    assert {row: one.field for row, one in both.errors.items()} == {1: "handles"}
    last = await talk.ask(packed([1], [1], x[1, 1:]))
    y = np.concatenate((own[1].y, last.y))
    assert largest_difference(y, networks["gru"].offline(x[1])) <= TOLERANCE


async def test_a_session_in_the_place_of_a_closed_one_is_not_taken_for_it(stub: Stub):
    await opened(stub, "live")
    await opened(stub, "old")
    talk = Conversation(stub)
    await talk.ask(packed([], None, draw(0), bind={0: "live", 1: "old"}))
    for t in range(2):
        await talk.ask(packed([0, 1], [t, t], draw(2)))
    await stub.CloseSession(pb.CloseSessionRequest(session_id="old"))
    await opened(stub, "new")
    told = await talk.ask(packed([0, 1], None, draw(2)))
    assert {row: one.reason for row, one in told.errors.items()} == {1: "SESSION_CLOSED"}
    assert told.t.tolist() == [3, 0]
    assert (await where(stub, "new")).t == 0


async def test_a_stream_that_is_cut_while_a_session_is_loaded_leaves_nothing_queued(config):
    one = replace(config, slots=1)
    async with running_server(one) as server, raw_stub(server.address) as stub:
        await opened(stub, "away")
        await opened(stub, "busy")
        long = asyncio.create_task(unary(stub, blocker("busy", rows=BLOCKER_ROWS)))
        await queued(stub, "busy", 1)
        talk = Conversation(stub)
        await talk.send(packed([0, 0, 0], None, draw(3), bind={0: "away"}))

        async def rows(count: int) -> bool:
            return server.sessions.queued_rows == count

        await until(lambda: rows(BLOCKER_ROWS + 3))
        talk.cancel()
        await until(lambda: rows(BLOCKER_ROWS))
        await long


async def test_bytes_that_are_no_message_are_refused_in_band(stub: Stub, server: Server):
    await opened(stub, "a")
    good = packed([0], [0], draw(1), bind={0: "a"}).SerializeToString()
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream(
            PACKED, response_deserializer=pb.StreamPackedResponse.FromString
        )()
        await call.write(GARBAGE)
        await call.write(good)
        await call.done_writing()
        replies = [reply async for reply in call]
    assert [reply.HasField("error") for reply in replies] == [True, False]


async def test_a_message_without_rows_is_answered(stub: Stub):
    await opened(stub, "a")
    bindings, nothing = await ask_packed(
        stub, [packed([], None, draw(0), bind={4: "a"}, id=1), packed([], None, draw(0), id=2)]
    )
    assert (bindings.id, nothing.id, len(bindings.t), bindings.error) == (1, 2, 0, None)


async def test_a_message_whose_rows_are_all_refused_has_no_outputs(stub: Stub):
    names, x = await crowd(stub, 2), series(2, 1)[:, 0]
    talk = Conversation(stub)
    await talk.ask(packed(range(2), [0, 0], x, bind=names))
    told = await talk.ask(packed(range(2), [7, 7], x))
    assert {row: one.reason for row, one in told.errors.items()} == {
        0: "STEP_AHEAD",
        1: "STEP_AHEAD",
    }
    assert told.y.size == 0


async def test_rows_and_refusals_cost_their_client_of_its_share(stub: Stub, monkeypatch):
    charged: list[float] = []
    monkeypatch.setattr(LoopShares, "charge", lambda _, peer, cost: charged.append(cost))
    names, x = await crowd(stub, 4), series(4, 1)[:, 0]
    talk = Conversation(stub)
    await talk.ask(packed(range(4), [0] * 4, x, bind=names))
    assert charged == [4 * PACKED_ROW_COST]
    await talk.ask(packed(range(4), [1, 7, 1, 7], x))
    assert sorted(charged) == sorted([4 * PACKED_ROW_COST] * 2 + [REFUSAL_COST] * 2)


async def test_a_stream_that_is_cut_leaves_nothing_queued(stub: Stub, other_stub: Stub, server):
    """Rows on their way, rows that wait, and rows whose session is being loaded."""
    names = await crowd(stub, 4)
    long = asyncio.create_task(unary(other_stub, blocker("s0", rows=BLOCKER_ROWS)))
    await queued(stub, "s0", 1)
    talk = Conversation(stub)
    for number in range(20):
        handles = [0, 1, 1, 1, 2, 3, 4]
        bind = {**names, 4: "never"} if not number else None
        await talk.send(packed(handles, None, draw(7), bind=bind))
    await queued(stub, "s0", 21)
    talk.cancel()
    await long

    async def nothing_queued() -> bool:
        text = await scrape(server.metrics_address)
        return sample(text, "stepstate_queue_rows") == sample(text, "stepstate_queue_requests") == 0

    await until(nothing_queued)
    assert server.sessions.queued_rows == 0
    talk = Conversation(stub)
    told = await talk.ask(packed(range(4), None, draw(4), bind=names))
    assert not told.errors


async def test_a_drain_answers_what_was_accepted(config, network):
    x = series(20, 30)
    async with running_server(config) as server, raw_stub(server.address) as stub:
        names = await crowd(stub, 20)
        talk = Conversation(stub)
        await talk.ask(packed([], None, draw(0), bind=names))
        rows = np.concatenate([x[:, t] for t in range(30)])
        await talk.send(packed(list(range(20)) * 30, np.repeat(range(30), 20), rows, id=7))

        async def begun() -> bool:
            return server.sessions.queued_rows > 0

        await until(begun)
        drained = asyncio.create_task(server.drain())
        told = await talk.next()
        await drained
    assert told.t.tolist() == np.repeat(range(1, 31), 20).tolist()
    y = told.y.reshape(30, 20, -1)
    for place in range(20):
        assert largest_difference(y[:, place], network.offline(x[place])) <= TOLERANCE


async def test_a_queue_that_is_full_refuses_the_message_whole(config):
    few = replace(config, queue_rows=10)
    async with running_server(few) as server, raw_stub(server.address) as stub:
        names = await crowd(stub, 12)
        long = asyncio.create_task(unary(stub, blocker("s0", rows=BLOCKER_ROWS)))
        await queued(stub, "s0", 1)
        talk = Conversation(stub)
        told = await talk.ask(packed(range(1, 12), None, draw(11), bind=names))
        assert told.error is not None
        assert (told.error.reason, told.error.retry_seconds is not None) == ("QUEUE_FULL", True)
        await long
        told = await talk.ask(packed(range(1, 12), None, draw(11), bind=names))
        assert told.t.tolist() == [1] * 11
