"""Sessions end: closed by a client, expired, or swept; and what is answered afterwards."""

from __future__ import annotations

import asyncio
import time
from typing import Any, ClassVar

import numpy as np
import pytest

from stepstate.errors import (
    SessionClosed,
    SessionExpired,
    SessionUnknown,
    StoreUnavailable,
)
from stepstate.identity import DEFAULT_TENANT
from stepstate.stores import MemoryStore, SessionRecord, StoredSession, Tombstone
from stepstate.stores.base import TOMBSTONE_SECONDS
from tests.unit.rig import (
    GRACE_SECONDS,
    IDLE_SECONDS,
    rounds,
    rows_of,
)
from tests.unit.sessions.slow_store import SlowStore


@pytest.fixture
def x(network):
    return rows_of(network, 8)


async def test_close_tells_the_last_t_and_is_told_for_a_while_then_unknown(rig, x):
    session = await rig.open("a")
    await rig.step(session, x[:3], 0)
    assert await rig.sessions.close("a") == 3
    assert rig.sessions.find("a") is None
    rig.clock.advance(TOMBSTONE_SECONDS - 1)
    for use in (rig.sessions.get, rig.sessions.close):
        with pytest.raises(SessionClosed) as told:
            await use("a")
        assert told.value.fields() == {"session_id": "a", "t": "3"}
    rig.clock.advance(1)
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("a")


async def test_a_session_expires_exactly_when_its_time_is_up_without_any_sweep(rig, x):
    session = await rig.open("a", idle=7.0)
    await rig.step(session, x[0], 0)
    rig.clock.advance(6.99)
    assert rig.sessions.find("a") is session
    rig.clock.advance(0.01)
    assert rig.sessions.find("a") is None
    with pytest.raises(SessionExpired) as told:
        await rig.sessions.get("a")
    fields = told.value.fields()
    assert fields.pop("restore_until") in str(told.value)
    assert fields == {"session_id": "a", "t": "1", "idle_timeout_seconds": "7.0"}
    assert len(rig.sessions) == rig.scheduler.open_sessions == 0


async def test_an_expired_session_is_told_for_a_while_and_then_unknown(rig):
    await rig.open("a")
    rig.clock.advance(IDLE_SECONDS)
    assert await rig.sessions.sweep() == 1
    rig.clock.advance(GRACE_SECONDS - 1)
    with pytest.raises(SessionExpired, match="restore it"):
        await rig.sessions.get("a")
    rig.clock.advance(2)
    await rig.sessions.sweep()
    rig.clock.advance(TOMBSTONE_SECONDS - 1)
    with pytest.raises(SessionExpired, match="was deleted"):
        await rig.sessions.get("a")
    rig.clock.advance(1)
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("a")


async def test_a_sweep_ends_those_whose_time_is_up_and_no_others(rig, x):
    for name, idle in (("a", 5.0), ("b", 50.0), ("c", 5.0)):
        await rig.open(name, idle=idle)
    rig.clock.advance(5)
    assert await rig.sessions.sweep() == 2
    assert await rig.sessions.sweep() == 0
    assert [
        one.record.session_id
        for one in (await rig.sessions.page("", 10, "", tenant=DEFAULT_TENANT))[0]
    ] == ["b"]
    assert rig.scheduler.open_sessions == 1


class Forgetful(MemoryStore):
    """Tells what it was given, and must not be searched: that would look at every session."""

    snapshots: ClassVar[list[bytes]] = []

    async def create(self, record: SessionRecord, **fields: Any) -> int | StoredSession:
        self.snapshots.append(fields["snapshot"])
        return await super().create(record, **fields)

    async def overdue(self, before: float, limit: int) -> list[StoredSession]:
        raise AssertionError("was searched")


async def test_a_store_that_does_not_last_keeps_no_states_and_is_not_searched(make_rig, x):
    rig = make_rig(store=Forgetful(time.time))
    session = await rig.open("a", idle=5.0)
    await rig.step(session, x[0], 0)
    await rig.open("b", idle=500.0)
    rig.clock.advance(100)
    assert await rig.sessions.sweep() == 1
    assert Forgetful.snapshots == [b"", b""]


