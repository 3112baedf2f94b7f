from __future__ import annotations

import math

import numpy as np
import pytest

from stepstate.engine.tracking.scores import BLOCK, LAST, LIFE, MEDIAN, SCALE, SCALE_N, SCORES
from stepstate.engine.tracking.tracker import (
    _ALARMS,
    _LOW_WIDTH,
    _SINCE,
    _TEST,
    LARGEST,
    Tracker,
)
from stepstate.models import Manifest
from tests.offline import forecasting_network


def tracker_of(**tracking: object) -> Tracker:
    manifest = forecasting_network(quantiles=()).manifest
    manifest["tracking"] |= {"drift": {}, **tracking}
    parsed = Manifest.model_validate(manifest)
    return Tracker(parsed, parsed.tracking)


class Track:
    """One tracked part, in float64 so that it can be compared exactly."""

    def __init__(self, **tracking: object) -> None:
        self.tracker = tracker_of(**tracking)
        self.part = self.tracker.blank(None).astype(np.float64)
        self.totals = self.tracker.new_totals()
        self.t = 0

    def rows(self, truths: np.ndarray, *, median: float = 0.0) -> None:
        """Takes rows, each with the one before as its naive forecast."""
        before = math.nan
        for truth in truths.tolist():
            self.row(truth, median=median, naive=before)
            before = truth

    def row(self, truth: float, *, median: float = 0.0, naive: float = math.nan) -> int:
        """Takes a row; returns the alarms so far."""
        self.tracker.observe(
            memoryview(self.part),
            0,
            self.t,
            truths=[truth],
            naive=[naive],
            forecasts=[median] * 6,
            totals=self.totals,
        )
        self.t += 1
        return self.totals.alarms

    @property
    def drift(self):
        return self.tracker.quality(self.part, self.t).drift

    @property
    def first(self):
        return self.tracker.quality(self.part, self.t).accuracy[0]


def test_the_flag_of_drift_stays_for_a_season():
    track = Track(season_steps=40, drift={"threshold": 5.0, "min_rows": 5})
    track.row(1.0)
    track.row(1.0, naive=0.0)
    assert track.drift.last_t is None
    for _ in range(50):
        track.row(0.1)
    while not track.row(9.0):
        assert not track.drift.drifting
    assert track.drift.drifting
    for _ in range(39):
        track.row(0.1)
    assert track.drift.drifting
    track.row(0.1)
    assert (track.drift.drifting, track.drift.alarms) == (False, 1)


def test_nothing_is_scored_before_a_truth_has_come():
    track = Track()
    track.row(5.0)
    assert track.first.lifetime.scored == 0
    assert math.isnan(track.first.lifetime.mean_absolute_error)
    assert math.isnan(track.first.lifetime.coverage)
    assert math.isnan(track.first.median_absolute_error)
    track.row(math.nan)
    assert track.first.lifetime.scored == 0
    track.row(3.0)
    figures = track.first.lifetime
    assert (figures.scored, figures.mean_absolute_error) == (1, 3.0)
    assert track.first.recent == figures
    assert math.isnan(figures.mean_absolute_scaled_error)


def test_errors_beyond_float32_do_not_end_it():
    track = Track()
    track.part = track.part.astype(np.float32)
    for truth in (3e38, -3e38, 3e38, 1.0, 2.0, 3e38) * 20:
        track.row(truth, median=-truth, naive=-truth)
    assert track.first.lifetime.mean_absolute_error <= LARGEST
    assert not np.isinf(track.part).any()


def test_one_absurd_value_does_not_drown_the_sums():
    """The session's own figures suffer; those of the model do not."""
    track = Track()
    for truth in (1.0, 2.0, 1.0, 1e20, 1.0, 2.0, 1.0):
        track.row(truth, naive=0.0)
    score = track.totals.scores[0]
    assert score.scored == 5
    assert score.absolute_error == 7.0
    assert score.scaled_error <= 20 * score.scaled
    before = score.absolute_error
    track.row(0.5, naive=0.0)
    assert score.absolute_error == before + 0.5


