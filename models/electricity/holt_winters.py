"""The baseline to beat: double seasonal Holt-Winters with an AR(1) error. Needs only numpy.

On the logarithm of demand, since its seasons grow with its level: those of
Taylor (2003) are factors. On logarithms they add up, so the equations are those of
Taylor, "Triple seasonal methods for short-term electricity demand forecasting",
European Journal of Operational Research 204 (2010), 139-152, with two seasons:

    e(t) = y(t) - (l(t-1) + d(t-48) + w(t-336))
    l(t) = l(t-1) + level * e(t)
    d(t) = d(t-48) + daily * e(t)
    w(t) = w(t-336) + weekly * e(t)
    forecast of y(t+k) = l(t) + d(t+k-48) + w(t+k-336) + memory^k * e(t)

Its four parameters minimise the squared error one step ahead on the training
weeks, as in the papers. Logarithms and first values were chosen by the last two
training weeks: without the logarithms all its forecasts are worse.

Run: python models/electricity/holt_winters.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from series import (
    HORIZONS,
    STEPS_PER_DAY,
    STEPS_PER_WEEK,
    TRAIN_ROWS,
    Floats,
    Rows,
    load_series,
    mape_by_horizon,
    origins_of_test_weeks,
    truth,
)

FIRST_ROWS = 2 * STEPS_PER_WEEK
"""The first values of level and seasons are means over these."""
SCORED_FROM = 3 * STEPS_PER_WEEK
"""The fit scores these rows and later ones: the first values have faded a little by then."""
POPULATION = 40
GENERATIONS = 80
"""The search's best then agree to four digits over seeds."""
TOLD_HORIZONS = (1, 12, 24, 48)


@dataclass(frozen=True, slots=True)
class Parameters:
    """The four parameters, each between 0 and 1."""

    level: float
    daily: float
    weekly: float
    memory: float

    def column(self) -> Floats:
        """As one candidate [4, 1] for `smooth`."""
        return np.array([[self.level], [self.daily], [self.weekly], [self.memory]])


@dataclass(frozen=True, slots=True)
class State:
    """What is known after a row, of C candidates at once."""

    level: Floats  # [C]
    daily: Floats  # [48, C], by the half-hour of the day
    weekly: Floats  # [336, C], by the half-hour of the week
    error: Floats  # [C]


def smooth(values: Floats, candidates: Floats) -> Iterator[State]:
    """Runs candidates [4, C] over logarithms [T]; yields the state after each row.

    The arrays of the seasons are the same ones throughout, updated in place.
    """
    level_rate, daily_rate, weekly_rate, _ = candidates
    level, daily, weekly = _first_values(values, candidates.shape[1])
    for row, value in enumerate(values):
        day, week = row % STEPS_PER_DAY, row % STEPS_PER_WEEK
        error = value - level - daily[day] - weekly[week]
        level = level + level_rate * error
        daily[day] += daily_rate * error
        weekly[week] += weekly_rate * error
        yield State(level, daily, weekly, error)


def _first_values(values: Floats, count: int) -> tuple[Floats, Floats, Floats]:
    first = values[:FIRST_ROWS]
    level = first.mean()
    daily = first.reshape(-1, STEPS_PER_DAY).mean(axis=0) - level
    weekly = first.reshape(-1, STEPS_PER_WEEK).mean(axis=0) - level - np.tile(daily, 7)
    return np.full(count, level), _columns(daily, count), _columns(weekly, count)


def _columns(values: Floats, count: int) -> Floats:
    return np.repeat(values[:, None], count, axis=1)


def squared_errors(values: Floats, candidates: Floats) -> Floats:
    """Mean squared error [C] one step ahead of candidates [4, C] on logarithms [T]."""
    memory = candidates[3]
    errors = np.array([state.error for state in smooth(values, candidates)])
    surprises = errors[SCORED_FROM:] - memory * errors[SCORED_FROM - 1 : -1]
    found: Floats = np.mean(surprises**2, axis=0)
    return found


def fit_holt_winters(demand: Floats, seed: int = 1) -> Parameters:
    """The parameters for demand [T]: differential evolution (Storn and Price 1997)."""
    random, values = np.random.default_rng(seed), np.log(demand)
    members = random.uniform(0.0, 1.0, (4, POPULATION))
    scores = squared_errors(values, members)
    for _ in range(GENERATIONS):
        trials = _trials(members, scores, random)
        found = squared_errors(values, trials)
        better = found < scores
        members = np.where(better, trials, members)
        scores = np.where(better, found, scores)
    return Parameters(*map(float, members[:, scores.argmin()]))


def _trials(members: Floats, scores: Floats, random: np.random.Generator) -> Floats:
    """Each member, part of it moved towards the best and along a difference of two others."""
    first, second = random.permutation(POPULATION), random.permutation(POPULATION)
    towards_best = members[:, scores.argmin(), None] - members
    moved = members + 0.6 * towards_best + 0.6 * (members[:, first] - members[:, second])
    trials = np.where(random.random(members.shape) < 0.9, moved, members)
    # What leaves the range comes back by the same amount.
    return np.clip(np.where(trials > 1, 2 - trials, np.abs(trials)), 0.0, 1.0)


def forecast_holt_winters(parameters: Parameters, demand: Floats, origins: Rows) -> Floats:
    """Forecasts [N, 48] in MW, all from one run from the first row on."""
    wanted = set(origins.tolist())
    states = enumerate(smooth(np.log(demand), parameters.column()))
    return np.array([_forecast(parameters, state, row) for row, state in states if row in wanted])


def _forecast(parameters: Parameters, state: State, row: int) -> Floats:
    ahead = np.arange(1, HORIZONS + 1)
    days, weeks = (row + ahead) % STEPS_PER_DAY, (row + ahead) % STEPS_PER_WEEK
    fading = parameters.memory**ahead * state.error
    found: Floats = np.exp(state.level + state.daily[days, 0] + state.weekly[weeks, 0] + fading)
    return found


def main() -> None:
    """Fits to the training weeks and prints the accuracy on the test weeks."""
    series = load_series()
    parameters = fit_holt_winters(series.demand[:TRAIN_ROWS])
    origins = origins_of_test_weeks(series)
    forecasts = forecast_holt_winters(parameters, series.demand, origins)
    mape = mape_by_horizon(forecasts, truth(series.demand, origins))
    print(parameters)
    print("MAPE % on the test weeks")
    for horizon in TOLD_HORIZONS:
        print(f"h{horizon:<4}{mape[horizon - 1]:8.3f}")
    print(f"mean {mape.mean():8.3f}")


if __name__ == "__main__":
    main()
