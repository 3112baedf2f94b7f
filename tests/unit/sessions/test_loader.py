"""Sessions that outlive their server: several rigs on one store are servers, one after another."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from stepstate.errors import (
    Draining,
    InvalidField,
    QueueFull,
    SessionExists,
    SessionExpired,
    SessionLimit,
    SessionLost,
    SessionUnknown,
    SessionUnreadable,
    SnapshotCorrupt,
    SnapshotForeign,
    StaleOwner,
    StepAhead,
    StepTooOld,
    StepUnplaced,
    StoreUnavailable,
)
from stepstate.models import Model
from stepstate.sessions import room
from stepstate.sessions.opening import Copying
from stepstate.sessions.snapshot import decode, encode
from stepstate.stores import Durability
from tests.networks import Network, make_network
from tests.unit.rig import (
    IDLE_SECONDS,
    Clock,
    Lasting,
    Rig,
    model_of,
    outputs,
    rounds,
    rows_of,
    timed_network,
)

CLOSE = 1e-5
AS_IT_IS = Copying("", None, None)


class Flaky(Lasting):
    """A store that is away when a test says so; `late` still does what it is asked."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.away = False
        self.late = False

    async def save(self, saves):
        if self.away and not self.late:
            raise StoreUnavailable("it is away")
        verdicts = await super().save(saves)
        if self.away:
            raise StoreUnavailable("no answer in time")
        return verdicts

    async def acquire(self, session_id, **options):
        if self.away and not self.late:
            raise StoreUnavailable("it is away")
        found = await super().acquire(session_id, **options)
        if self.away:
            raise StoreUnavailable("no answer in time")
        return found

    async def find(self, session_id):
        if self.away:
            raise StoreUnavailable("it is away")
        return await super().find(session_id)


@pytest.fixture
def x(network):
    return rows_of(network, 40)


@pytest.fixture
def store(clock):
    return Flaky(clock)


@pytest.fixture
def start(make_rig, store, clock):
    """Starts a server on the store; the one before it is as dead as after kill -9."""

    def start(*models, **options):
        options = {"owner": f"server-{len(started)}", "replay_rows": 8} | options
        made = make_rig(*models, store=store, clock=clock, **options)
        started.append(made)
        return made

    started: list[Rig] = []
    return start


@pytest.fixture
def rig(start):
    return start()


async def play(rig: Rig, session_id: str, x: np.ndarray, t: int) -> np.ndarray:
    """Steps rows one by one from t on; outputs [T, O]."""
    y = []
    for place, row in enumerate(x):
        session = await rig.sessions.get(session_id)
        y.append(outputs(await rig.step(session, row, t + place)))
    return np.concatenate(y)


def printed(network: Network, digits: str) -> Model:
    """A network as a model with a fingerprint."""
    manifest = network.manifest | {"fingerprint": f"sha256:{digits * 32}"}
    return model_of(replace(network, manifest=manifest))


def count(rig: Rig, name: str) -> float:
    """A counter of the LSTM's."""
    return rig.registry.get_sample_value(name, {"model": "lstm", "version": "1"})


# Durability.


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
    await first.sessions.saver.save_round()
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
    with pytest.raises(StepUnplaced) as refused:
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
    assert len(rig.sessions) == rig.lane.open_sessions == 0
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
        await rig.sessions.saver.save_round()
    assert rig.sessions.undurable_rows == 5
    assert not rig.sessions.store_up
    store.away = False
    await rig.sessions.saver.save_round()
    assert rig.sessions.undurable_rows == 0
    y = np.concatenate((y, await play(rig, "a", x[5:9], 5)))
    assert np.abs(y - network.offline(x[:9])).max() <= CLOSE


async def test_a_store_that_lost_its_sessions_gets_them_again_from_the_arena(
    rig, store, start, x, network
):
    session = await rig.open("a")
    await play(rig, "a", x[:4], 0)
    store._sessions.clear()
    epoch = session.epoch
    await rig.sessions.saver.save_round()
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
        with pytest.raises(StepUnplaced):
            await two.step(await two.sessions.get("a"), x[3])
    else:
        assert two.sessions.t(await two.sessions.get("a")) == 3


