"""Bytes from outside, and surprises in a forward: nobody else's session is touched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stepstate.engine.forecasts import Method, Outlook
from stepstate.engine.intervals import quantiles_of
from stepstate.engine.scores import BLOCK
from stepstate.engine.tracking import Tracker
from stepstate.errors import Internal, InvalidField, SnapshotCorrupt
from stepstate.sessions import Copying
from stepstate.sessions.snapshot import decode, encode
from tests.offline import forecasting_network
from tests.unit.rig import Rig, model_of
from tests.unit.sessions.test_forecasting import as_version_1, rows


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
    return as_version_1(data, rig.lane.engine.layout.cell) if version_1 else data


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan])
async def test_a_snapshot_with_a_count_that_can_not_be_is_corrupt(rig, value):
    engine = rig.lane.engine
    spot = engine._tracker.targets[0].spots[0]
    place = engine.layout.tracked_from + spot.place + BLOCK  # how many errors there were
    data = await forged(rig, place, value)
    with pytest.raises(SnapshotCorrupt, match="tracks"):
        await rig.sessions.restore(data, Copying("b", None, None))


async def test_a_state_of_version_1_that_is_not_a_number_is_corrupt(rig):
    data = await forged(rig, 0, np.nan, version_1=True)
    with pytest.raises(SnapshotCorrupt, match="not finite"):
        await rig.sessions.restore(data, Copying("b", None, None))


@pytest.mark.parametrize("count", [1, 5])
async def test_a_surprise_while_tracking_changes_no_state(rig, monkeypatch, count):
    sessions = [await rig.open(name) for name in ("a", "b")]
    for session in sessions:
        await rig.y(session, rows(20))
    slots = np.array([session.slot for session in sessions])
    before = rig.lane.engine.read_states(slots)
    observe = Tracker.observe

    def surprise(self, values, base, at, **named):
        observe(self, values, base, at, **named)
        if at == 20 + count - 1:  # the last row of the request
            raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "observe", surprise)
        callers = [rig.send(session, rows(count, seed=3)) for session in sessions]
        for caller in callers:
            assert isinstance(await caller.error(), Internal)
    assert rig.lane.engine.read_states(slots).tobytes() == before.tobytes()
    assert [rig.sessions.t(session) for session in sessions] == [20, 20]


@pytest.mark.parametrize("level", [0.0099, 0.9991, 1e-9, 0.9999999])
async def test_a_level_that_no_session_could_keep_is_refused(rig, level):
    with pytest.raises(InvalidField, match=r"0\.01 to 0\.999"):
        await rig.open(level=level)


async def test_farther_quantiles_are_never_nearer(rig):
    session = await rig.open()
    await rig.y(session, rows(60))
    engine = rig.lane.engine
    state = engine.read_states(np.array([session.slot]))
    tracker = engine._tracker
    spot = tracker.targets[0].spots[0]
    state[0, engine.layout.tracked_from + spot.place] = -0.4  # an offset that takes much off
    levels = (0.02, 0.05, 0.3, 0.45, 0.5, 0.6, 0.95, 0.99)
    values = np.array([[[-0.2, 0.0, 1.0]]], np.float32)
    methods = np.full((1, 1), Method.DIRECT, np.uint8)
    outlook = Outlook(tracker.targets[0].output, values, methods)
    found = quantiles_of(outlook, levels, tracker, state[:, engine.layout.tracked_from :])
    assert (np.diff(found[0, 0]) >= 0).all()
