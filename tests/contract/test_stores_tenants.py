"""What every `SessionStore` promises of tenants: Rule 6 of `stores.base`, counts and limits."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.cluster import RedisCluster

from stepstate.errors import InvalidField
from stepstate.identity import DEFAULT_TENANT, SessionKey, session_key
from stepstate.stores import (
    SaveRequest,
    SessionStore,
    StoredSession,
    TenantFull,
    UnreadableSession,
)
from stepstate.stores.memory import MemoryStore
from stepstate.stores.redis import tenants
from stepstate.stores.redis.keys import queue
from tests.contract import store_opener
from tests.contract.conftest import KINDS
from tests.stores import (
    CLOSED,
    EXPIRED,
    FINGERPRINT,
    SNAPSHOT,
    FileHome,
    Home,
    RedisHome,
    WallClock,
    acquire,
    create,
    listed,
    record,
    saving,
)

TENANTS = (DEFAULT_TENANT, "acme", "acme2")
IDS = ("meter-1", "7", "acme")
LIMIT = 2


@dataclass
class View:
    """One tenant's use of a store: what it is told, without epochs, which differ by store."""

    store: SessionStore
    tenant: str
    clock: WallClock
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    async def do(self, what: str, session_id: str, number: int) -> object:
        """Calls the store; a third of the calls has an epoch that is too old."""
        key = session_key(self.tenant, session_id)
        found = await self.store.find(key)
        epoch = found.epoch - (number % 3 == 0) if isinstance(found, StoredSession) else 1
        return self.shape(await getattr(self, what)(key, epoch, number))

    async def create(self, key: SessionKey, epoch: int, number: int) -> object:
        made = await self.store.create(
            record(key, ("lstm", "gru")[number % 2]),
            owner="A",
            t=number,
            expires_at=self.clock() + 60.0,
            snapshot=bytes([number]),
            replacing=epoch,
            max_open_sessions=(None, LIMIT)[number % 2],
        )
        return "created" if isinstance(made, int) else made

    async def save(self, key: SessionKey, epoch: int, number: int) -> object:
        expires_at = self.clock() + 60.0
        return await self.store.save([SaveRequest(key, epoch, "A", number, expires_at, b"later")])

    async def acquire(self, key: SessionKey, epoch: int, number: int) -> object:
        del epoch, number
        return await self.store.acquire(key, owner="B", fingerprints={FINGERPRINT})

    async def expire(self, key: SessionKey, epoch: int, number: int) -> object:
        save = SaveRequest(key, epoch, "", number, 0.0, None)
        return await self.store.expire([save], delete_at=self.clock() + 100.0)

    async def restore(self, key: SessionKey, epoch: int, number: int) -> object:
        most = (None, LIMIT)[number % 2]
        return await self.store.restore(
            key, epoch, expires_at=self.clock() + 60.0, max_open_sessions=most
        )

    async def end(self, key: SessionKey, epoch: int, number: int) -> object:
        return await self.store.end(key, epoch, (CLOSED, EXPIRED)[number % 2])

    async def discard(self, key: SessionKey, epoch: int, number: int) -> object:
        del epoch, number
        return await self.store.discard(key, CLOSED)

    async def page(self, key: SessionKey, epoch: int, number: int) -> object:
        del key, epoch
        which = {"model": ("", "lstm")[number % 2], "expired": number % 3 == 0}
        keys = await listed(self.store, 2, **which, tenant=self.tenant)
        assert len(set(keys)) == len(keys)
        return sorted(map(self.shape, keys))

    async def count(self, key: SessionKey, epoch: int, number: int) -> object:
        del key, epoch, number
        counts = await self.store.count()
        return {
            model: sessions for (whose, model), sessions in counts.items() if whose == self.tenant
        }

    async def overdue(self, key: SessionKey, epoch: int, number: int) -> object:
        """What a sweep finds of the tenant, which expires."""
        del key, epoch, number
        found = [one for one in await self.store.overdue(self.clock(), 100) if self.has(one)]
        saves = [SaveRequest(one.key, one.epoch, "", one.t, 0.0, None) for one in found]
        told = await self.store.expire(saves, delete_at=self.clock() + 100.0)
        return sorted(one.session_id for one in found), told

    async def expired(self, key: SessionKey, epoch: int, number: int) -> object:
        """What a sweep finds of the tenant, which is deleted."""
        del key, epoch, number
        found = [one for one in await self.store.expired(self.clock(), 100) if self.has(one)]
        told = [await self.store.end(one.key, one.epoch, EXPIRED) for one in found]
        return sorted(one.session_id for one in found), told

    def has(self, one: StoredSession | UnreadableSession) -> bool:
        return isinstance(one, StoredSession) and one.record.tenant == self.tenant

    def shape(self, told: object) -> object:
        """What was told, as the same of another tenant."""
        if isinstance(told, tuple | list):
            return [self.shape(one) for one in told]
        if isinstance(told, StoredSession):
            assert self.has(told)
            times = told.expires_at - self.begun, told.delete_at and told.delete_at - self.begun
            return told.session_id, told.record.model, told.t, told.owner, *times
        if isinstance(told, str) and self.tenant != DEFAULT_TENANT:
            return told.removeprefix(f"{self.tenant}/")
        return told


