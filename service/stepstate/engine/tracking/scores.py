"""Scores of the forecasts of one output at one horizon: over the whole life, and recent ones.

Rows are counted in blocks. The *recent* figures are those of the last full block and the one
being filled, so that a value, however absurd, has no effect on them after two blocks. The
*lifetime* figures add the blocks before, which are kept as counts and means.

The scaled error is a ratio of two means over the same rows, as Hyndman and Koehler define it
("Another look at measures of forecast accuracy", 2006), so rows in which the series stands still
do not change it.

The median is found by stochastic approximation (Robbins and Monro 1951) on the logarithm of the
error, again in each block, starting from that of the last one: one absurd value moves it as far
as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from stepstate.engine.tracking.drift import MAX_AVERAGED

MIN_BLOCK_ROWS = 250
"""A block is the longer of this and a season: it gives a share of 0.9 to within 0.02."""
MEDIAN_STEP = 1.2
"""About 1 / (2 f), f the density of a log error at its median: 0.43 for normal errors."""

RECENT = 0.02
"""The weight of the newest error in the scale, once there are 50: it follows the last ones."""
USUAL_KNOWN = 51
"""From so many errors on the scale is known well enough to recognise a spike."""
SPIKE = 20.0
"""One error counts as at most so many times the scale: a glitch must not widen the intervals of
the next hundred rows, nor dominate the sums over all sessions."""

FAR = 100.0
"""In one block the median can move by about this factor; where it has to fall farther, as after a
glitch, it restarts at the error."""

# The numbers of one horizon. Of its intervals:
OFFSET, SCALE, SCALE_N = range(3)
# the same counts and sums three times (means in the first): all blocks but the current one, the
# last full one, the current one;
LIFE, LAST, BLOCK = 3, 10, 17
(_N, _ERROR, _PAIRS, _PAIR_ERROR, _NAIVE, _INTERVALS, _COVERED) = range(7)
# the median in the current block, and that of the last full one.
MEDIAN, LAST_MEDIAN, SCORES = 24, 25, 26
_COUNTS = (_N, _PAIRS, _INTERVALS)
_SUMS = ((_ERROR, _N), (_PAIR_ERROR, _PAIRS), (_NAIVE, _PAIRS), (_COVERED, _INTERVALS))


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """Means over scored forecasts; NaN is unknown. `coverage`: the share of intervals that held."""

    scored: int
    mean_absolute_error: float
    mean_absolute_scaled_error: float
    coverage: float


@dataclass(frozen=True, slots=True)
class HorizonAccuracy:
    """The scores of the forecasts of one output at one horizon."""

    output: str
    horizon: int
    lifetime: ScoreSummary
    recent: ScoreSummary
    median_absolute_error: float
    """Of the last full block, or of the current one while it is the first. NaN: unknown."""
    offset: float
    """By which intervals are wider than the model's own."""


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
    outliers: int = 0
    """Errors of which only a part is in the sums, see `SPIKE`."""

    def add(self, other: Score) -> None:
        """Adds the sums of another one."""
        self.scored += other.scored
        self.absolute_error += other.absolute_error
        self.scaled += other.scaled
        self.scaled_error += other.scaled_error
        self.with_interval += other.with_interval
        self.covered += other.covered
        self.outliers += other.outliers


@dataclass(slots=True)
class ScoreTotals:
    """Scores of many sessions: sums by output and horizon, and alarms of drift tests."""

    scores: list[Score] = field(default_factory=list)
    alarms: int = 0

    def add(self, other: ScoreTotals) -> None:
        """Adds other totals."""
        self.alarms += other.alarms
        for mine, added in zip(self.scores, other.scores, strict=True):
            mine.add(added)


def take_usual(values: memoryview[float], stats: int, error: float) -> float:
    """Takes an absolute error into the scale; returns how much of it counts, see `SPIKE`."""
    count = values[stats + SCALE_N] = min(values[stats + SCALE_N] + 1, USUAL_KNOWN)
    scale = values[stats + SCALE]
    usual = min(error, SPIKE * scale) if scale and count == USUAL_KNOWN else error
    values[stats + SCALE] += (usual - scale) * max(1 / count, RECENT)
    return usual


