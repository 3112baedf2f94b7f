"""What only the memory store promises; the rest is in tests/contract/test_stores.py."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from datetime import UTC, datetime
from types import SimpleNamespace

from stepstate.stores import Durability, EndReason, MemoryStore, SessionRecord, Tombstone, memory
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


async def test_a_page_looks_at_no_more_sessions_than_it_lists(clock, monkeypatch):
    """With 100,000 of them a page stopped the event loop for 20 ms."""
    looked_at: list[int] = []

    def nsmallest(count: int, keys: Iterable[str]) -> list[str]:
        all_keys = list(keys)
        looked_at.append(len(all_keys))
        return heapq.nsmallest(count, all_keys)

    monkeypatch.setattr(memory, "heapq", SimpleNamespace(nsmallest=nsmallest))
    store, names = MemoryStore(clock), [f"s{number:03}" for number in range(500)]
    for name in reversed(names):
        record = SessionRecord(name, "m", "1", "", 1e6, None, OPENED, Durability.NONE)
        await store.create(record, owner="", t=0, expires_at=1e12, snapshot=b"")
    listed, token = [], ""
    while not listed or token:
        page, token = await store.page(token, 100, tenant="default")
        listed += [one.session_id for one in page]
    assert listed == names
    assert looked_at == [101, 101, 101, 101, 100]
