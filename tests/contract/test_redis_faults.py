"""What happens to Redis: kill -9, a pause, a restart, a failover, no memory, a moved slot."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest
from redis.crc import key_slot

from stepstate.errors import StoreOpenError, StoreUnavailable
from stepstate.stores import SaveResult, open_store
from stepstate.stores.base import TOMBSTONE_SECONDS
from stepstate.stores.redis import keys, pipeline
from tests.contract.proxy import proxy
from tests.redis_process import free_port, redis_process
from tests.stores import CLOSED, FINGERPRINT, SNAPSHOT, RedisHome, acquire, create, record, saving


@pytest.fixture
def server(tmp_path):
    """A Redis of the test's own, that loses nothing it has acknowledged."""
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with redis_process(tmp_path / "redis", *options) as started:
        yield started


@pytest.fixture
async def home(server):
    made = RedisHome(server)
    yield made
    await made.close()


@pytest.fixture
async def cluster_home(one_cluster):
    made = RedisHome(*one_cluster)
    yield made
    await made.close()


async def test_what_was_acknowledged_survives_kill_9_of_redis(home, server):
    store = await home.open()
    epochs = {f"s{i}": await create(home, store, f"s{i}") for i in range(20)}
    saves = [saving(home, name, epoch, t=5) for name, epoch in epochs.items()]
    assert await store.save(saves) == [SaveResult.DONE] * 20
    server.restart()
    for name in epochs:
        entry, snapshot = await acquire(store, name)
        assert (entry.t, snapshot) == (5, b"later")


async def test_a_restart_of_redis_fails_no_call_that_comes_after_it(home, server):
    """Neither connections that broke meanwhile nor scripts that it forgot are noticed."""
    store = await home.open()
    epoch = await create(home, store, "a")
    calls = (
        lambda: store.save([saving(home, "a", epoch)]),
        lambda: create(home, store, "b"),
        lambda: acquire(store, "b"),
        lambda: store.find("a"),
        lambda: store.end("a", epoch, CLOSED),
        store.count,
    )
    for call in calls:
        server.restart()
        assert await call()
    assert await store.count() == {("default", "lstm/1"): 1}


async def test_without_redis_each_call_says_so_at_once_until_it_is_back(home, server):
    store = await home.open()
    epoch = await create(home, store, "a")
    server.kill()
    for _ in range(3):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{server.port}"):
            await store.save([saving(home, "a", epoch)])
        assert time.monotonic() - started < 1.0
    server.start()
    assert await store.save([saving(home, "a", epoch)]) == [SaveResult.DONE]


async def test_a_redis_that_does_not_answer_is_given_up_after_two_seconds(home, server):
    """All who wait are told together."""
    store = await home.open()
    epoch = await create(home, store, "a")
    with server.paused():
        started = time.monotonic()
        calls = [store.save([saving(home, "a", epoch, t)]) for t in range(1, 6)]
        calls += [store.find("a"), store.count()]
        first = asyncio.create_task(calls[0])
        await asyncio.sleep(0.05)  # on its way: the others wait behind it
        answers = await asyncio.gather(first, *calls[1:], return_exceptions=True)
        assert all(isinstance(answer, StoreUnavailable) for answer in answers)
        assert 1.9 < time.monotonic() - started < 2.5
        newest = asyncio.create_task(store.save([saving(home, "a", epoch, t=9)]))
        await asyncio.sleep(0.05)
    assert await newest == [SaveResult.DONE]
    assert (await store.find("a")).t == 9


@pytest.fixture
async def far_home(server):
    """Behind a proxy."""
    async with proxy(server.port) as between:
        made = RedisHome(server)
        made.url = f"redis://127.0.0.1:{between.port}/0"
        yield made, between
        await made.close()


