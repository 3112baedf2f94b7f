"""Sessions that were idle for too long: kept, restored, deleted; in groups where they are many."""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest

from stepstate.config import LONGEST_IDLE_SECONDS
from stepstate.errors import (
    InvalidField,
    SessionClosed,
    SessionExists,
    SessionExpired,
    SessionLimit,
    SessionLost,
    SnapshotModelMismatch,
)
from stepstate.identity import DEFAULT_TENANT
from stepstate.sessions import CopyOptions, sweeper
from stepstate.stores import Durability, Tombstone
from tests.networks import make_network
from tests.unit.rig import (
    GRACE_SECONDS,
    IDLE_SECONDS,
    MAX_IDLE_SECONDS,
    Lasting,
    Rig,
    model_of,
    opening,
    rounds,
    rows_of,
)

DAY = 86_400.0


@pytest.fixture
def store(clock):
    return Lasting(clock)


@pytest.fixture
def rig(make_rig, store, clock):
    return make_rig(store=store, clock=clock)


@pytest.fixture
def x(network):
    return rows_of(network, 9)


def series(rig: Rig, name: str, **labels: str) -> float | None:
    return rig.registry.get_sample_value(f"stepstate_{name}", labels)


def deleted(rig: Rig) -> dict[str, float | None]:
    reasons = ("grace_over", "limit", "replaced")
    return {r: series(rig, "expired_sessions_deleted_total", reason=r) for r in reasons}


async def expire(rig: Rig, clock, *names: str) -> None:
    for name in names:
        await rig.open(name)
    clock.advance(IDLE_SECONDS)
    assert await rig.sessions.sweep() == len(names)


async def test_an_expired_session_says_how_to_restore_it_and_until_when(rig, clock):
    await expire(rig, clock, "a")
    for ask in (rig.sessions.get, rig.sessions.look, rig.sessions.export, rig.sessions.close):
        with pytest.raises(SessionExpired, match=r"`stepstate sessions restore a`") as told:
            await ask("a")
        assert told.value.restore_until in str(told.value)


async def test_an_expired_session_is_no_open_one_and_is_listed_on_request(rig, clock):
    await expire(rig, clock, "a")
    await rig.open("b")
    assert [
        s.record.session_id for s in (await rig.sessions.page("", 9, "", tenant=DEFAULT_TENANT))[0]
    ] == ["b"]
    shown = (await rig.sessions.page("", 9, "", expired=True, tenant=DEFAULT_TENANT))[0]
    left = {s.record.session_id: s.delete_seconds for s in shown}
    assert left == {"a": GRACE_SECONDS, "b": None}
    assert rig.sessions.expired == 1


async def test_after_its_grace_an_expired_session_is_deleted_logged_and_counted(rig, clock, caplog):
    await expire(rig, clock, "a", "b")
    clock.advance(GRACE_SECONDS - 1)
    with caplog.at_level(logging.INFO, logger="stepstate"):
        await rig.sessions.sweep()
        assert "deleted" not in caplog.text
        clock.advance(10)
        await rig.sessions.sweep()
    (line,) = [line for line in caplog.records if "deleted" in line.message]
    assert (line.reason, line.count, line.sessions) == ("grace_over", 2, "a b")
    assert deleted(rig) == {"grace_over": 2, "limit": 0, "replaced": 0}
    assert rig.sessions.expired == 0
    with pytest.raises(SessionExpired, match="was deleted"):
        await rig.sessions.restore_expired("a")


async def test_a_grace_of_other_length_may_be_set(make_rig, store, clock):
    rig = make_rig(store=store, clock=clock, grace_seconds=5.0)
    await expire(rig, clock, "a")
    clock.advance(6.0)
    await rig.sessions.sweep()
    assert deleted(rig)["grace_over"] == 1


async def test_open_and_expired_sessions_together_keep_the_bound(make_rig, store, clock, caplog):
    rig = make_rig(store=store, clock=clock, stored_sessions=4)
    await expire(rig, clock, "a")
    clock.advance(1)
    await expire(rig, clock, "b", "c")
    with caplog.at_level(logging.INFO, logger="stepstate"):
        for name in "def":
            await rig.open(name)
        clock.advance(10)
        await rig.sessions.sweep()
    assert deleted(rig) == {"grace_over": 0, "limit": 2, "replaced": 0}
    lines = [line.sessions.split() for line in caplog.records if "deleted" in line.message]
    assert {"a"} < {name for line in lines for name in line} < {"a", "b", "c"}
    assert await store.count_expired() == 1
    with pytest.raises(SessionExpired, match="was deleted"):
        await rig.sessions.get("a")


async def test_a_server_alone_keeps_the_bound_at_every_sweep(make_rig, clock):
    rig = make_rig(clock=clock, max_sessions=3)
    await expire(rig, clock, "a", "b")
    for count, names in enumerate(("cd", "e"), 1):
        for name in names:
            await rig.open(name)
        clock.advance(1)
        await rig.sessions.sweep()
        assert deleted(rig)["limit"] == count


