"""Stores that are asked by many at once, and by several servers: Rule 1 of `stores.base`."""

from __future__ import annotations

import asyncio
import random

import pytest

from stepstate.errors import StoreUnavailable
from stepstate.stores import SaveResult, StoredSession
from tests.stores import CLOSED, FINGERPRINT, SNAPSHOT, acquire, create, record, saving


async def test_three_hundred_calls_at_once_are_each_answered_for_themselves(home, store):
    async def life(i: int) -> None:
        name = f"s{i}"
        epoch = await create(home, store, name)
        assert await store.save([saving(home, name, epoch, i, bytes([i % 256]))]) == [
            SaveResult.DONE
        ]
        entry, snapshot = await acquire(store, name)
        assert (entry.record.session_id, entry.t, snapshot) == (name, i, bytes([i % 256]))
        assert await store.save([saving(home, name, epoch)]) == [SaveResult.FENCED]
        assert await store.find(name) is not None
        assert await store.end(name, entry.epoch, CLOSED)
        assert await store.find(name) == CLOSED

    await asyncio.gather(*(life(i) for i in range(300)))
    assert await store.count() == {}


async def test_of_many_who_take_a_session_only_the_one_with_the_newest_epoch_can_save(home):
    stores = [await home.open() for _ in range(3)]
    await create(home, stores[0], "a")
    takers = [(stores[i % 3], f"taker{i}") for i in range(30)]
    taken = await asyncio.gather(*(acquire(store, "a", owner) for store, owner in takers))
    epochs = [entry.epoch for entry, _ in taken]
    assert len(set(epochs)) == len(epochs)
    saves = (stores[i % 3].save([saving(home, "a", epoch)]) for i, epoch in enumerate(epochs))
    verdicts = [verdict for (verdict,) in await asyncio.gather(*saves)]
    assert verdicts.count(SaveResult.DONE) == 1
    assert verdicts.index(SaveResult.DONE) == epochs.index(max(epochs))
    assert verdicts.count(SaveResult.FENCED) == len(epochs) - 1


async def test_of_many_who_create_an_id_one_does(home):
    stores = [await home.open() for _ in range(3)]

    def told(i: int):
        how = {"owner": f"taker{i}", "t": i, "expires_at": home.clock() + 60}
        return stores[i % 3].create(record("a"), **how, snapshot=SNAPSHOT)

    answers = await asyncio.gather(*(told(i) for i in range(30)))
    (epoch,) = (answer for answer in answers if isinstance(answer, int))
    found = await stores[0].find("a")
    assert found.epoch == epoch
    assert answers.index(epoch) == found.t
    assert all(answer == found for answer in answers if isinstance(answer, StoredSession))


async def test_what_one_server_writes_another_reads(home):
    one, other = await home.open(), await home.open()
    epoch = await create(home, one, "a")
    entry, snapshot = await acquire(other, "a", owner="other")
    assert (entry.owner, snapshot) == ("A", SNAPSHOT)
    assert await one.save([saving(home, "a", epoch)]) == [SaveResult.FENCED]
    assert await other.save([saving(home, "a", entry.epoch, t=9)]) == [SaveResult.DONE]
    assert (await one.find("a")).t == 9
    assert await one.count() == {("default", "lstm/1"): 1}


async def test_a_store_that_lost_everything_gives_no_epoch_again(home, store):
    first = (await acquire(store, "a", "B"))[0].epoch if await create(home, store, "a") else 0
    await home.pass_time(1)
    store = await home.lose()
    assert await store.find("a") is None
    assert await store.save([saving(home, "a", first)]) == [SaveResult.MISSING]
    assert await create(home, store, "a") > first
    assert await store.save([saving(home, "a", first)]) == [SaveResult.FENCED]


async def test_servers_that_fight_for_sessions_never_both_commit(home):
    """Every save that was DONE is on top of the last one: a chain without a fork."""
    stores = [await home.open() for _ in range(2)]
    names = [f"s{i}" for i in range(8)]
    for name in names:
        await create(home, stores[0], name)
    committed = {name: [0] for name in names}

    async def server(store, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(40):
            name = chance.choice(names)
            entry, _ = await acquire(store, name, owner=str(seed))
            for t in range(entry.t + 1, entry.t + 1 + chance.randrange(3)):
                if await store.save([saving(home, name, entry.epoch, t)]) != [SaveResult.DONE]:
                    break
                committed[name].append(t)

    await asyncio.gather(*(server(stores[i % 2], i) for i in range(6)))
    for name, ts in committed.items():
        assert sorted(ts) == list(range(len(ts)))
        assert (await stores[0].find(name)).t == len(ts) - 1


async def test_a_caller_that_gives_up_disturbs_nobody(home, store):
    epoch = await create(home, store, "a")
    tasks = [asyncio.create_task(store.save([saving(home, "a", epoch, t)])) for t in range(1, 50)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert done[1::2] == [[SaveResult.DONE]] * 24
    assert await store.save([saving(home, "a", epoch, 50)]) == [SaveResult.DONE]


async def test_a_closed_store_says_so(home, store):
    epoch = await create(home, store, "a")
    await store.close()
    if store.durable:
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.save([saving(home, "a", epoch)])
        reopened = await home.open()
        assert (await acquire(reopened, "a"))[1] == SNAPSHOT
    else:
        taken = await store.acquire("a", owner="B", fingerprints={FINGERPRINT})
        assert isinstance(taken, tuple)