# One writer.


async def test_the_loser_of_a_sync_session_answers_aborted_and_forgets_its_copy(start, x, network):
    one, two = start(), start()
    session = await one.open("a", durability=Durability.SYNC)
    await play(one, "a", x[:3], 0)
    await play(two, "a", x[3:5], 3)
    callers = [one.send(session, x[5], None), one.send(session, x[6], None)]
    for caller in callers:
        error = await caller.error()
        assert isinstance(error, StaleOwner)
    assert (await callers[0].error()).expected_t == 5
    await rounds(3)
    assert len(one.sessions) == 0
    y = await play(one, "a", x[5:8], 5)  # and takes it back
    assert np.abs(y - network.offline(x[:8])[5:]).max() <= CLOSE
    assert count(one, "stepstate_session_takeovers_total") == 1


async def test_the_loser_of_an_async_session_notices_with_its_next_snapshot(start, x):
    one, two = start(), start()
    await one.open("a")
    await play(one, "a", x[:3], 0)
    await one.sessions.saver.save_round()
    await play(one, "a", x[3:5], 3)
    await play(two, "a", x[3:4], 3)
    await one.sessions.saver.save_round()
    await rounds(2)
    assert len(one.sessions) == 0
    fenced = {"reason": "fenced"}
    assert one.registry.get_sample_value("stepstate_snapshot_failures_total", fenced) == 1
    await two.sessions.saver.save_round()
    assert two.sessions.undurable_rows == 0


async def test_a_client_that_is_ahead_of_a_stale_copy_is_told_of_the_takeover(start, x):
    one, two = start(), start()
    session = await one.open("a", durability=Durability.SYNC)
    await play(one, "a", x[:2], 0)
    await play(two, "a", x[2:5], 2)
    callers = [one.send(session, x[t], t) for t in (5, 6)]
    for caller in callers:
        error = await caller.error()
        assert isinstance(error, StaleOwner)
        assert error.expected_t == 5
    await rounds(3)
    await play(one, "a", x[5:7], 5)


async def test_a_client_that_is_ahead_of_its_session_is_told_so(rig, x):
    session = await rig.open("a")
    callers = [rig.send(session, x[0], t) for t in (3, 4, 0)]
    for caller in callers[:2]:
        assert isinstance(await caller.error(), StepAhead)
    assert (await callers[2].outcome()).t_after == 1


async def test_no_rows_are_asked_for_again_while_the_store_can_not_tell_who_has_them(
    start, store, x
):
    one, two = start(), start()
    session = await one.open("a", durability=Durability.SYNC)
    await play(one, "a", x[:3], 0)
    await play(two, "a", x[3:5], 3)
    store.away = True
    with pytest.raises(StoreUnavailable):
        await one.step(session, x[5], 5)
    store.away = False
    with pytest.raises(StaleOwner):
        await one.step(session, x[5], 5)


async def test_closing_a_session_that_another_server_took_is_refused(start, x):
    one, two = start(), start()
    await one.open("a")
    await play(two, "a", x[:2], 0)
    with pytest.raises(StaleOwner):
        await one.sessions.close("a")
    assert await one.sessions.close("a") == 0  # taken back first, as two had not saved it


async def test_of_two_servers_that_open_one_id_only_one_succeeds(start):
    one, two = start(), start()
    await one.open("a")
    with pytest.raises(SessionExists):
        await two.open("a")


async def test_looking_takes_nothing_over(start, x):
    one, two = start(), start()
    session = await one.open("a", durability=Durability.SYNC)
    await play(one, "a", x[:3], 0)
    standing = await two.sessions.look("a")
    assert (standing.t, standing.durable_t, standing.resident) == (3, 3, False)
    assert standing.owner == "server-0"
    (listed,), following = await two.sessions.page("", 10, "")
    assert (listed.record.session_id, listed.t, following) == ("a", 3, "")
    await one.step(session, x[3], 3)


