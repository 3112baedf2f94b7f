"""What is tracked of a session's forecasts: their errors, honest intervals, drift.

Rule 1: all of it is part of the session's state, so snapshots, forks and spills carry it.
Rule 2: a forecast is scored when its truth arrives, as it was issued then.
Rule 3: what is missing is neither truth nor scored.

Intervals follow adaptive conformal inference (Gibbs and Candes, "Adaptive conformal
inference under distribution shift", 2021), with the update scaled by the typical error:
`q += rate * scale * (miss - alpha)`, interval `[low - q, high + q]`. Where the model has no
quantiles, low and high are those of a normal error with the tracked mean absolute error.

Errors are scaled as in Hyndman and Koehler, "Another look at measures of forecast accuracy",
2006: by the mean absolute error of the (seasonal) naive forecast over the same rows.

The drift test is that of Page and Hinkley (Page, "Continuous inspection schemes", 1954),
as river's `PageHinkley` has it; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from stepstate.engine.work import Floats
from stepstate.models import LEAST_LEVEL, MOST_LEVEL, Manifest, Output, Tracking

Wide = NDArray[np.float64]

MEAN_ERROR = math.sqrt(math.pi / 2)
"""Standard deviation of a normal error whose mean absolute value is 1."""
RECENT = 0.02
"""The weight of the newest error in the scale, once there are 50: it follows the last ones."""

SPIKE = 20.0
"""So many times the scale is the most that one error counts as: a glitch must not blow up the
intervals of the next hundred rows."""
LARGEST = 1e30
"""Larger errors count as this: their sums must fit float32."""
LARGEST_ERROR, LEAST_UNIT, LARGEST_SCALED = 1e9, 1e-6, 1e6
"""In scales of the output, but for the last: one absurd value must not drown the sums of all."""
FLOAT32 = float(np.finfo(np.float32).max)

MOST_AVERAGED = 50_000
"""A mean is one of about so many values: with more, float32 would not move it any further."""
MOST_COUNTED = float(2**24)
"""Where counting by one ends in float32."""

# Places in the tracked part. First what the session asked for:
_ALPHA, _HEAD = range(2)
# then for each target: what that means for its intervals, and (a count lies before its mean) the
# naive forecast, the drift test, alarms;
_LOW_WIDTH, _HIGH_WIDTH, _NAIVE_N, _NAIVE, _TEST_N = range(5)
_TEST_MEAN, _TEST_SUM, _TEST_LEAST, _ALARMS, _SINCE, _TARGET = range(5, 11)
# then for each horizon of it, followed by the pending forecasts: low, median, high of each.
_OFFSET, _SCALE, _SCORED, _ERROR, _SCALED_N, _SCALED, _COVERED_N, _COVERED, _HORIZON = range(9)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How good the forecasts of one output were at one horizon."""

    output: str
    horizon: int
    scored: int
    mean_absolute_error: float
    mean_absolute_scaled_error: float
    """NaN: not known yet."""
    coverage: float
    """NaN: no interval has met its truth yet."""
    offset: float


@dataclass(frozen=True, slots=True)
class Drift:
    """Whether forecasts have become worse of late."""

    drifting: bool = False
    alarms: int = 0
    last_t: int | None = None
    """Rows applied before the row of the last alarm."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What is told of a session's forecasts."""

    level: float
    accuracy: tuple[Accuracy, ...]
    drift: Drift


@dataclass(slots=True)
class Score:
    """Sums over scored forecasts of one output at one horizon."""

    output: str
    horizon: int
    scored: int = 0
    absolute_error: float = 0.0
    scaled: int = 0
    scaled_error: float = 0.0
    with_interval: int = 0
    covered: int = 0


@dataclass(slots=True)
class Tally:
    """What was scored of many sessions: sums by output and horizon, and alarms of drift."""

    scores: list[Score] = field(default_factory=list)
    alarms: int = 0

    def add(self, other: Tally) -> None:
        """Adds what another one counted."""
        self.alarms += other.alarms
        for mine, its in zip(self.scores, other.scores, strict=True):
            mine.scored += its.scored
            mine.absolute_error += its.absolute_error
            mine.scaled += its.scaled
            mine.scaled_error += its.scaled_error
            mine.with_interval += its.with_interval
            mine.covered += its.covered


