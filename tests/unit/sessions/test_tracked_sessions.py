"""What sessions track of their own forecasts, against `tests.offline`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stepstate.errors import (
    SnapshotCorrupt,
)
from stepstate.sessions import CopyOptions
from stepstate.sessions.snapshots.format import decode, encode
from tests import offline
from tests.offline import rows
from tests.unit.rig import Rig, model_of
from tests.unit.sessions.forecasts import CLOSE, as_version_1, stepped, told


@pytest.fixture
def rig(make_rig, sensor) -> Rig:
    return make_rig(model_of(sensor), replay_rows=64)


async def test_stepping_equals_the_whole_sequence_offline(rig, sensor):
    x = rows(30)
    found = await stepped(rig, await rig.open(), x)
    assert np.abs(found - offline.outputs(sensor, x)).max() < CLOSE


async def test_priming_leaves_what_stepping_leaves(rig, sensor):
    """Outputs, past rows and all that is tracked; chunks of 128, 1 row, 7 rows."""
    x = rows(400)
    x[37, 0] = x[250] = np.nan
    one = await rig.open("one", missing="hold")
    many = await rig.open("many", missing="hold")
    slow = await stepped(rig, one, x)
    fast = np.concatenate([await rig.y(many, part) for part in (x[:300], x[300:301], x[301:])])
    assert np.abs(slow - fast).max() < CLOSE
    states = rig.scheduler.engine.read_states(np.array([one.slot, many.slot]))
    assert np.array_equal(np.isnan(states[0]), np.isnan(states[1]))
    assert np.nanmax(np.abs(states[0] - states[1])) < 1e-3  # counts and sums, over 400 rows


async def test_what_is_tracked_is_what_its_definition_gives(rig, sensor):
    x = rows(120)
    x[50, 0] = np.nan
    session = await rig.open(missing="impute", level=0.8)
    y = await stepped(rig, session, x)
    quality = rig.sessions.summary(session).quality
    assert quality.level == pytest.approx(0.8)
    for accuracy, spot in zip(quality.accuracy, offline.track(sensor, x, y, 0.8), strict=True):
        assert (accuracy.output, accuracy.horizon) == ("level", spot.horizon)
        figures = accuracy.lifetime
        assert accuracy.recent == figures
        assert figures.scored == len(spot.errors) == 119 - spot.horizon
        assert figures.mean_absolute_error == pytest.approx(np.mean(spot.errors), rel=1e-3)
        scaled = offline.scaled_error(spot)
        assert figures.mean_absolute_scaled_error == pytest.approx(scaled, rel=2e-2)
        assert figures.coverage == pytest.approx(np.mean(spot.held), rel=1e-3)
        assert accuracy.offset == pytest.approx(spot.offset, abs=1e-3)


async def test_intervals_are_those_that_were_tracked(rig, sensor):
    x = rows(60)
    y = await stepped(rig, await rig.open(), x)
    spots = offline.track(sensor, x, y)
    (forecast,) = await told(rig, horizon=3)
    assert forecast.levels == pytest.approx((0.05, 0.5, 0.95))
    values = forecast.outputs[0].values
    for spot in spots:
        issued = spot.issued[59 + spot.horizon]
        assert values[spot.horizon - 1] == pytest.approx(issued, abs=1e-3)
    between = values[1]
    assert between[0] <= between[1] <= between[2]


async def test_a_fork_carries_past_rows_and_what_is_tracked(make_rig, sensor):
    rig = make_rig(model_of(sensor), replay_rows=64)
    x = rows(60)
    session = await rig.open()
    await stepped(rig, session, x[:40])
    copy = await rig.sessions.fork("a", CopyOptions("b", None, None))
    assert np.array_equal(await stepped(rig, session, x[40:]), await stepped(rig, copy, x[40:]))
    left = rig.scheduler.engine.read_states(np.array([session.slot, copy.slot]))
    assert left[0].tobytes() == left[1].tobytes()


async def test_metrics_add_up_what_sessions_tell(rig):
    for session_id in ("a", "b"):
        await rig.y(await rig.open(session_id), rows(50, seed=ord(session_id)))
    tally = rig.scheduler.engine.score_totals
    standings = [rig.sessions.summary(rig.sessions.find(s)) for s in ("a", "b")]
    for place, score in enumerate(tally.scores):
        parts = [standing.quality.accuracy[place].lifetime for standing in standings]
        assert score.scored == sum(part.scored for part in parts)
        total = sum(part.scored * part.mean_absolute_error for part in parts)
        assert score.absolute_error == pytest.approx(total, rel=1e-3)
        assert score.covered <= score.with_interval <= score.scored


async def test_a_snapshot_of_version_1_goes_on_where_it_was(make_rig, model):
    """Its past rows are those of its replay window: what is missing next can be held."""
    rig = make_rig()
    x = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
    session = await rig.open(missing="hold")
    await stepped(rig, session, x)
    old = as_version_1((await rig.sessions.export("a"))[0], rig.scheduler.engine.layout.cell)
    copy = await rig.sessions.restore(old, CopyOptions("b", None, None))
    states = rig.scheduler.engine.read_states(np.array([session.slot, copy.slot]))
    assert states[0].tobytes() == states[1].tobytes()
    hole = [np.nan, 1.0, np.nan]
    assert np.array_equal(await rig.y(session, hole), await rig.y(copy, hole))


async def test_a_state_that_is_not_a_number_is_corrupt(make_rig):
    rig = make_rig()
    await rig.y(await rig.open(), np.ones((2, 3)))
    snapshot = decode((await rig.sessions.export("a"))[0])
    state = snapshot.state.copy()
    state[0] = np.nan
    with pytest.raises(SnapshotCorrupt, match="not finite"):
        await rig.sessions.restore(
            encode(replace(snapshot, state=state)), CopyOptions("b", None, None)
        )
