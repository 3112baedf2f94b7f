"""An operator begins a session's accuracy anew: in its line, kept, and nothing else changes."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from stepstate.errors import Draining, SessionUnknown, StaleOwner, StoreUnavailable
from stepstate.stores import Durability
from tests.offline import forecasting_network, rows
from tests.unit.rig import Clock, Lasting, Rig, model_of, rounds
from tests.unit.sessions.servers import Flaky


@pytest.fixture
def sensor():
    return model_of(forecasting_network())


def scored(rig: Rig, session) -> int:
    return rig.sessions.summary(session).quality.accuracy[0].lifetime.scored


async def test_a_reset_comes_after_the_steps_before_it_and_before_those_after_it(make_rig, sensor):
    rig = make_rig(sensor)
    session = await rig.open()
    before = [rig.send(session, part) for part in (rows(30), rows(1), rows(5))]
    reset = asyncio.create_task(rig.sessions.reset_accuracy("a"))
    await asyncio.sleep(0)
    after = [rig.send(session, part) for part in (rows(1), rows(3))]
    for caller in (*before, *after):
        await caller.outcome()
    standing = await reset
    assert standing.t == 36
    assert standing.quality.accuracy[0].lifetime.scored == 0
    assert scored(rig, session) == 4


async def test_a_reset_changes_nothing_that_a_session_computes(make_rig, sensor):
    rig = make_rig(sensor)
    x = rows(60)
    sessions = [await rig.open(name) for name in "ab"]
    for session in sessions:
        await rig.y(session, x[:40])
    await rig.sessions.reset_accuracy("a")
    y = [await rig.y(session, x[40:]) for session in sessions]
    assert np.array_equal(*y)
    told = [rig.sessions.summary(session).quality for session in sessions]
    assert [one.accuracy[0].lifetime.scored for one in told] == [20, 59]
    for one, other in zip(told[0].accuracy, told[1].accuracy, strict=True):
        assert one.offset == other.offset
    states = rig.scheduler.engine.read_states(np.array([session.slot for session in sessions]))
    untracked = rig.scheduler.engine.layout.tracked_from
    assert states[0, :untracked].tobytes() == states[1, :untracked].tobytes()


async def test_a_model_that_tracks_nothing_has_nothing_to_reset(rig):
    session = await rig.open()
    await rig.y(session, np.ones((3, 3)))
    assert (await rig.sessions.reset_accuracy("a")).t == 3
    with pytest.raises(SessionUnknown):
        await rig.sessions.reset_accuracy("b")


@pytest.mark.parametrize("durability", Durability)
async def test_a_reset_is_kept_by_whoever_has_the_session_next(make_rig, sensor, durability):
    clock = Clock()
    store = Lasting(clock)
    rig = make_rig(sensor, store=store, clock=clock)
    session = await rig.open(durability=durability)
    await rig.y(session, rows(40))
    await rig.sessions.writer.save([session])  # its rows are in the store, with their scores
    await rig.sessions.reset_accuracy("a")
    if durability is Durability.NONE:  # kept when it leaves
        await rig.sessions.drain()
    other = make_rig(sensor, store=store, clock=clock, owner="there")
    taken = await other.sessions.get("a")
    assert (other.sessions.t(taken), scored(other, taken)) == (40, 0)


async def test_a_reset_that_could_not_be_saved_says_so_and_is_kept_with_the_next_save(
    make_rig, sensor
):
    """Its t is durable already, so that a drain would have nothing to write."""
    clock = Clock()
    store = Flaky(clock)
    rig = make_rig(sensor, store=store, clock=clock)
    session = await rig.open(durability=Durability.ASYNC)
    await rig.y(session, rows(40))
    await rig.sessions.writer.save([session])
    store.away = True
    with pytest.raises(StoreUnavailable):
        await rig.sessions.reset_accuracy("a")
    store.away = False
    assert scored(rig, session) == 0
    await rig.sessions.drain()
    other = make_rig(sensor, store=store, clock=clock, owner="there")
    assert scored(other, await other.sessions.get("a")) == 0


async def test_a_reset_of_a_session_that_another_server_has_taken_is_refused(make_rig, sensor):
    clock = Clock()
    store = Lasting(clock)
    rig = make_rig(sensor, store=store, clock=clock)
    session = await rig.open(durability=Durability.ASYNC)
    await rig.y(session, rows(40))
    await rig.sessions.writer.save([session])
    other = make_rig(sensor, store=store, clock=clock, owner="there")
    taken = await other.sessions.get("a")
    with pytest.raises(StaleOwner):
        await rig.sessions.reset_accuracy("a")
    assert scored(other, taken) == 39


async def test_a_reset_is_answered_when_it_is_saved_whoever_else_saves_meanwhile(
    make_rig, sensor, monkeypatch
):
    clock = Clock()
    store = Flaky(clock)
    rig = make_rig(sensor, store=store, clock=clock)
    session = await rig.open(durability=Durability.ASYNC)
    await rig.y(session, rows(40))
    engine, plain, saving = rig.scheduler.engine, rig.scheduler.engine.reset_accuracy, []

    def reset(slot: int) -> None:
        plain(slot)
        saving.append(asyncio.create_task(rig.sessions.writer.save_round()))

    async def fail_late(saves):
        await rounds(5)
        raise StoreUnavailable("no answer in time")

    monkeypatch.setattr(engine, "reset_accuracy", reset)
    monkeypatch.setattr(store, "save", fail_late)
    before = rig.send(session, rows(1))  # so that the reset waits for its turn
    with pytest.raises(StoreUnavailable):
        await rig.sessions.reset_accuracy("a")
    await before.outcome()
    await asyncio.gather(*saving, return_exceptions=True)
    assert session.changed


async def test_a_draining_server_resets_nothing(make_rig, sensor):
    """It would take back a lease that the drain has given up."""
    clock = Clock()
    store = Lasting(clock)
    rig = make_rig(sensor, store=store, clock=clock)
    session = await rig.open(durability=Durability.ASYNC)
    await rig.y(session, rows(40))
    await rig.sessions.drain()
    with pytest.raises(Draining):
        await rig.sessions.reset_accuracy("a")
    assert (await store.find("a")).owner == ""