@pytest.mark.parametrize("key", ["a", "acme/a"])
async def test_a_call_whose_answer_was_lost_is_sent_again_and_acts_once(far_home, key):
    home, between = far_home
    store = await home.open()
    await use_every_script(home, store)

    async def losing(call):
        between.losing = True
        answer = await call
        assert not between.losing
        return answer

    one_open = {(record(key).tenant, "lstm/1"): 1}
    until = {"expires_at": home.clock() + 60.0, "max_open_sessions": 1}
    first = await losing(store.create(record(key), owner="A", t=0, snapshot=SNAPSHOT, **until))
    assert (await store.find(key)).epoch == first
    entry, snapshot = await losing(acquire(store, key, owner="B"))
    assert (entry.owner, entry.epoch, snapshot) == ("A", first + 1, SNAPSHOT)
    assert (await store.find(key)).epoch == first + 1
    save = saving(home, key, first + 1, t=3)
    assert await losing(store.save([save])) == [SaveResult.DONE]
    assert await losing(store.count()) == one_open
    assert await losing(store.expire([save], delete_at=9e9)) == [SaveResult.DONE]
    assert await store.count() == {}
    assert await losing(store.restore(key, first + 2, **until)) is True
    assert await store.count() == one_open
    assert await losing(store.end(key, first + 3, CLOSED)) is True
    assert await store.end(key, first + 3, CLOSED) is False
    assert await store.count() == {}


async def use_every_script(home, store) -> None:
    """So that Redis knows them, and the reply that is lost is not that it does not."""
    epoch = await create(home, store, "warm")
    await acquire(store, "warm")
    await store.save([saving(home, "warm", epoch)])
    await store.expire([saving(home, "warm", epoch + 1)], delete_at=9e9)
    await store.restore("warm", epoch + 2, expires_at=home.clock() + 60)
    assert await store.end("warm", epoch + 3, CLOSED)


async def test_a_save_that_arrives_late_undoes_no_newer_one(far_home, monkeypatch):
    """Redis may find a save in its socket when the server that sent it has long gone on."""
    home, between = far_home
    store = await home.open()
    epoch = await create(home, store, "a")
    between.holding = True
    with monkeypatch.context() as impatient, pytest.raises(StoreUnavailable):
        impatient.setattr(pipeline, "TIMEOUT_SECONDS", 0.2)
        await store.save([saving(home, "a", epoch, t=1, snapshot=b"1")])
    between.holding = False
    assert await store.save([saving(home, "a", epoch, t=2, snapshot=b"2")]) == [SaveResult.DONE]
    await between.let_go()
    entry, snapshot = await acquire(store, "a")
    assert (entry.t, snapshot) == (2, b"2")


async def test_a_replica_that_may_not_write_says_so_until_it_leads_again(home, server):
    store = await home.open()
    epoch = await create(home, store, "a")
    server.command("REPLICAOF", "127.0.0.1", free_port())
    for call in (store.save([saving(home, "a", epoch)]), store.probe()):
        with pytest.raises(StoreUnavailable, match="read only replica") as refused:
            await call
        assert refused.value.cause == "readonly"
    server.command("REPLICAOF", "NO", "ONE")
    await store.probe()
    assert await store.save([saving(home, "a", epoch)]) == [SaveResult.DONE]


async def test_a_redis_without_memory_says_so_and_still_ends_sessions(home, server):
    store = await home.open()
    epoch = await create(home, store, "a")
    server.command("CONFIG", "SET", "maxmemory", 1)
    for call in (store.save([saving(home, "a", epoch)]), store.probe()):
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            await call
    assert (await store.find("a")).t == 0
    assert await store.end("a", epoch, CLOSED)
    assert await store.find("a") == CLOSED
    server.command("CONFIG", "SET", "maxmemory", 0)
    assert await create(home, store, "a") > epoch


async def test_one_that_fails_in_a_group_fails_alone(home, server):
    store = await home.open()
    await create(home, store, "a")
    server.command("SET", keys.due(keys.bucket("b")), "of another type")
    answers = await asyncio.gather(
        create(home, store, "b"), create(home, store, "c"), return_exceptions=True
    )
    assert isinstance(answers[0], StoreUnavailable)
    assert isinstance(answers[1], int)


