"""What every `SessionStore` promises of its clock, and of sessions whose time is up."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from stepstate.stores import SaveRequest, SaveResult, StoredSession
from stepstate.uptime import HEARTBEAT_SECONDS, MAX_HEARTBEAT_SECONDS
from tests.contract.conftest import KINDS
from tests.stores import (
    CLOSED,
    EXPIRED,
    FINGERPRINT,
    SNAPSHOT,
    acquire,
    create,
    record,
    saving,
)

GRACE = 1000.0

lasting = pytest.mark.parametrize("home", KINDS[1:], indirect=True)
"""In memory the clock is that of the process, see test_uptime, and nobody shares it."""


async def expire(
    home, store, session_id: str, epoch: int, snapshot: bytes | None = None
) -> SaveResult:
    save = SaveRequest(session_id, epoch, "", 7, 0.0, snapshot)
    (verdict,) = await store.expire([save], delete_at=store.now() + GRACE)
    return verdict


async def test_the_clock_goes_on_while_a_server_is_up(home, store):
    before = store.now()
    await home.pass_time(100.0)
    assert store.now() == pytest.approx(before + 100.0)


async def test_two_servers_move_the_clock_on_once(home, store):
    other, before = await home.open(), store.now()
    await home.pass_time(100.0)
    assert store.now() == pytest.approx(before + 100.0)
    assert other.now() == pytest.approx(store.now())


@lasting
async def test_a_pause_of_the_process_hardly_counts(home, store):
    before = store.now()
    home.clock.advance(30 * 86_400)
    assert store.now() == pytest.approx(before + MAX_HEARTBEAT_SECONDS)
    await store.heartbeat()
    assert store.now() == pytest.approx(before + MAX_HEARTBEAT_SECONDS)


@lasting
async def test_the_clock_stands_still_while_no_server_is_up(home, store):
    before = store.now()
    await create(home, store, "a")
    await home.close()
    home.clock.advance(-400 * 86_400)
    later = await home.open()
    await later.heartbeat()
    assert later.now() == pytest.approx(before)
    home.clock.advance(900 * 86_400)
    last = await home.open()
    await last.heartbeat()
    assert before <= last.now() <= before + MAX_HEARTBEAT_SECONDS
    assert (await last.acquire("a", owner="B", fingerprints={FINGERPRINT}))[1] == SNAPSHOT


@lasting
async def test_a_server_that_was_paused_does_not_set_the_clock_of_others_back_or_on(home, store):
    other, before = await home.open(), store.now()
    for _ in range(20):
        home.clock.advance(HEARTBEAT_SECONDS)
        await store.heartbeat()
    assert store.now() == pytest.approx(before + 100.0)
    await other.heartbeat()
    assert other.now() == pytest.approx(before + 100.0)
    assert store.now() == pytest.approx(before + 100.0)


async def test_a_store_that_lost_everything_takes_the_clock_of_a_server_that_is_up(home, store):
    before = store.now()
    lost = await home.lose()
    await lost.heartbeat()
    await create(home, lost, "a")
    assert lost.now() >= before
    assert isinstance((await acquire(lost, "a"))[0], StoredSession)


async def test_an_expired_session_is_kept_whole_and_out_of_the_way(home, store):
    epoch = await create(home, store, "a")
    await create(home, store, "b")
    assert await expire(home, store, "a", epoch, b"last") is SaveResult.DONE
    found = await store.find("a")
    assert (found.t, found.owner) == (7, "")
    assert found.epoch > epoch
    assert found.delete_at == pytest.approx(store.now() + GRACE)
    assert await store.acquire("a", owner="B", fingerprints={FINGERPRINT}) == found
    assert await store.count() == {("default", "lstm/1"): 1}
    assert await store.count_expired() == 1
    assert [e.record.session_id for e in (await store.page("", 9))[0]] == ["b"]
    assert await store.overdue(store.now() + 1e6, 9) == [await store.find("b")]
    held = {"owner": "A", "t": 0, "expires_at": store.now() + 60, "snapshot": b""}
    assert await store.create(record("a"), **held) == found
    assert await store.find("a") == found


async def test_who_held_an_expired_session_can_neither_save_nor_expire_nor_end_it(home, store):
    epoch = await create(home, store, "a")
    assert await expire(home, store, "a", epoch) is SaveResult.DONE
    assert await store.save([saving(home, "a", epoch)]) == [SaveResult.FENCED]
    assert await expire(home, store, "a", epoch) is SaveResult.FENCED
    assert not await store.end("a", epoch, CLOSED)
    assert not await store.restore("a", epoch, expires_at=store.now() + 60)


async def test_a_restored_session_is_as_it_was(home, store):
    epoch = await create(home, store, "a")
    await expire(home, store, "a", epoch, b"last")
    await home.pass_time(GRACE / 2)
    marked, until = await store.find("a"), store.now() + 60.0
    assert await store.restore("a", marked.epoch, expires_at=until)
    found = await store.find("a")
    assert found == replace(marked, epoch=found.epoch, expires_at=found.expires_at, delete_at=None)
    assert found.expires_at == pytest.approx(until)
    assert found.epoch > marked.epoch
    assert await store.count() == {("default", "lstm/1"): 1}
    assert await store.count_expired() == 0
    assert not await store.restore("a", marked.epoch, expires_at=until)
    entry, snapshot = await acquire(store, "a")
    assert (entry.t, snapshot) == (7, b"last")
    assert await store.save([saving(home, "a", entry.epoch)]) == [SaveResult.DONE]
    assert await store.overdue(store.now() + 61, 9) == [await store.find("a")]


async def test_only_an_expired_session_is_restored(home, store):
    epoch = await create(home, store, "a")
    assert not await store.restore("a", epoch, expires_at=store.now() + 60)
    assert not await store.restore("b", epoch, expires_at=store.now() + 60)


async def test_what_expires_without_a_lease_given_up_still_tells_of_it(home, store):
    epoch = await create(home, store, "a", owner="A")
    await store.expire([SaveRequest("a", epoch, "A", 0, 0.0, None)], delete_at=store.now() + GRACE)
    marked = await store.find("a")
    assert await store.restore("a", marked.epoch, expires_at=store.now() + 60)
    assert (await acquire(store, "a"))[0].owner == "A"


async def test_expired_sessions_are_due_after_their_grace_the_oldest_first(home, store):
    for name in "abc":
        await expire(home, store, name, await create(home, store, name))
        await home.pass_time(10.0)
    assert await store.expired(store.now(), 9) == []
    everything = await store.expired(float("inf"), 9)
    assert [entry.record.session_id for entry in everything] == ["a", "b", "c"]
    assert [e.record.session_id for e in await store.expired(float("inf"), 2)] == ["a", "b"]
    await home.pass_time(GRACE - 15.0)
    due = await store.expired(store.now(), 9)
    assert [entry.record.session_id for entry in due] == ["a", "b"]
    assert await store.end("a", due[0].epoch, EXPIRED)
    assert await store.find("a") == EXPIRED
    assert await store.count_expired() == 2


async def test_a_listing_can_show_expired_ones_too(home, store):
    for i in range(20):
        epoch = await create(home, store, f"s{i}")
        if i % 3 == 0:
            await expire(home, store, f"s{i}", epoch)
    listed, token, pages = [], "", 0
    while token or not pages:
        entries, token = await store.page(token, 6, expired=True)
        listed += [(e.record.session_id, e.delete_at is not None) for e in entries]
        pages += 1
    assert sorted(listed) == sorted((f"s{i}", i % 3 == 0) for i in range(20))
    assert pages == 4


async def test_an_expired_session_is_replaced_on_request(home, store):
    await expire(home, store, "a", await create(home, store, "a"))
    marked = await store.find("a")
    epoch = await create(home, store, "a", model="gru", replacing=marked.epoch)
    assert epoch > marked.epoch
    assert await store.count() == {("default", "gru/1"): 1}
    assert await store.count_expired() == 0


async def test_each_of_many_that_expire_together_has_its_own_verdict(home, store):
    epochs = {f"s{i}": await create(home, store, f"s{i}") for i in range(600)}
    await acquire(store, "s1")
    await store.end("s2", epochs["s2"], CLOSED)
    saves = [SaveRequest(n, epoch, "", 0, 0.0, None) for n, epoch in epochs.items()]
    saves.append(SaveRequest("never", 1, "", 0, 0.0, None))
    verdicts = await store.expire(saves, delete_at=store.now() + GRACE)
    wanted = dict.fromkeys(epochs, SaveResult.DONE) | {
        "s1": SaveResult.FENCED,
        "s2": SaveResult.FENCED,
    }
    assert verdicts == [*wanted.values(), SaveResult.MISSING]
    assert await store.count_expired() == 598
    assert await store.count() == {("default", "lstm/1"): 1}


async def test_of_many_servers_one_restores_a_session(home, store):
    await expire(home, store, "a", await create(home, store, "a"))
    epoch = (await store.find("a")).epoch
    stores = [store, *[await home.open() for _ in range(3)]]
    until = store.now() + 60.0
    done = await asyncio.gather(*(s.restore("a", epoch, expires_at=until) for s in stores))
    assert sorted(done) == [False, False, False, True]
