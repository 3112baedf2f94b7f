"""What every `SessionStore` promises. Another store is one more entry of STORES."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from stepstate.stores import Ending, EndReason, MemoryStore, SessionRecord, SessionStore
from tests.unit.rig import Clock

STORES = {"memory": lambda: MemoryStore(Clock())}


@pytest.fixture(params=STORES)
async def store(request) -> AsyncIterator[SessionStore]:
    made = STORES[request.param]()
    yield made
    await made.close()


def record(session_id: str, idle: float = 60.0) -> SessionRecord:
    start, opened = datetime(1969, 7, 20, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    return SessionRecord(session_id, "lstm", "1", "sha256:00", idle, start, opened)


CLOSED = Ending(EndReason.CLOSED, 12, 60.0)
EXPIRED = Ending(EndReason.EXPIRED, 2**40, 0.5)


async def test_an_id_that_was_never_created_is_not_known(store):
    assert await store.find("a") is None


async def test_a_created_session_is_found_with_all_that_was_told_of_it(store):
    await store.create(record("a"))
    assert await store.find("a") == record("a")


async def test_a_record_without_a_start_time_comes_back_without_one(store):
    told = SessionRecord("a", "m", "1", "", 1.0, None, datetime(2026, 1, 2, tzinfo=UTC))
    await store.create(told)
    assert await store.find("a") == told


@pytest.mark.parametrize("ending", [CLOSED, EXPIRED])
async def test_a_session_that_ended_is_found_by_its_ending(store, ending):
    await store.create(record("a"))
    await store.end("a", ending)
    assert await store.find("a") == ending


async def test_creating_an_id_again_forgets_its_ending(store):
    await store.create(record("a"))
    await store.end("a", CLOSED)
    await store.create(record("a", idle=5.0))
    assert await store.find("a") == record("a", idle=5.0)


async def test_the_last_ending_counts(store):
    for ending in (CLOSED, EXPIRED):
        await store.create(record("a"))
        await store.end("a", ending)
    assert await store.find("a") == EXPIRED


async def test_sessions_do_not_touch_each_other(store):
    await store.create(record("a"))
    await store.create(record("b"))
    await store.end("a", CLOSED)
    assert await store.find("b") == record("b")
    assert await store.find("a") == CLOSED


async def test_finding_changes_nothing(store):
    await store.create(record("a"))
    await store.end("a", CLOSED)
    assert [await store.find("a") for _ in range(3)] == [CLOSED] * 3


async def test_closing_twice_is_harmless(store):
    await store.close()
    await store.close()
