"""When a store is up, and when it is away: writes decide, and nothing flaps."""

from __future__ import annotations

import logging

import pytest

from stepstate.errors import StoreUnavailable
from stepstate.sessions.monitored_store import PROBE_SECONDS, STEADY_SECONDS, MonitoredStore
from stepstate.stores import MemoryStore
from tests.unit.rig import Clock


class HalfAway(MemoryStore):
    """Answers reads, and takes no writes while it is told so: a replica, or a full disk."""

    read_only = False
    probes = 0

    async def probe(self) -> None:
        self.probes += 1
        await self.save([])

    async def save(self, saves):
        if self.read_only:
            raise StoreUnavailable("it is a replica", cause="readonly")
        return await super().save(saves)

    async def find(self, session_id):
        raise StoreUnavailable("database disk image is malformed", cause="corrupt")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> HalfAway:
    return HalfAway(clock)


@pytest.fixture
def link(store: HalfAway, clock: Clock) -> MonitoredStore:
    return MonitoredStore(store, clock=clock)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


async def fails(link: MonitoredStore) -> None:
    with pytest.raises(StoreUnavailable):
        await link.ask(link.backend.save([]))


async def test_reads_that_succeed_do_not_bring_back_a_store_that_cant_be_written(
    link: MonitoredStore, store: HalfAway, clock: Clock, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    store.read_only = True
    for _ in range(60):
        await fails(link)
        assert await link.ask(store.count()) == {}
        await link.check()
        assert not link.up
        clock.advance(1.0)
    assert told(caplog) == ["the store is away"]
    assert link.failures["readonly"] == 120

    store.read_only = False
    for _ in range(10):
        await link.check()
        clock.advance(1.0)
    assert link.up
    assert told(caplog) == ["the store is away", "the store is back"]


async def test_a_store_that_takes_some_writes_only_stays_away(
    link: MonitoredStore, store: HalfAway, clock: Clock, caplog: pytest.LogCaptureFixture
):
    for _ in range(60):
        store.read_only = not store.read_only
        if store.read_only:
            await fails(link)
        await link.check()
        clock.advance(STEADY_SECONDS / 2)
    assert told(caplog) == ["the store is away"]


async def test_an_idle_server_notices_that_its_store_cant_be_written(
    link: MonitoredStore, store: HalfAway, clock: Clock
):
    await link.check()
    store.read_only = True
    for _ in range(int(PROBE_SECONDS)):
        await link.check()
        clock.advance(1.0)
    await link.check()
    assert not link.up
    assert store.probes == 2


async def damaged(link: MonitoredStore) -> None:
    with pytest.raises(StoreUnavailable):
        await link.ask(link.backend.find("damaged"))


async def test_a_damaged_session_that_is_asked_for_on_and_on_is_no_outage(
    link: MonitoredStore, store: HalfAway, clock: Clock, caplog: pytest.LogCaptureFixture
):
    for _ in range(20):
        await damaged(link)
        await link.check()
        assert link.up
        clock.advance(1.0)
    assert link.failures["corrupt"] == store.probes == 20
    assert told(caplog) == []


async def test_a_failure_that_may_be_of_one_session_has_the_store_probed_at_the_next_check(
    link: MonitoredStore, store: HalfAway, clock: Clock
):
    await link.check()
    clock.advance(0.1)
    store.read_only = True
    await damaged(link)
    await link.check()
    assert not link.up


async def test_a_damaged_session_does_not_prolong_an_outage(
    link: MonitoredStore, store: HalfAway, clock: Clock
):
    store.read_only = True
    await fails(link)
    store.read_only = False
    for _ in range(int(STEADY_SECONDS)):
        await damaged(link)
        await link.check()
        assert not link.up
        clock.advance(1.0)
    await damaged(link)
    await link.check()
    assert link.up