class Gathering(MemoryStore):
    """Ends nothing until three are to be ended."""

    barrier: ClassVar[asyncio.Barrier]

    async def end(self, session_id: str, epoch: int, ending: Tombstone) -> bool:
        await self.barrier.wait()
        return await super().end(session_id, epoch, ending)


async def test_a_sweep_ends_many_in_one_wait_for_the_store(make_rig):
    """So sqlite ends 20,000 in two seconds; one by one it took eleven."""
    Gathering.barrier = asyncio.Barrier(3)
    rig = make_rig(store=Gathering(time.time))
    for name in ("a", "b", "c"):
        await rig.open(name, idle=5.0)
    rig.clock.advance(5)
    assert await asyncio.wait_for(rig.sessions.sweep(), 20) == 3


async def test_a_session_that_another_ends_meanwhile_is_ended_once(rig):
    await rig.open("a", idle=5.0)
    rig.clock.advance(5)
    swept, asked = await asyncio.gather(
        rig.sessions.sweep(), rig.sessions.get("a"), return_exceptions=True
    )
    assert swept == 1
    assert isinstance(asked, SessionExpired)
    assert rig.scheduler.open_sessions == 0
    assert await rig.sessions.sweep() == 0


async def test_a_session_with_a_step_in_the_engine_does_not_expire(rig, x):
    session = await rig.open("a", idle=5.0)
    caller = rig.send(session, x[0], 0)
    rig.clock.advance(5)
    assert await rig.sessions.sweep() == 0
    await caller.outcome()
    assert rig.sessions.summary(session).seconds_left == 5.0


@pytest.mark.parametrize("end", ["close", "expire"])
async def test_an_id_that_ended_can_be_opened_again_and_starts_from_zero(rig, x, network, end):
    session = await rig.open("a")
    await rig.step(session, x[:3], 0)
    if end == "close":
        await rig.sessions.close("a")
    else:
        rig.clock.advance(IDLE_SECONDS)
    again = await rig.open("a")
    assert rig.sessions.t(again) == 0
    y = await rig.y(again, x[0], 0)
    assert np.abs(y - network.offline(x[:1])).max() <= 1e-5


async def test_a_session_that_is_gone_is_never_restarted_by_a_step(rig, x):
    session = await rig.open("a")
    await rig.step(session, x[0], 0)
    rig.clock.advance(IDLE_SECONDS)
    for _ in range(3):
        assert rig.sessions.find("a") is None
        with pytest.raises(SessionExpired):
            await rig.sessions.get("a")
    assert len(rig.sessions) == 0


async def test_close_waits_for_accepted_steps_and_later_requests_wait_for_it(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    callers = [rig.send(session, x[:4], 0), rig.send(session, x[4], 4)]
    closing = asyncio.create_task(rig.sessions.close("a"))
    await asyncio.sleep(0)
    assert rig.sessions.find("a") is None
    late, again = await asyncio.gather(rig.sessions.get("a"), rig.open("a"), return_exceptions=True)
    assert isinstance(late, SessionClosed)
    assert late.t == 5
    assert closing.done()
    assert await closing == 5
    assert all(caller.answered for caller in callers)
    assert rig.sessions.find("a") is again is not session


async def test_a_close_whose_caller_gives_up_is_finished_all_the_same(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    caller = rig.send(session, x[:4], 0)
    closing = asyncio.create_task(rig.sessions.close("a"))
    await asyncio.sleep(0)
    closing.cancel()
    await caller.outcome()
    await rounds(5)
    with pytest.raises(SessionClosed) as told:
        await rig.sessions.get("a")
    assert told.value.t == 4
    assert len(rig.sessions) == 0


async def test_of_two_closes_one_succeeds(rig):
    await rig.open("a")
    results = await asyncio.gather(
        rig.sessions.close("a"), rig.sessions.close("a"), return_exceptions=True
    )
    assert results[0] == 0
    assert isinstance(results[1], SessionClosed)


async def test_a_session_that_the_store_could_not_end_is_still_open(make_rig, x):
    store = SlowStore()
    store.gate.open()
    rig = make_rig(store=store)
    session = await rig.open("a")
    store.fails = True
    with pytest.raises(StoreUnavailable):
        await rig.sessions.close("a")
    assert (await rig.step(session, x[:1], 0)).t_after == 1
    store.fails = False
    assert await rig.sessions.close("a") == 1
