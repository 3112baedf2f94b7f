"""Tracks a session's forecasts: their errors, interval widths and drift.

Rule 1: the tracked part belongs to the session's state, so snapshots, forks and spills carry it.
Rule 2: a forecast is scored when its truth arrives, as it was when it was issued.
Rule 3: a missing value is neither truth nor scored.

Intervals follow adaptive conformal inference (Gibbs and Candes, "Adaptive conformal
inference under distribution shift", 2021), with the update scaled by the typical error:
`q += rate * scale * (miss - alpha)`, interval `[low - q, high + q]`. Where the model has no
quantiles, low and high are those of a normal error with the tracked mean absolute error.

`scores` keeps the errors, `drift` tests whether they have grown. The tracked part is

    [ level | each target: widths, alarms, drift test | its horizons: scores, pending forecasts ]

B rows, D inputs, O outputs, Q the width of a tracked part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from stepstate.engine.tracking.drift import DriftTest, PageHinkley, drift_test
from stepstate.engine.tracking.scores import (
    LAST,
    LIFE,
    MIN_BLOCK_ROWS,
    OFFSET,
    SCALE,
    SCALE_N,
    SCORES,
    SPIKE,
    USUAL_KNOWN,
    HorizonAccuracy,
    Score,
    ScoreTotals,
    accuracy,
    close_block,
    is_full,
    naive_error,
    take_error,
    take_interval,
    take_usual,
)
from stepstate.engine.tracking.scores import is_valid as valid_scores
from stepstate.engine.work import Floats
from stepstate.models import MAX_LEVEL, MIN_LEVEL, Manifest, OutputSpec, Tracking

MEAN_ERROR = math.sqrt(math.pi / 2)
"""Standard deviation of a normal error whose mean absolute value is 1."""
LARGEST = 1e30
"""Larger errors count as this: their sums must fit float32."""
LARGEST_ERROR, MIN_UNIT = 1e9, 1e-6
"""In scales of the output: one absurd value must not dominate the sums over all sessions."""
FLOAT32 = float(np.finfo(np.float32).max)
MAX_COUNTED = float(2**24)
"""Where counting by one ends in float32."""

# Places in the tracked part. First 1 - level, as the session asked for it:
_ALPHA, _HEAD = range(2)
# then for each target: the factors of its interval widths, alarms, rows since the last alarm (NaN:
# none), and the numbers of its test;
_LOW_WIDTH, _HIGH_WIDTH, _ALARMS, _SINCE, _TEST = range(5)
# then for each horizon of it: its scores, and the pending forecasts: low, median, high of each.

# The same in snapshots up to version 2:
_OLD_HEAD, _OLD_TARGET, _OLD_HORIZON = 1, 10, 8
_OLD_NAIVE_N, _OLD_NAIVE, _OLD_ALARMS, _OLD_SINCE = 2, 3, 8, 9
_OLD_OFFSET, _OLD_SCALE, _OLD_SCORED, _OLD_ERROR = range(4)
_OLD_SCALED_N, _OLD_SCALED, _OLD_COVERED_N, _OLD_COVERED = range(4, _OLD_HORIZON)


@dataclass(frozen=True, slots=True)
class DriftStatus:
    """Whether forecasts have become worse lately."""

    drifting: bool = False
    alarms: int = 0
    last_t: int | None = None
    """Rows applied before the row of the last alarm."""
    learning: bool = False
    """The test of some output has not learned yet what is usual."""
    score: float = math.nan
    """The share of its limit that a test has reached, the largest of all; NaN while all learn."""


@dataclass(frozen=True, slots=True)
class ForecastQuality:
    """The quality of a session's forecasts; `level`: the share that its intervals should cover."""

    level: float
    accuracy: tuple[HorizonAccuracy, ...]
    drift: DriftStatus


@dataclass(frozen=True, slots=True)
class TrackedHorizon:
    """One tracked horizon of one target."""

    number: int
    """Among all tracked horizons of the model."""
    horizon: int
    place: int
    """Where its part of the tracked part begins."""
    columns: tuple[int, int, int]
    """Of y: the lowest quantile, the median, the highest."""

    @property
    def scores(self) -> slice:
        """Its numbers in the tracked part, without the pending forecasts."""
        return slice(self.place, self.place + SCORES)

    @property
    def point(self) -> bool:
        """Whether the model has no quantiles."""
        return self.columns[0] == self.columns[2]