def test_a_glitch_does_not_blow_up_the_intervals():
    track = Track(rate=0.05)
    rng = np.random.default_rng(6)
    for truth in rng.normal(0, 1, 500):
        track.row(float(truth))
    before = track.first.offset
    track.row(1e12)
    assert abs(track.first.offset - before) < 1
    for truth in rng.normal(0, 1, 50):
        track.row(float(truth))
    assert abs(track.first.offset - before) < 1


def test_a_series_that_stands_still_scales_nothing():
    track = Track()
    for _ in range(50):
        track.row(4.0, median=9.0, naive=4.0 + 1e-9)
    assert (track.totals.scores[0].scored, track.totals.scores[0].scaled) == (49, 0)
    assert math.isnan(track.first.lifetime.mean_absolute_scaled_error)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_intervals_of_a_point_model_reach_their_level(level):
    """Errors that are far from normal: the offset has to make up for it."""
    manifest = forecasting_network(quantiles=()).manifest
    manifest["tracking"]["rate"] = 0.05
    parsed = Manifest.model_validate(manifest)
    track = Track()
    track.tracker = Tracker(parsed, parsed.tracking)
    track.part = track.tracker.blank(level).astype(np.float64)
    rng = np.random.default_rng(4)
    for truth in rng.standard_exponential(4000) ** 2:
        track.row(float(truth), median=1.0)
    assert track.first.lifetime.coverage == pytest.approx(level, abs=0.015)


def test_intervals_follow_errors_that_grow():
    track = Track(rate=0.05)
    rng = np.random.default_rng(5)
    for truth in rng.normal(0, 1, 1000):
        track.row(float(truth))
    held = []
    for truth in rng.normal(0, 10, 2000):
        before = track.totals.scores[0].covered
        track.row(float(truth))
        held.append(track.totals.scores[0].covered - before)
    assert np.mean(held[100:]) == pytest.approx(0.9, abs=0.03)


def test_outputs_without_an_input_of_their_name_are_not_tracked():
    tracker = tracker_of()
    assert [target.output.name for target in tracker.targets] == ["level"]


def test_a_scale_of_zero_grows_again():
    track = Track()
    for _ in range(60):
        track.row(0.0)
    rng = np.random.default_rng(1)
    for error in rng.normal(0, 1, 2000):
        track.row(float(error))
    assert track.first.lifetime.coverage > 0.8


def test_means_still_move_after_very_many_errors():
    track = Track()
    track.part = track.part.astype(np.float32)
    place = track.tracker.targets[0].horizons[0].place
    track.part[place + LIFE : place + LIFE + 2] = (10_000_000, 100.0)
    for _ in range(50_000):
        track.row(103.0)
    assert track.first.lifetime.mean_absolute_error > 101.5


def test_an_alarm_too_long_ago_to_be_counted_has_no_row():
    track = Track()
    place = track.tracker.targets[0].place
    track.part[place + _ALARMS], track.part[place + _SINCE] = 1, 2.0**24
    track.t = 2**25
    assert (track.drift.alarms, track.drift.last_t, track.drift.drifting) == (1, None, False)


