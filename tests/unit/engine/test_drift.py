"""Drift tests: what they tell, against river and against their definitions with lists."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from pydantic import ValidationError
from river.drift import PageHinkley as RiversPageHinkley

from benchmarks.drift import NOISES, autoregressive
from stepstate.engine.tracking.drift import DriftTestStatus, drift_test
from stepstate.models import CusumSpec, PageHinkleySpec, Tracking

MIN_UNIT = 1e-6


@dataclass
class Definition:
    """The chart as the module's docstring defines it, in float64, with lists instead of sums."""

    rise: float = 0.25
    min_rows: int = 256
    average_run_length: float = 2e6
    waiting: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.means, self.squares, self.away = [], [], []
        self.up = self.down = self.limit = 0.0
        self.known = False

    def row(self, error: float) -> bool:
        self.waiting.append(error)
        if len(self.waiting) < 8:
            return False
        x, self.waiting = np.sqrt(self.waiting), []
        level = float(np.mean(self.means)) if self.means else 0.0
        x = np.minimum(x, self.most(x, level))
        if not self.means:
            if x.any():
                self.keep(x, 0.0)
            return False
        k = (math.sqrt(1 + self.rise) - 1) * level
        variance = self.long_run_variance(level)
        n = 8 * len(self.means)
        self.known = n >= self.min_rows and math.sqrt(variance / n) <= k / 2
        self.limit = (
            variance / (2 * k) * math.log(1 + self.average_run_length * 2 * k**2 / variance)
        )
        if self.known:
            self.up = max(0.0, self.up + np.sum(x - level - k))
            self.down = max(0.0, self.down + np.sum(level - x - k))
            if max(self.up, self.down) > self.limit:
                risen = self.up > self.limit
                self.begin()
                return risen
        if self.up <= self.limit / 2:
            self.keep(x, float(np.mean(x)) - level)
        return False

    def keep(self, x: np.ndarray, away: float) -> None:
        self.means.append(float(np.mean(x)))
        self.squares.append(float(np.mean(x**2)))
        self.away.append(away)

    def most(self, x: np.ndarray, level: float) -> float:
        if len(self.means) < 4:
            return 5 * np.sort(x)[4] or math.inf
        return max(level + 5 * math.sqrt(max(np.mean(self.squares) - level**2, 0)), 2 * level)

    def long_run_variance(self, level: float) -> float:
        found = [0.09 * level**2]
        for w in (1, 4, 16, 64):
            if w == 1 or len(self.away) >= 4 * w:
                decay = (1 - 1 / w) ** np.arange(len(self.away)) / w
                moved = np.convolve(self.away, decay)[: len(self.away)]
                found.append(8 * (2 * w - 1) * np.mean(moved**2))
        return max(found)


class Chartered:
    """A test with its numbers, in float64 so that it can be compared exactly."""

    def __init__(self, spec: CusumSpec | PageHinkleySpec, dtype: type = np.float64) -> None:
        self.test = drift_test(spec, MIN_UNIT)
        self.numbers = np.zeros(self.test.width, dtype)

    def row(self, error: float, naive: float = math.nan) -> bool:
        return self.test.take(memoryview(self.numbers), 0, error, naive)

    def alarms(self, errors: np.ndarray) -> list[int]:
        return [row for row, error in enumerate(np.abs(errors).tolist()) if self.row(error)]

    @property
    def status(self) -> DriftTestStatus:
        return self.test.status(self.numbers)


def cusum(errors: np.ndarray, **spec: float) -> list[int]:
    return Chartered(CusumSpec(**spec)).alarms(errors)


def test_the_chart_is_what_its_definition_gives():
    alarms = 0
    for seed, noise in enumerate(NOISES.values()):
        rng = np.random.default_rng(seed)
        errors = np.abs(noise(rng, 2400)) * np.repeat([1.0, 2.5, 0.3, 0.9], 600)
        errors[rng.random(2400) < 0.002] *= 1000
        spec = {
            "rise": float(rng.uniform(0.1, 0.6)),
            "min_rows": int(rng.integers(1, 400)),
            "average_run_length": float(rng.choice([1e3, 1e5, 1e7])),
        }
        chart, definition = Chartered(CusumSpec(**spec)), Definition(**spec)
        for error in errors.tolist():
            alarm = chart.row(error)
            assert alarm == definition.row(error)
            assert chart.numbers[12] == pytest.approx(definition.up, rel=1e-9, abs=1e-9)
            alarms += alarm
        assert chart.status.learning != definition.known
    assert alarms > 10


@pytest.mark.parametrize("seed", range(20))
def test_page_hinkley_tells_where_river_tells(seed):
    """With the naive error at 1 throughout the scaled error is the error itself."""
    rng = np.random.default_rng(seed)
    spec = {
        "delta": float(rng.uniform(0, 0.1)),
        "threshold": float(rng.uniform(3, 20)),
        "min_rows": int(rng.integers(1, 60)),
        "forget": float(rng.choice([1.0, 0.9999, 0.95])),
    }
    river = RiversPageHinkley(
        min_instances=spec["min_rows"],
        delta=spec["delta"],
        threshold=spec["threshold"],
        alpha=spec["forget"],
        mode="up",
    )
    errors = np.abs(rng.normal(0, np.repeat([1, 3, 0.5, 4], 200)))
    test = Chartered(PageHinkleySpec(**spec))
    wanted = []
    for row, error in enumerate(errors.tolist()):
        river.update(error)
        assert test.row(error, 1.0 if row == 0 else math.nan) == river.drift_detected
        wanted.append(river.drift_detected)
    assert any(wanted)