@dataclass(frozen=True, slots=True)
class Spot:
    """One tracked horizon of one target."""

    number: int
    horizon: int
    place: int
    """Where its part of the tracked part begins."""
    columns: tuple[int, int, int]
    """Of y: the lowest quantile, the median, the highest."""

    @property
    def point(self) -> bool:
        """Whether the model has no quantiles."""
        return self.columns[0] == self.columns[2]


@dataclass(frozen=True, slots=True)
class Target:
    """An output whose truth arrives as an input of its name."""

    output: Output
    column: int
    """Of x."""
    place: int
    """Where its part of the tracked part begins."""
    spots: tuple[Spot, ...]

    @property
    def least_unit(self) -> float:
        """A series whose naive error is below it stands still: nothing can be scaled by it."""
        return LEAST_UNIT * abs(self.output.scale)

    @property
    def largest_error(self) -> float:
        """Beyond it an error is a mistake of somebody's, and not counted among others'."""
        return LARGEST_ERROR * abs(self.output.scale)


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
        self._drift = tracking.drift
        self._drift_rows = max(self.season, self._drift.min_rows)
        self._spots = [spot for target in self.targets for spot in target.spots]
        self._truths = np.array([target.column for target in self.targets])
        self._columns = np.array([spot.columns for spot in self._spots]).flatten()
        last = self._spots[-1]
        self.width = last.place + _HORIZON + 3 * last.horizon

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
            pending = spot.place + _HORIZON
            part[pending : pending + 3 * spot.horizon] = np.nan
        return part

    def sound(self, part: Floats) -> bool:
        """Whether a tracked part [Q] can have come from here: bytes from outside may hold anything.

        A count below 0 would make the forward that it shares with others fail.
        """
        targets = np.array([target.place for target in self.targets])
        stats = np.array([spot.place for spot in self._spots])
        counts = _of(part, targets, (_NAIVE_N, _TEST_N, _ALARMS))
        counts += _of(part, stats, (_SCORED, _SCALED_N, _COVERED_N))
        sizes = _of(part, targets, (_NAIVE,)) + _of(
            part, stats, (_SCALE, _ERROR, _SCALED, _COVERED)
        )
        others = _of(part, targets, (_TEST_MEAN, _TEST_SUM, _TEST_LEAST))
        others += _of(part, stats, (_OFFSET,))
        since = [rows for rows in _of(part, targets, (_SINCE,)) if not math.isnan(rows)]
        widths = _of(part, targets, (_LOW_WIDTH, _HIGH_WIDTH))
        return (
            LEAST_LEVEL <= self.level(part) <= MOST_LEVEL
            and all(count >= 0 and count.is_integer() for count in (*counts, *since))
            and all(size >= 0 for size in sizes)
            and all(width > 0 for width in widths)
            and not any(map(math.isnan, others))
        )

    def tally(self) -> Tally:
        """Counts of nothing yet."""
        return Tally(
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
        tally: Tally,
    ) -> None:
        """Takes rows, of one session or of several, each into its tracked part.

        Args:
            values: where the tracked parts are.
            places: of each row, its tracked part's place there, and the rows applied before it.
            x: the rows [B, D]; NaN is missing.
            before: the rows a season before [B, D]; NaN is unknown.
            y: their outputs [B, O].
            tally: counts what is scored.
        """
        truths, naive = x[:, self._truths].tolist(), before[:, self._truths].tolist()
        told = zip(places, truths, naive, y[:, self._columns].tolist(), strict=True)
        for (base, at), truth, earlier, forecasts in told:
            self.observe(
                values, base, at, truths=truth, naive=earlier, forecasts=forecasts, tally=tally
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
        tally: Tally,
    ) -> None:
        """Takes one row into a tracked part: scores what was said of it, keeps what is said now.

        Args:
            values: where the tracked part is.
            base: its place there.
            at: rows applied before the row.
            truths: the targets' values in the row; NaN is missing.
            naive: the same a season before; NaN is unknown.
            forecasts: what is tracked of the row's outputs.
            tally: counts what is scored.
        """
        for target, truth, before in zip(self.targets, truths, naive, strict=True):
            place = base + target.place
            unit = _naive_error(values, place, min(abs(truth - before), LARGEST))
            unit = unit if unit >= target.least_unit else 0.0
            values[place + _SINCE] += 1  # NaN stays NaN
            for spot in target.spots:
                stats = base + spot.place
                pending = stats + _HORIZON + 3 * (at % spot.horizon)
                error = min(abs(truth - values[pending + 1]), LARGEST)
                if not math.isnan(error):
                    score = tally.scores[spot.number]
                    counted = score if error <= target.largest_error else None
                    self._score(values, stats, error, unit, counted)
                    self._adapt(values, base, stats, pending=pending, truth=truth, score=score)
                    if spot is target.spots[0] and unit:
                        tally.alarms += self._test(values, place, _scaled(error, unit))
                self._issue(values, place, spot, stats=stats, pending=pending, forecasts=forecasts)

    @staticmethod
    def _score(
        values: memoryview[float], stats: int, error: float, unit: float, score: Score | None
    ) -> None:
        """Takes an error, and it as a multiple of `unit` where that is known; counts both."""
        count = _average(values, stats + _SCORED, error)
        scale = values[stats + _SCALE]
        usual = min(error, SPIKE * scale) if scale and count * RECENT > 1 else error
        values[stats + _SCALE] += (usual - scale) * max(1 / count, RECENT)
        if score is not None:
            score.scored += 1
            score.absolute_error += error
        if unit:
            _average(values, stats + _SCALED_N, _scaled(error, unit))
            if score is not None:
                score.scaled += 1
                score.scaled_error += _scaled(error, unit)

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
        miss = not low <= truth <= high
        step = self._tracking.rate * values[stats + _SCALE]
        values[stats + _OFFSET] += step * (miss - values[base + _ALPHA])
        _average(values, stats + _COVERED_N, 1 - miss)
        score.with_interval += 1
        score.covered += not miss

    @staticmethod
    def _issue(
        values: memoryview[float],
        place: int,
        spot: Spot,
        *,
        stats: int,
        pending: int,
        forecasts: Sequence[float],
    ) -> None:
        """Keeps a forecast and its interval until its truth arrives."""
        low, median, high = forecasts[3 * spot.number : 3 * spot.number + 3]
        below, above = max(median - low, 0.0), max(high - median, 0.0)
        if spot.point:
            below = above = values[stats + _SCALE] if values[stats + _SCORED] else math.nan
        below = max(values[place + _LOW_WIDTH] * below + values[stats + _OFFSET], 0.0)
        above = max(values[place + _HIGH_WIDTH] * above + values[stats + _OFFSET], 0.0)
        values[pending] = max(median - below, -FLOAT32)
        values[pending + 1] = median
        values[pending + 2] = min(median + above, FLOAT32)

    def _test(self, values: memoryview[float], place: int, error: float) -> bool:
        """The Page-Hinkley test on one more scaled error; whether it raises an alarm."""
        spec = self._drift
        count = _average(values, place + _TEST_N, error)
        mean = values[place + _TEST_MEAN]
        total = spec.forget * values[place + _TEST_SUM] + error - mean - spec.delta
        values[place + _TEST_SUM] = total
        least = total if count == 1 else min(values[place + _TEST_LEAST], total)
        values[place + _TEST_LEAST] = least
        if count < spec.min_rows or total - least <= spec.threshold:
            return False
        values[place + _TEST_N] = values[place + _TEST_MEAN] = values[place + _TEST_SUM] = 0.0
        values[place + _ALARMS] += 1
        values[place + _SINCE] = 0.0
        return True

    def quality(self, part: Floats, t: int) -> Quality:
        """What a tracked part [Q] tells of a session at t."""
        accuracy = [
            _accuracy(
                target.output.name,
                spot.horizon,
                part[spot.place : spot.place + _HORIZON].tolist(),
            )
            for target in self.targets
            for spot in target.spots
        ]
        return Quality(self.level(part), tuple(accuracy), self._drift_of(part, t))

    def spread(self, parts: Floats, output: Output, horizon: int) -> tuple[Wide, Wide] | None:
        """Offsets [B, K] and mean absolute errors [B, K] at horizons 1 to K, tracked or between.

        None: the output is not tracked. NaN: no error is known yet.
        """
        target = next((target for target in self.targets if target.output is output), None)
        if target is None:
            return None
        spots = sorted(target.spots, key=lambda spot: spot.horizon)
        weights = _weights([spot.horizon for spot in spots], horizon)
        places = np.array([spot.place for spot in spots])
        offsets = parts[:, places + _OFFSET].astype(np.float64)
        scales = parts[:, places + _SCALE].astype(np.float64)
        scales[parts[:, places + _SCORED] == 0] = np.nan
        between = np.where(weights > 0, scales[:, :, None] * weights, 0.0).sum(axis=1)
        return offsets @ weights, between

    @staticmethod
    def level(part: Floats) -> float:
        """The share of truths that intervals are to cover."""
        return round(1 - float(part[_ALPHA]), 7)

    def _drift_of(self, part: Floats, t: int) -> Drift:
        alarms = sum(int(part[target.place + _ALARMS]) for target in self.targets)
        since = [float(part[target.place + _SINCE]) for target in self.targets]
        known = [rows for rows in since if not math.isnan(rows)]
        if not known:
            return Drift()
        rows = min(known)
        last_t = t - 1 - int(rows) if rows < MOST_COUNTED else None  # so long ago that none counted
        return Drift(rows < self._drift_rows, alarms, last_t)