# Residency.


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
    gate = asyncio.Event()
    save = store.save

    async def slow(saves):
        await gate.wait()
        return await save(saves)

    await rig.open("a")
    await play(rig, "a", x[:3], 0)
    clock.advance(1)
    await rig.open("b")
    store.save = slow
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
    gate = asyncio.Event()
    save = store.save

    async def slow(saves):
        await gate.wait()
        return await save(saves)

    store.save = slow
    opening = asyncio.create_task(rig.open("b"))
    await rounds(3)
    saving = asyncio.create_task(rig.sessions.saver.save_round())
    await rounds(3)
    gate.set()
    await asyncio.gather(opening, saving)
    assert (await store.find("a")).owner == ""


async def test_a_round_of_snapshots_does_not_take_leases_back_from_a_drain(start, store, x):
    rig = start()
    await rig.open("a")
    await play(rig, "a", x[:3], 0)
    gate = asyncio.Event()
    save = store.save

    async def slow(saves):
        await gate.wait()
        return await save(saves)

    store.save = slow
    draining = asyncio.create_task(rig.sessions.drain())
    await rounds(3)
    saving = asyncio.create_task(rig.sessions.saver.save_round())
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
    await rig.sessions.saver.save_round()
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
    await first.sessions.saver.save_round()
    y = await play(first, "a", x[3:6], 3)
    assert np.abs(y - network.offline(x[:6])[3:]).max() <= CLOSE
    second = start()
    if durability is Durability.NONE:
        with pytest.raises(SessionLost):
            await second.sessions.get("a")
    elif durability is Durability.ASYNC:
        with pytest.raises(StepUnplaced):
            await second.step(await second.sessions.get("a"), x[6])
    else:
        assert second.sessions.t(await second.sessions.get("a")) == 6


async def test_when_every_resident_session_is_busy_a_load_is_refused_for_now(
    start, store, x, monkeypatch
):
    rig = start(max_sessions=1)
    session = await rig.open("a", durability=Durability.SYNC)
    gate = asyncio.Event()
    save = store.save

    async def slow(saves):
        await gate.wait()
        return await save(saves)

    store.save = slow
    caller = rig.send(session, x[0], 0)
    monkeypatch.setattr(room, "ROOM_SECONDS", 0.05)
    with pytest.raises(QueueFull, match="all of them busy"):
        await rig.open("b")
    monkeypatch.undo()
    gate.set()
    await caller.outcome()
    await rig.open("b")


async def test_waiting_for_room_in_vain_leaves_nothing_behind(start, store, x, monkeypatch):
    rig = start(max_sessions=2)
    busy = [await rig.open(name, durability=Durability.SYNC) for name in "ab"]
    gate = asyncio.Event()
    save = store.save

    async def slow(saves):
        await gate.wait()
        return await save(saves)

    store.save = slow
    callers = [rig.send(session, x[0], 0) for session in busy]
    monkeypatch.setattr(room, "ROOM_SECONDS", 0.05)
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
    rig = start(max_sessions=2, most_sessions=3)
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
        await one.sessions.saver.save_round()
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
        with pytest.raises(SnapshotForeign, match="gru/1"):
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
    good = store._sessions["a"].snapshot
    store._sessions["a"].snapshot = good[:-9] + b"!" + good[-8:]
    second = start()
    with pytest.raises(SessionUnreadable, match="checksum"):
        await second.sessions.get("a")
    assert len(second.sessions) == second.lane.open_sessions == 0
    store._sessions["a"].snapshot = good
    await play(second, "a", x[:2], 0)


# Copies.


async def test_a_fork_goes_on_from_the_state_of_its_source_and_apart_from_it(rig, x, network):
    await rig.open("a")
    await play(rig, "a", x[:6], 0)
    fork = await rig.sessions.fork("a", Copying("b", None, None))
    assert rig.sessions.t(fork) == 6
    await play(rig, "a", x[10:13], 6)
    y = await play(rig, "b", x[6:9], 6)
    assert np.abs(y - network.offline(x[:9])[6:]).max() <= CLOSE
    assert fork.record.idle_timeout_seconds == IDLE_SECONDS