async def test_nothing_in_redis_goes_by_the_wall_clock_of_its_machine(home, server):
    store = await home.open()
    epochs = {name: await create(home, store, name) for name in "abc"}
    await store.save([saving(home, "a", epochs["a"])])
    await store.expire([saving(home, "b", epochs["b"])], delete_at=store.now() + 60)
    await store.end("c", epochs["c"], CLOSED)
    with server.client() as client:
        assert {client.ttl(key) for key in client.keys("stepstate:*")} == {-1}


async def test_endings_leave_redis_when_they_are_forgotten(home, server):
    store = await home.open()
    for i in range(50):
        await store.end(f"s{i}", await create(home, store, f"s{i}"), CLOSED)
    await home.pass_time(TOMBSTONE_SECONDS + 61)
    assert server.command("KEYS", "stepstate:*end*") == []


async def test_sessions_of_a_version_without_a_clock_keep_the_time_they_had_left(home, server):
    """Its times were Unix times, and its keys had a time to live, by which Redis deletes them."""
    store = await home.open()
    epochs = {name: await create(home, store, name) for name in "ab"}
    await home.pass_time(20)
    await store.save([saving(home, "b", epochs["b"])])
    await home.close()
    server.command("DEL", "stepstate:clock")
    for name in "ab":
        server.command("PEXPIRE", keys.session(name), 10_000_000)
    for jump in (-21 * 86_400, 400 * 86_400):  # a wrong clock, or years in a cupboard
        home.clock.now += jump
        server.command("DEL", "stepstate:clock")
        store = await home.open()
        left = {n: (await store.find(n)).expires_at - store.now() for n in "ab"}
        assert left["b"] - left["a"] == pytest.approx(20)
        assert left["b"] >= 60 if jump < 0 else left["b"] == pytest.approx(60)
        assert {server.command("PTTL", keys.session(name)) for name in "ab"} == {-1}
        assert isinstance(await store.acquire("a", owner="B", fingerprints={FINGERPRINT}), tuple)


async def test_a_damaged_session_of_that_version_takes_no_time_from_others(home, server):
    store = await home.open()
    for name in "ab":
        await create(home, store, name)
    await home.close()
    server.command("DEL", keys.CLOCK)
    server.command("HSET", keys.session("b"), "x", str(10**17))
    home.clock.now += 86_400
    store = await home.open()
    assert (await store.find("a")).expires_at - store.now() == pytest.approx(60)


@pytest.mark.parametrize(
    "damage", [("SET", "soon"), ("SET", "-5"), ("SET", str(10**17)), ("LPUSH", "what")]
)
async def test_a_damaged_clock_begins_at_the_last_step_or_is_the_servers(home, server, damage):
    def spoil():
        server.command("DEL", keys.CLOCK)
        server.command(damage[0], keys.CLOCK, damage[1])

    store = await home.open()
    await create(home, store, "a")
    spoil()
    await home.pass_time(20)
    assert (await store.find("a")).expires_at - store.now() == pytest.approx(40)
    spoil()
    home.clock.now += 86_400
    opened = await home.open()
    assert (await opened.find("a")).expires_at - opened.now() == pytest.approx(60)


async def test_sessions_whose_keys_are_gone_are_not_counted(home, server):
    store = await home.open()
    for name in "abc":
        await create(home, store, name)
    with server.client() as client:
        client.delete(keys.session("a"), keys.session("b"))
    await home.pass_time(61)
    assert [e.record.session_id for e in await store.overdue(home.clock(), 10)] == ["c"]
    assert await store.count() == {("default", "lstm/1"): 1}
    assert [e.record.session_id for e in (await store.page("", 10))[0]] == ["c"]


async def test_a_session_that_went_by_itself_may_come_again_with_another_model(home, server):
    store = await home.open()
    await create(home, store, "a")
    server.command("DEL", keys.session("a"))
    await create(home, store, "a", model="gru")
    assert [e.record.model for e in (await store.page("", 10))[0]] == ["gru"]
    assert await store.count() == {("default", "gru/1"): 1}


