"""Single rows on the fast path: what may happen between their arrival and their forward."""

from __future__ import annotations

import numpy as np
import pytest

from stepstate.errors import Draining
from stepstate.sessions import ResidentSession, SingleRow, Source, Step
from stepstate.sessions.snapshots.format import decode
from tests.unit.rig import Caller, Clock, Lasting, Rig, request, rounds, rows_of


class RowCaller:
    """A `RowReplyTo`: keeps the outcomes of rows, and the callers of those that became steps."""

    def __init__(self) -> None:
        self.cancelled = False
        self.source = Source()
        self.applied: list[int] = []
        self.returned: list[Caller] = []

    def deliver_row(self, row: SingleRow, y: bytes, durable_t: int) -> None:
        self.applied.append(row.at + 1)

    def step_of(self, row: SingleRow) -> Step:
        caller = Caller(self.source)
        self.returned.append(caller)
        return request(row.session, np.frombuffer(row.x, "<f4"), row.t, caller)

    def hold_row(self, row: SingleRow) -> None:
        pass


def row_of(session: ResidentSession, caller: RowCaller, x: np.ndarray, t: int) -> SingleRow:
    ref = session.scheduler._table.ref_of(session)  # noqa: SLF001 - as `SessionService.ref_of`
    assert ref is not None
    return SingleRow(caller, session, ref.generation, t, x.tobytes(), b"", b"")


@pytest.fixture
def rig(model, clock: Clock) -> Rig:
    return Rig(model, store=Lasting(clock), clock=clock)


async def test_a_row_is_applied_at_the_end_of_its_round(rig: Rig, network):
    session, caller = await rig.open("a"), RowCaller()
    x = rows_of(network, 2)
    assert session.scheduler.add_row(row_of(session, caller, x[0], 0))
    assert not caller.applied
    await rounds(2)
    assert caller.applied == [1]
    assert not rig.left_over()


async def test_a_row_that_came_just_before_a_drain_is_refused_and_not_saved(rig: Rig, network):
    """It is not counted, so the drain does not wait for it: what is saved may not lack it."""
    session, caller = await rig.open("a"), RowCaller()
    x = rows_of(network, 2)
    await rig.step(session, x[0], 0)
    assert session.scheduler.add_row(row_of(session, caller, x[1], 1))
    await rig.sessions.drain()
    await rounds(2)
    assert not caller.applied
    assert isinstance(await caller.returned[0].error(), Draining)
    assert decode(rig.store.snapshot("a")).t == 1


async def test_a_row_whose_caller_leaves_before_its_forward_is_not_applied(rig: Rig, network):
    session, caller = await rig.open("a"), RowCaller()
    x = rows_of(network, 2)
    assert session.scheduler.add_row(row_of(session, caller, x[0], 0))
    assert session.scheduler.add_row(row_of(session, caller, x[1], 1))  # waits for the first
    caller.cancelled = True
    await rounds(4)
    assert not caller.applied
    assert not caller.returned
    assert rig.sessions.t(session) == 0
    assert rig.results == {"cancelled": 2}
    assert not rig.left_over()


async def test_a_row_of_a_session_that_ends_meanwhile_becomes_a_step_before_the_end(
    rig: Rig, network
):
    session, caller = await rig.open("a"), RowCaller()
    assert session.scheduler.add_row(row_of(session, caller, rows_of(network, 1)[0], 0))
    assert await rig.sessions.close("a") == 1
    assert (await caller.returned[0].outcome()).t_after == 1
    assert not rig.left_over()
