"""The numpy parts of models/electricity, each against a slow or another computation."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from river.drift import PageHinkley

from tests.conftest import ELECTRICITY

sys.path.append(str(ELECTRICITY / "electricity"))

from base import base_weights
from drift import DriftTest, scaled_errors
from holt_winters import FIRST_ROWS, Parameters, forecast_holt_winters, squared_errors
from intervals import covered, tracked_intervals
from series import STEPS_PER_DAY, STEPS_PER_WEEK, forecast_rows, load_series
from settings import LAGS

PARAMETERS = Parameters(level=0.02, daily=0.2, weekly=0.3, memory=0.9)


@pytest.fixture(scope="module")
def demand() -> np.ndarray:
    return load_series().demand


def test_the_base_forecast_is_its_formula(demand):
    v, t = demand - demand.mean(), 1000
    d = np.zeros_like(v)
    d[STEPS_PER_WEEK:] = v[STEPS_PER_WEEK:] - 0.5 * v[:-STEPS_PER_WEEK]
    found = base_weights(LAGS) @ v[t - np.array(LAGS)]
    for h in (1, 2, 47, 48):
        last = d[t] - 0.6 * d[t - STEPS_PER_DAY]
        expected = 0.5 * v[t + h - STEPS_PER_WEEK] + 0.6 * d[t + h - STEPS_PER_DAY]
        assert found[h - 1] == pytest.approx(expected + 0.97**h * last)


def test_a_lag_that_the_base_forecast_needs_is_named_when_missing():
    with pytest.raises(ValueError, match="lags: 384 is missing"):
        base_weights(LAGS[:-1])


def test_tracked_intervals_cover_what_they_promise_whatever_the_model_says():
    random = np.random.default_rng(1)
    demand = random.normal(0.0, 1.0, 6000)
    for width in (0.3, 5.0):
        issued = np.tile([-width, 0.0, width], (6000, 1))
        tracked = tracked_intervals(issued, demand, 3, level=0.9, rate=0.05)
        raw = covered(issued[2000:-3][:, [0, 2]], demand[2003:])
        assert abs(raw - 90.0) > 5.0
        assert covered(tracked[2000:-3], demand[2003:]) == pytest.approx(90.0, abs=1.0)


def test_a_tracked_interval_never_leaves_the_median():
    issued = np.tile([-1.0, 0.0, 1.0], (2000, 1))
    tracked = tracked_intervals(issued, np.zeros(2000) + 0.01, 1, level=0.9, rate=0.5)
    assert np.all(tracked[:, 0] <= 0.0)
    assert np.all(tracked[:, 1] >= 0.0)


def test_the_interval_of_a_row_knows_nothing_that_comes_later():
    random = np.random.default_rng(2)
    issued, demand = np.sort(random.normal(size=(200, 3))), random.normal(size=200)
    changed = demand.copy()
    changed[100:] += 50.0
    before, after = (
        tracked_intervals(issued, values, 4, level=0.9, rate=0.1) for values in (demand, changed)
    )
    assert np.array_equal(before[:100], after[:100])
    assert not np.array_equal(before[100], after[100])


def test_drift_alarms_are_those_of_river():
    random = np.random.default_rng(3)
    errors = np.abs(random.normal(size=3000)) * np.repeat([1.0, 1.6, 1.0, 2.0], 750)
    settings = {"delta": 0.05, "threshold": 20.0}
    rivers = PageHinkley(min_instances=30, alpha=0.9999, mode="up", **settings)
    expected = []
    for place, error in enumerate(errors):
        rivers.update(error)
        if rivers.drift_detected:
            expected.append(place)
    assert expected
    found = DriftTest(min_rows=30, forget=0.9999, **settings).alarms(errors)
    assert found.tolist() == expected


def test_errors_are_scaled_by_the_weekly_naive_ones_so_far(demand):
    medians = demand + 10.0
    found, row = scaled_errors(medians, demand), 700
    assert np.isnan(found[: STEPS_PER_WEEK - 1]).all()
    naive = [abs(demand[t] - demand[t - STEPS_PER_WEEK]) for t in range(STEPS_PER_WEEK, row + 1)]
    expected = abs(demand[row] - medians[row - 1]) / np.mean(naive)
    assert found[row - 1] == pytest.approx(expected)


def slow_holt_winters(demand: np.ndarray, origin: int) -> list[float]:
    """The equations as they stand, with a dictionary for each series of values."""
    y, p = np.log(demand), PARAMETERS
    level = float(np.mean(y[:FIRST_ROWS]))
    daily = {t: float(np.mean(y[t + 48 : FIRST_ROWS : 48])) - level for t in range(-48, 0)}
    weekly = {
        t: float(np.mean(y[t + 336 : FIRST_ROWS : 336])) - level - daily[t % 48 - 48]
        for t in range(-336, 0)
    }
    error = 0.0
    for t in range(origin + 1):
        error = y[t] - (level + daily[t - 48] + weekly[t - 336])
        level += p.level * error
        daily[t] = daily[t - 48] + p.daily * error
        weekly[t] = weekly[t - 336] + p.weekly * error
    ahead = range(1, 49)
    return [
        np.exp(level + daily[origin + k - 48] + weekly[origin + k - 336] + p.memory**k * error)
        for k in ahead
    ]


def test_holt_winters_is_its_equations(demand):
    origins = np.array([900, 1500])
    found = forecast_holt_winters(PARAMETERS, demand, origins)
    assert found.shape == forecast_rows(origins).shape
    for place, origin in enumerate(origins):
        assert found[place] == pytest.approx(slow_holt_winters(demand, origin))


def test_candidates_are_scored_together_as_alone(demand):
    values = np.log(demand[:1200])
    other = np.array([[0.1], [0.1], [0.1], [0.5]])
    together = squared_errors(values, np.hstack([PARAMETERS.column(), other]))
    alone = [squared_errors(values, one)[0] for one in (PARAMETERS.column(), other)]
    assert together == pytest.approx(alone)