@dataclass(frozen=True, slots=True)
class TrackedOutput:
    """A target: an output whose truth arrives as the input of the same name."""

    output: OutputSpec
    column: int
    """Of x."""
    place: int
    """Where its part of the tracked part begins."""
    test: DriftTest
    horizons: tuple[TrackedHorizon, ...]
    min_unit: float
    """A series whose naive error is below it stands still: nothing can be scaled by it."""
    largest_error: float
    """A larger error is taken for a mistake in the data, and not added to sums over sessions."""

    @property
    def test_part(self) -> slice:
        """The numbers of its drift test in the tracked part."""
        return slice(self.place + _TEST, self.place + _TEST + self.test.width)


class Tracker:
    """Updates the tracked parts of states, row by row, as plain numbers in one memoryview.

    Args:
        manifest: of the model.
        tracking: which horizons, interval level and drift test.
    """

    def __init__(self, manifest: Manifest, tracking: Tracking) -> None:
        self.season = tracking.season_steps
        self.targets = list(_targets(manifest, tracking))
        self._tracking = tracking
        self._drift_rows = max(self.season, tracking.drift.min_rows)
        self._block_rows = max(self.season, MIN_BLOCK_ROWS)
        self._horizons = [each for target in self.targets for each in target.horizons]
        self._truths = np.array([target.column for target in self.targets])
        self._columns = np.array([each.columns for each in self._horizons]).flatten()
        last = self._horizons[-1]
        self.width = last.place + SCORES + 3 * last.horizon

    def blank(self, level: float | None) -> Floats:
        """The tracked part [Q] of a session without rows; `level` of its intervals."""
        level = self._tracking.level if level is None else level
        part = np.zeros(self.width, np.float32)
        part[_ALPHA] = 1 - level
        for target in self.targets:
            place = target.place
            part[place + _LOW_WIDTH], part[place + _HIGH_WIDTH] = _widths(target.output, level)
            part[place + _SINCE] = np.nan
        for each in self._horizons:
            pending = each.place + SCORES
            part[pending : pending + 3 * each.horizon] = np.nan
        return part

    def reset(self, part: Floats) -> None:
        """Deletes the scores and drift tests of a tracked part [Q]; interval widths stay."""
        for target in self.targets:
            part[target.place + _ALARMS] = 0.0
            part[target.place + _SINCE] = np.nan
            part[target.test_part] = 0.0
        for each in self._horizons:
            part[each.place + LIFE : each.place + SCORES] = 0.0

    @property
    def old_width(self) -> int:
        """The width of the tracked part in snapshots up to version 2."""
        horizons = sum(_OLD_HORIZON + 3 * each.horizon for each in self._horizons)
        return _OLD_HEAD + _OLD_TARGET * len(self.targets) + horizons

    def upgraded(self, old: Floats) -> Floats:
        """Converts the tracked part of a snapshot up to version 2 to [Q]."""
        part = self.blank(None)
        part[_ALPHA] = old[_ALPHA]
        place = _OLD_HEAD
        for target in self.targets:
            naive = old[place + _OLD_NAIVE]
            _upgrade_target(part[target.place :], target.test, old[place:])
            place += _OLD_TARGET
            for each in target.horizons:
                width = _OLD_HORIZON + 3 * each.horizon
                _upgrade_horizon(part[each.place :], old[place : place + width], naive)
                place += width
        return part

    def is_valid(self, part: Floats, t: int) -> bool:
        """Whether `observe` can have written a tracked part [Q] in t rows: anything may be in one.

        A count below 0 would make the forward fail that the session shares with others, and one
        that is too large can't be sent, so the list that the session is in would fail.
        """
        return (
            MIN_LEVEL <= self.level(part) <= MAX_LEVEL
            and all(_valid_target(target, part, t) for target in self.targets)
            and all(valid_scores(part[each.scores].tolist(), t) for each in self._horizons)
        )

    def new_totals(self) -> ScoreTotals:
        """Totals in which nothing is counted yet."""
        return ScoreTotals(
            [Score(t.output.name, each.horizon) for t in self.targets for each in t.horizons]
        )

    def observe_rows(
        self,
        values: memoryview[float],
        places: Iterable[tuple[int, int]],
        *,
        x: Floats,
        before: Floats,
        y: Floats,
        totals: ScoreTotals,
    ) -> None:
        """Takes rows, of one session or of several, each into its tracked part.

        Args:
            values: the memory that holds the tracked parts.
            places: of each row, its tracked part's place there, and the rows applied before it.
            x: the rows [B, D]; NaN is missing.
            before: the rows a season before [B, D]; NaN is unknown.
            y: their outputs [B, O].
            totals: counts what is scored.
        """
        truths, naive = x[:, self._truths].tolist(), before[:, self._truths].tolist()
        rows = zip(places, truths, naive, y[:, self._columns].tolist(), strict=True)
        for (base, at), truth, season_ago, forecasts in rows:
            self.observe(
                values, base, at, truths=truth, naive=season_ago, forecasts=forecasts, totals=totals
            )

    def observe(
        self,
        values: memoryview[float],
        base: int,
        at: int,
        *,
        truths: Sequence[float],
        naive: Sequence[float],
        forecasts: Sequence[float],
        totals: ScoreTotals,
    ) -> None:
        """Takes one row into a tracked part: scores the forecasts of it, keeps the new ones.

        Args:
            values: the memory that holds the tracked part.
            base: its place there.
            at: rows applied before the row.
            truths: the targets' values in the row; NaN is missing.
            naive: the same a season before; NaN is unknown.
            forecasts: low, median and high of each tracked horizon, from the row's outputs.
            totals: counts what is scored.
        """
        for target, truth, before in zip(self.targets, truths, naive, strict=True):
            place = base + target.place
            naive_now = min(abs(truth - before), LARGEST)
            unit = naive_error(values, base + target.horizons[0].place)
            unit = unit if unit >= target.min_unit else 0.0
            values[place + _SINCE] += 1  # NaN stays NaN
            for each in target.horizons:
                stats = base + each.place
                pending = stats + SCORES + 3 * (at % each.horizon)
                error = min(abs(truth - values[pending + 1]), LARGEST)
                if not math.isnan(error):
                    score = totals.scores[each.number]
                    usual = take_usual(values, stats, error)
                    take_error(values, stats, error, naive_now, target.min_unit)
                    if error <= target.largest_error:
                        _count(score, error, usual, unit)
                    self._adapt(values, base, stats, pending=pending, truth=truth, score=score)
                    if is_full(values, stats, self._block_rows):
                        close_block(values, stats)
                    if each is target.horizons[0] and target.test.take(
                        values, place + _TEST, error, naive_now
                    ):
                        totals.alarms += 1
                        values[place + _ALARMS] += 1
                        values[place + _SINCE] = 0.0
                self._issue(values, place, each, stats=stats, pending=pending, forecasts=forecasts)

    def _adapt(
        self,
        values: memoryview[float],
        base: int,
        stats: int,
        *,
        pending: int,
        truth: float,
        score: Score,
    ) -> None:
        """Widens or narrows future intervals, by whether that of this row held its truth."""
        low, high = values[pending], values[pending + 2]
        if math.isnan(low):
            return
        held = low <= truth <= high
        step = self._tracking.rate * values[stats + SCALE]
        values[stats + OFFSET] += step * (1 - held - values[base + _ALPHA])
        take_interval(values, stats, held)
        score.with_interval += 1
        score.covered += held

    @staticmethod
    def _issue(
        values: memoryview[float],
        place: int,
        tracked: TrackedHorizon,
        *,
        stats: int,
        pending: int,
        forecasts: Sequence[float],
    ) -> None:
        """Keeps a forecast and its interval until its truth arrives."""
        low, median, high = forecasts[3 * tracked.number : 3 * tracked.number + 3]
        below, above = max(median - low, 0.0), max(high - median, 0.0)
        if tracked.point:
            below = above = values[stats + SCALE] if values[stats + SCALE_N] else math.nan
        below = max(values[place + _LOW_WIDTH] * below + values[stats + OFFSET], 0.0)
        above = max(values[place + _HIGH_WIDTH] * above + values[stats + OFFSET], 0.0)
        values[pending] = max(median - below, -FLOAT32)
        values[pending + 1] = median
        values[pending + 2] = min(median + above, FLOAT32)

    def quality(self, part: Floats, t: int) -> ForecastQuality:
        """The quality of a session's forecasts at t, from its tracked part [Q]."""
        found = [
            accuracy(target.output.name, each.horizon, part[each.scores].tolist(), target.min_unit)
            for target in self.targets
            for each in target.horizons
        ]
        return ForecastQuality(self.level(part), tuple(found), self._drift_of(part, t))

    @staticmethod
    def level(part: Floats) -> float:
        """The share of truths that intervals should cover."""
        return round(1 - float(part[_ALPHA]), 7)

    def _drift_of(self, part: Floats, t: int) -> DriftStatus:
        alarms = sum(int(part[target.place + _ALARMS]) for target in self.targets)
        since = [float(part[target.place + _SINCE]) for target in self.targets]
        known = [rows for rows in since if not math.isnan(rows)]
        tests = [target.test.status(part[target.test_part]) for target in self.targets]
        scores = [test.score for test in tests if not test.learning]
        rows = min(known, default=math.inf)
        return DriftStatus(
            drifting=rows < self._drift_rows,
            alarms=alarms,
            # Unknown where it was too long ago to be counted.
            last_t=t - 1 - int(rows) if rows < MAX_COUNTED else None,
            learning=any(test.learning for test in tests),
            score=max(scores, default=math.nan),
        )


