"""Forecasts of sessions, against `tests.offline`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stepstate.engine import Method
from stepstate.errors import (
    ForecastImpossible,
    InvalidField,
    SessionUnknown,
)
from stepstate.sessions import ForecastRequest, Scenario
from tests import offline
from tests.offline import rows
from tests.unit.rig import Rig, model_of
from tests.unit.sessions.forecasts import CLOSE, PATH, stepped, told


@pytest.fixture
def rig(make_rig, sensor) -> Rig:
    return make_rig(model_of(sensor), replay_rows=64)


async def test_a_forecast_is_what_the_last_step_said(rig, sensor):
    x = rows(20)
    session = await rig.open()
    y = (await stepped(rig, session, x))[-1]
    (forecast,) = await told(rig, horizon=3, quantiles=(0.5,))
    columns = [1, 4, 7] if len(y) > 5 else [0, 1, 2]
    (level,) = forecast.outputs
    assert level.values[:, 0] == pytest.approx(y[columns], abs=CLOSE)
    assert level.methods == [Method.DIRECT] * 3
    assert (forecast.t, forecast.session_id) == (20, "a")


async def test_beyond_the_horizons_forecasts_are_fed_back(rig, sensor):
    """Horizon 4 has no column: it is read, a row fed back, at 3; heat is not forecast."""
    session = await rig.open()
    await stepped(rig, session, rows(20))
    with pytest.raises(ForecastImpossible, match="column 'heat'"):
        await told(rig, horizon=9)
    (forecast,) = await told(rig, horizon=5, quantiles=(0.5,))
    methods = forecast.outputs[0].methods
    assert methods == [Method.DIRECT] * 3 + [Method.NONE, Method.DIRECT]
    assert np.isnan(forecast.outputs[0].values[3])


async def test_a_scenario_is_what_a_fork_would_say(rig, sensor):
    """Heat is given for 6 rows and level is the model's own, a row at a time."""
    x = rows(20)
    await stepped(rig, await rig.open(), x)
    heat = np.array([0.0, 1.0, -3.0, 0.5, 2.0, -1.0], np.float32)
    ahead = np.stack([np.full(6, np.nan, np.float32), heat], axis=1)
    (forecast,) = await told(
        rig, horizon=8, quantiles=(0.5,), scenarios=[Scenario("warm", ahead.ravel())]
    )
    level, warm = forecast.outputs
    path, said, median = x, [], 1 if len(offline.outputs(sensor, x)[0]) > 5 else 0
    for value in heat:
        said.append(offline.outputs(sensor, path)[-1, median])
        path = np.concatenate([path, [[said[-1], value]]]).astype(np.float32)
    last = offline.outputs(sensor, path)
    said += [last[-1, median], last[-1, median + (3 if median else 1)]]
    assert level.values[:, 0] == pytest.approx(said, abs=10 * CLOSE)
    assert level.methods == [Method.DIRECT] + [Method.FED_BACK] * 7
    assert warm.values[:6, 0] == pytest.approx(last[-6:, -1], abs=CLOSE)
    assert np.isnan(warm.values[6:]).all()


async def test_given_values_are_told_as_given(rig):
    await stepped(rig, await rig.open(), rows(20))
    ahead = Scenario("all", np.array([7.0, 0.0, 8.0, 0.0], np.float32))
    (forecast,) = await told(rig, horizon=3, quantiles=(0.1, 0.9), scenarios=[ahead])
    level = forecast.outputs[0]
    assert level.values[:2].tolist() == [[7.0, 7.0], [8.0, 8.0]]
    assert level.methods == [Method.GIVEN, Method.GIVEN, Method.FED_BACK]


async def test_scenarios_of_many_lengths_come_back_in_order(rig):
    for session_id in ("a", "b", "c"):
        await stepped(rig, await rig.open(session_id), rows(20, seed=ord(session_id)))
    paths = [np.full((length, 2), float(length), np.float32) for length in (3, 1, 3, 2)]
    scenarios = tuple(Scenario(str(n), path.ravel()) for n, path in enumerate(paths))
    wish = ForecastRequest(4, (0.5,), scenarios)
    found = await rig.sessions.forecast(["a", "b", "c"], wish)
    for session_id, of_session in zip("abc", found, strict=True):
        assert [one.scenario for one in of_session] == ["0", "1", "2", "3"]
        for one, scenario in zip(of_session, scenarios, strict=True):
            (alone,) = await told(rig, session_id, 4, (0.5,), [scenario])
            for mine, its in zip(one.outputs, alone.outputs, strict=True):
                assert np.allclose(mine.values, its.values, atol=CLOSE, equal_nan=True)


