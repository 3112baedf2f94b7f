"""What every `SessionStore` promises. Another store is one more of KINDS in conftest.py."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest

from stepstate.errors import InvalidField
from stepstate.stores import SaveRequest, SaveResult, StoredSession
from stepstate.stores.base import TOMBSTONE_SECONDS
from tests.stores import (
    CLOSED,
    EXPIRED,
    FINGERPRINT,
    SNAPSHOT,
    STARTED,
    acquire,
    create,
    record,
    saving,
)


async def test_an_id_that_was_never_created_is_not_known(store):
    assert await store.find("a") is None
    assert await store.acquire("a", owner="B", fingerprints={FINGERPRINT}) is None


@pytest.mark.parametrize("start", [STARTED, None])
async def test_a_created_session_is_found_with_all_that_was_told_of_it(home, store, start):
    told, expires_at = record("a", start=start), home.clock() + 60
    epoch = await store.create(told, owner="A", t=7, expires_at=expires_at, snapshot=SNAPSHOT)
    assert await store.find("a") == StoredSession(told, 7, expires_at, epoch, "A")


async def test_finding_takes_nothing(home, store):
    await create(home, store, "a")
    assert await store.find("a") == await store.find("a")


async def test_an_id_that_is_open_is_not_created_again(home, store):
    await create(home, store, "a")
    before = await store.find("a")
    other = replace(record("a"), model="gru")
    held = await store.create(other, owner="B", t=9, expires_at=home.clock() + 9, snapshot=b"")
    assert held == await store.find("a") == before
    assert await store.count() == {("default", "lstm/1"): 1}


async def test_a_session_past_its_time_is_replaced_on_request_with_a_higher_epoch(home, store):
    first = await create(home, store, "a")
    new = {"owner": "B", "t": 0, "expires_at": home.clock() + 999, "snapshot": b""}
    assert await store.create(record("a"), **new, replacing=first) == await store.find("a")
    await home.pass_time(60)
    assert await store.create(record("a"), **new) == await store.find("a")
    assert await store.create(record("a"), **new, replacing=first - 1) == await store.find("a")
    second = await create(home, store, "a", model="gru", owner="B", replacing=first)
    assert second > first
    found = await store.find("a")
    assert (found.record.model, found.owner, found.t) == ("gru", "B", 0)
    assert await store.count() == {("default", "gru/1"): 1}
    assert await store.save([saving(home, "a", first)]) == [SaveResult.FENCED]


async def test_taking_a_session_raises_its_epoch_and_tells_who_had_it(home, store):
    first = await create(home, store, "a")
    entry, snapshot = await acquire(store, "a", owner="B")
    assert (entry.owner, entry.t, snapshot) == ("A", 0, SNAPSHOT)
    assert entry.epoch > first
    assert await store.find("a") == replace(entry, owner="B")
    again, _ = await acquire(store, "a", owner="C")
    assert (again.owner, again.epoch > entry.epoch) == ("B", True)


async def test_a_session_of_another_model_is_shown_and_not_taken(home, store):
    await create(home, store, "a")
    before = await store.find("a")
    assert await store.acquire("a", owner="B", fingerprints={"sha256:ff"}) == before
    assert await store.acquire("a", owner="B", fingerprints=[]) == before
    assert await store.find("a") == before


async def test_a_session_past_its_time_is_shown_and_not_taken(home, store):
    await create(home, store, "a")
    before = await store.find("a")
    await home.pass_time(60)
    assert await store.acquire("a", owner="B", fingerprints={FINGERPRINT}) == before
    assert await store.find("a") == before


async def test_a_save_is_what_the_next_taker_gets(home, store):
    epoch = await create(home, store, "a")
    assert await store.save([SaveRequest("a", epoch, "A", 2**50, home.clock() + 99, b"\x01")]) == [
        SaveResult.DONE
    ]
    entry, snapshot = await acquire(store, "a")
    assert (entry.t, entry.expires_at, entry.owner) == (2**50, home.clock() + 99, "A")
    assert snapshot == b"\x01"


async def test_a_save_without_a_snapshot_keeps_the_one_that_is_stored(home, store):
    epoch = await create(home, store, "a")
    await store.save([SaveRequest("a", epoch, "", 0, home.clock() + 99, None)])
    entry, snapshot = await acquire(store, "a")
    assert (entry.owner, entry.expires_at, snapshot) == ("", home.clock() + 99, SNAPSHOT)


async def test_an_empty_snapshot_is_one(home, store):
    epoch = await create(home, store, "a")
    await store.save([saving(home, "a", epoch, snapshot=b"")])
    assert (await acquire(store, "a"))[1] == b""


async def test_each_save_of_a_group_has_its_own_verdict_in_order(home, store):
    epochs = {name: await create(home, store, name) for name in "abcd"}
    await acquire(store, "b")
    assert await store.end("c", epochs["c"], CLOSED)
    names = ["z", "a", "c", "b", "d"]
    verdicts = await store.save([saving(home, n, epochs.get(n, 1), t=5) for n in names])
    done, fenced, missing = SaveResult.DONE, SaveResult.FENCED, SaveResult.MISSING
    assert verdicts == [missing, done, fenced, fenced, done]
    ts = {name: (await store.find(name)).t for name in "abd"}
    assert ts == {"a": 5, "b": 0, "d": 5}
    assert await store.save([]) == []


async def test_of_two_saves_of_a_session_the_later_counts(home, store):
    epoch = await create(home, store, "a")
    both = [saving(home, "a", epoch, t, snapshot=bytes([t])) for t in (1, 2)]
    assert await store.save(both) == [SaveResult.DONE] * 2
    assert (await acquire(store, "a"))[1] == b"\x02"
    epoch = (await store.find("a")).epoch
    await asyncio.gather(*(store.save([saving(home, "a", epoch, t)]) for t in range(3, 40)))
    assert (await store.find("a")).t == 39


@pytest.mark.parametrize("ending", [CLOSED, EXPIRED])
async def test_a_session_that_ended_is_found_by_its_ending(home, store, ending):
    epoch = await create(home, store, "a")
    assert await store.end("a", epoch, ending)
    assert await store.find("a") == ending
    assert await store.acquire("a", owner="B", fingerprints={FINGERPRINT}) == ending
    assert await store.count() == {}


async def test_an_older_epoch_ends_nothing(home, store):
    epoch = await create(home, store, "a")
    entry, _ = await acquire(store, "a")
    assert not await store.end("a", epoch, CLOSED)
    assert isinstance(await store.find("a"), StoredSession)
    assert await store.end("a", entry.epoch, CLOSED)
    assert not await store.end("a", entry.epoch, EXPIRED)
    assert await store.find("a") == CLOSED


async def test_an_ending_is_forgotten_after_its_time(home, store):
    assert await store.end("a", await create(home, store, "a"), CLOSED)
    await home.pass_time(TOMBSTONE_SECONDS - 1)
    assert await store.find("a") == CLOSED
    await home.pass_time(1)
    assert await store.find("a") is None


async def test_creating_an_id_again_forgets_its_ending_and_raises_its_epoch(home, store):
    first = await create(home, store, "a")
    assert await store.end("a", first, CLOSED)
    home.clock.advance(-30)  # a wall clock may go back
    second = await create(home, store, "a")
    assert second > first
    assert isinstance(await store.find("a"), StoredSession)
    assert await store.end("a", second, EXPIRED)
    assert await store.find("a") == EXPIRED


async def test_overdue_are_those_that_were_not_used_in_time(home, store):
    epochs = {name: await create(home, store, name) for name in "abcd"}
    now = home.clock()
    await store.save([SaveRequest("b", epochs["b"], "A", 1, now + 200, b"")])
    await store.save([SaveRequest("c", epochs["c"], "A", 1, now + 10, b"")])
    assert await overdue(store, now + 10) == set()
    assert await overdue(store, now + 11) == {"c"}
    assert await overdue(store, now + 61) == {"a", "c", "d"}
    assert await overdue(store, now + 61) == {"a", "c", "d"}
    assert len(await store.overdue(now + 201, 3)) == 3
    assert await overdue(store, now + 201) == set("abcd")
    assert await store.end("b", epochs["b"], EXPIRED)
    assert await overdue(store, now + 201) == set("acd")


async def test_a_session_that_was_lengthened_and_shortened_is_overdue_by_its_last_word(home, store):
    epoch, now = await create(home, store, "a"), home.clock()
    for later in (500, 100, 300):
        await store.save([SaveRequest("a", epoch, "A", 1, now + later, b"")])
        assert await overdue(store, now + later) == set()
        assert await overdue(store, now + later + 1) == {"a"}


async def test_open_sessions_are_counted_by_model(home, store):
    for name, model in (("a", "lstm"), ("b", "gru"), ("c", "lstm")):
        epoch = await create(home, store, name, model)
    assert await store.count() == {("default", "lstm/1"): 2, ("default", "gru/1"): 1}
    assert await store.end("c", epoch, CLOSED)
    assert await store.count() == {("default", "lstm/1"): 1, ("default", "gru/1"): 1}


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("model", ["", "lstm", "gru"])
async def test_a_listing_has_every_session_of_its_model_in_one_page(home, store, size, model):
    names = [f"{kind}.{i}" for kind in ("lstm", "gru", "gru2") for i in range(10)]
    await asyncio.gather(*(create(home, store, name, name.partition(".")[0]) for name in names))
    wanted = [name for name in names if model in ("", name.partition(".")[0])]
    listed, token, pages = [], "", 0
    while pages == 0 or token:
        entries, token = await store.page(token, size, model)
        assert len(entries) <= size
        listed += [entry.record.session_id for entry in entries]
        pages += 1
    assert sorted(listed) == sorted(wanted)
    assert pages == -(-len(wanted) // size)


async def test_a_listing_of_nothing_is_one_empty_page(home, store):
    assert await store.page("", 10) == ([], "")
    await create(home, store, "a")
    assert await store.page("", 10, "gru") == ([], "")


async def test_a_session_that_stays_is_listed_once_whatever_else_happens(home, store):
    stay = [f"stay.{i}" for i in range(40)]
    epochs = {n: await create(home, store, n) for n in [*stay, *(f"go.{i}" for i in range(40))]}
    listed, token, turn = [], "", 0
    while turn == 0 or token:
        entries, token = await store.page(token, 7)
        listed += [entry.record.session_id for entry in entries]
        await create(home, store, f"come.{turn}")
        await store.end(f"go.{turn}", epochs[f"go.{turn}"], CLOSED)
        await home.pass_time(1)
        await store.save([saving(home, n, epochs[n]) for n in stay[turn % 3 :: 3]])
        turn += 1
    assert sorted(name for name in listed if name in stay) == sorted(stay)
    assert len(set(listed)) == len(listed)


async def test_what_is_no_token_is_refused_or_is_only_a_place_in_the_order(home, store):
    await create(home, store, "a")
    with suppress(InvalidField):
        entries, token = await store.page("\x00 no token", 10)
        assert (len(entries), token) == (1, "")


async def test_a_large_snapshot_comes_back_whole(home, store):
    large = bytes(range(256)) * 32_768  # 8 MiB
    epoch = await create(home, store, "a")
    assert await store.save([saving(home, "a", epoch, snapshot=large)]) == [SaveResult.DONE]
    assert (await acquire(store, "a"))[1] == large


async def test_closing_twice_is_harmless(store):
    await store.close()
    await store.close()


async def overdue(store, before: float) -> set[str]:
    return {entry.record.session_id for entry in await store.overdue(before, 100)}


async def test_a_probe_leaves_sessions_as_they_are(home, store):
    await create(home, store, "a")
    before = await store.find("a")
    for _ in range(2):
        await store.probe()
    assert await store.find("a") == before
    assert await store.count() == {("default", "lstm/1"): 1}