def _targets(manifest: Manifest, tracking: Tracking) -> Iterator[TrackedOutput]:
    place, number = _HEAD, 0
    for output, first_column, column in manifest.placed_outputs():
        if column is None:
            continue
        scale = abs(output.scale)
        test = drift_test(tracking.drift, MIN_UNIT * scale)
        target_place, place = place, place + _TEST + test.width
        horizons = []
        for horizon in tracking.horizons:
            first = first_column + output.column(horizon)
            columns = (first, first + output.median, first + output.columns - 1)
            horizons.append(TrackedHorizon(number, horizon, place, columns))
            place += SCORES + 3 * horizon
            number += 1
        limits = MIN_UNIT * scale, LARGEST_ERROR * scale
        yield TrackedOutput(output, column, target_place, test, tuple(horizons), *limits)


def deviate(level: float) -> float:
    """The normal deviate z of a quantile level."""
    return NormalDist().inv_cdf(level)


def _widths(output: OutputSpec, level: float) -> tuple[float, float]:
    """The factors on the model's distances from the median that give intervals of a level.

    They are those of normal errors: the level's normal deviate over those of the model's outermost
    quantiles, or over a mean absolute error where it has no quantiles.
    """
    outer = deviate((1 + level) / 2)
    if not output.quantiles:
        return MEAN_ERROR * outer, MEAN_ERROR * outer
    low, high = output.quantiles[0], output.quantiles[-1]
    return outer / -deviate(low), outer / deviate(high)


