"""Tests for a lasting increase of a session's forecast errors.

A test's numbers are part of the session's state: a few float32 for each target, in one memoryview.
Each test takes the absolute errors of one horizon, row by row, in constant time.

`Cusum` is the default. It is the chart of Page ("Continuous inspection schemes", Biometrika 41,
1954) on the square root of the error, which is less skewed than the error itself. It differs from
the textbook's where that fails on streams:

- The errors of neighbouring rows are correlated. The limit uses their *long-run variance*, the
  variance of a long mean times its length, as measured on the stream itself: exponentially
  weighted means of several lengths w have variance (long-run variance) / (2 w - 1), and the
  largest counts.
- The limit follows from the wanted average run length, by the diffusion approximation:
  a sum that drifts down by k a row, with long-run variance v, reaches `v / (2 k) * log(1 + L)` once
  in about `v / (2 k^2) * L` rows (Siegmund, "Sequential Analysis", 1985, chapter 10).
- It decides nothing before the level that it compares with is known well enough: errors that
  are correlated for long need many rows.
- It does not learn from what looks like a change, and one row counts for at most some standard
  deviations.

`PageHinkley` is the test of river's `PageHinkley` for a rising mean, on the scaled error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stepstate.engine.work import Floats
from stepstate.models import CusumSpec, DriftSpec, PageHinkleySpec

LARGEST_SCALED = 1e6
MAX_AVERAGED = 50_000
"""A mean is one of about so many values: with more, float32 would not move it any further."""

BLOCK_ROWS = 8
"""The chart is updated once in so many rows: that saves most of its cost, for a delay of some four
rows."""
WINDOWS = (1, 4, 16, 64)
"""Lengths of the means, in blocks: errors that are correlated for 500 rows are seen."""
TRUSTED = 4
"""A mean's variance counts from this many times its length on."""
MIN_VARIANCE = 0.09
"""Of the squared level: errors that were all alike so far will not stay so."""
LEARNED = 4.0
"""The level counts as known when its standard error is half of the allowance."""
FROZEN = 0.5
"""At this share of the limit it stops to learn: a change must not become the new normal."""
DEVIATIONS, LEVELS = 5.0, 2.0
"""One row counts as at most the level and so many deviations, but as much as twice the level."""
FIRST_BLOCKS, MEDIANS = 4, 5.0
"""While no deviation is known, a row counts as at most this many times its block's median."""

# The numbers of `Cusum`; the errors of the block that is not full come before them.
_FILLED, _ERRORS = 0, 1
_BLOCKS, _LEVEL, _SQUARE, _UP, _DOWN, _MEANS = range(1 + BLOCK_ROWS, 7 + BLOCK_ROWS)
# The numbers of `PageHinkley`.
_NAIVE_N, _NAIVE, _COUNT, _MEAN, _SUM, _LEAST = range(6)


@dataclass(frozen=True, slots=True)
class DriftTestStatus:
    """How near a test is to an alarm."""

    learning: bool
    """It has not learned yet what is usual, so it raises no alarm."""
    score: float
    """The share of its limit that is reached: at 1 it raises an alarm. NaN while learning."""


class DriftTest(Protocol):
    """A test that keeps its numbers in a session's state."""

    width: int
    """How many numbers; zeros at first."""

    def take(self, values: memoryview[float], place: int, error: float, naive: float) -> bool:
        """Takes a row; returns whether it raises an alarm. After an alarm the test starts again.

        Args:
            values: the memory that holds its numbers.
            place: their place there.
            error: the absolute error of the forecast.
            naive: that of the naive forecast; NaN is unknown.
        """
        ...

    def status(self, part: Floats) -> DriftTestStatus:
        """How near it is to an alarm, by its numbers [W]."""
        ...

    def is_valid(self, part: Floats) -> bool:
        """Whether its numbers [W] are possible."""
        ...


def drift_test(spec: DriftSpec, min_unit: float) -> DriftTest:
    """The test that a manifest asks for; errors below `min_unit` count as none."""
    if isinstance(spec, PageHinkleySpec):
        return PageHinkley(spec, min_unit)
    return Cusum(spec, min_unit)