async def test_passwords_are_used_and_never_told(server, caplog):
    server.command("CONFIG", "SET", "requirepass", "s3cret/+@")
    place = f"127.0.0.1:{server.port}"
    for wrong in ("", ":s3cret@", "somebody:s3cret@"):
        with pytest.raises(StoreOpenError, match=place) as refused:
            await open_store(f"redis://{wrong}{place}", clock=time.time)
        assert "s3cret" not in str(refused.value) + repr(refused.value)
    store = await open_store(f"redis://:s3cret%2F%2B%40@{place}/3", clock=time.time)
    server.kill()
    with pytest.raises(StoreUnavailable) as away:
        await store.count()
    assert "s3cret" not in str(away.value) + caplog.text
    await store.close()
    server.start()


async def test_a_redis_that_is_away_is_opened_and_used_when_it_is_back(server, caplog):
    server.kill()
    home = RedisHome.__new__(RedisHome)
    super(RedisHome, home).__init__(server.url)
    with caplog.at_level(logging.WARNING):
        store = await home.open()
    assert "away" in caplog.text
    with pytest.raises(StoreUnavailable):
        await create(home, store, "a")
    server.start()
    assert await create(home, store, "a")
    await home.close()


async def test_a_slot_that_moves_to_another_node_is_found_there(cluster_home, one_cluster):
    store = await cluster_home.open()
    await create(cluster_home, store, "a")
    slot = key_slot(keys.session("a").encode())
    owners = [s for s in one_cluster if s.command("CLUSTER", "COUNTKEYSINSLOT", slot)]
    cluster_home.empty()
    for taker in (next(s for s in one_cluster if s is not owners[0]), owners[0]):
        name = taker.command("CLUSTER", "MYID")
        for server in (taker, *one_cluster):
            server.command("CLUSTER", "SETSLOT", slot, "NODE", name)
        await create(cluster_home, store, f"{taker.port}")
        await cluster_home.pass_time(61)
        epoch = await create(cluster_home, store, "a")
        assert await store.save([saving(cluster_home, "a", epoch)]) == [SaveResult.DONE]
        assert taker.command("CLUSTER", "COUNTKEYSINSLOT", slot)
        cluster_home.empty()


async def test_a_probe_of_a_cluster_fails_while_one_of_its_nodes_takes_no_writes(
    cluster_home, one_cluster
):
    store = await cluster_home.open()
    await create(cluster_home, store, "a")
    await store.probe()
    for server in one_cluster:
        server.command("CONFIG", "SET", "min-replicas-to-write", 1)
        with pytest.raises(StoreUnavailable, match="replicas"):
            await store.probe()
        server.command("CONFIG", "SET", "min-replicas-to-write", 0)
        await store.probe()


async def test_one_node_of_a_cluster_is_opened_only_as_a_cluster(one_cluster, server):
    with pytest.raises(StoreOpenError, match=r"redis\+cluster"):
        await open_store(one_cluster[0].url, clock=time.time)
    with pytest.raises(StoreOpenError, match="no cluster"):
        await open_store(f"redis+cluster://127.0.0.1:{server.port}", clock=time.time)


async def test_a_page_of_a_tenant_reads_no_sessions_of_others(home, server):
    store = await home.open()
    names = [f"{tenant}s{i:03}" for tenant in ("", "other/") for i in range(300)]
    await asyncio.gather(*(create(home, store, key) for key in [*names, "acme/a"]))
    server.command("CONFIG", "RESETSTAT")
    entries, token = await store.page("", 100, tenant="acme", expired=True)
    assert ([entry.key for entry in entries], token) == (["acme/a"], "")
    done = server.command("INFO", "commandstats")
    assert done["cmdstat_hmget"]["calls"] == 1
    assert done["cmdstat_zrangebyscore"]["calls"] == keys.BUCKETS