def _count(score: Score, error: float, usual: float, unit: float) -> None:
    """Counts an error, also in multiples of `unit` where that is known."""
    score.scored += 1
    score.absolute_error += usual
    score.outliers += usual < error
    if unit:
        score.scaled += 1
        score.scaled_error += min(usual / unit, SPIKE)


def _valid_target(target: TrackedOutput, part: Floats, t: int) -> bool:
    """Whether the numbers of a target in a tracked part [Q] are possible after t rows."""
    low, high, alarms, since = part[target.place : target.place + _TEST].tolist()
    known = (alarms,) if math.isnan(since) else (alarms, since)
    return (
        0 < low < math.inf
        and 0 < high < math.inf
        and all(0 <= count <= t and count.is_integer() for count in known)
        and since != t  # an alarm in the row before this one is 0 rows ago
        and target.test.is_valid(part[target.test_part])
    )


def _upgrade_target(part: Floats, test: DriftTest, old: Floats) -> None:
    """Fills in a target's widths, alarms and test from version 2.

    It knew Page-Hinkley's test only; another one begins to learn.
    """
    part[[_LOW_WIDTH, _HIGH_WIDTH, _ALARMS, _SINCE]] = old[[0, 1, _OLD_ALARMS, _OLD_SINCE]]
    if isinstance(test, PageHinkley):
        part[_TEST : _TEST + test.width] = old[_OLD_NAIVE_N:_OLD_ALARMS]


def _upgrade_horizon(part: Floats, old: Floats, naive: float) -> None:
    """Fills in the scores and pending forecasts of a horizon from version 2.

    It kept no recent means: its means become those of the whole life.
    """
    scored, scaled, covered = old[[_OLD_SCORED, _OLD_SCALED_N, _OLD_COVERED_N]]
    part[[OFFSET, SCALE]] = old[[_OLD_OFFSET, _OLD_SCALE]]
    part[SCALE_N] = min(scored, USUAL_KNOWN)
    part[LIFE:LAST] = (
        *(scored, old[_OLD_ERROR]),
        *(scaled, old[_OLD_SCALED] * naive, naive),
        *(covered, old[_OLD_COVERED]),
    )
    part[SCORES : SCORES + len(old) - _OLD_HORIZON] = old[_OLD_HORIZON:]