def take_error(
    values: memoryview[float], stats: int, error: float, naive: float, least: float
) -> None:
    """Takes an absolute error, and that of the naive forecast (NaN: unknown), into the block."""
    block = stats + BLOCK
    rows = values[block + _N] = values[block + _N] + 1
    values[block + _ERROR] += error
    if naive == naive:  # noqa: PLR0124 - not NaN, in a third of the time
        values[block + _PAIRS] += 1
        values[block + _PAIR_ERROR] += error
        values[block + _NAIVE] += naive
    median = values[stats + MEDIAN]
    if rows == 1 and (median <= 2 * least or 0 < error * FAR < median):
        median = error
    if error > median:
        median *= 1 + MEDIAN_STEP / (rows + 1)
    elif error < median:
        median /= 1 + MEDIAN_STEP / (rows + 1)
    values[stats + MEDIAN] = max(median, least)


def take_interval(values: memoryview[float], stats: int, held: bool) -> None:  # noqa: FBT001 - a hot call
    """Takes whether an interval held its truth into the block."""
    values[stats + BLOCK + _INTERVALS] += 1
    values[stats + BLOCK + _COVERED] += held


def is_full(values: memoryview[float], stats: int, rows: int) -> bool:
    """Whether the block has so many rows."""
    return values[stats + BLOCK + _N] >= rows


def close_block(values: memoryview[float], stats: int) -> None:
    """Makes the current block the last full one, and begins another."""
    life, last, block = stats + LIFE, stats + LAST, stats + BLOCK
    for part in _COUNTS:
        values[life + part] += values[block + part]
    for part, count in _SUMS:
        rows = values[block + count]
        if rows:
            off = values[block + part] - rows * values[life + part]
            values[life + part] += off / max(min(values[life + count], MAX_AVERAGED), rows)
    for part in range(BLOCK - LAST):
        values[last + part] = values[block + part]
        values[block + part] = 0.0
    values[stats + LAST_MEDIAN] = values[stats + MEDIAN]


def naive_error(values: memoryview[float], stats: int) -> float:
    """The mean error of the naive forecast over the recent rows; 0: unknown."""
    last, block = stats + LAST, stats + BLOCK
    pairs = values[last + _PAIRS] + values[block + _PAIRS]
    return (values[last + _NAIVE] + values[block + _NAIVE]) / pairs if pairs else 0.0


def accuracy(output: str, horizon: int, part: list[float], least: float) -> HorizonAccuracy:
    """The scores in the numbers of a horizon; a mean naive error below `least` scales nothing."""
    life, last, block = part[LIFE:LAST], part[LAST:BLOCK], part[BLOCK:MEDIAN]
    recent = [a + b for a, b in zip(last, block, strict=True)]
    whole = [a + b for a, b in zip(_sums(life), block, strict=True)]
    median = part[LAST_MEDIAN] or part[MEDIAN]
    return HorizonAccuracy(
        output,
        horizon,
        lifetime=_summary(whole, least),
        recent=_summary(recent, least),
        median_absolute_error=(median if median > least else 0.0) if recent[_N] else math.nan,
        offset=part[OFFSET],
    )


def is_valid(part: list[float], t: int) -> bool:
    """Whether the numbers of a horizon are possible after t rows."""
    counts = [part[SCALE_N], *(part[at + n] for at in (LIFE, LAST, BLOCK) for n in _COUNTS)]
    return (
        all(map(math.isfinite, part))
        and all(count.is_integer() and count <= 2 * t for count in counts)  # float32 rounds up
        and min(part[SCALE:]) >= 0
    )


def _sums(life: list[float]) -> list[float]:
    """The lifetime means as sums."""
    found = life.copy()
    for part, count in _SUMS:
        found[part] *= life[count]
    return found


def _summary(sums: list[float], least: float) -> ScoreSummary:
    pairs = sums[_PAIRS]
    moves = pairs and sums[_NAIVE] > 0 and sums[_NAIVE] >= least * pairs
    return ScoreSummary(
        scored=int(sums[_N]),
        mean_absolute_error=sums[_ERROR] / sums[_N] if sums[_N] else math.nan,
        mean_absolute_scaled_error=sums[_PAIR_ERROR] / sums[_NAIVE] if moves else math.nan,
        coverage=sums[_COVERED] / sums[_INTERVALS] if sums[_INTERVALS] else math.nan,
    )
