"""Rows of tenants on the fast path: never more than their rates, and by their weights."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepstate.errors import TenantLimitReached
from stepstate.sessions import ResidentSession, Source
from stepstate.tenants import LimitTable, Share, TenantLimits, TenantTable
from tests.unit.rig import Clock, Rig, rounds, rows_of
from tests.unit.sessions.test_rows import RowCaller, row_of


def caller_of(table: TenantTable, name: str) -> RowCaller:
    caller = RowCaller()
    caller.source = Source(Share(table.get(name)))
    return caller


def send(
    sessions: Sequence[ResidentSession], caller: RowCaller, x: np.ndarray, ts: Sequence[int]
) -> None:
    for session, t in zip(sessions, ts, strict=True):
        assert session.scheduler.add_row(row_of(session, caller, x, t))


async def opened(rig: Rig, count: int, prefix: str) -> list[ResidentSession]:
    return [await rig.open(f"{prefix}{number}") for number in range(count)]


async def test_what_is_over_the_rate_is_refused_in_its_place_and_nothing_of_it_applied(
    model, network, clock: Clock
):
    rig = Rig(model, clock=clock, max_sessions=20)
    limits = LimitTable(tenants={"a": TenantLimits(rows_per_second=10, rows_burst=5)})
    table = TenantTable(limits, clock)
    mine, others = caller_of(table, "a"), caller_of(table, "b")
    sessions, theirs = await opened(rig, 8, "a"), await opened(rig, 8, "b")
    x = rows_of(network, 1)[0]
    send(sessions, mine, x, [0] * 8)
    send(theirs, others, x, [0] * 8)
    send(sessions, mine, x, [1] * 8)  # each waits for the one before
    await rounds(4)
    assert len(others.applied) == 8
    assert mine.applied == [1] * 5
    assert len(mine.returned) == 11
    for returned in mine.returned:
        assert isinstance(await returned.error(), TenantLimitReached)
    assert [rig.sessions.t(one) for one in sessions] == [1] * 5 + [0] * 3
    assert not rig.left_over()
    share = mine.source.share
    assert (share.queued_rows, share.queued_requests) == (0, 0)
    clock.advance(0.3)
    send(sessions, mine, x, [rig.sessions.t(one) for one in sessions])
    await rounds(4)
    assert len(mine.applied) == 8
    assert table.get("a").rows.taken == 8
    assert table.get("a").refused["rows_per_second"] == 16


@given(st.lists(st.tuples(st.integers(0, 12), st.floats(0, 1)), max_size=12))
@settings(max_examples=25)
def test_rows_are_never_more_than_rate_and_burst_over_any_interval(model, network, rounds_of_rows):
    async def run() -> None:
        clock = Clock()
        rig = Rig(model, clock=clock, max_sessions=20)
        table = TenantTable(
            LimitTable(defaults=TenantLimits(rows_per_second=10, rows_burst=4)), clock
        )
        caller = caller_of(table, "a")
        sessions = await opened(rig, 12, "a")
        x, applied = rows_of(network, 1)[0], []
        for count, wait in rounds_of_rows:
            clock.advance(wait)
            before = len(caller.applied)
            some = sessions[:count]
            send(some, caller, x, [rig.sessions.t(one) for one in some])
            await rounds(4)
            applied.append((clock.now, len(caller.applied) - before))
        for first, (begin, _) in enumerate(applied):
            for last in range(first, len(applied)):
                total = sum(count for _, count in applied[first : last + 1])
                assert total <= 10 * (applied[last][0] - begin) + 4 + 0.01

    asyncio.run(run())


@pytest.mark.parametrize("packed", [False, True])
async def test_a_tenant_with_twice_the_weight_has_twice_the_rows_while_both_wait(
    model, network, *, packed: bool
):
    rig = Rig(model, max_sessions=400, batch_rows=12)
    limits = LimitTable(tenants={"light": TenantLimits(), "heavy": TenantLimits(weight=2)})
    table = TenantTable(limits)
    light, heavy = (caller_of(table, name) for name in ("light", "heavy"))
    sessions = {light: await opened(rig, 180, "l"), heavy: await opened(rig, 180, "h")}
    x = rows_of(network, 1)[0]
    if packed:
        for caller, its in sessions.items():
            for first in range(0, 180, 4):
                rig.send_pack(its[first : first + 4], np.stack([x] * 4), caller.source)
    else:
        for caller, its in sessions.items():
            send(its, caller, x, [0] * 180)
    while not rig.results.get("applied"):
        await rounds(1)
    for _ in range(100):
        t = {who: sum(map(rig.sessions.t, its)) for who, its in sessions.items()}
        if t[heavy] == 180:
            break
        assert abs(t[heavy] - 2 * t[light]) <= 16
        await rounds(1)
    assert t[heavy] == 180
    assert t[light] <= 100
