"""Sessions come and go between the arena and the store: loads, spills and their limits."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from stepstate.errors import (
    Draining,
    QueueFull,
    SessionExpired,
    SessionLimit,
    SessionLost,
    SessionUnknown,
    SessionUnreadable,
    SnapshotModelMismatch,
    StepPositionUnknown,
    StoreUnavailable,
)
from stepstate.sessions import slots
from stepstate.stores import Durability
from tests.unit.rig import (
    IDLE_SECONDS,
    rounds,
    rows_of,
)
from tests.unit.sessions.servers import CLOSE, count, play, printed


def hold_saves(store) -> asyncio.Event:
    """From now on saves wait until the returned event is set."""
    gate, save = asyncio.Event(), store.save

    async def held(saves):
        await gate.wait()
        return await save(saves)

    store.save = held
    return gate


@pytest.fixture
def x(network):
    return rows_of(network, 40)


@pytest.fixture
def rig(start):
    return start()


async def test_when_slots_run_out_the_longest_idle_go_to_the_store_and_come_back(
    start, clock, x, network
):
    rig = start(max_sessions=4)
    for place in range(12):
        clock.advance(0.1)
        await rig.open(f"s{place}")
        await play(rig, f"s{place}", x[:2], 0)
    assert len(rig.sessions) <= 4
    for t in range(2, 6):
        for place in range(12):
            clock.advance(0.1)
            y = await play(rig, f"s{place}", x[t : t + 1], t)
            assert np.abs(y - network.offline(x[: t + 1])[-1]).max() <= CLOSE
    assert len(rig.sessions) <= 4
    assert count(rig, "stepstate_session_spills_total") >= 40
    assert count(rig, "stepstate_session_restores_total") >= 40
    assert count(rig, "stepstate_session_takeovers_total") == 0


async def test_the_session_stepped_last_stays(start, clock, x):
    rig = start(max_sessions=2)
    for name in "ab":
        await rig.open(name)
    clock.advance(1)
    await play(rig, "a", x[:1], 0)
    await rig.open("c")
    assert not (await rig.sessions.look("b")).resident


async def test_sessions_without_durability_survive_a_spill(start, clock, x, network):
    rig = start(max_sessions=2)
    await rig.open("a", durability=Durability.NONE)
    await play(rig, "a", x[:4], 0)
    clock.advance(1)
    for name in "bcd":
        await rig.open(name)
    y = await play(rig, "a", x[4:6], 4)
    assert np.abs(y - network.offline(x[:6])[4:]).max() <= CLOSE


async def test_a_step_that_comes_during_a_spill_is_not_lost(start, store, clock, x, network):
    rig = start(max_sessions=2)
    await rig.open("a")
    await play(rig, "a", x[:3], 0)
    clock.advance(1)
    await rig.open("b")
    gate = hold_saves(store)
    opening = asyncio.create_task(rig.open("c"))
    await rounds(3)
    assert rig.sessions.find("a") is None
    stepping = asyncio.create_task(play(rig, "a", x[3:5], 3))
    await rounds(3)
    gate.set()
    await opening
    assert np.abs(await stepping - network.offline(x[:5])[3:]).max() <= CLOSE


async def test_a_round_of_snapshots_does_not_take_back_the_lease_of_a_session_that_leaves(
    start, store, clock, x
):
    rig = start(max_sessions=1)
    await rig.open("a")
    await play(rig, "a", x[:3], 0)
    gate = hold_saves(store)
    opening = asyncio.create_task(rig.open("b"))
    await rounds(3)
    saving = asyncio.create_task(rig.sessions.writer.save_round())
    await rounds(3)
    gate.set()
    await asyncio.gather(opening, saving)
    assert (await store.find("a")).owner == ""


async def test_a_round_of_snapshots_does_not_take_leases_back_from_a_drain(start, store, x):
    rig = start()
    await rig.open("a")
    await play(rig, "a", x[:3], 0)
    gate = hold_saves(store)
    draining = asyncio.create_task(rig.sessions.drain())
    await rounds(3)
    saving = asyncio.create_task(rig.sessions.writer.save_round())
    await rounds(3)
    gate.set()
    await asyncio.gather(draining, saving)
    assert (await store.find("a")).owner == ""


async def test_a_spill_that_the_store_refuses_leaves_all_as_it_was(start, store, x, network):
    rig = start(max_sessions=1)
    await rig.open("a")
    await play(rig, "a", x[:3], 0)
    store.away = True
    with pytest.raises(StoreUnavailable):
        await rig.open("b")
    store.away = False
    await rig.sessions.writer.save_round()
    y = await play(rig, "a", x[3:5], 3)
    assert np.abs(y - network.offline(x[:5])[3:]).max() <= CLOSE
    await rig.open("b")


@pytest.mark.parametrize("durability", Durability)
async def test_a_spill_without_an_answer_renews_the_lease_before_the_next_step(  # noqa: PLR0917
    start, store, clock, x, network, durability
):
    first = start(max_sessions=1)
    session = await first.open("a", durability=durability)
    await play(first, "a", x[:3], 0)
    clock.advance(2)
    store.away = store.late = True
    with pytest.raises(StoreUnavailable):
        await first.open("b")
    with pytest.raises(StoreUnavailable, match="lease"):
        await first.step(session, x[3], 3)
    store.away = False
    await first.sessions.writer.save_round()
    y = await play(first, "a", x[3:6], 3)
    assert np.abs(y - network.offline(x[:6])[3:]).max() <= CLOSE
    second = start()
    if durability is Durability.NONE:
        with pytest.raises(SessionLost):
            await second.sessions.get("a")
    elif durability is Durability.ASYNC:
        with pytest.raises(StepPositionUnknown):
            await second.step(await second.sessions.get("a"), x[6])
    else:
        assert second.sessions.t(await second.sessions.get("a")) == 6


async def test_when_every_resident_session_is_busy_a_load_is_refused_for_now(
    start, store, x, monkeypatch
):
    rig = start(max_sessions=1)
    session = await rig.open("a", durability=Durability.SYNC)
    gate = hold_saves(store)
    caller = rig.send(session, x[0], 0)
    monkeypatch.setattr(slots, "ROOM_SECONDS", 0.05)
    with pytest.raises(QueueFull, match="all of them busy"):
        await rig.open("b")
    monkeypatch.undo()
    gate.set()
    await caller.outcome()
    await rig.open("b")


async def test_waiting_for_room_in_vain_leaves_nothing_behind(start, store, x, monkeypatch):
    rig = start(max_sessions=2)
    busy = [await rig.open(name, durability=Durability.SYNC) for name in "ab"]
    gate = hold_saves(store)
    callers = [rig.send(session, x[0], 0) for session in busy]
    monkeypatch.setattr(slots, "ROOM_SECONDS", 0.05)
    given_up = asyncio.create_task(rig.open("c"))
    await rounds(3)
    given_up.cancel()
    with pytest.raises(QueueFull):
        await rig.open("d")
    monkeypatch.undo()
    gate.set()
    for caller in callers:
        await caller.outcome()
    for name in "efgh":
        await rig.open(name)
    for name in "ab":
        await rig.sessions.close(name)
    await asyncio.gather(*(rig.sessions.get(name) for name in "efgh"))
    assert len(rig.sessions) <= 2


async def test_open_sessions_are_bounded_wherever_they_are(start):
    rig = start(max_sessions=2, stored_sessions=3)
    for name in "abc":
        await rig.open(name)
    with pytest.raises(SessionLimit) as refused:
        await rig.open("d")
    assert refused.value.limit == 3
    await rig.sessions.close("a")
    await rig.open("d")


async def test_spilled_sessions_expire_too(start, clock, x):
    rig = start(max_sessions=1)
    await rig.open("a", idle=5.0)
    await rig.open("b")
    clock.advance(5)
    for _ in range(2):
        with pytest.raises(SessionExpired) as told:
            await rig.sessions.get("a")
        assert told.value.idle_timeout_seconds == 5.0


async def test_a_sweep_ends_spilled_sessions_whose_time_is_up(start, store, clock):
    rig = start(max_sessions=1)
    for name in "abc":
        await rig.open(name, idle=5.0)
    await rig.open("d")
    clock.advance(100)
    assert await rig.sessions.sweep() == 3 + 1  # "d" lives IDLE_SECONDS
    assert await store.count() == {}


async def test_a_living_session_without_durability_is_not_swept_by_another_server(start, clock, x):
    one, two = start(), start()
    session = await one.open("a", durability=Durability.NONE)
    for t in range(20):
        clock.advance(IDLE_SECONDS / 3)
        await one.step(session, x[t], t)
        await one.sessions.writer.save_round()
        assert await two.sessions.sweep() == 0
        assert await one.sessions.sweep() == 0
    await one.step(session, x[20], 20)


async def test_many_waiting_for_one_session_load_it_once(start, x):
    first = start()
    await first.open("a", durability=Durability.SYNC)
    second = start()
    got = await asyncio.gather(*(second.sessions.get("a") for _ in range(20)))
    assert len(set(map(id, got))) == 1
    assert count(second, "stepstate_session_restores_total") == 1


async def test_a_draining_server_takes_no_session(start):
    first = start()
    await first.open("a")
    second = start()
    await second.sessions.drain()
    with pytest.raises(Draining):
        await second.sessions.get("a")
    assert (await first.sessions.look("a")).resident


async def test_a_session_of_a_model_that_is_not_here_stays_where_it_is(start, store, networks):
    first = start(printed(networks["gru"], "11"))
    await first.open("a")
    for models in ([], [printed(networks["gru"], "22")]):
        second = start(*models)
        with pytest.raises(SnapshotModelMismatch, match="gru/1"):
            await second.sessions.get("a")
    assert (await store.find("a")).owner == "server-0"


@pytest.mark.parametrize("expired", [False, True])
async def test_a_session_goes_on_under_a_fingerprint_that_its_model_had_before(
    start, networks, clock, x, expired
):
    """The description was part of it once: the very same model has two."""
    before, now = printed(networks["lstm"], "11"), printed(networks["lstm"], "22")
    first = start(before)
    await first.open("a", durability=Durability.SYNC)
    whole = [await play(first, "a", x[:5], 0)]
    await first.sessions.drain()
    second = start(replace(now, former_fingerprint=before.manifest.fingerprint))
    if expired:
        clock.advance(IDLE_SECONDS + 1)
        await second.sessions.restore_expired("a")
    whole.append(await play(second, "a", x[5:10], 5))
    want = networks["lstm"].offline(x[:10])
    assert np.abs(np.concatenate(whole) - want).max() <= 1e-5


async def test_a_damaged_snapshot_in_the_store_is_told_and_kept(start, store, x):
    first = start()
    await first.open("a", durability=Durability.SYNC)
    good = store.snapshot("a")
    store.overwrite("a", good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    second = start()
    with pytest.raises(SessionUnreadable, match="checksum"):
        await second.sessions.get("a")
    assert len(second.sessions) == second.scheduler.open_sessions == 0
    store.overwrite("a", good)
    await play(second, "a", x[:2], 0)


async def test_a_drain_does_not_wait_for_those_who_keep_asking(start, store, monkeypatch):
    rig, plain, draining = start(), store.find, asyncio.Event()
    await rig.open("a", durability=Durability.ASYNC)

    async def slow(session_id: str) -> object:
        await rounds(3)
        return await plain(session_id)

    async def ask(session_id: str) -> None:
        while not draining.is_set():
            with pytest.raises(SessionUnknown):
                await rig.sessions.look(session_id)

    monkeypatch.setattr(store, "find", slow)
    asking = asyncio.gather(*(ask(f"unknown-{number}") for number in range(4)))
    await rounds(5)
    try:
        await asyncio.wait_for(rig.sessions.drain(), 10)
    finally:
        draining.set()
        await asking
    assert (await store.find("a")).owner == ""
