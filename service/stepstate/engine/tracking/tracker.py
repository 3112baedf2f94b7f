"""What is tracked of a session's forecasts: their errors, honest intervals, drift.

Rule 1: all of it is part of the session's state, so snapshots, forks and spills carry it.
Rule 2: a forecast is scored when its truth arrives, as it was issued then.
Rule 3: what is missing is neither truth nor scored.

Intervals follow adaptive conformal inference (Gibbs and Candes, "Adaptive conformal
inference under distribution shift", 2021), with the update scaled by the typical error:
`q += rate * scale * (miss - alpha)`, interval `[low - q, high + q]`. Where the model has no
quantiles, low and high are those of a normal error with the tracked mean absolute error.

`scores` has what is told of errors, `drift` the tests that tell when they have grown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from stepstate.engine.tracking import version2
from stepstate.engine.tracking.drift import DriftTest, drift_test
from stepstate.engine.tracking.scores import (
    LIFE,
    MIN_BLOCK_ROWS,
    OFFSET,
    SCALE,
    SCALE_N,
    SCORES,
    SPIKE,
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

Wide = NDArray[np.float64]

MEAN_ERROR = math.sqrt(math.pi / 2)
"""Standard deviation of a normal error whose mean absolute value is 1."""
LARGEST = 1e30
"""Larger errors count as this: their sums must fit float32."""
LARGEST_ERROR, MIN_UNIT = 1e9, 1e-6
"""In scales of the output: one absurd value must not drown the sums of all."""
FLOAT32 = float(np.finfo(np.float32).max)
MAX_COUNTED = float(2**24)
"""Where counting by one ends in float32."""

# Places in the tracked part. First what the session asked for:
_ALPHA, _HEAD = range(2)
# then for each target: what that means for its intervals, alarms, and the numbers of its test;
_LOW_WIDTH, _HIGH_WIDTH, _ALARMS, _SINCE, _TEST = range(5)
# then for each horizon of it: its scores, and the pending forecasts: low, median, high of each.


@dataclass(frozen=True, slots=True)
class DriftStatus:
    """Whether forecasts have become worse of late."""

    drifting: bool = False
    alarms: int = 0
    last_t: int | None = None
    """Rows applied before the row of the last alarm."""
    learning: bool = False
    """The test of some output does not know yet what is usual."""
    score: float = math.nan
    """The share of its limit that a test has reached, the largest of all; NaN while they learn."""


@dataclass(frozen=True, slots=True)
class ForecastQuality:
    """What is told of a session's forecasts."""

    level: float
    accuracy: tuple[HorizonAccuracy, ...]
    drift: DriftStatus


@dataclass(frozen=True, slots=True)
class TrackedHorizon:
    """One tracked horizon of one target."""

    number: int
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
    """An output whose truth arrives as an input of its name."""

    output: OutputSpec
    column: int
    """Of x."""
    place: int
    """Where its part of the tracked part begins."""
    test: DriftTest
    spots: tuple[TrackedHorizon, ...]
    min_unit: float
    """A series whose naive error is below it stands still: nothing can be scaled by it."""
    largest_error: float
    """Beyond it an error is a mistake of somebody's, and not counted among others'."""

    @property
    def test_part(self) -> slice:
        """The numbers of its drift test in the tracked part."""
        return slice(self.place + _TEST, self.place + _TEST + self.test.width)


