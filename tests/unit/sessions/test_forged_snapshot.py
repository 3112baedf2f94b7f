"""Snapshots from outside with values that no session can have: refused as corrupt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stepstate.engine.tracking.scores import BLOCK
from stepstate.errors import SnapshotCorrupt
from stepstate.sessions import CopyOptions
from stepstate.sessions.snapshots.format import decode, encode
from stepstate.transport.convert import encode_session
from stepstate.v1 import stepstate_pb2 as pb
from tests.offline import forecasting_network, rows
from tests.unit.rig import Rig, model_of
from tests.unit.sessions.forecasts import as_version_1


@pytest.fixture
def rig(make_rig) -> Rig:
    return make_rig(model_of(forecasting_network()), replay_rows=64)


async def forged(rig: Rig, place: int, value: float, *, version_1: bool = False) -> bytes:
    """A snapshot of a session of 20 rows in which one value of the state is another."""
    await rig.y(await rig.open("source"), rows(20))
    data = (await rig.sessions.export("source"))[0]
    snapshot = decode(data)
    state = snapshot.state.copy()
    state[place] = value
    data = encode(replace(snapshot, state=state))
    return as_version_1(data, rig.scheduler.engine.layout.cell) if version_1 else data


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan])
async def test_a_snapshot_with_a_count_that_can_not_be_is_corrupt(rig, value):
    engine = rig.scheduler.engine
    spot = rig.tracker.targets[0].horizons[0]
    place = engine.layout.tracked_from + spot.place + BLOCK  # how many errors there were
    data = await forged(rig, place, value)
    with pytest.raises(SnapshotCorrupt, match="tracks"):
        await rig.sessions.restore(data, CopyOptions("b", None, None))


async def test_a_state_of_version_1_that_is_not_a_number_is_corrupt(rig):
    data = await forged(rig, 0, np.nan, version_1=True)
    with pytest.raises(SnapshotCorrupt, match="not finite"):
        await rig.sessions.restore(data, CopyOptions("b", None, None))


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, 7.0, 2.0**24, 3e38, np.nan])
async def test_what_is_tracked_is_refused_or_can_be_shown(rig, value):
    """Each number of the tracked part in turn: no list that the session is in may fail."""
    session = await rig.open("source")
    await rig.y(session, rows(20))
    engine, t = rig.scheduler.engine, 20
    state = engine.read_states(np.array([session.slot]))[0]
    for place in range(engine.layout.tracked_from, engine.layout.width):
        changed = state.copy()
        changed[place] = value
        if engine.is_valid(changed, t):
            engine.write_state(session.slot, changed)
            shown = encode_session(rig.sessions.summary(session))
            assert shown.status == pb.SESSION_STATUS_OPEN, place
            assert shown.drift.last_t < t