async def test_a_forecast_changes_nothing_and_comes_again_the_same(rig):
    x = rows(40)
    session, other = await rig.open(), await rig.open("other")
    for row in x[:20]:
        await rig.y(session, row)
        await rig.y(other, row)
    scenario = Scenario("s", rows(4, seed=9).ravel())
    first = await told(rig, horizon=5, scenarios=[scenario])
    again = await told(rig, horizon=5, scenarios=[scenario])
    assert first[0].outputs[0].values.tobytes() == again[0].outputs[0].values.tobytes()
    assert np.array_equal(await stepped(rig, session, x[20:]), await stepped(rig, other, x[20:]))
    left = rig.scheduler.engine.read_states(np.array([session.slot, other.slot]))
    assert left[0].tobytes() == left[1].tobytes()


async def test_a_forecast_waits_for_the_steps_before_it(rig):
    session = await rig.open()
    await rig.y(session, rows(5))
    callers = [rig.send(session, row) for row in rows(5, seed=3)]
    (forecast,) = await told(rig, horizon=1)
    assert forecast.t == 10
    assert all(caller.answered for caller in callers)


async def test_quantiles_rise_with_their_levels(rig):
    await stepped(rig, await rig.open(), rows(60))
    levels = (0.01, 0.05, 0.2, 0.5, 0.7, 0.95, 0.99)
    (forecast,) = await told(rig, horizon=3, quantiles=levels)
    assert (np.diff(forecast.outputs[0].values, axis=1) >= 0).all()


async def test_a_session_without_rows_has_no_forecast(rig):
    await rig.open()
    with pytest.raises(ForecastImpossible, match="no rows yet"):
        await told(rig)


async def test_each_session_has_its_own_interval_among_others(rig):
    x = rows(60)
    for name, level in (("a", 0.5), ("b", 0.9), ("c", 0.5)):
        await stepped(rig, await rig.open(name, level=level), x)
    found = await rig.sessions.forecast(["a", "b", "c"], ForecastRequest(3, (), ()))
    for name, (together,) in zip("abc", found, strict=True):
        (alone,) = await told(rig, name, horizon=3)
        assert together.levels == alone.levels
        assert np.allclose(together.outputs[0].values, alone.outputs[0].values, atol=CLOSE)


async def test_a_scenario_that_can_not_be_forecast_is_named(rig):
    await stepped(rig, await rig.open(), rows(20))
    cold = np.array([np.nan, -1.0] * 8, np.float32)
    unknown = cold.copy()
    unknown[-1] = np.nan
    scenarios = [Scenario("cold", cold), Scenario("unknown", unknown)]
    with pytest.raises(ForecastImpossible, match=r"scenarios\[1\] 'unknown': the row 8 ahead"):
        await told(rig, horizon=9, quantiles=(0.5,), scenarios=scenarios)


async def test_one_unknown_session_does_not_hide_the_others(rig):
    await stepped(rig, await rig.open(), rows(3))
    found = await rig.sessions.forecast(["a", "nobody", "a"], ForecastRequest(1, (), ()))
    assert isinstance(found[1], SessionUnknown)
    assert [type(one) for one in (found[0], found[2])] == [list, list]


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        (ForecastRequest(10_001, (), ()), "horizon"),
        (ForecastRequest(1, (0.0,), ()), r"quantiles\[0\]"),
        (ForecastRequest(1, (0.5, math.nan), ()), r"quantiles\[1\]"),
        (ForecastRequest(1, (0.5,) * 101, ()), "quantiles: holds 101"),
        (ForecastRequest(1, (), (Scenario("s", PATH),) * 1001), "scenarios: holds 1001"),
        (ForecastRequest(1, (), (Scenario("s" * 129, PATH),)), r"scenarios\[0\].name: has 129"),
        (ForecastRequest(1, (), (Scenario("s", np.ones(3, np.float32)),)), r"scenarios\[0\].x"),
        (
            ForecastRequest(1, (), (Scenario("s", np.array([1, math.inf], np.float32)),)),
            r"scenarios\[0\].x",
        ),
        (ForecastRequest(1, (), (Scenario("s", np.ones(0, np.float32)),)), r"scenarios\[0\].x"),
    ],
)
async def test_what_can_not_be_asked_for_is_told_by_field(rig, wish, field):
    await stepped(rig, await rig.open(), rows(3))
    with pytest.raises(InvalidField, match=field):
        found = (await rig.sessions.forecast(["a"], wish))[0]
        if isinstance(found, Exception):
            raise found
