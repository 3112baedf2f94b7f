"""A drain finishes what was accepted; a failure after the caller gave up is nobody's."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from stepstate.engine.engine import ROUNDS_TO_A_CHUNK
from stepstate.errors import (
    Draining,
    Internal,
    StaleOwner,
    StoreUnavailable,
)
from tests.unit.rig import (
    Clock,
    Lasting,
    rounds,
    rows_of,
)
from tests.unit.sessions.slow_store import Gate, SlowStore


@pytest.fixture
def x(network):
    return rows_of(network, 8)


async def test_drain_refuses_what_is_new_and_waits_for_what_was_accepted(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    caller = rig.send(session, x[:4], 0)
    draining = asyncio.create_task(rig.sessions.drain())
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await rig.open("b")
    with pytest.raises(Draining):
        rig.send(session, x[4], 4)
    assert not draining.done()
    await draining
    assert (await caller.outcome()).t_after == 4


async def test_drain_ends_at_once_when_nothing_is_accepted(rig):
    await asyncio.wait_for(rig.sessions.drain(), 1)


async def test_a_drain_that_is_given_up_still_lets_accepted_steps_be_answered(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    caller = rig.send(session, x[:4], 0)
    draining = asyncio.create_task(rig.sessions.drain())
    await asyncio.sleep(0)
    draining.cancel()
    await rounds(4 * ROUNDS_TO_A_CHUNK + 2)
    assert caller.answered


async def test_two_drains_both_end(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    rig.send(session, x[:4], 0)
    drains = asyncio.gather(rig.sessions.drain(), rig.sessions.drain())
    await asyncio.wait_for(drains, 1)


async def test_an_open_that_a_drain_overtakes_is_refused(make_rig):
    store = SlowStore()
    rig = make_rig(store=store)
    opening = asyncio.create_task(rig.open("a"))
    await rounds(2)
    await rig.sessions.drain()
    store.gate.open()
    with pytest.raises(Draining):
        await opening
    assert len(rig.sessions) == 0


class FailingLate(Lasting):
    """Holds calls until the test opens the gate, and then fails."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.gate = Gate()
        self.error: Exception = StoreUnavailable("it is away")

    async def _fail(self) -> Any:
        await self.gate.wait()
        raise self.error

    async def acquire(self, session_id, **options):
        return await self._fail()

    async def end(self, session_id, epoch, ending):
        return await self._fail()

    async def find(self, session_id):
        return await self._fail()

    async def create(self, record, **options):
        if record.session_id == "late":
            return await self._fail()
        return await super().create(record, **options)


@pytest.mark.parametrize("surprising", [False, True])
@pytest.mark.parametrize("what", ["get", "close", "close a spilled one", "look", "open", "export"])
async def test_what_fails_after_its_caller_gave_up_is_nobodys(make_rig, clock, what, surprising):
    """`make_rig` fails on what asyncio says: "Task exception was never retrieved"."""
    store = FailingLate(clock)
    rig = make_rig(store=store, clock=clock)
    await rig.open("a")
    if surprising:
        store.error = RuntimeError("no one expects it")
    uses = {
        "get": lambda: rig.sessions.get("b"),
        "close": lambda: rig.sessions.close("a"),
        "close a spilled one": lambda: rig.sessions.close("b"),
        "look": lambda: rig.sessions.look("b"),
        "open": lambda: rig.open("late"),
        "export": lambda: rig.sessions.export("b"),
    }
    caller = asyncio.create_task(uses[what]())
    await rounds(3)
    caller.cancel()
    await asyncio.wait([caller])
    store.gate.open()
    await rounds(10)
    del caller
    gc.collect()
    await rounds(2)
    assert not rig.left_over()
    assert rig.sessions.find("a") is not None


async def test_a_snapshot_whose_caller_gave_up_is_nobodys_if_the_session_is_lost(
    make_rig, clock, x
):
    rig = make_rig(store=Lasting(clock), clock=clock, chunk_rows=1)
    session = await rig.open("a")
    caller = rig.send(session, x[:4], 0)
    exporting = asyncio.create_task(rig.sessions.export("a"))
    await rounds(2)
    exporting.cancel()
    rig.table.lose(session, StaleOwner("a", 9))
    with pytest.raises(StaleOwner):
        await caller.outcome()
    del exporting, caller
    gc.collect()
    await rounds(2)


async def test_a_surprise_of_the_store_answers_a_step_that_is_ahead(make_rig, clock, x):
    store = FailingLate(clock)
    rig = make_rig(store=store, clock=clock)
    session = await rig.open("a")
    store.error = RuntimeError("no one expects it")
    store.gate.open()
    assert isinstance(await rig.send(session, x[0], 5).error(), Internal)
    await rig.step(session, x[0], 0)