async def test_a_fork_has_the_steps_accepted_before_it_and_none_after(start, x, network):
    rig = start(chunk_rows=1)
    session = await rig.open("a")
    before = rig.send(session, x[:4], 0)
    forking = asyncio.create_task(rig.sessions.fork("a", Copying("b", None, None)))
    await asyncio.sleep(0)
    after = rig.send(session, x[4:6], 4)
    fork = await forking
    await before.outcome()
    await after.outcome()
    assert rig.sessions.t(fork) == 4
    y = await play(rig, "b", x[4:6], 4)
    assert np.abs(y - network.offline(x[:6])[4:]).max() <= CLOSE


async def test_a_fork_can_have_another_timeout_and_durability(rig):
    await rig.open("a")
    fork = await rig.sessions.fork("a", Copying("b", 7.0, Durability.SYNC))
    assert fork.record.idle_timeout_seconds == 7.0
    assert fork.record.durability is Durability.SYNC
    with pytest.raises(SessionExists):
        await rig.sessions.fork("a", Copying("b", None, None))
    with pytest.raises(InvalidField, match="session_id"):
        await rig.sessions.fork("a", Copying("b b", None, None))
    with pytest.raises(SessionUnknown):
        await rig.sessions.fork("never", Copying("c", None, None))


async def test_an_exported_session_goes_on_elsewhere_with_the_same_bytes(rig, make_rig, x, network):
    await rig.open("a")
    await play(rig, "a", x[:6], 0)
    snapshot, standing = await rig.sessions.export("a")
    assert standing.t == 6
    other = make_rig(replay_rows=8)  # another server, with a memory of its own
    session = await other.sessions.restore(snapshot, AS_IT_IS)
    assert (session.session_id, other.sessions.t(session)) == ("a", 6)
    assert session.record.durability is Durability.NONE
    assert (await other.sessions.export("a"))[0] != b""
    again = await other.step(session, x[5], 5)
    assert again.replayed
    assert (await other.y(session, x[6])).tobytes() == (await play(rig, "a", x[6:7], 6)).tobytes()


async def test_a_snapshot_can_be_imported_under_another_id(rig, x):
    await rig.open("a")
    await play(rig, "a", x[:3], 0)
    snapshot, _ = await rig.sessions.export("a")
    with pytest.raises(SessionExists):
        await rig.sessions.restore(snapshot, AS_IT_IS)
    session = await rig.sessions.restore(snapshot, Copying("b", None, None))
    assert rig.sessions.t(session) == 3


async def test_an_import_of_other_weights_is_refused(rig, make_rig, x):
    await rig.open("a")
    snapshot, _ = await rig.sessions.export("a")
    other = make_rig(printed(make_network("lstm", seed=77), "22"))
    with pytest.raises(SnapshotForeign) as refused:
        await other.sessions.restore(snapshot, AS_IT_IS)
    assert refused.value.loaded == other.lane.model.manifest.fingerprint
    assert len(other.sessions) == 0


async def test_an_import_whose_state_does_not_fit_its_model_is_refused(rig):
    await rig.open("a")
    snapshot = decode((await rig.sessions.export("a"))[0])
    cut = encode(replace(snapshot, state=snapshot.state[:-1]))
    with pytest.raises(SnapshotForeign):
        await rig.sessions.restore(cut, Copying("b", None, None))


async def test_an_import_that_is_no_snapshot_is_refused(rig):
    with pytest.raises(SnapshotCorrupt):
        await rig.sessions.restore(b"", AS_IT_IS)


async def test_a_shorter_replay_window_keeps_the_newest_rows(rig, make_rig, x):
    await rig.open("a")
    await play(rig, "a", x[:8], 0)
    snapshot, _ = await rig.sessions.export("a")
    small = make_rig(replay_rows=3)
    session = await small.sessions.restore(snapshot, AS_IT_IS)
    for t in (5, 6, 7):
        assert (await small.step(session, x[t], t)).replayed
    with pytest.raises(StepTooOld):
        await small.step(session, x[4], 4)


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
