"""StreamPacked: rows of many sessions in one message."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from stepstate.server import running_server
from stepstate.transport import packed as packed_stream
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.packed import (
    IMPUTED,
    REPLAYED,
    Conversation,
    Outcome,
    ask_packed,
    crowd,
    packed,
    series,
)
from tests.integration.wire import (
    BLOCKER_ROWS,
    TOLERANCE,
    ask,
    blocker,
    draw,
    largest_difference,
    opened,
    queued,
    raw_stub,
    request,
    sample,
    scrape,
    unary,
    where,
)
from tests.networks import Network

pytestmark = pytest.mark.transports

Stub = StepstateServiceStub

SYNC, ASYNC, NONE = pb.DURABILITY_SYNC, pb.DURABILITY_ASYNC, pb.DURABILITY_NONE


@pytest.mark.parametrize("durability", [NONE, ASYNC, SYNC])
async def test_packed_sessions_give_the_numbers_of_the_offline_network(
    stub: Stub, network: Network, durability
):
    names, x = await crowd(stub, 40, durability=durability), series(40, 12)
    talk = Conversation(stub)
    told = []
    for t in range(12):
        bind = names if t == 0 else None
        told.append(await talk.ask(packed(range(40), [t] * 40, x[:, t], bind=bind, id=t)))
    assert [one.id for one in told] == list(range(12))
    assert not any(one.errors for one in told)
    y = np.stack([one.y for one in told], axis=1)
    for place in range(40):
        assert largest_difference(y[place], network.offline(x[place])) <= TOLERANCE
    for t, one in enumerate(told):
        assert one.t.tolist() == [t + 1] * 40
        want = {SYNC: [t + 1] * 40, NONE: [0] * 40}.get(durability)
        assert want is None or one.durable_t.tolist() == want


async def test_rows_of_one_session_are_applied_in_order_within_and_across_messages(
    stub: Stub, network: Network
):
    """Messages are sent without waiting; a session comes in some of them several times."""
    names, x = await crowd(stub, 7), series(7, 40)
    order, at = random.Random(3), dict.fromkeys(names, 0)
    requests, expected = [], []
    bind = names
    while any(t < 40 for t in at.values()):
        rows = []
        for _ in range(order.randrange(1, 30)):
            handle = order.choice(list(names))
            if at[handle] < 40:
                rows.append((handle, at[handle]))
                at[handle] += 1
        if rows:
            handles, t = zip(*rows, strict=True)
            sent_t = None if order.random() < 0.3 else t
            columns = np.array([x[handle, one] for handle, one in rows])
            requests.append(packed(handles, sent_t, columns, id=len(requests), bind=bind))
            expected.append(rows)
            bind = None
    replies = {one.id: one for one in await ask_packed(stub, requests)}
    y = np.zeros((7, 40, 2))
    for number, rows in enumerate(expected):
        one = replies[number]
        assert not one.errors
        assert one.t.tolist() == [t + 1 for _, t in rows]
        for (handle, t), row in zip(rows, one.y, strict=True):
            y[handle, t] = row
    for handle in names:
        assert largest_difference(y[handle], network.offline(x[handle])) <= TOLERANCE


async def test_a_message_sent_again_is_applied_once_and_answered_with_the_same_outputs(stub: Stub):
    names, x = await crowd(stub, 9), series(9, 3)
    message = packed(
        list(range(9)) * 2, [0] * 9 + [1] * 9, np.concatenate((x[:, 0], x[:, 1])), bind=names
    )
    first, again = await ask_packed(stub, [message, message])
    assert first.y.tobytes() == again.y.tobytes()
    assert (first.flags.tolist(), again.flags.tolist()) == ([0] * 18, [REPLAYED] * 18)
    assert again.t.tolist() == first.t.tolist() == [1] * 9 + [2] * 9
    (later,) = await ask_packed(stub, [packed(range(9), [2] * 9, x[:, 2], bind=names)])
    assert later.t.tolist() == [3] * 9


async def test_half_of_a_message_that_was_applied_before_is_replayed_and_half_applied(stub: Stub):
    names, x = await crowd(stub, 4), series(4, 2)
    talk = Conversation(stub)
    first = await talk.ask(packed([0, 2], [0, 0], x[[0, 2], 0], bind=names))
    both = await talk.ask(packed(range(4), [0] * 4, x[:, 0]))
    assert both.flags.tolist() == [REPLAYED, 0, REPLAYED, 0]
    assert both.y[[0, 2]].tobytes() == first.y.tobytes()
    assert both.t.tolist() == [1] * 4


async def test_a_handle_that_is_bound_again_means_the_new_session_from_that_message_on(
    stub: Stub, network: Network
):
    """Its rows before, which still wait for one of the old session, are not affected."""
    x = draw(12)
    await opened(stub, "old")
    await opened(stub, "new")
    told = await ask_packed(
        stub,
        [
            packed([0] * 6, range(6), x[:6], bind={0: "old"}, id=1),
            packed([0] * 5, range(5), x[:5], bind={0: "new"}, id=2),
        ],
    )
    by_id = {one.id: one for one in told}
    assert by_id[1].t.tolist() == [1, 2, 3, 4, 5, 6]
    assert by_id[2].t.tolist() == [1, 2, 3, 4, 5]
    assert largest_difference(by_id[1].y, network.offline(x[:6])) <= TOLERANCE
    assert largest_difference(by_id[2].y, network.offline(x[:5])) <= TOLERANCE


async def test_two_handles_of_one_session_are_one_session(stub: Stub, network: Network):
    x = draw(8)
    await opened(stub, "a")
    bind = {0: "a", 1: "a"}
    talk = Conversation(stub)
    first = await talk.ask(packed([0, 1, 0, 1], None, x[:4], bind=bind))
    second = await talk.ask(packed([0, 1, 1, 0], None, x[4:]))
    y = np.concatenate((first.y, second.y))
    assert first.t.tolist() + second.t.tolist() == list(range(1, 9))
    assert largest_difference(y, network.offline(x)) <= TOLERANCE


async def test_packed_rows_and_single_steps_of_one_session_take_turns(
    stub: Stub, other_stub: Stub, network: Network
):
    """A row without t is applied to the session as it stands: together all are applied once."""
    names = await crowd(stub, 5)
    row = draw(1)[0]

    async def by_stream() -> list[float]:
        sent = [request(name, None, row) for _ in range(60) for name in names.values()]
        return [value for reply in await ask(other_stub, sent) for value in reply.y]

    async def by_pack() -> list[Outcome]:
        talk = Conversation(stub)
        await talk.ask(packed([], None, draw(0), bind=names))
        return [await talk.ask(packed(range(5), None, np.tile(row, (5, 1)))) for _ in range(60)]

    single, together = await asyncio.gather(by_stream(), by_pack())
    want = np.repeat(network.offline(np.tile(row, (120, 1))), 5, axis=0)
    got = np.concatenate([np.reshape(single, (-1, 2)), *(one.y for one in together)])
    order = np.lexsort(np.round(want.T, 4)), np.lexsort(np.round(got.T, 4))
    assert largest_difference(got[order[1]], want[order[0]]) <= 2e-4  # sorted by rounded values
    assert [(await where(stub, name)).t for name in names.values()] == [120] * 5


async def test_a_row_waits_for_a_long_request_of_its_session_and_other_messages_do_not(
    stub: Stub, other_stub: Stub
):
    names = await crowd(stub, 3)
    talk = Conversation(stub)
    await talk.ask(packed(range(3), None, draw(3), bind=names))
    long = asyncio.create_task(unary(other_stub, blocker("s0", 1, rows=BLOCKER_ROWS)))
    await queued(stub, "s0", 1)
    await talk.send(packed(range(3), None, draw(3), id=1))
    await talk.send(packed([1, 2], None, draw(2), id=2))
    second, first = await talk.next(), await talk.next()
    assert (second.id, first.id) == (2, 1)
    assert second.t.tolist() == [3, 3]
    assert first.t.tolist() == [BLOCKER_ROWS + 2, 2, 2]
    assert (await long).t == BLOCKER_ROWS + 1


async def test_a_large_message_takes_several_forwards_and_keeps_the_order_of_rows(
    config, network: Network, monkeypatch
):
    """Two rows of each of 40 sessions in one message, parts and forwards of 16 rows."""
    monkeypatch.setattr(packed_stream, "PART_ROWS", 16)
    limited = replace(config, batch_rows=16)
    x = series(40, 2)
    async with running_server(limited) as server, raw_stub(server.address) as stub:
        names = await crowd(stub, 40)
        rows = np.concatenate((x[:, 0], x[:, 1]))
        talk = Conversation(stub)
        told = await talk.ask(packed([*range(40)] * 2, [0] * 40 + [1] * 40, rows, bind=names))
        assert not told.errors
        assert told.t.tolist() == [1] * 40 + [2] * 40
        for place in range(40):
            offline = network.offline(x[place])
            assert largest_difference(told.y[[place, 40 + place]], offline) <= TOLERANCE
        text = await scrape(server.metrics_address)
        assert sample(text, 'stepstate_microbatch_rows_count{model="lstm",version="1"}') >= 5
        assert sample(
            text, 'stepstate_microbatch_rows_bucket{le="16.0",model="lstm",version="1"}'
        ) == sample(text, 'stepstate_microbatch_rows_count{model="lstm",version="1"}')


async def test_more_sessions_than_slots_are_loaded_and_spilled_in_turn(config, network):
    x = series(30, 5)
    async with running_server(replace(config, slots=8)) as server, raw_stub(server.address) as stub:
        names = await crowd(stub, 30)
        told: list[Outcome] = []
        for t in range(5):
            groups = [list(range(first, first + 6)) for first in range(0, 30, 6)]
            requests = [
                packed(group, [t] * 6, x[group, t], bind=names, id=number)
                for number, group in enumerate(groups)
            ]
            told += sorted(await ask_packed(stub, requests), key=lambda one: one.id)
        y = np.concatenate([one.y for one in told]).reshape(5, 30, -1).swapaxes(0, 1)
        for place in range(30):
            assert largest_difference(y[place], network.offline(x[place])) <= TOLERANCE
        text = await scrape(server.metrics_address)
        assert sample(text, "stepstate_session_spills_total") >= 22


@pytest.mark.parametrize("durability", [SYNC, ASYNC])
async def test_after_kill_9_packed_rows_are_what_their_durability_says(
    start_process: Callable, tmp_path, durability, network
):
    options = ("--store", f"sqlite:{tmp_path / 'kept.db'}", "--snapshot-interval", "1000")
    x = series(6, 4)
    with start_process(*options) as first:
        async with raw_stub(first.address) as stub:
            names = await crowd(stub, 6, durability=durability)
            talk = Conversation(stub)
            for t in range(3):
                told = await talk.ask(packed(range(6), [t] * 6, x[:, t], bind=None if t else names))
        first.process.kill()
        first.process.wait()
    with start_process(*options) as second:
        async with raw_stub(second.address) as stub:
            talk = Conversation(stub)
            again = await talk.ask(packed(range(6), [3] * 6, x[:, 3], bind=names))
            if durability == ASYNC:
                assert told.durable_t.tolist() == [0] * 6
                expected = [refusal.metadata["expected_t"] for refusal in again.errors.values()]
                assert expected == ["0"] * 6
                rows, t = np.concatenate(x), [0, 1, 2, 3] * 6
                again = await talk.ask(packed(np.repeat(range(6), 4), t, rows))
                y = again.y.reshape(6, 4, -1)[:, 3]
            else:
                assert told.durable_t.tolist() == [3] * 6
                y = again.y
            assert not again.errors
            for place in range(6):
                assert largest_difference(y[place], network.offline(x[place])[3]) <= TOLERANCE


async def test_missing_values_are_imputed_and_told(stub: Stub):
    names = await crowd(stub, 3, missing=pb.MISSING_POLICY_HOLD)
    x = series(3, 2)
    x[1, 1, 2] = math.nan
    talk = Conversation(stub)
    await talk.ask(packed(range(3), [0] * 3, x[:, 0], bind=names))
    told = await talk.ask(packed(range(3), [1] * 3, x[:, 1]))
    assert told.flags.tolist() == [0, IMPUTED, 0]
    assert np.isfinite(told.y).all()
