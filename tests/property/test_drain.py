"""A drain at any time: all who asked are answered, and the server keeps nothing.

The requests are those of `test_order`, at the real doors, at any point of an opening, a load, a
spill, a takeover or a close.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stepstate.errors import StepstateError
from stepstate.stores import Durability
from tests.hypothesis_profiles import examples
from tests.property.test_order import (
    ARRIVALS,
    HANG,
    MODEL,
    NAMES,
    STATES,
    Arrival,
    Delayed,
    Doors,
    prepare,
)
from tests.unit.rig import Clock, Rig, rounds


class InOrder(Delayed):
    """Writes one after the other, as a database does."""

    def __init__(self, clock: Clock, delays: Sequence[int]) -> None:
        super().__init__(clock, delays)
        self._turn = asyncio.Lock()

    async def create(self, record, **options):
        async with self._turn:
            return await super().create(record, **options)

    async def acquire(self, session_id, **options):
        async with self._turn:
            return await super().acquire(session_id, **options)

    async def save(self, saves):
        async with self._turn:
            return await super().save(saves)

    async def expire(self, saves, *, delete_at):
        async with self._turn:
            return await super().expire(saves, delete_at=delete_at)

    async def restore(self, key, epoch, **options):
        async with self._turn:
            return await super().restore(key, epoch, **options)

    async def end(self, session_id, epoch, ending):
        async with self._turn:
            return await super().end(session_id, epoch, ending)


@examples(150)
@given(
    states=st.tuples(*[st.sampled_from(STATES)] * len(NAMES)),
    durability=st.sampled_from(Durability),
    delays=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    arrivals=st.lists(ARRIVALS, min_size=2, max_size=24),
    after=st.integers(0, 24),
)
def test_a_drain_at_any_time_answers_all_and_gives_every_lease_up(
    states: tuple[str, ...],
    durability: Durability,
    delays: list[int],
    arrivals: list[Arrival],
    after: int,
) -> None:
    asyncio.run(carry_out(states, durability, delays, arrivals[:after], arrivals[after:]))


async def carry_out(
    states: Sequence[str],
    durability: Durability,
    delays: Sequence[int],
    before: Sequence[Arrival],
    later: Sequence[Arrival],
) -> None:
    """Lets requests arrive before a drain begins and after that, and looks at what is left."""
    surprises: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: surprises.append(told))
    count = len(before) + len(later)
    rows = np.random.default_rng(count).normal(size=(count + 10, 3)).astype(np.float32)
    clock = Clock()
    store = InOrder(clock, delays)
    rig = Rig(MODEL, store=store, clock=clock, max_sessions=len(NAMES))
    await prepare(rig, store, states, durability=durability, rows=rows, first=count + 1)
    doors = Doors(rig, rows)
    await _arrive(doors, before, 1)
    draining = asyncio.create_task(rig.sessions.drain())
    await _arrive(doors, later, len(before) + 1)
    for wire in doors.wires.values():
        wire.write(grpc.aio.EOF)
    async with asyncio.timeout(HANG):
        await asyncio.gather(draining, *doors.streams)
        told = await asyncio.gather(*doors.calls.values(), return_exceptions=True)
        await rig.settle(*NAMES)
    expected = (StepstateError, asyncio.CancelledError)
    assert not [e for e in told if isinstance(e, BaseException) and not isinstance(e, expected)]
    assert not rig.left_over()
    assert {entry.owner for entry in (await store.page("", 100))[0]} <= {"", "other"}
    assert not surprises


async def _arrive(doors: Doors, arrivals: Sequence[Arrival], first: int) -> None:
    for place, one in enumerate(arrivals, first):
        doors.arrive(place, one.kind, one.name)
        await rounds(one.pause + one.gives_up * one.may_give_up)
        if one.may_give_up:
            doors.calls[place].cancel()
