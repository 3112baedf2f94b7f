"""What only the memory store promises; the rest is in tests/contract/test_stores.py."""

from __future__ import annotations

from stepstate.stores import Ending, EndReason, MemoryStore
from stepstate.stores.memory import ENDING_SECONDS

ENDING = Ending(EndReason.CLOSED, 1, 60.0)


async def test_an_ending_is_remembered_for_its_time_and_not_longer(clock):
    store = MemoryStore(clock)
    await store.end("a", ENDING)
    clock.advance(ENDING_SECONDS - 0.001)
    await store.end("b", ENDING)
    assert await store.find("a") == ENDING
    clock.advance(0.001)
    assert await store.find("a") is None
    assert await store.find("b") == ENDING


async def test_beyond_the_bound_the_oldest_endings_are_forgotten(clock):
    store = MemoryStore(clock, most_endings=2)
    for name in ("a", "b", "a", "c"):
        await store.end(name, ENDING)
    assert [await store.find(name) for name in "abc"] == [ENDING, None, ENDING]
