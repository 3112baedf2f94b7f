"""Sessions are opened, found, listed and counted, within limits."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from stepstate.errors import (
    InvalidField,
    ModelUnknown,
    QueueFull,
    SessionExists,
    SessionLimit,
    SessionUnknown,
    StepAhead,
    StoreUnavailable,
)
from stepstate.identity import DEFAULT_TENANT, session_key
from stepstate.sessions import check_id
from tests.offline import forecasting_network
from tests.unit.rig import (
    IDLE_SECONDS,
    MAX_IDLE_SECONDS,
    Caller,
    model_of,
    outputs,
    request,
    rounds,
    rows_of,
    timed_network,
)
from tests.unit.sessions.slow_store import SlowStore


@pytest.fixture
def x(network):
    return rows_of(network, 8)


async def test_an_opened_session_stands_at_0_and_is_found(rig):
    session = await rig.open("a")
    assert rig.sessions.t(session) == 0
    assert rig.sessions.find("a") is session
    assert await rig.sessions.get("a") is session
    assert len(rig.sessions) == 1
    assert session.record.fingerprint == rig.scheduler.model.manifest.fingerprint


async def test_without_an_id_the_server_makes_one_that_is_unique(rig):
    made = {(await rig.open("")).session_id for _ in range(5)}
    assert len(made) == 5
    for session_id in made:
        check_id(session_id)


@pytest.mark.parametrize("session_id", ["a", "A-Z.a_z:0-9", "x" * 128])
def test_good_ids_pass(session_id):
    check_id(session_id)


@pytest.mark.parametrize("session_id", ["", "a b", "é", "a/b", "a\n", "x" * 129])
async def test_a_bad_id_is_refused_by_open_and_by_look_up(rig, session_id):
    with pytest.raises(InvalidField, match="session_id"):
        await rig.sessions.get(session_key(DEFAULT_TENANT, session_id))
    if session_id:
        with pytest.raises(InvalidField, match="session_id"):
            await rig.open(session_id)
    assert len(rig.sessions) == 0


async def test_an_id_that_is_open_is_refused_and_told_where_it_stands(rig, x):
    session = await rig.open("a")
    await rig.step(session, x[:3], 0)
    with pytest.raises(SessionExists) as refused:
        await rig.open("a")
    assert refused.value.fields() == {"session_id": "a", "t": "3"}
    assert rig.sessions.t(session) == 3


async def test_an_id_that_never_was_is_unknown(rig):
    assert rig.sessions.find("never") is None
    with pytest.raises(SessionUnknown, match="never"):
        await rig.sessions.get("never")
    with pytest.raises(SessionUnknown):
        await rig.sessions.close("never")


async def test_the_model_is_the_one_asked_for(make_rig, networks):
    rig = make_rig(model_of(networks["lstm"]), model_of(networks["gru"]))
    session = await rig.open("a", model="gru")
    assert session.record.model == "gru"
    with pytest.raises(InvalidField, match="gru, lstm"):
        await rig.open("b")
    with pytest.raises(ModelUnknown):
        await rig.open("b", model="other")
    with pytest.raises(ModelUnknown):
        await rig.open("b", model="gru", version="2")
    assert len(rig.sessions) == 1


async def test_a_model_that_needs_the_time_refuses_to_open_without(make_rig):
    rig = make_rig(model_of(*timed_network()))
    with pytest.raises(InvalidField, match="start_time"):
        await rig.open("a")
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("a")
    await rig.open("a", start=datetime(2026, 1, 2, tzinfo=UTC))


async def test_row_t_has_the_calendar_of_start_time_plus_t_steps(make_rig):
    rig = make_rig(model_of(*timed_network()))
    start = datetime(2026, 1, 2, 10, 20, tzinfo=UTC)
    early = await rig.open("early", start=start)
    late = await rig.open("late", start=start + timedelta(hours=3))
    x = np.ones((3, 2), np.float32)
    assert late.phase == early.phase + 3
    whole = await rig.y(early, x, 0)
    again = await rig.open("again", start=start)
    single = np.concatenate([await rig.y(again, row) for row in x])
    assert np.abs(whole - single).max() <= 1e-4


@pytest.mark.parametrize("idle", [0.0, -1.0, MAX_IDLE_SECONDS + 1, float("nan"), float("inf")])
async def test_an_idle_timeout_outside_the_limits_is_refused(rig, idle):
    with pytest.raises(InvalidField, match="idle_timeout"):
        await rig.open("a", idle=idle)


async def test_one_more_session_than_the_limit_is_refused_until_one_ends(make_rig):
    rig = make_rig(max_sessions=2)
    await rig.open("a")
    await rig.open("b")
    with pytest.raises(SessionLimit) as refused:
        await rig.open("c")
    assert refused.value.limit == 2
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("c")
    await rig.sessions.close("a")
    await rig.open("c")


@pytest.mark.parametrize("rounds", range(12))
async def test_sessions_that_are_opened_at_once_count_once_each(make_rig, rounds: int):
    """The second is opened at each moment of the opening of the first."""
    rig = make_rig(max_sessions=2)
    first = asyncio.ensure_future(rig.open("a"))
    for _ in range(rounds):
        await asyncio.sleep(0)
    await rig.open("b")
    await first
    with pytest.raises(SessionLimit):
        await rig.open("c")


async def test_more_requests_than_the_limit_are_refused_and_nothing_of_them_is_kept(make_rig, x):
    rig = make_rig(queued_requests=2)
    session = await rig.open("a")
    first, second = rig.send(session, x[0], 0), rig.send(session, x[1], 1)
    with pytest.raises(QueueFull) as refused:
        rig.send(session, x[2], 2)
    assert refused.value.limit == 2
    await first.outcome()
    await second.outcome()
    assert rig.sessions.t(session) == 2
    await rig.step(session, x[2], 2)


async def test_more_rows_than_the_limit_are_refused_unless_nothing_else_waits(make_rig, x):
    rig = make_rig(queued_rows=4)
    session = await rig.open("a")
    long = rig.send(session, x[:6], 0)
    with pytest.raises(QueueFull):
        rig.send(session, x[6], 6)
    await long.outcome()
    await rig.step(session, x[6], 6)


async def test_pages_give_every_open_session_once(rig):
    for name in "abcde":
        await rig.open(name)
    await rig.sessions.close("b")
    seen, following = [], None
    while following != "":
        page, following = await rig.sessions.page(following or "", 2, "", tenant=DEFAULT_TENANT)
        assert len(page) <= 2
        seen += [standing.record.session_id for standing in page]
    assert sorted(seen) == ["a", "c", "d", "e"]


async def test_others_take_turns_while_a_long_page_is_listed(make_rig):
    rig = make_rig(max_sessions=600)
    for number in range(600):
        await rig.open(f"s{number}")
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    page, _ = await rig.sessions.page("", 1_000, "", tenant=DEFAULT_TENANT)
    counting.cancel()
    assert len(page) == 600
    assert turns >= 4


async def test_a_page_can_be_of_one_model(make_rig, networks):
    rig = make_rig(model_of(networks["lstm"]), model_of(networks["gru"]))
    for name, model in (("a", "gru"), ("b", "lstm"), ("c", "gru")):
        await rig.open(name, model=model)
    found, following = await rig.sessions.page("", 10, "gru", tenant=DEFAULT_TENANT)
    assert sorted(standing.record.session_id for standing in found) == ["a", "c"]
    assert following == ""


async def test_a_refusal_keeps_its_place_behind_the_steps_before_it(rig, x):
    session = await rig.open("a")
    step, refusal = rig.send(session, x[:4], 0), Caller()
    assert rig.sessions.refuse("a", StepAhead("a", 9, 0), refusal, held_bytes=0)
    assert not refusal.answered
    await step.outcome()
    assert isinstance(await refusal.error(), StepAhead)
    assert rig.sessions.t(session) == 4


async def test_a_refusal_with_nothing_before_it_is_the_callers_to_deliver(rig):
    await rig.open("a")
    refusal = Caller()
    assert not rig.sessions.refuse("a", StepAhead("a", 9, 0), refusal, held_bytes=0)
    assert not rig.sessions.refuse("never", SessionUnknown("never"), refusal, held_bytes=0)
    assert not refusal.answered


async def test_opened_and_closed_sessions_are_counted(rig):
    await rig.open("a")
    await rig.open("b")
    await rig.sessions.close("a")
    rig.clock.advance(IDLE_SECONDS)
    await rig.sessions.sweep()
    count = rig.registry.get_sample_value
    assert count("stepstate_sessions_opened_total", {"model": "lstm", "version": "1"}) == 2
    assert count("stepstate_sessions_closed_total", {"reason": "closed"}) == 1
    assert count("stepstate_sessions_closed_total", {"reason": "expired"}) == 1


async def test_a_session_that_the_store_did_not_take_leaves_nothing_behind(make_rig):
    store = SlowStore(fails=True)
    store.gate.open()
    rig = make_rig(store=store, max_sessions=1)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await rig.open("a")
    assert len(rig.sessions) == rig.scheduler.open_sessions == 0
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("a")


async def test_a_session_takes_no_steps_before_the_store_has_it(make_rig):
    store = SlowStore()
    rig = make_rig(store=store)
    opening = asyncio.create_task(rig.open("a"))
    await rounds(2)
    assert rig.sessions.find("a") is None
    wanted = asyncio.create_task(rig.sessions.get("a"))
    await rounds(2)
    assert not wanted.done()
    store.gate.open()
    session = await opening
    assert await wanted is session


async def test_sessions_that_the_store_is_still_taking_count(make_rig):
    store = SlowStore()
    rig = make_rig(store=store, max_sessions=1)
    opening = asyncio.create_task(rig.open("a"))
    again = asyncio.create_task(rig.open("a"))
    await rounds(2)
    with pytest.raises(SessionLimit):
        await rig.open("b")
    store.gate.open()
    await opening
    with pytest.raises(SessionExists):
        await again


async def test_the_time_of_row_0_is_kept(rig):
    start = datetime(2026, 1, 2, tzinfo=UTC)
    assert (await rig.open("a", start=start)).record.start_time == start


async def test_steps_of_many_sessions_share_forwards(rig, x, network):
    opened = [await rig.open(f"s{place}") for place in range(6)]
    for t in range(3):
        callers = [rig.send(session, x[t], t) for session in opened]
        y = [outputs(await caller.outcome())[0] for caller in callers]
        assert np.abs(y - network.offline(x[: t + 1])[-1]).max() <= 1e-5
    rows = rig.registry.get_sample_value(
        "stepstate_microbatch_rows_count", {"model": "lstm", "version": "1"}
    )
    assert rows == 3


def test_a_request_has_the_values_of_its_rows(model):
    assert request(None, [[1, 2, 3], [4, 5, 6]], 0, None).x == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("level", [0.0099, 0.9991, 1e-9, 0.9999999])
async def test_a_level_that_no_session_could_keep_is_refused(make_rig, level):
    rig = make_rig(model_of(forecasting_network()))
    with pytest.raises(InvalidField, match=r"0\.01 to 0\.999"):
        await rig.open(level=level)