def test_each_target_has_the_interval_that_its_own_output_promises():
    """Level has quantiles, heat has none: a normal error's 90 % are other multiples of each."""
    manifest = forecasting_network().manifest
    manifest["outputs"].append({"name": "heat", "horizons": [1, 2, 3, 5]})
    parsed = Manifest.model_validate(manifest)
    tracker = Tracker(parsed, parsed.tracking)
    part = tracker.blank(0.9)
    level, heat = (part[t.place + _LOW_WIDTH] for t in tracker.targets)
    assert level == pytest.approx(1.0)
    assert heat == pytest.approx(1.645 * math.sqrt(math.pi / 2), abs=1e-3)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("head", -3.0),
        ("head", math.nan),
        (_TEST, -1.0),
        (_TEST, 0.5),
        (_ALARMS, math.nan),
        (_ALARMS, 0.5),
        (_SINCE, -1.0),
        (_SINCE, math.inf),
        (_LOW_WIDTH, 0.0),
        (_TEST + 12, math.nan),
        ("scale", math.nan),
        ("scale", -1.0),
        ("scaled by", 0.5),
        ("life", -7.0),
        ("last", math.inf),
        ("block", 1.5),
        ("median", -1.0),
        (_ALARMS, 101.0),
        (_SINCE, 100.0),
        ("scaled by", 3e38),
        ("life", 201.0),
    ],
)
def test_an_impossible_tracked_part_is_not_valid(where, value):
    """After 100 rows."""
    tracker = tracker_of()
    part = tracker.blank(None)
    assert tracker.is_valid(part, 100)
    target = tracker.targets[0]
    places = {
        "head": 0,
        "scale": target.horizons[1].place + SCALE,
        "scaled by": target.horizons[1].place + SCALE_N,
        "life": target.horizons[1].place + LIFE,
        "last": target.horizons[1].place + LAST + 1,
        "block": target.horizons[1].place + BLOCK,
        "median": target.horizons[1].place + MEDIAN,
    }
    part[places[where] if isinstance(where, str) else target.place + where] = value
    assert not tracker.is_valid(part, 100)


def figures_of(errors: np.ndarray, truths: np.ndarray) -> tuple[float, float]:
    """The mean absolute error, and the scaled one, over rows that have a row before."""
    naive = np.abs(np.diff(truths))
    return np.mean(errors), np.sum(errors[-len(naive) :]) / np.sum(naive[-len(errors) :])


@pytest.mark.parametrize("count", [100, 251, 500, 501, 777, 2000])
def test_figures_are_those_of_all_rows_and_of_one_to_two_blocks(count):
    truths = np.random.default_rng(1).normal(3, 2, count)
    track = Track()
    track.rows(truths)
    accuracy, errors = track.first, np.abs(truths)[1:]  # the first row was not forecast
    scored = len(errors)
    recent = scored if scored < 250 else 250 + scored % 250
    assert (accuracy.lifetime.scored, accuracy.recent.scored) == (scored, recent)
    found = accuracy.lifetime.mean_absolute_error, accuracy.lifetime.mean_absolute_scaled_error
    assert found == pytest.approx(figures_of(errors, truths))
    found = accuracy.recent.mean_absolute_error, accuracy.recent.mean_absolute_scaled_error
    assert found == pytest.approx(figures_of(errors[-recent:], truths[-recent - 1 :]))
    block = errors[-recent:][:250]
    assert accuracy.median_absolute_error == pytest.approx(np.median(block), rel=0.25)


def test_a_block_is_as_long_as_a_season_that_is_longer():
    track = Track(season_steps=400)
    track.rows(np.ones(1 + 399))
    assert track.first.recent.scored == 399
    track.rows(np.ones(1 + 399 + 400))
    assert track.first.recent.scored == 400 + 399
    track.row(1.0)
    assert track.first.recent.scored == 400


@pytest.mark.parametrize("draw", ["normal", "laplace", "standard_cauchy", "standard_exponential"])
def test_the_median_is_near_that_of_the_block_whatever_the_errors(draw):
    off = []
    for seed in range(20):
        truths = getattr(np.random.default_rng(seed), draw)(size=501)
        track = Track()
        track.rows(truths)
        wanted = np.median(np.abs(truths[251:]))
        off.append(math.log(track.first.median_absolute_error / wanted))
    assert abs(np.mean(off)) < 0.05
    assert np.std(off) < 0.12