@pytest.mark.parametrize("delays", [[1], [1, 4, 2], [2, 9, 5, 1, 3]])
async def test_servers_that_keep_the_bound_together_delete_little_more_than_one_would(
    make_rig, store, clock, monkeypatch, delays
):
    monkeypatch.setattr(sweeper, "GROUP", 4)
    monkeypatch.setattr(sweeper, "LOOKED_AT_ONCE", 8)
    plain, turns = store.end, itertools.cycle(delays)

    async def slow(*args: object) -> bool:
        await rounds(next(turns))
        return await plain(*args)

    monkeypatch.setattr(store, "end", slow)
    larger = make_rig(store=store, clock=clock, stored_sessions=200)
    names = [f"s{number}" for number in range(200)]
    for first in range(0, 200, 8):
        await expire(larger, clock, *names[first : first + 8])
    servers = [make_rig(store=store, clock=clock, stored_sessions=100, owner=o) for o in "abc"]
    sweeps = []
    for server in servers:
        sweeps.append(asyncio.create_task(server.sessions.sweep()))
        await rounds(7)
    await asyncio.gather(*sweeps)
    assert 100 - len(servers) * sweeper.LOOKED_AT_ONCE <= await store.count_expired() <= 100


@pytest.mark.parametrize("seen", [True, False])
async def test_an_id_that_is_opened_anew_replaces_its_expired_session(rig, clock, x, seen):
    session = await rig.open("a")
    await rig.step(session, x[0], 0)
    clock.advance(IDLE_SECONDS)
    if seen:
        await rig.sessions.sweep()
    again = await rig.open("a")
    assert rig.sessions.t(again) == 0
    assert deleted(rig) == {"grace_over": 0, "limit": 0, "replaced": 1}
    assert series(rig, "sessions_closed_total", reason="expired") == 1
    assert rig.sessions.expired == 0
    with pytest.raises(SessionExists):
        await rig.sessions.restore_expired("a")


async def test_what_is_restored_counts_as_open_and_is_counted(rig, clock, x):
    await expire(rig, clock, "a")
    session = await rig.sessions.restore_expired("a")
    assert (await rig.step(session, x[0], 0)).t_after == 1
    assert series(rig, "expired_sessions_restored_total") == 1
    assert rig.sessions.expired == 0
    clock.advance(IDLE_SECONDS - 1)
    assert await rig.sessions.sweep() == 0
    clock.advance(1)
    assert await rig.sessions.sweep() == 1
    with pytest.raises(SessionExpired):
        await rig.sessions.get("a")


async def test_only_where_there_is_room_a_session_is_restored(make_rig, store, clock):
    rig = make_rig(store=store, clock=clock, stored_sessions=2)
    await expire(rig, clock, "a")
    for name in "bc":
        await rig.open(name)
    with pytest.raises(SessionLimit):
        await rig.sessions.restore_expired("a")


async def test_sessions_that_are_restored_together_keep_the_bound(
    make_rig, store, clock, monkeypatch
):
    rig, plain = make_rig(store=store, clock=clock, stored_sessions=4), store.restore
    await expire(rig, clock, *"abcd")
    for name in "efg":
        await rig.open(name)

    async def slow(*args: object, **options: object) -> bool:
        await rounds(3)
        return await plain(*args, **options)

    monkeypatch.setattr(store, "restore", slow)
    asked = (rig.sessions.restore_expired(name) for name in "abcd")
    done = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(one, SessionLimit) for one in done) == 3
    assert sum((await store.count()).values()) == 4


@pytest.mark.parametrize("door", ["look", "open", "restore_expired"])
async def test_a_caller_that_gives_up_leaves_no_session_half_expired(
    rig, store, clock, monkeypatch, door
):
    plain = store.expire
    await rig.open("a")
    clock.advance(IDLE_SECONDS)

    async def slow(saves, **options: float) -> object:
        verdicts = await plain(saves, **options)
        await rounds(5)
        return verdicts

    monkeypatch.setattr(store, "expire", slow)
    asking = asyncio.create_task(
        getattr(rig.sessions, door)(opening("a") if door == "open" else "a")
    )
    await rounds(4)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await rounds(10)
    assert series(rig, "sessions_closed_total", reason="expired") == 1
    assert len(rig.sessions) == 0
    assert rig.sessions.expired == await store.count_expired()


async def test_a_session_that_was_closed_or_is_of_another_model_is_not_restored(
    make_rig, rig, store, clock
):
    await rig.open("closed")
    await rig.sessions.close("closed")
    with pytest.raises(SessionClosed):
        await rig.sessions.restore_expired("closed")
    await expire(rig, clock, "a")
    other = make_rig(model_of(make_network("other")), store=store, clock=clock, owner="o")
    with pytest.raises(SnapshotModelMismatch):
        await other.sessions.restore_expired("a")
    assert await rig.sessions.restore_expired("a")


