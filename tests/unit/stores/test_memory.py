"""What only the memory store promises; the rest is in tests/contract/test_stores.py."""

from __future__ import annotations

from datetime import UTC, datetime

from stepstate.stores import Durability, EndReason, MemoryStore, SessionRecord, Tombstone
from stepstate.stores.base import TOMBSTONE_SECONDS

TOMBSTONE = Tombstone(EndReason.CLOSED, 1, 60.0)
OPENED = datetime(2026, 1, 2, tzinfo=UTC)


async def come_and_go(store: MemoryStore, name: str) -> None:
    record = SessionRecord(name, "m", "1", "", 1e6, None, OPENED, Durability.NONE)
    epoch = await store.create(record, owner="", t=0, expires_at=1e12, snapshot=b"")
    assert await store.end(name, epoch, TOMBSTONE)


async def test_a_tombstone_is_kept_for_an_hour_and_not_longer(clock):
    store = MemoryStore(clock)
    await come_and_go(store, "a")
    clock.advance(TOMBSTONE_SECONDS - 0.001)
    await come_and_go(store, "b")
    assert await store.find("a") == TOMBSTONE
    clock.advance(0.001)
    assert await store.find("a") is None
    assert await store.find("b") == TOMBSTONE


async def test_beyond_the_limit_the_oldest_tombstones_are_deleted(clock):
    store = MemoryStore(clock, max_tombstones=2)
    for name in ("a", "b", "a", "c"):
        await come_and_go(store, name)
    assert [await store.find(name) for name in "abc"] == [TOMBSTONE, None, TOMBSTONE]
