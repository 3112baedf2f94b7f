"""Against a slow computation that knows calendars by `datetime`, not by arithmetic on phases."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from stepstate.errors import ModelInvalid
from stepstate.models import build_timeline
from tests.unit.rig import model_of, timed_network

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIMES = [
    EPOCH,
    datetime(2026, 2, 28, 23, tzinfo=UTC),
    datetime(2024, 2, 29, 12, tzinfo=UTC),
    datetime(2024, 3, 1, 5, tzinfo=UTC),
    datetime(1969, 12, 31, 23, tzinfo=UTC),
    datetime(1901, 5, 6, 7, tzinfo=UTC),
    datetime(2026, 1, 1, 3, 59, 59, 999_999, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 30, tzinfo=UTC),
    datetime(2026, 7, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=30))),
]


def floored(time: datetime, step: timedelta) -> datetime:
    """The last time on the grid of steps since the epoch."""
    return EPOCH + (time - EPOCH) // step * step


def profile_value(model, name: str, time: datetime) -> float:
    """By counting the steps from the profile's origin."""
    profile = model.manifest.profiles[name]
    step = timedelta(seconds=model.manifest.step_interval_seconds)
    steps = (time - floored(profile.origin, step)) // step
    return float(model.tensors[name][steps % profile.period_steps])


def slow_row(model, time: datetime) -> tuple[list[float], list[float], list[float]]:
    """Levels, calendar and bases of the row at a time."""
    manifest = model.manifest
    step = timedelta(seconds=manifest.step_interval_seconds)
    time = floored(time.astimezone(UTC), step)

    def level(column, at: datetime) -> float:
        return column.mean + (profile_value(model, column.profile, at) if column.profile else 0.0)

    levels = [level(column, time) for column in manifest.inputs]
    calendar: list[float] = []
    for part in manifest.calendar:
        if part.kind == "day_of_week":
            calendar += [float(time.weekday() == day) for day in range(7)]
        else:
            seconds = (time - EPOCH) % timedelta(seconds=part.period_seconds)
            angle = 2 * math.pi * (seconds / timedelta(seconds=part.period_seconds))
            for k in range(1, part.harmonics + 1):
                calendar += [math.sin(k * angle), math.cos(k * angle)]
    bases = [
        level(output, time + horizon * step)
        for output in manifest.outputs
        for horizon in output.horizons
    ]
    return levels, calendar, bases


@pytest.mark.parametrize("interval", [3600, 900, 86_400, 7, 5400])
@pytest.mark.parametrize("time", TIMES, ids=str)
def test_rows_have_what_the_calendar_says_of_their_time(interval, time):
    network, profiles = timed_network()
    network.manifest["step_interval_seconds"] = interval
    model = model_of(network, profiles)
    timeline = build_timeline(model)
    for ahead in (0, 1, 5, 1000):
        phase = (timeline.phase(time) + ahead) % timeline.phases
        at = floored(time.astimezone(UTC), timedelta(seconds=interval))
        levels, calendar, bases = slow_row(model, at + ahead * timedelta(seconds=interval))
        assert np.allclose(timeline.levels[phase], levels, atol=1e-5, rtol=0)
        assert np.allclose(timeline.calendar[phase], calendar, atol=1e-6, rtol=0)
        assert np.allclose(timeline.bases[phase], bases, atol=1e-5, rtol=0)


def test_everything_repeats_after_the_phases_and_no_sooner_than_needed():
    timeline = build_timeline(model_of(*timed_network()))
    assert timeline.phases == math.lcm(24, 7 * 24, 5)


def test_a_model_that_knows_no_time_has_one_phase(model):
    timeline = build_timeline(model)
    assert timeline.phases == 1
    assert timeline.calendar.shape == (1, 0)
    assert timeline.phase(datetime(2026, 1, 1, tzinfo=UTC)) == 0


def test_a_calendar_that_repeats_too_late_for_a_table_is_refused_by_name():
    network, profiles = timed_network()
    network.manifest["calendar"][0]["period_seconds"] = 31_556_953  # a prime-ish year
    with pytest.raises(ModelInvalid, match=r"timed/1: its calendar repeats after \d+ steps"):
        build_timeline(model_of(network, profiles))