class Tracker:
    """Keeps the tracked part of states, row by row, as plain numbers in one memoryview.

    Args:
        manifest: the model's.
        tracking: what it tracks.
    """

    def __init__(self, manifest: Manifest, tracking: Tracking) -> None:
        self.season = tracking.season_steps
        self.targets = list(_targets(manifest, tracking))
        self._tracking = tracking
        self._drift_rows = max(self.season, tracking.drift.min_rows)
        self._block_rows = max(self.season, MIN_BLOCK_ROWS)
        self._spots = [spot for target in self.targets for spot in target.spots]
        self._truths = np.array([target.column for target in self.targets])
        self._columns = np.array([spot.columns for spot in self._spots]).flatten()
        last = self._spots[-1]
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
        for spot in self._spots:
            pending = spot.place + SCORES
            part[pending : pending + 3 * spot.horizon] = np.nan
        return part

    def reset(self, part: Floats) -> None:
        """Forgets in a tracked part [Q] what was scored and tested; the intervals go on."""
        for target in self.targets:
            part[target.place + _ALARMS] = 0.0
            part[target.place + _SINCE] = np.nan
            part[target.test_part] = 0.0
        for spot in self._spots:
            part[spot.place + LIFE : spot.place + SCORES] = 0.0

    @property
    def width_before(self) -> int:
        """How long the tracked part of snapshots up to version 2 is."""
        return version2.width(len(self.targets), [spot.horizon for spot in self._spots])

    def upgraded(self, part: Floats) -> Floats:
        """A tracked part [Q], made of that of a snapshot up to version 2."""
        found = self.blank(None)
        found[_ALPHA] = part[_ALPHA]
        place = version2.HEAD
        for target in self.targets:
            version2.take_target(found[target.place :], target.test, part[place:])
            naive = part[place + version2.NAIVE]
            place += version2.TARGET
            for spot in target.spots:
                width = version2.HORIZON + 3 * spot.horizon
                version2.take_horizon(found[spot.place :], part[place : place + width], naive)
                place += width
        return found

    def is_valid(self, part: Floats) -> bool:
        """Whether a tracked part [Q] can have come from here: bytes from outside may hold anything.

        A count below 0 would make the forward that it shares with others fail.
        """
        return (
            MIN_LEVEL <= self.level(part) <= MAX_LEVEL
            and all(_valid_target(target, part) for target in self.targets)
            and all(valid_scores(part[spot.scores].tolist()) for spot in self._spots)
        )

    def new_totals(self) -> ScoreTotals:
        """Counts of nothing yet."""
        return ScoreTotals(
            [
                Score(target.output.name, spot.horizon)
                for target in self.targets
                for spot in target.spots
            ]
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
            values: where the tracked parts are.
            places: of each row, its tracked part's place there, and the rows applied before it.
            x: the rows [B, D]; NaN is missing.
            before: the rows a season before [B, D]; NaN is unknown.
            y: their outputs [B, O].
            totals: counts what is scored.
        """
        truths, naive = x[:, self._truths].tolist(), before[:, self._truths].tolist()
        told = zip(places, truths, naive, y[:, self._columns].tolist(), strict=True)
        for (base, at), truth, beside, forecasts in told:
            self.observe(
                values, base, at, truths=truth, naive=beside, forecasts=forecasts, totals=totals
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
        """Takes one row into a tracked part: scores what was said of it, keeps what is said now.

        Args:
            values: where the tracked part is.
            base: its place there.
            at: rows applied before the row.
            truths: the targets' values in the row; NaN is missing.
            naive: the same a season before; NaN is unknown.
            forecasts: what is tracked of the row's outputs.
            totals: counts what is scored.
        """
        for target, truth, before in zip(self.targets, truths, naive, strict=True):
            place = base + target.place
            beside = min(abs(truth - before), LARGEST)
            unit = naive_error(values, base + target.spots[0].place)
            unit = unit if unit >= target.min_unit else 0.0
            values[place + _SINCE] += 1  # NaN stays NaN
            for spot in target.spots:
                stats = base + spot.place
                pending = stats + SCORES + 3 * (at % spot.horizon)
                error = min(abs(truth - values[pending + 1]), LARGEST)
                if not math.isnan(error):
                    score = totals.scores[spot.number]
                    usual = take_usual(values, stats, error)
                    take_error(values, stats, error, beside, target.min_unit)
                    if error <= target.largest_error:
                        _count(score, error, usual, unit)
                    self._adapt(values, base, stats, pending=pending, truth=truth, score=score)
                    if is_full(values, stats, self._block_rows):
                        close_block(values, stats)
                    if spot is target.spots[0] and target.test.take(
                        values, place + _TEST, error, beside
                    ):
                        totals.alarms += 1
                        values[place + _ALARMS] += 1
                        values[place + _SINCE] = 0.0
                self._issue(values, place, spot, stats=stats, pending=pending, forecasts=forecasts)

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
        """Widens or narrows the intervals to come, by whether the one of this row held."""
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
        spot: TrackedHorizon,
        *,
        stats: int,
        pending: int,
        forecasts: Sequence[float],
    ) -> None:
        """Keeps a forecast and its interval until its truth arrives."""
        low, median, high = forecasts[3 * spot.number : 3 * spot.number + 3]
        below, above = max(median - low, 0.0), max(high - median, 0.0)
        if spot.point:
            below = above = values[stats + SCALE] if values[stats + SCALE_N] else math.nan
        below = max(values[place + _LOW_WIDTH] * below + values[stats + OFFSET], 0.0)
        above = max(values[place + _HIGH_WIDTH] * above + values[stats + OFFSET], 0.0)
        values[pending] = max(median - below, -FLOAT32)
        values[pending + 1] = median
        values[pending + 2] = min(median + above, FLOAT32)

    def quality(self, part: Floats, t: int) -> ForecastQuality:
        """What a tracked part [Q] tells of a session at t."""
        found = [
            accuracy(target.output.name, spot.horizon, part[spot.scores].tolist(), target.min_unit)
            for target in self.targets
            for spot in target.spots
        ]
        return ForecastQuality(self.level(part), tuple(found), self._drift_of(part, t))

    def spread(self, parts: Floats, output: OutputSpec, horizon: int) -> tuple[Wide, Wide] | None:
        """Offsets [B, K] and mean absolute errors [B, K] at horizons 1 to K, tracked or between.

        None: the output is not tracked. NaN: no error is known yet.
        """
        target = next((target for target in self.targets if target.output is output), None)
        if target is None:
            return None
        spots = sorted(target.spots, key=lambda spot: spot.horizon)
        weights = _weights([spot.horizon for spot in spots], horizon)
        places = np.array([spot.place for spot in spots])
        offsets = parts[:, places + OFFSET].astype(np.float64)
        scales = parts[:, places + SCALE].astype(np.float64)
        scales[parts[:, places + SCALE_N] == 0] = np.nan
        between = np.where(weights > 0, scales[:, :, None] * weights, 0.0).sum(axis=1)
        return offsets @ weights, between

    @staticmethod
    def level(part: Floats) -> float:
        """The share of truths that intervals are to cover."""
        return round(1 - float(part[_ALPHA]), 7)

    def _drift_of(self, part: Floats, t: int) -> DriftStatus:
        alarms = sum(int(part[target.place + _ALARMS]) for target in self.targets)
        since = [float(part[target.place + _SINCE]) for target in self.targets]
        known = [rows for rows in since if not math.isnan(rows)]
        charts = [target.test.chart(part[target.test_part]) for target in self.targets]
        scores = [chart.score for chart in charts if not chart.learning]
        rows = min(known, default=math.inf)
        return DriftStatus(
            drifting=rows < self._drift_rows,
            alarms=alarms,
            # so long ago that none counted: unknown
            last_t=t - 1 - int(rows) if rows < MAX_COUNTED else None,
            learning=any(chart.learning for chart in charts),
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
        spots = []
        for horizon in tracking.horizons:
            first = first_column + output.column(horizon)
            columns = (first, first + output.median, first + output.columns - 1)
            spots.append(TrackedHorizon(number, horizon, place, columns))
            place += SCORES + 3 * horizon
            number += 1
        limits = MIN_UNIT * scale, LARGEST_ERROR * scale
        yield TrackedOutput(output, column, target_place, test, tuple(spots), *limits)


def deviate(level: float) -> float:
    """The normal deviate z of a quantile level."""
    return NormalDist().inv_cdf(level)


def _widths(output: OutputSpec, level: float) -> tuple[float, float]:
    """What the model's distances from the median are multiplied by, for a level of its own.

    As far as errors are normal: both levels' normal deviates over those of the model's
    outermost quantiles, or over a mean absolute error where it has none.
    """
    outer = deviate((1 + level) / 2)
    if not output.quantiles:
        return MEAN_ERROR * outer, MEAN_ERROR * outer
    low, high = output.quantiles[0], output.quantiles[-1]
    return outer / -deviate(low), outer / deviate(high)


def _weights(known: list[int], horizon: int) -> Wide:
    """How much each of some horizons [S] counts at 1 to K: linear between, constant outside."""
    ahead = np.arange(1, horizon + 1)
    return np.stack([np.interp(ahead, known, one) for one in np.eye(len(known))])


def _count(score: Score, error: float, usual: float, unit: float) -> None:
    """Counts an error, and it as a multiple of `unit` where that is known."""
    score.scored += 1
    score.absolute_error += usual
    score.outliers += usual < error
    if unit:
        score.scaled += 1
        score.scaled_error += min(usual / unit, SPIKE)


def _valid_target(target: TrackedOutput, part: Floats) -> bool:
    """Whether a target's own numbers in a tracked part [Q] can have come from here."""
    low, high, alarms, since = part[target.place : target.place + _TEST].tolist()
    counts = (alarms,) if math.isnan(since) else (alarms, since)
    return (
        0 < low < math.inf
        and 0 < high < math.inf
        and all(count >= 0 and count.is_integer() for count in counts)
        and target.test.is_valid(part[target.test_part])
    )