CALLS = (*(name for name in vars(View) if name[0] != "_" and name not in ("do", "has", "shape")),)
OPS = st.tuples(st.integers(0, 2), st.sampled_from(CALLS), st.sampled_from(IDS), st.integers(0, 9))
PASS_TIME = st.sampled_from([1.0, 59.0, 60.0])


@pytest.mark.parametrize("kind", KINDS[:3])
def test_what_a_tenant_is_told_is_what_it_would_be_told_alone(request, tmp_path, kind):
    """Tenants use the same ids in one store. The model: each alone in a store, as the default."""
    homes: dict[str, Callable[[Path], Home]] = {
        "memory": lambda _: Home("memory:"),
        "sqlite": FileHome,
        "redis": lambda _: RedisHome(request.getfixturevalue("one_redis")),
    }
    count = 0

    @given(st.lists(st.one_of(OPS, OPS, OPS, PASS_TIME), min_size=1, max_size=40))
    @settings(
        max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def same(ops):
        nonlocal count
        count += 1
        asyncio.run(compare(homes[kind](tmp_path / f"{count}.db"), ops))

    same()


async def compare(home: Home, ops: list) -> None:
    """Does the same in one store and in one for each tenant."""
    shared = await home.open()
    both = [
        (
            View(shared, tenant, home.clock),
            View(MemoryStore(home.clock), DEFAULT_TENANT, home.clock),
        )
        for tenant in TENANTS
    ]
    try:
        for op in ops:
            if isinstance(op, float):
                await home.pass_time(op)
                continue
            tenant, *call = op
            together, alone = [await view.do(*call) for view in both[tenant]]
            assert together == alone, (TENANTS[tenant], call)
        keys = sorted(await listed(shared, 2, expired=True))
        each = [await listed(shared, 2, tenant=tenant, expired=True) for tenant in TENANTS]
        assert keys == sorted(chain.from_iterable(each))
    finally:
        await home.close()


async def fill(home, store, tenants=TENANTS, each=30) -> list[str]:
    keys = [session_key(tenant, f"s{i:02}") for tenant in tenants for i in range(each)]
    models = ("lstm", "gru")
    await asyncio.gather(*(create(home, store, key, models[i % 2]) for i, key in enumerate(keys)))
    return keys


@pytest.mark.parametrize("expired", [False, True])
@pytest.mark.parametrize("model", ["", "gru"])
@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_listing_of_a_tenant_has_its_sessions_and_no_others(
    home, store, size, model, expired
):
    keys = await fill(home, store)
    gone = [saving(home, key, (await store.find(key)).epoch) for key in keys[::3]]
    await store.expire(gone, delete_at=home.clock() + 999)
    left = keys if expired else sorted({*keys} - {*keys[::3]})
    wanted = [key for key in left if not model or keys.index(key) % 2]
    which = {"model": model, "expired": expired}
    for tenant in TENANTS:
        own = [key for key in wanted if record(key).tenant == tenant]
        assert sorted(await listed(store, size, tenant=tenant, **which)) == own
    assert sorted(await listed(store, size, **which)) == sorted(wanted)
    assert await listed(store, tenant="nobody", **which) == []


async def test_a_token_of_another_tenant_is_a_place_in_the_own_listing_or_refused(home, store):
    keys = [session_key(tenant, f"{tenant}-{i:02}") for tenant in TENANTS for i in range(30)]
    await asyncio.gather(*(create(home, store, key) for key in keys))
    for whose in TENANTS:
        _, token = await store.page("", 9, tenant=whose)
        others = [record(key).session_id for key in keys if record(key).tenant != whose]
        assert not [one for one in others if one in token or one.encode().hex() in token.lower()]
        for tenant in TENANTS:
            try:
                entries, following = await store.page(token, 100, tenant=tenant)
            except InvalidField:
                continue
            assert {entry.record.tenant for entry in entries} <= {tenant}
            assert following == ""


async def test_open_sessions_are_counted_by_tenant_and_model(home, store):
    keys = await fill(home, store, each=4)
    wanted = Counter({(tenant, f"{m}/1"): 2 for tenant in TENANTS for m in ("lstm", "gru")})
    assert await store.count() == wanted
    epochs = {key: (await store.find(key)).epoch for key in keys}
    await acquire(store, keys[0])  # a takeover changes no count
    assert await store.end("acme/s00", epochs["acme/s00"], CLOSED)
    await store.expire([saving(home, "acme/s01", epochs["acme/s01"])], delete_at=9e9)
    wanted.subtract({("acme", "lstm/1"): 1, ("acme", "gru/1"): 1})
    assert await store.count() == wanted
    marked = await store.find("acme/s01")
    assert await store.restore("acme/s01", marked.epoch, expires_at=home.clock() + 60)
    wanted["acme", "gru/1"] += 1
    assert await store.count() == wanted
    for key in ("acme/s01", "acme/s02", "acme/s03"):
        assert await store.end(key, (await store.find(key)).epoch, CLOSED)
    assert await store.count() == {k: n for k, n in wanted.items() if k[0] != "acme"}


async def opened(home, store, key, most, **how) -> object:
    told = {"owner": "A", "t": 0, "expires_at": home.clock() + 60.0, "snapshot": SNAPSHOT}
    return await store.create(record(key), **told, max_open_sessions=most, **how)


@pytest.mark.parametrize("tenant", ["acme", DEFAULT_TENANT])
async def test_a_tenant_opens_as_many_sessions_as_it_may(home, store, tenant):
    await fill(home, store, ["acme2"])  # those of others do not count
    key = [session_key(tenant, name) for name in "abcd"]
    assert await opened(home, store, key[0], 0) == TenantFull(0, 0)
    first = await opened(home, store, key[0], 2)
    second = await opened(home, store, key[1], 2)
    assert isinstance(first, int)
    assert isinstance(second, int)
    assert await opened(home, store, key[2], 2) == TenantFull(2, 2)
    assert await opened(home, store, key[2], 1) == TenantFull(2, 1)
    assert await store.find(key[2]) is None
    assert await opened(home, store, key[0], 2) == await store.find(key[0])  # it is there already
    assert await store.end(key[0], first, CLOSED)
    assert isinstance(await opened(home, store, key[2], 2), int)
    assert await opened(home, store, key[0], 2) == TenantFull(2, 2)
    assert await store.find(key[0]) == CLOSED  # nothing changed
    assert isinstance(await opened(home, store, key[3], None), int)


@pytest.mark.parametrize("tenant", ["acme", DEFAULT_TENANT])
async def test_an_expired_session_takes_no_room_until_it_is_restored_or_replaced(
    home, store, tenant
):
    key = [session_key(tenant, name) for name in "ab"]
    epoch = await opened(home, store, key[0], 1)
    await store.expire([saving(home, key[0], epoch)], delete_at=home.clock() + 999)
    marked = await store.find(key[0])
    until = {"expires_at": home.clock() + 60.0}
    other = await opened(home, store, key[1], 1)
    assert isinstance(other, int)
    full = await store.restore(key[0], marked.epoch, **until, max_open_sessions=1)
    assert full == TenantFull(1, 1)
    assert await opened(home, store, key[0], 1, replacing=marked.epoch) == TenantFull(1, 1)
    assert await store.find(key[0]) == marked
    assert await store.end(key[1], other, CLOSED)
    assert await store.restore(key[0], marked.epoch, **until, max_open_sessions=1) is True
    assert await store.restore(key[0], marked.epoch, **until, max_open_sessions=1) is False


async def test_an_overdue_session_is_replaced_at_the_limit(home, store):
    epoch = await opened(home, store, "acme/a", 1)
    await home.pass_time(60)
    assert await opened(home, store, "acme/b", 1) == TenantFull(1, 1)  # it is open still
    assert isinstance(await opened(home, store, "acme/a", 1, replacing=epoch), int)
    assert await store.count() == {("acme", "lstm/1"): 1}


@pytest.mark.parametrize("tenant", ["acme", DEFAULT_TENANT])
async def test_servers_that_open_at_once_never_pass_the_limit(home, tenant):
    stores = [await home.open() for _ in range(3)]
    told = await asyncio.gather(
        *(opened(home, stores[i % 3], session_key(tenant, f"s{i}"), 10) for i in range(60))
    )
    assert sum(isinstance(one, int) for one in told) == 10
    assert told.count(TenantFull(10, 10)) == 50
    assert await stores[0].count() == {(tenant, "lstm/1"): 10}


async def processes(home: Home, what: str, *names: str, limit: int = 0) -> list:
    """Some processes on the same store."""
    command = [sys.executable, "-m", store_opener.__name__, home.url, what]
    return [
        await asyncio.create_subprocess_exec(*command, name, str(limit), stdout=PIPE)
        for name in names
    ]


@pytest.mark.parametrize("home", KINDS[1:], indirect=True)
async def test_processes_that_open_at_once_never_pass_the_limit(home):
    store = await home.open()
    openers = await processes(home, "fill", "x", "y", limit=200)
    told = [int((await opener.communicate())[0]) for opener in openers]
    assert sum(told) == 200
    assert await store.count() == {("acme", "lstm/1"): 200}


@pytest.mark.parametrize("home", KINDS[1:], indirect=True)
async def test_counts_and_listings_are_right_whenever_a_server_is_killed(home):
    store = await home.open()
    for round_ in range(2):
        servers = await processes(home, "churn", "x", "y")
        for server in servers:
            for _ in range(60 * (round_ + 1)):
                await server.stdout.readline()
        for server in servers:
            server.kill()
            await server.wait()
    wanted = {}
    for tenant in (DEFAULT_TENANT, "acme", "other"):
        for one in await listed(store, tenant=tenant):
            assert record(one).tenant == tenant
            wanted[tenant, "lstm/1"] = wanted.get((tenant, "lstm/1"), 0) + 1
    assert await store.count() == wanted
    assert len(await listed(store)) == sum(wanted.values())


@pytest.mark.parametrize("home", [pytest.param("cluster", marks=pytest.mark.long)], indirect=True)
async def test_a_server_that_was_killed_in_its_turn_is_waited_for_and_then_not(
    home, store, one_cluster, monkeypatch
):
    """On a cluster: its place in the tenant's queue stays, as if it still might open a session."""
    monkeypatch.setattr(tenants, "TURN_SECONDS", 0.001)
    with RedisCluster("127.0.0.1", one_cluster[0].port) as client:
        client.zadd(queue("acme"), {f"{int(store.now() * 1e6)} killed": 1, "no time": 2})
    assert isinstance(await opened(home, store, "acme/a", 2), int)  # one before it: there is room
    waiting = asyncio.create_task(opened(home, store, "acme/b", 2))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await home.pass_time(31)
    assert isinstance(await waiting, int)
    assert await opened(home, store, "acme/c", 2) == TenantFull(2, 2)
