from __future__ import annotations

import math

import numpy as np
import pytest
from river.drift import PageHinkley

from stepstate.engine.tracking import (
    _ALARMS,
    _ERROR,
    _LOW_WIDTH,
    _NAIVE,
    _NAIVE_N,
    _SCORED,
    _SINCE,
    _TEST_SUM,
    LARGEST,
    Tracker,
    _average,
)
from stepstate.models import Manifest
from tests.offline import forecasting_network


def tracker_of(**tracking: object) -> Tracker:
    manifest = forecasting_network(quantiles=()).manifest
    manifest["tracking"] |= tracking
    parsed = Manifest.model_validate(manifest)
    return Tracker(parsed, parsed.tracking)


class Track:
    """One tracked part, in float64 so that it can be compared exactly."""

    def __init__(self, **tracking: object) -> None:
        self.tracker = tracker_of(**tracking)
        self.part = self.tracker.blank(None).astype(np.float64)
        self.tally = self.tracker.tally()
        self.t = 0

    def row(self, truth: float, *, median: float = 0.0, naive: float = math.nan) -> int:
        """Takes a row; returns the alarms so far."""
        self.tracker.observe(
            memoryview(self.part),
            0,
            self.t,
            truths=[truth],
            naive=[naive],
            forecasts=[median] * 6,
            tally=self.tally,
        )
        self.t += 1
        return self.tally.alarms

    @property
    def drift(self):
        return self.tracker.quality(self.part, self.t).drift

    @property
    def first(self):
        return self.tracker.quality(self.part, self.t).accuracy[0]


@pytest.mark.parametrize("seed", range(20))
def test_drift_is_told_where_river_tells_it(seed):
    """With the naive error at 1 throughout the scaled error is the error itself."""
    rng = np.random.default_rng(seed)
    spec = {
        "delta": float(rng.uniform(0, 0.1)),
        "threshold": float(rng.uniform(3, 20)),
        "min_rows": int(rng.integers(1, 60)),
        "forget": float(rng.choice([1.0, 0.9999, 0.95])),
    }
    track = Track(drift=spec)
    river = PageHinkley(
        min_instances=spec["min_rows"],
        delta=spec["delta"],
        threshold=spec["threshold"],
        alpha=spec["forget"],
        mode="up",
    )
    errors = np.abs(rng.normal(0, np.repeat([1, 3, 0.5, 4], 200)))
    track.row(1.0, naive=0.0)
    alarms = []
    for error in errors:
        before = track.tally.alarms
        # The naive error stays 1: the row before it is missing to the naive forecast.
        alarms.append(track.row(float(error), naive=math.nan) > before)
    wanted = []
    for error in errors:
        river.update(float(error))
        wanted.append(river.drift_detected)
    assert alarms == wanted
    assert any(wanted)
    assert track.drift.alarms == sum(wanted)
    assert track.drift.last_t == 1 + max(np.flatnonzero(wanted))


def test_the_flag_of_drift_stays_for_a_season():
    track = Track(season_steps=40, drift={"threshold": 5.0, "min_rows": 5})
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
    assert track.first.scored == 0
    assert math.isnan(track.first.mean_absolute_error)
    assert math.isnan(track.first.coverage)
    track.row(math.nan)
    assert track.first.scored == 0
    track.row(3.0)
    assert (track.first.scored, track.first.mean_absolute_error) == (1, 3.0)
    assert math.isnan(track.first.mean_absolute_scaled_error)


def test_errors_beyond_float32_do_not_end_it():
    track = Track()
    track.part = track.part.astype(np.float32)
    for truth in (3e38, -3e38, 3e38, 1.0, 2.0, 3e38) * 20:
        track.row(truth, median=-truth, naive=-truth)
    assert track.first.mean_absolute_error <= LARGEST
    assert not np.isinf(track.part).any()


def test_one_absurd_value_does_not_drown_the_sums():
    """The session's own figures suffer; what is told of the model does not."""
    track = Track()
    for truth in (1.0, 2.0, 1.0, 1e20, 1.0, 2.0, 1.0):
        track.row(truth, naive=0.0)
    score = track.tally.scores[0]
    assert score.scored == 5
    assert score.absolute_error == 7.0
    assert score.scaled_error < 1e3
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
    assert (track.tally.scores[0].scored, track.tally.scores[0].scaled) == (49, 0)
    assert math.isnan(track.first.mean_absolute_scaled_error)


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
    assert track.first.coverage == pytest.approx(level, abs=0.015)


def test_intervals_follow_errors_that_grow():
    track = Track(rate=0.05)
    rng = np.random.default_rng(5)
    for truth in rng.normal(0, 1, 1000):
        track.row(float(truth))
    held = []
    for truth in rng.normal(0, 10, 2000):
        before = track.tally.scores[0].covered
        track.row(float(truth))
        held.append(track.tally.scores[0].covered - before)
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
    assert track.first.coverage > 0.8


def test_means_still_move_after_very_many_errors():
    tracker = tracker_of()
    part = tracker.blank(None)
    place = tracker.targets[0].spots[0].place
    part[place + _SCORED : place + _ERROR + 1] = (1_000_000, 100.0)
    values = memoryview(part)
    for _ in range(300_000):
        _average(values, place + _SCORED, 103.0)
    assert part[place + _ERROR] == pytest.approx(103.0, abs=0.5)


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
        (_NAIVE_N, -1.0),
        (_NAIVE, math.nan),
        (_ALARMS, math.nan),
        (_ALARMS, 0.5),
        (_SINCE, -1.0),
        (_SINCE, math.inf),
        (_LOW_WIDTH, 0.0),
        (_TEST_SUM, math.nan),
        ("scored", -7.0),
    ],
)
def test_a_tracked_part_that_can_not_be_is_not_sound(where, value):
    tracker = tracker_of()
    part = tracker.blank(None)
    assert tracker.sound(part)
    target = tracker.targets[0]
    places = {
        "head": 0,
        "scored": target.spots[1].place + _SCORED,
    }
    part[places[where] if isinstance(where, str) else target.place + where] = value
    assert not tracker.sound(part)
