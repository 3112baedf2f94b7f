"""Rows that are missing: held or imputed, against `tests.offline`."""

from __future__ import annotations

import numpy as np
import pytest

from stepstate.engine.network import Network
from stepstate.engine.tracking.scores import _PAIRS, BLOCK
from stepstate.errors import (
    NonFiniteResult,
)
from tests import offline
from tests.offline import rows
from tests.unit.rig import Rig, model_of, outputs
from tests.unit.sessions.forecasts import CLOSE, stepped


@pytest.fixture
def rig(make_rig, sensor) -> Rig:
    return make_rig(model_of(sensor), replay_rows=64)


async def test_imputed_values_are_the_models_own_forecast(rig, sensor):
    x = rows(20)
    median = 1 if len(offline.outputs(sensor, x)[0]) > 5 else 0
    session = await rig.open(missing="impute")
    await stepped(rig, session, x)
    filled = x
    for holes in ([np.nan, 0.5], [np.nan, np.nan], [6.0, np.nan]):
        own = offline.outputs(sensor, filled)[-1, median], filled[-1, 1]
        row = np.where(np.isnan(holes), own, holes)
        filled = np.concatenate([filled, [row]]).astype(np.float32)
        found = await rig.y(session, holes)
        assert found[0] == pytest.approx(offline.outputs(sensor, filled)[-1], abs=10 * CLOSE)


async def test_held_values_are_those_of_the_row_before(rig, sensor):
    x = rows(20)
    session = await rig.open(missing="hold")
    await stepped(rig, session, x)
    found = await rig.y(session, np.full((3, 2), np.nan))
    held = np.concatenate([x, x[-1:], x[-1:], x[-1:]])
    assert found == pytest.approx(offline.outputs(sensor, held)[-3:], abs=CLOSE)


@pytest.mark.parametrize("policy", ["hold", "impute"])
async def test_a_columns_level_stands_in_until_its_first_value(rig, sensor, policy):
    """One of two sensors is not there yet: its mean stands in, and no row is scored by it."""
    session = await rig.open(missing=policy)
    x = rows(12)
    x[:5, 1] = np.nan
    step = await rig.step(session, x[0])
    assert step.missing_rows == 1
    found = np.concatenate([outputs(step), await rig.y(session, x[1:])])
    x[:5, 1] = sensor.manifest["inputs"][1]["mean"]
    assert found == pytest.approx(offline.outputs(sensor, x), abs=CLOSE)


async def test_a_level_that_stood_in_is_no_naive_forecast(rig):
    session = await rig.open(missing="hold")
    x = rows(9)
    x[:4, 0] = np.nan
    await stepped(rig, session, x)
    part = rig.scheduler.engine.read_states(np.array([session.slot]))[
        0, rig.scheduler.engine.layout.tracked_from :
    ]
    spot = rig.tracker.targets[0].horizons[0]
    assert (
        part[spot.place + BLOCK + _PAIRS] == 1
    )  # of nine rows, only the last had one a season before


async def test_missing_rows_are_answered_again_like_others(rig):
    session = await rig.open(missing="impute")
    await rig.y(session, rows(5), 0)
    for x, t in (([np.nan, 0.0], 5), (np.full((4, 2), np.nan), 6)):
        first = await rig.step(session, x, t)
        again = await rig.step(session, x, t)
        assert (again.replayed, again.y) == (True, first.y)


async def test_missing_rows_among_others_touch_only_their_own(rig, sensor):
    """One micro-batch of whole and missing rows; every session as if alone."""
    x = rows(9)
    sessions = [
        await rig.open(f"s{n}", missing=("reject", "hold", "impute")[n % 3]) for n in range(6)
    ]
    for session in sessions:
        await rig.y(session, x)
    callers = [
        rig.send(s, [5.0, 0.0] if s.record.missing.value == "reject" else [np.nan, 0.0])
        for s in sessions
    ]
    together = [outputs(await caller.outcome()) for caller in callers]
    for n, first in enumerate(together[:3]):
        assert first == pytest.approx(together[n + 3], abs=CLOSE)
    alone = await rig.open("alone")
    await rig.y(alone, x)
    assert together[0] == pytest.approx(await rig.y(alone, [5.0, 0.0]), abs=CLOSE)