@pytest.mark.parametrize("glitch", [99_999.0, -1e20, 3e38])
@pytest.mark.parametrize("row", [1, 40, 700])
def test_an_absurd_value_is_gone_from_the_recent_figures_after_two_blocks(row, glitch):
    truths = np.random.default_rng(2).normal(0, 1, 2000)
    spoiled, whole = Track(), Track()
    spoiled.part = spoiled.part.astype(np.float32)
    whole.part = whole.part.astype(np.float32)
    end = row + 2 * 250 + 2
    whole.rows(truths[:end])
    truths[row] = glitch
    spoiled.rows(truths[:end])
    assert (
        spoiled.first.lifetime.mean_absolute_error > 30 * whole.first.lifetime.mean_absolute_error
    )
    for name in ("scored", "mean_absolute_error", "mean_absolute_scaled_error"):
        found, wanted = (getattr(track.first.recent, name) for track in (spoiled, whole))
        assert found == pytest.approx(wanted, rel=1e-5)
    wanted = whole.first.median_absolute_error
    assert spoiled.first.median_absolute_error == pytest.approx(wanted, rel=0.3)
    assert spoiled.drift.alarms == 0


def test_a_flat_past_changes_nothing_of_the_scaled_error():
    """A mean of ratios to the naive mean so far was twice as large: it begins near 0."""
    truths = np.random.default_rng(3).normal(0, 1, 20_000)
    truths[:2000] = 0
    flat, moving = Track(), Track()
    flat.rows(truths)
    moving.rows(truths[1999:])
    wanted = moving.first.lifetime.mean_absolute_scaled_error
    assert flat.first.lifetime.mean_absolute_scaled_error == pytest.approx(wanted, rel=1e-3)
    assert flat.first.recent.mean_absolute_scaled_error == pytest.approx(wanted, rel=0.1)
    assert flat.drift.alarms == 0
    score = flat.totals.scores[0]
    assert score.scaled_error / score.scaled == pytest.approx(wanted, rel=0.15)


def test_a_series_that_stands_still_lately_has_no_scaled_error_lately():
    truths = np.random.default_rng(4).normal(0, 1, 2000)
    truths[1000:] = 1
    track = Track()
    track.rows(truths)
    assert math.isnan(track.first.recent.mean_absolute_scaled_error)
    assert track.first.lifetime.mean_absolute_scaled_error > 0


def test_an_outlier_counts_among_others_as_twenty_usual_errors():
    track = Track()
    track.rows(np.random.default_rng(5).normal(0, 1, 400))
    score = track.totals.scores[0]
    before, outliers = score.absolute_error, score.outliers
    track.row(99_999.0)
    assert score.absolute_error - before == pytest.approx(20 * 0.8, rel=0.3)
    assert (outliers, score.outliers) == (0, 1)


def test_a_reset_leaves_intervals_and_what_is_pending_as_they_are():
    track, kept = Track(), Track()
    truths = np.random.default_rng(6).normal(0, 1, 900)
    for one in (track, kept):
        one.rows(truths)
    track.tracker.reset(track.part)
    fresh = Track()
    assert (track.first.lifetime, track.drift) == (fresh.first.lifetime, fresh.drift)
    assert math.isnan(track.first.median_absolute_error)
    assert track.first.recent.scored == 0
    for truth in np.random.default_rng(7).normal(0, 1, 300).tolist():
        for one in (track, kept):
            one.row(truth)
        assert track.first.offset == kept.first.offset
    assert track.first.lifetime.scored == 300
    assert kept.first.lifetime.scored == 1199
    for spot in track.tracker.targets[0].horizons:
        pending = slice(spot.place + SCORES, spot.place + SCORES + 3 * spot.horizon)
        assert np.array_equal(track.part[pending], kept.part[pending], equal_nan=True)


@pytest.mark.parametrize("start", [0.0, 1e-3, 50.0])
def test_the_median_follows_errors_that_became_others(start):
    truths = np.random.default_rng(8).normal(0, 1, 1501)
    truths[:751] *= start
    track = Track()
    track.rows(truths)
    assert track.first.median_absolute_error == pytest.approx(0.674, rel=0.25)
