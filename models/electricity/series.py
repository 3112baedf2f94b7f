"""The electricity series: rows, split, naive forecasts and the score. Needs only numpy.

Half-hourly demand in England and Wales, MW; `CREDITS.md` names the source. One
row is one step. Forecasts are arrays [N, 48]: one line per origin, horizons
1..48 from left to right. An origin is the last row that a forecast has seen.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

CSV = Path(__file__).with_name("electricity_demand.csv")

STEP_INTERVAL_SECONDS = 1800
STEPS_PER_DAY = 48
STEPS_PER_WEEK = 7 * STEPS_PER_DAY
HORIZONS = 48
"""Horizons 1..48: the next day, half-hour by half-hour."""

TRAIN_ROWS = 8 * STEPS_PER_WEEK
"""Rows 0..2687 train and the four weeks after them test, as in Taylor (2003)."""


@dataclass(frozen=True, slots=True)
class Series:
    """The whole series: `times` [T], the start of each half-hour, and `demand` [T] in MW."""

    times: NDArray[np.datetime64]
    demand: Floats


def load_series(path: Path = CSV) -> Series:
    """Reads the csv.

    Raises:
        ValueError: the rows are not half an hour apart, without gaps.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = np.array([row["period_start"] for row in rows], "datetime64[s]")
    if np.any(np.diff(times) != np.timedelta64(STEP_INTERVAL_SECONDS, "s")):
        raise ValueError(f"{path}: rows must be {STEP_INTERVAL_SECONDS} s apart, without gaps")
    return Series(times, np.array([row["demand_mw"] for row in rows], np.float64))


def origins_within(first_row: int, end_row: int) -> Rows:
    """Every origin whose horizons 1..48 all fall in rows first_row..end_row - 1."""
    return np.arange(first_row - 1, end_row - HORIZONS)


def origins_of_test_weeks(series: Series) -> Rows:
    """The origins of the test weeks: 1,297 of them."""
    return origins_within(TRAIN_ROWS, len(series.demand))


def forecast_rows(origins: Rows) -> Rows:
    """The rows [N, 48] that forecasts from these origins [N] are about."""
    return origins[:, None] + np.arange(1, HORIZONS + 1)


def truth(demand: Floats, origins: Rows) -> Floats:
    """What came: demand [N, 48] in MW."""
    return demand[forecast_rows(origins)]


def naive(demand: Floats, origins: Rows) -> Floats:
    """Forecasts [N, 48] in MW: demand stays what it is."""
    return np.repeat(demand[origins, None], HORIZONS, axis=1)


def seasonal_naive(demand: Floats, origins: Rows, period_steps: int) -> Floats:
    """Forecasts [N, 48] in MW: demand is what it was one period before.

    Raises:
        ValueError: the period is shorter than the longest horizon, so it would look ahead.
    """
    if period_steps < HORIZONS:
        raise ValueError(f"period_steps is {period_steps}, expected at least {HORIZONS}")
    return demand[forecast_rows(origins) - period_steps]


def naive_forecasts(demand: Floats, origins: Rows) -> dict[str, Floats]:
    """The three forecasts to beat, each [N, 48] in MW, by name."""
    return {
        "naive": naive(demand, origins),
        "seasonal naive, daily": seasonal_naive(demand, origins, STEPS_PER_DAY),
        "seasonal naive, weekly": seasonal_naive(demand, origins, STEPS_PER_WEEK),
    }


def mape_by_horizon(forecasts: Floats, actual: Floats) -> Floats:
    """Mean absolute percentage error [48] of forecasts [N, 48] against what came, in %."""
    found: Floats = 100.0 * np.mean(np.abs(forecasts - actual) / actual, axis=0)
    return found