class Cusum:
    """Page's chart, as the module's docstring describes it.

    Args:
        spec: what the manifest asks for.
        min_unit: errors below it count as 0; a series without others is not judged.
    """

    width = _MEANS + 2 * len(WINDOWS)

    def __init__(self, spec: CusumSpec, min_unit: float) -> None:
        self._min_rows = spec.min_rows
        self._rows = spec.average_run_length
        self._allowed = math.sqrt(1 + spec.rise) - 1  # of the level of square roots
        self._min_unit = min_unit

    def take(
        self,
        values: memoryview[float],
        place: int,
        error: float,
        naive: float,  # noqa: ARG002 - a protocol's
    ) -> bool:
        """See `DriftTest`."""
        filled = int(values[place + _FILLED])
        values[place + _ERRORS + filled] = error
        if filled + 1 < BLOCK_ROWS:
            values[place + _FILLED] = filled + 1
            return False
        values[place + _FILLED] = 0.0
        return self._take_block(values, place)

    def _take_block(self, values: memoryview[float], place: int) -> bool:
        errors = values[place + _ERRORS : place + _ERRORS + BLOCK_ROWS].tolist()
        roots = [math.sqrt(error) if error >= self._min_unit else 0.0 for error in errors]
        blocks, level = values[place + _BLOCKS], values[place + _LEVEL]
        largest = _max_root(roots, blocks, level, values[place + _SQUARE])
        roots = [min(root, largest) for root in roots]
        mean = sum(roots) / BLOCK_ROWS
        square = sum([root * root for root in roots]) / BLOCK_ROWS
        if not blocks:
            if mean:  # as long as the series stands still there is no level to compare with
                self._learn(values, place, 0.0, mean, square)
            return False
        variance = _long_run_variance(values, place, blocks, level)
        allowed = self._allowed * level
        limit = self._limit(variance, allowed)
        if self._known(blocks, variance, allowed):
            away = BLOCK_ROWS * (mean - level)
            allowed *= BLOCK_ROWS
            up = values[place + _UP] = max(values[place + _UP] + away - allowed, 0.0)
            down = values[place + _DOWN] = max(values[place + _DOWN] - away - allowed, 0.0)
            if up > limit or down > limit:  # it learns the new level, worse or better
                for number in range(_BLOCKS, self.width):
                    values[place + number] = 0.0
                return up > limit
            if up > FROZEN * limit:
                return False
        self._learn(values, place, mean - level, mean, square)
        return False

    @staticmethod
    def _learn(
        values: memoryview[float], place: int, away: float, mean: float, square: float
    ) -> None:
        """Takes a block into the level and its variances."""
        blocks = values[place + _BLOCKS] = values[place + _BLOCKS] + 1
        weight = 1 / min(blocks, MAX_AVERAGED)
        values[place + _LEVEL] += (mean - values[place + _LEVEL]) * weight
        values[place + _SQUARE] += (square - values[place + _SQUARE]) * weight
        at = place + _MEANS
        for length in WINDOWS:
            moved = values[at] = values[at] + (away - values[at]) / length
            values[at + 1] += (moved * moved - values[at + 1]) * weight
            at += 2

    def _limit(self, variance: float, allowed: float) -> float:
        twice = 2 * allowed
        return variance / twice * math.log1p(self._rows * twice * allowed / variance)

    def _known(self, blocks: float, variance: float, allowed: float) -> bool:
        rows = blocks * BLOCK_ROWS
        return rows >= self._min_rows and rows * allowed * allowed >= LEARNED * variance

    def status(self, part: Floats) -> DriftTestStatus:
        """See `DriftTest`."""
        values: memoryview[float] = memoryview(part.astype(np.float64))  # type: ignore[arg-type]
        blocks, level = values[_BLOCKS], values[_LEVEL]
        if not blocks:
            return DriftTestStatus(learning=True, score=math.nan)
        variance = _long_run_variance(values, 0, blocks, level)
        allowed = self._allowed * level
        if not self._known(blocks, variance, allowed):
            return DriftTestStatus(learning=True, score=math.nan)
        score = values[_UP] / self._limit(variance, allowed)
        return DriftTestStatus(learning=False, score=min(score, 1.0))

    def is_valid(self, part: Floats) -> bool:
        """See `DriftTest`."""
        numbers = part.tolist()
        filled, blocks = numbers[_FILLED], numbers[_BLOCKS]
        variances = numbers[_MEANS + 1 :: 2]
        return (
            all(map(math.isfinite, numbers))
            and filled in range(BLOCK_ROWS)
            and blocks >= 0
            and blocks.is_integer()
            and bool(blocks) == (numbers[_LEVEL] > 0)
            and min(*numbers[_ERRORS:_BLOCKS], *numbers[_SQUARE:_MEANS], *variances) >= 0
        )