def test_page_hinkley_does_not_scale_by_a_start_that_stands_still():
    rng = np.random.default_rng(0)
    test = Chartered(PageHinkleySpec(threshold=100.0))
    still = [test.row(0.0, 0.0) for _ in range(2000)]
    moving = [test.row(*row) for row in np.abs(rng.normal(size=(2000, 2))).tolist()]
    assert not any(still)
    assert sum(moving) <= 2


def test_after_an_alarm_the_new_level_is_the_usual_one():
    errors = np.random.default_rng(1).normal(size=20_000)
    errors[5000:] *= 3
    errors[12_000:] *= 3
    first, second = cusum(errors)
    assert 5000 <= first < 5100
    assert 12_000 <= second < 12_100


def test_errors_that_become_better_are_the_usual_ones_from_then_on():
    errors = np.random.default_rng(2).normal(size=12_000)
    errors[:4000] *= 4
    errors[8000:] *= 2  # still half of what it began with
    (alarm,) = cusum(errors)
    assert 8000 <= alarm < 8100


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e12, 1e29])
def test_the_unit_of_the_errors_changes_nothing(unit, dtype):
    errors = np.random.default_rng(3).normal(size=6000)
    errors[3000:] *= 2
    (alarm,) = Chartered(CusumSpec(), dtype).alarms(errors * unit)
    assert 3000 <= alarm < 3200


@pytest.mark.parametrize("still", [0.0, 5.0])
def test_a_series_that_stands_still_raises_no_alarm_and_what_comes_then_one_at_most(still):
    errors = np.full(20_000, still)
    assert cusum(errors) == []
    errors[8000:] = np.random.default_rng(4).normal(size=12_000)
    assert len(cusum(errors)) <= 1


def test_errors_that_were_all_alike_and_double_raise_an_alarm():
    errors = np.repeat([5.0, 10.0], 1000)
    (alarm,) = cusum(errors)
    assert 1000 <= alarm < 1032


@pytest.mark.parametrize("row", [0, 3, 7, 8, 100, 1999])
def test_a_glitch_raises_no_alarm_and_hides_none(row):
    errors = np.random.default_rng(5).normal(size=4000)
    errors[2000:] *= 2
    errors[row] = 99_999.0
    (alarm,) = cusum(errors)
    assert 2000 <= alarm < 2200


def test_errors_that_hang_together_take_longer_to_be_learned():
    rng = np.random.default_rng(6)
    loose, close = Chartered(CusumSpec()), Chartered(CusumSpec())
    for a, b in zip(rng.normal(size=400), autoregressive(0.98, rng, 400), strict=True):
        loose.row(abs(a))
        close.row(abs(b))
    assert not loose.status.learning
    assert 0 <= loose.status.score < 1
    assert close.status.learning
    assert math.isnan(close.status.score)


def test_the_status_shows_how_near_an_alarm_is():
    chart, scores = Chartered(CusumSpec()), []
    chart.alarms(np.random.default_rng(7).normal(size=2000))
    rows = iter(np.random.default_rng(8).normal(size=1000) * 1.6)
    while not chart.row(abs(next(rows))):
        scores.append(chart.status.score)
    assert max(scores) > 0.7
    assert chart.status.learning


@pytest.mark.parametrize("spec", [CusumSpec(), PageHinkleySpec(threshold=1e6)])
def test_numbers_of_a_test_are_valid_and_forged_ones_are_not(spec):
    chart = Chartered(spec, np.float32)
    for row in np.abs(np.random.default_rng(9).normal(size=(700, 2))).tolist():
        assert chart.test.is_valid(chart.numbers)
        chart.row(*row)
    for place in range(chart.test.width):
        for value in (math.nan, math.inf, -math.inf):
            forged = chart.numbers.copy()
            forged[place] = value
            assert not chart.test.is_valid(forged)


@pytest.mark.parametrize(("place", "value"), [(0, 8.0), (0, 0.5), (0, -1.0), (3, -1.0), (9, 1.5)])
def test_impossible_counts_of_a_chart_are_not_valid(place, value):
    chart = Chartered(CusumSpec())
    chart.alarms(np.ones(100))
    assert chart.test.is_valid(chart.numbers)
    chart.numbers[place] = value
    assert not chart.test.is_valid(chart.numbers)


@pytest.mark.parametrize(
    ("drift", "test"),
    [
        ({}, "cusum"),
        ({"min_rows": 100}, "cusum"),
        ({"test": "cusum", "rise": 0.5}, "cusum"),
        ({"test": "page_hinkley"}, "page_hinkley"),
        ({"threshold": 2.0, "min_rows": 5}, "page_hinkley"),
    ],
)
def test_a_manifest_names_its_test_or_has_the_numbers_of_one(drift, test):
    assert Tracking(horizons=(1,), drift=drift).drift.test == test


@pytest.mark.parametrize(
    ("drift", "named"),
    [
        ({"test": "adwin"}, "cusum or page_hinkley"),
        ({"test": "cusum", "threshold": 3.0}, "drift.cusum.threshold"),
        ({"rise": 0.0}, "drift.cusum.rise"),
        ({"delta": 0.1, "rise": 0.5}, "drift.page_hinkley.rise"),
        (5, "cusum or page_hinkley"),
    ],
)
def test_a_test_that_is_none_is_refused_by_name(drift, named):
    with pytest.raises(ValidationError, match=named):
        Tracking(horizons=(1,), drift=drift)