async def test_one_whose_server_crashed_with_it_in_memory_is_not_restored_from_before(
    make_rig, rig, store, clock, x
):
    session = await rig.open("a", durability=Durability.NONE)
    await rig.step(session, x[0], 0)
    clock.advance(IDLE_SECONDS + 100)
    next_one = make_rig(store=store, clock=clock, owner="next")
    assert await next_one.sessions.sweep() == 1
    with pytest.raises(SessionLost):
        await next_one.sessions.restore_expired("a")


async def test_of_several_that_restore_a_session_one_does(rig, clock):
    await expire(rig, clock, "a")
    asked = (rig.sessions.restore_expired("a") for _ in range(4))
    done = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(one, SessionExists) for one in done) == 3
    assert len(rig.sessions) == 1


async def test_a_store_that_is_away_expires_nothing_and_later_does(rig, clock, store, monkeypatch):
    await rig.open("a")
    clock.advance(IDLE_SECONDS)

    async def away(*_args: object, **_options: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(store, "expire", away)
        with pytest.raises(ConnectionError):
            await rig.sessions.sweep()
    assert len(rig.sessions) == 1
    assert await rig.sessions.sweep() == 1
    assert await rig.sessions.restore_expired("a")


async def test_many_expire_and_are_deleted_in_groups_with_rests(
    make_rig, store, clock, monkeypatch
):
    """One wait for the store for each group, and others come in between two."""
    count = 3 * sweeper.GROUP + 5
    rig = make_rig(store=store, clock=clock, max_sessions=4, stored_sessions=count)
    for i in range(count):
        await rig.open(f"s{i}")
    clock.advance(IDLE_SECONDS + 61)
    groups: list[int] = []
    plain = store.expire

    async def seen(saves, **options):
        groups.append(len(saves))
        return await plain(saves, **options)

    monkeypatch.setattr(store, "expire", seen)
    others, done = 0, asyncio.create_task(rig.sessions.sweep())
    while not done.done():
        await asyncio.sleep(0)
        others += 1
    assert await done == count
    assert max(groups) <= sweeper.GROUP
    assert len(groups) <= 3 + 1 + 1
    assert others >= len(groups)
    assert await store.count() == {}
    clock.advance(GRACE_SECONDS + 1)
    await rig.sessions.sweep()
    assert await store.count_expired() == 0
    assert deleted(rig)["grace_over"] == count


async def test_all_are_deleted_whose_grace_is_over_also_if_the_store_tells_of_few_at_once(
    make_rig, store, clock, monkeypatch
):
    """Redis tells of as many of each bucket; where those are uneven, of fewer than asked for."""
    rig = make_rig(store=store, clock=clock, max_sessions=4, stored_sessions=50)
    for i in range(20):
        await rig.open(f"s{i}")
    clock.advance(IDLE_SECONDS + 61)
    assert await rig.sessions.sweep() == 20
    plain = store.expired
    monkeypatch.setattr(store, "expired", lambda before, limit: plain(before, min(limit, 3)))
    clock.advance(GRACE_SECONDS + 1)
    await rig.sessions.sweep()
    assert await store.count_expired() == 0


def slow_network(interval: int):
    network = make_network("slow", seed=3)
    network.manifest["step_interval_seconds"] = interval
    return network


@pytest.mark.parametrize(("days", "default"), [(1, 5 * DAY), (7, 35 * DAY), (0, IDLE_SECONDS)])
async def test_a_model_of_long_intervals_has_a_long_idle_timeout(make_rig, clock, days, default):
    network = slow_network(int(days * DAY) or 10)
    rig = make_rig(model_of(network), clock=clock)
    session = await rig.open("a")
    assert session.record.idle_timeout_seconds == default
    assert rig.sessions.default_idle_timeout(session.scheduler.model.manifest) == default
    for t in range(4):
        await rig.step(session, rows_of(network, 1), t)
        clock.advance(max(days * DAY, 10.0))
        assert await rig.sessions.sweep() == 0


async def test_the_bound_on_idle_timeouts_is_never_below_a_few_intervals(make_rig, clock):
    rig = make_rig(model_of(slow_network(int(DAY))), clock=clock)
    assert 5 * DAY > MAX_IDLE_SECONDS
    session = await rig.open("a", idle=5 * DAY)
    assert session.record.idle_timeout_seconds == 5 * DAY
    copy = await rig.sessions.fork("a", CopyOptions("b", None, None))
    assert copy.record.idle_timeout_seconds == 5 * DAY
    with pytest.raises(InvalidField, match="at most 432000 s"):
        await rig.open("c", idle=5 * DAY + 1)


async def test_an_interval_of_ages_makes_no_time_that_cannot_be_told(make_rig, clock):
    rig = make_rig(model_of(slow_network(int(LONGEST_IDLE_SECONDS))), clock=clock)
    session = await rig.open("a")
    assert session.record.idle_timeout_seconds == LONGEST_IDLE_SECONDS


def test_an_ending_of_a_deleted_session_says_so():
    ending = Tombstone(sweeper.EndReason.EXPIRED, 3, 60.0)
    error = sweeper.expired_error("a", ending.t, ending.idle_timeout_seconds, 0.0)
    assert error.restore_until == ""
    assert "deleted" in str(error)