async def test_a_row_beyond_float32_is_refused_among_others(rig):
    """Neither its session nor its mates, nor what is tracked of any of them, notice."""
    x = rows(12)
    sessions = [await rig.open(f"s{n}") for n in range(3)]
    for session in sessions:
        await rig.y(session, x)
    callers = [
        rig.send(s, row) for s, row in zip(sessions, ([5, 0], [3e38, 0], [5, 0]), strict=True)
    ]
    assert isinstance(await callers[1].error(), NonFiniteResult)
    assert outputs(await callers[0].outcome()) == pytest.approx(outputs(await callers[2].outcome()))
    scored = [
        rig.sessions.summary(session).quality.accuracy[0].lifetime.scored for session in sessions
    ]
    assert scored == [12, 11, 12]
    assert outputs(await rig.step(sessions[1], [5, 0])) == pytest.approx(
        outputs(await callers[0].outcome()), abs=CLOSE
    )


async def test_a_session_with_missing_rows_does_not_slow_another_that_is_primed(rig, monkeypatch):
    """Its own forecasts take a row at a time; whole rows of another go a chunk at a time."""
    gappy = await rig.open("gappy", missing="impute")
    whole = await rig.open("whole")
    await rig.y(gappy, rows(1))
    chunks = []
    sequence = Network.sequence

    def noted(network, x, *rest):
        chunks.append(x.shape)
        return sequence(network, x, *rest)

    monkeypatch.setattr(Network, "sequence", noted)
    holes = rig.send(gappy, np.full((300, 2), np.nan))
    primed = rig.send(whole, rows(512))
    assert await primed.outcome()
    assert await holes.outcome()
    assert [shape[1] for shape in chunks if shape[1] > 1] == [128] * 4


@pytest.mark.parametrize("policy", ["hold", "impute"])
async def test_runs_of_missing_rows_leave_what_stepping_leaves(rig, policy):
    """From the first row on, in one request, in chunks; several sessions with gaps of their own."""
    x = [rows(140, seed=n) for n in range(3)]
    for n, mine in enumerate(x):
        mine[:n, 0] = np.nan
        mine[: 2 * n, 1] = np.nan
        mine[40 : 65 + n] = np.nan
        mine[100 + n : 130 : 2 + n, 0] = np.nan
    slow = [await rig.open(f"slow{n}", missing=policy) for n in range(3)]
    fast = [await rig.open(f"fast{n}", missing=policy) for n in range(3)]
    wanted = [await stepped(rig, session, mine) for session, mine in zip(slow, x, strict=True)]
    callers = [rig.send(session, mine) for session, mine in zip(fast, x, strict=True)]
    for caller, y in zip(callers, wanted, strict=True):
        step = await caller.outcome()
        assert outputs(step) == pytest.approx(y, abs=CLOSE)
    slots = np.array([session.slot for session in (*slow, *fast)])
    states = rig.scheduler.engine.read_states(slots)
    assert np.array_equal(np.isnan(states[:3]), np.isnan(states[3:]))
    assert np.nanmax(np.abs(states[:3] - states[3:])) < 1e-3


@pytest.mark.parametrize("policy", ["hold", "impute"])
async def test_inspect_fills_what_is_missing_too(rig, policy):
    x = rows(12)
    x[0, 1] = x[5:8] = np.nan
    one, other = [await rig.open(name, missing=policy) for name in ("one", "other")]
    step = await rig.step(one, x, inspect=True)
    assert outputs(step) == pytest.approx(await rig.y(other, x), abs=CLOSE)
    assert all(part.shape[0] == 12 for layer in step.layers for part in layer.values())


async def test_rows_held_are_applied_a_chunk_at_a_time(rig, monkeypatch):
    session = await rig.open(missing="hold")
    x = rows(256)
    x[100:200] = np.nan
    pieces = []
    sequence = Network.sequence_seen

    def noted(network, seen, *rest):
        pieces.append(seen.shape[1])
        return sequence(network, seen, *rest)

    monkeypatch.setattr(Network, "sequence_seen", noted)
    await rig.y(session, x)
    assert pieces == [128, 128]