class PageHinkley:
    """The Page-Hinkley test on the error over the mean error of the naive forecast.

    Args:
        spec: what the manifest asks for.
        min_unit: a naive error below it does not begin the mean: nothing moves yet.
    """

    width = 6

    def __init__(self, spec: PageHinkleySpec, min_unit: float) -> None:
        self._spec = spec
        self._min_unit = min_unit

    def take(self, values: memoryview[float], place: int, error: float, naive: float) -> bool:
        """See `DriftTest`."""
        if naive >= (0.0 if values[place + _NAIVE_N] else self._min_unit):
            average(values, place + _NAIVE_N, naive)
        unit = values[place + _NAIVE]
        if unit < self._min_unit or not unit:
            return False
        scaled = min(error / unit, LARGEST_SCALED)
        spec = self._spec
        count = average(values, place + _COUNT, scaled)
        total = spec.forget * values[place + _SUM] + scaled - values[place + _MEAN] - spec.delta
        values[place + _SUM] = total
        least = total if count == 1 else min(values[place + _LEAST], total)
        values[place + _LEAST] = least
        if count < spec.min_rows or total - least <= spec.threshold:
            return False
        values[place + _COUNT] = values[place + _MEAN] = values[place + _SUM] = 0.0
        return True

    def status(self, part: Floats) -> DriftTestStatus:
        """See `DriftTest`."""
        count, _, total, least = part[_COUNT:].tolist()
        if count < self._spec.min_rows:
            return DriftTestStatus(learning=True, score=math.nan)
        return DriftTestStatus(
            learning=False, score=min((total - least) / self._spec.threshold, 1.0)
        )

    def is_valid(self, part: Floats) -> bool:
        """See `DriftTest`."""
        numbers = part.tolist()
        counts = numbers[_NAIVE_N], numbers[_COUNT]
        return (
            all(map(math.isfinite, numbers))
            and all(count >= 0 and count.is_integer() for count in counts)
            and numbers[_NAIVE] >= 0
        )


def average(values: memoryview[float], place: int, value: float) -> float:
    """Takes a value into a count and the mean that follows it; returns the count."""
    count = values[place] = values[place] + 1
    values[place + 1] += (value - values[place + 1]) / min(count, MAX_AVERAGED)
    return count


def _max_root(roots: list[float], blocks: float, level: float, square: float) -> float:
    """The most that one row counts for."""
    if blocks < FIRST_BLOCKS:
        return MEDIANS * sorted(roots)[BLOCK_ROWS // 2] or math.inf
    deviation = math.sqrt(max(square - level * level, 0.0))
    return max(level + DEVIATIONS * deviation, LEVELS * level)


def _long_run_variance(values: memoryview[float], place: int, blocks: float, level: float) -> float:
    """Of single rows: the variance of a mean of n rows is about an n-th of it."""
    found = MIN_VARIANCE * level * level
    at = place + _MEANS + 1
    for length in WINDOWS:
        if blocks < TRUSTED * length and length > 1:
            break
        found = max(found, BLOCK_ROWS * (2 * length - 1) * values[at])
        at += 2
    return found
