"""What survives a crash, what does not, and what happens while the store is away."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from stepstate.errors import (
    InvalidField,
    SessionLost,
    StepAhead,
    StepPositionUnknown,
    StoreUnavailable,
)
from stepstate.stores import Durability
from tests.unit.rig import (
    model_of,
    outputs,
    rounds,
    rows_of,
    timed_network,
)
from tests.unit.sessions.servers import CLOSE, count, play


@pytest.fixture
def x(network):
    return rows_of(network, 40)


@pytest.fixture
def rig(start):
    return start()


async def test_a_sync_session_goes_on_where_it_was_after_a_crash(start, x, network):
    first = start()
    await first.open("a", durability=Durability.SYNC)
    before = await play(first, "a", x[:10], 0)
    second = start()
    after = await play(second, "a", x[10:20], 10)
    want = network.offline(x[:20])
    assert np.abs(np.concatenate((before, after)) - want).max() <= CLOSE


async def test_every_reply_of_a_sync_session_is_durable(start, x):
    rig = start()
    session = await rig.open("a", durability=Durability.SYNC)
    for t in range(3):
        step = await rig.step(session, x[t], t)
        assert step.durable_t == step.t_after == t + 1
    step = await rig.step(session, x[3:9], 3)
    assert step.durable_t == step.t_after == 9


async def test_an_async_session_goes_back_to_what_was_saved_and_says_so(start, x, network):
    first = start()
    session = await first.open("a")
    await play(first, "a", x[:6], 0)
    assert (await first.step(session, x[6], 6)).durable_t == 0
    await first.sessions.writer.save_round()
    step = await first.step(session, x[7], 7)
    assert (step.t_after, step.durable_t) == (8, 7)
    second = start()
    session = await second.sessions.get("a")
    with pytest.raises(StepAhead) as refused:
        await second.step(session, x[8], 8)
    assert refused.value.expected_t == 7
    y = await play(second, "a", x[7:10], 7)
    assert np.abs(y - network.offline(x[:10])[7:]).max() <= CLOSE


async def test_a_retry_after_a_crash_gets_the_same_outputs(start, x):
    first = start()
    session = await first.open("a", durability=Durability.SYNC)
    single = await first.step(session, x[0], 0)
    many = await first.step(session, x[1:6], 1)
    inspected = await first.step(session, x[6:8], 6, inspect=True)
    second = start()
    session = await second.sessions.get("a")
    for reply, rows, t, inspect in (
        (single, x[0], 0, False),
        (many, x[1:6], 1, False),
        (inspected, x[6:8], 6, True),
    ):
        again = await second.step(session, rows, t, inspect=inspect)
        assert again.replayed
        assert (again.y, again.t_after) == (reply.y, reply.t_after)
        assert repr(again.layers) == repr(reply.layers)
    assert second.sessions.t(session) == 8


async def test_a_session_without_durability_is_lost_in_a_crash_and_told_so(start, x):
    first = start()
    await first.open("a", durability=Durability.NONE)
    assert (await play(first, "a", x[:3], 0)).shape == (3, 2)
    second = start()
    with pytest.raises(SessionLost, match="durability none"):
        await second.sessions.look("a")
    for _ in range(2):
        with pytest.raises(SessionLost):
            await second.sessions.get("a")
    assert (
        second.registry.get_sample_value("stepstate_sessions_closed_total", {"reason": "lost"}) == 1
    )
    assert second.sessions.t(await second.open("a")) == 0


@pytest.mark.parametrize("durability", Durability)
async def test_a_drained_server_leaves_every_session_whole(start, x, network, durability):
    first = start()
    await first.open("a", durability=durability)
    await play(first, "a", x[:5], 0)
    await first.sessions.drain()
    second = start()
    session = await second.sessions.get("a")
    y = await second.y(session, x[5])  # no t: nothing was lost, so none is asked for
    assert np.abs(y - network.offline(x[:6])[5:]).max() <= CLOSE
    assert count(second, "stepstate_session_takeovers_total") == 0


async def test_a_request_without_t_is_refused_where_a_crash_may_have_lost_rows(start, x):
    first = start()
    await first.open("a")
    await play(first, "a", x[:5], 0)
    second = start()
    session = await second.sessions.get("a")
    with pytest.raises(StepPositionUnknown) as refused:
        await second.step(session, x[5])
    assert refused.value.expected_t == 0
    await second.step(session, x[0], 0)
    await second.step(session, x[1])


async def test_a_sync_session_needs_no_t_after_a_crash(start, x):
    first = start()
    await first.open("a", durability=Durability.SYNC)
    await play(first, "a", x[:5], 0)
    second = start()
    step = await second.step(await second.sessions.get("a"), x[5])
    assert step.t_after == 6


async def test_the_calendar_goes_on_after_a_restart(start, clock):
    network, profiles = timed_network()
    first = start(model_of(network, profiles))
    begin = datetime(2026, 1, 2, 10, 20, tzinfo=UTC)
    whole = await first.open("whole", start=begin)
    await first.open("cut", start=begin, durability=Durability.SYNC)
    rows = np.ones((6, 2), np.float32)
    want = np.concatenate([await first.y(whole, row) for row in rows])
    await play(first, "cut", rows[:3], 0)
    second = start(model_of(network, profiles))
    got = await play(second, "cut", rows[3:], 3)
    assert np.abs(got - want[3:]).max() <= 1e-4


async def test_memory_only_servers_refuse_durability_and_default_to_none(make_rig):
    rig = make_rig()
    for durability in (Durability.ASYNC, Durability.SYNC):
        with pytest.raises(InvalidField, match="durability"):
            await rig.open("a", durability=durability)
    assert (await rig.open("a")).record.durability is Durability.NONE


# The store is away.


async def test_a_sync_step_that_is_not_saved_is_unavailable_and_changes_nothing(
    rig, store, x, network
):
    session = await rig.open("a", durability=Durability.SYNC)
    await play(rig, "a", x[:3], 0)
    store.away = True
    with pytest.raises(StoreUnavailable):
        await rig.step(session, x[3], 3)
    with pytest.raises(StoreUnavailable):
        await rig.sessions.get("a")
    store.away = False
    assert rig.sessions.t(await rig.sessions.get("a")) == 3
    y = await play(rig, "a", x[3:6], 3)
    assert np.abs(y - network.offline(x[:6])[3:]).max() <= CLOSE


async def test_a_commit_that_happened_without_an_answer_is_found_by_a_retry(rig, store, x, network):
    session = await rig.open("a", durability=Durability.SYNC)
    await play(rig, "a", x[:3], 0)
    store.away = store.late = True
    with pytest.raises(StoreUnavailable):
        await rig.step(session, x[3], 3)
    store.away = False
    step = await rig.step(await rig.sessions.get("a"), x[3], 3)
    assert step.replayed
    assert np.abs(outputs(step) - network.offline(x[:4])[3:]).max() <= CLOSE


async def test_steps_that_wait_behind_a_failed_commit_fail_too(rig, store, x):
    session = await rig.open("a", durability=Durability.SYNC)
    store.away = True
    callers = [rig.send(session, x[t], t) for t in range(4)]
    for caller in callers:
        assert isinstance(await caller.error(), StoreUnavailable)
    await rounds(3)
    assert len(rig.sessions) == rig.scheduler.open_sessions == 0
    store.away = False
    assert rig.sessions.t(await rig.sessions.get("a")) == 0


async def test_async_sessions_go_on_without_the_store_up_to_their_backlog(start, store, x, network):
    rig = start(backlog_rows=5)
    session = await rig.open("a")
    store.away = True
    y = await play(rig, "a", x[:5], 0)
    with pytest.raises(StoreUnavailable, match="5 rows"):
        await rig.step(session, x[5], 5)
    with pytest.raises(StoreUnavailable):
        await rig.sessions.writer.save_round()
    assert rig.sessions.undurable_rows == 5
    assert not rig.sessions.store_up
    store.away = False
    await rig.sessions.writer.save_round()
    assert rig.sessions.undurable_rows == 0
    y = np.concatenate((y, await play(rig, "a", x[5:9], 5)))
    assert np.abs(y - network.offline(x[:9])).max() <= CLOSE


async def test_a_store_that_lost_its_sessions_gets_them_again_from_the_arena(
    rig, store, start, x, network
):
    session = await rig.open("a")
    await play(rig, "a", x[:4], 0)
    store.lose_all()
    epoch = session.epoch
    await rig.sessions.writer.save_round()
    assert session.epoch > epoch
    assert rig.sessions.undurable_rows == 0
    second = start()
    y = await play(second, "a", x[4:6], 4)
    assert np.abs(y - network.offline(x[:6])[4:]).max() <= CLOSE


@pytest.mark.parametrize("durability", Durability)
async def test_an_acquire_without_an_answer_does_not_make_an_old_snapshot_good(
    start, store, x, durability
):
    one, two = start(), start()
    await one.open("a", durability=durability)
    await play(one, "a", x[:3], 0)
    store.away = store.late = True
    with pytest.raises(StoreUnavailable):
        await two.sessions.get("a")
    store.away = False
    if durability is Durability.NONE:
        with pytest.raises(SessionLost):
            await two.sessions.get("a")
    elif durability is Durability.ASYNC:
        with pytest.raises(StepPositionUnknown):
            await two.step(await two.sessions.get("a"), x[3])
    else:
        assert two.sessions.t(await two.sessions.get("a")) == 3