def _targets(manifest: Manifest, tracking: Tracking) -> Iterator[Target]:
    place, number = _HEAD, 0
    for output, first_column, column in manifest.placed_outputs():
        if column is None:
            continue
        target_place, place = place, place + _TARGET
        spots = []
        for horizon in tracking.horizons:
            first = first_column + output.column(horizon)
            columns = (first, first + output.median, first + output.columns - 1)
            spots.append(Spot(number, horizon, place, columns))
            place += _HORIZON + 3 * horizon
            number += 1
        yield Target(output, column, target_place, tuple(spots))


def deviate(level: float) -> float:
    """The normal deviate z of a quantile level."""
    return NormalDist().inv_cdf(level)


def _widths(output: Output, level: float) -> tuple[float, float]:
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


def _of(part: Floats, places: NDArray[np.int64], which: Sequence[int]) -> list[float]:
    """Some values of several targets or horizons."""
    found: list[float] = part[places[:, None] + np.array(which)].flatten().tolist()
    return found


def _average(values: memoryview[float], place: int, value: float) -> float:
    """Takes a value into a count and, behind it, their mean; returns the count."""
    count = values[place] = values[place] + 1
    values[place + 1] += (value - values[place + 1]) / min(count, MOST_AVERAGED)
    return count


def _scaled(error: float, unit: float) -> float:
    return min(error / unit, LARGEST_SCALED)


def _naive_error(values: memoryview[float], place: int, error: float) -> float:
    """Takes an error of the naive forecast, NaN if there was none; returns their mean."""
    if not math.isnan(error):
        _average(values, place + _NAIVE_N, error)
    return values[place + _NAIVE]


def _accuracy(output: str, horizon: int, stats: list[float]) -> Accuracy:
    return Accuracy(
        output,
        horizon,
        scored=int(stats[_SCORED]),
        mean_absolute_error=stats[_ERROR] if stats[_SCORED] else math.nan,
        mean_absolute_scaled_error=stats[_SCALED] if stats[_SCALED_N] else math.nan,
        coverage=stats[_COVERED] if stats[_COVERED_N] else math.nan,
        offset=stats[_OFFSET],
    )
