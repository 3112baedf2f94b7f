"""What a fitted model is worth: accuracy, cold start, coverage of intervals, alarms of drift."""

from __future__ import annotations

import numpy as np

from declare import DRIFT, LEVEL, RATE, TRACKED_HORIZONS
from drift import scaled_errors
from holt_winters import fit_holt_winters, forecast_holt_winters
from intervals import covered, tracked_intervals
from network import Fitted, forecast_primed, forecast_streamed, point_forecasts
from series import (
    STEPS_PER_WEEK,
    TRAIN_ROWS,
    Floats,
    Rows,
    Series,
    mape_by_horizon,
    naive_forecasts,
    origins_of_test_weeks,
    truth,
)

CHANGES = {"10% more demand": (1.1, 0.0), "1,500 MW more demand": (1.0, 1500.0)}
"""Lasting changes: factor and addend, in MW."""


def score_streamed(adapt: Fitted, series: Series, origins: Rows) -> Floats:
    """MAPE [48] in % at some origins of a session that steps from the first row on."""
    forecasts = forecast_streamed(adapt, series, origins)
    return mape_by_horizon(point_forecasts(forecasts), truth(series.demand, origins))


def score_baselines(series: Series, *, holt_winters: bool) -> dict[str, Floats]:
    """MAPE [48] in % on the test weeks of the forecasts to beat, by name."""
    origins = origins_of_test_weeks(series)
    forecasts: dict[str, Floats] = {}
    if holt_winters:
        parameters = fit_holt_winters(series.demand[:TRAIN_ROWS])
        found = forecast_holt_winters(parameters, series.demand, origins)
        forecasts["double seasonal Holt-Winters"] = found
    forecasts |= naive_forecasts(series.demand, origins)
    actual = truth(series.demand, origins)
    return {name: mape_by_horizon(found, actual) for name, found in forecasts.items()}


def score_primed(adapt: Fitted, series: Series, primed_rows: tuple[int, ...]) -> dict[int, Floats]:
    """MAPE [48] in % on the test weeks by the rows that a session has seen since zero state."""
    # Every 7th origin saves time, and 7 and 48 share no factor: no half-hour is left out.
    origins = origins_of_test_weeks(series)[::7]
    actual = truth(series.demand, origins)
    return {
        rows: mape_by_horizon(
            point_forecasts(forecast_primed(adapt, series, origins, rows)), actual
        )
        for rows in primed_rows
    }


def score_coverage(adapt: Fitted, series: Series, origins: Rows) -> dict[str, dict[int, float]]:
    """The share of truths in the intervals issued at some origins, in %, raw and tracked."""
    found: dict[str, dict[int, float]] = {"as the model has it": {}, "tracked": {}}
    forecasts = _all_forecasts(adapt, series)
    for horizon in TRACKED_HORIZONS:
        issued = forecasts[:, horizon - 1]
        tracked = tracked_intervals(issued, series.demand, horizon, level=LEVEL, rate=RATE)
        actual = series.demand[origins + horizon]
        found["as the model has it"][horizon] = covered(issued[origins][:, [0, -1]], actual)
        found["tracked"][horizon] = covered(tracked[origins], actual)
    return found


def drift_cases(adapt: Fitted, series: Series, since: int) -> dict[str, str]:
    """What the drift test says of the series, and of changes that last from a row on."""
    alarms = _alarms(adapt, series)
    found = {
        f"rows before {since:,}": f"{np.sum(alarms < since)} alarms",
        f"rows from {since:,} on": f"{np.sum(alarms >= since)} alarms",
    }
    for name, (factor, addend) in CHANGES.items():
        changed = series.demand.copy()
        changed[since:] = changed[since:] * factor + addend
        alarms = _alarms(adapt, Series(series.times, changed))
        later = alarms[alarms >= since]
        found[f"{name} from row {since:,} on"] = (
            f"the first alarm after {(later[0] - since + 1) / 2:g} h" if len(later) else "no alarm"
        )
    return found


def _alarms(adapt: Fitted, series: Series) -> Rows:
    """The rows whose error raises an alarm."""
    medians = point_forecasts(_all_forecasts(adapt, series))[:, 0]
    errors = scaled_errors(medians, series.demand)
    return DRIFT.alarms(errors[STEPS_PER_WEEK - 1 :]) + STEPS_PER_WEEK


def _all_forecasts(adapt: Fitted, series: Series) -> Floats:
    return forecast_streamed(adapt, series, np.arange(len(series.demand)))
