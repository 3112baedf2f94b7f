"""Against slow computations: calendars by `datetime`, and waves by exact fractions."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction

import numpy as np
import pytest
import torch

from stepstate.engine.features import Calendar
from stepstate.models import EPOCH, build_timeline
from tests.networks import make_network
from tests.unit.rig import model_of, timed_network

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


def told(model, steps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels, calendar and bases of rows at steps, as a server uses them."""
    calendar = Calendar(build_timeline(model))
    place = calendar.place(torch.tensor(steps))
    parts = (calendar.levels(place), calendar.inputs(place), calendar.bases(place))
    return tuple(part.numpy() for part in parts)


def with_calendar(*parts: dict[str, object], interval: float, profile: int = 1):
    """A model whose network is told these parts of the calendar."""
    width = sum(2 * part["harmonics"] if part["kind"] == "fourier" else 7 for part in parts)
    network = make_network("timed", inputs=1 + width, outputs=1)
    network.manifest.update(
        step_interval_seconds=interval,
        inputs=[{"name": "x", "mean": 3.0, "profile": "turn"}],
        outputs=[{"name": "x", "horizons": [7], "profile": "turn"}],
        calendar=list(parts),
        profiles={"turn": {"period_steps": profile, "origin": "2001-02-03T04:05:06Z"}},
    )
    values = np.random.default_rng(3).normal(size=profile).astype(np.float32)
    return model_of(network, {"turn": values})


def fourier(period: float, harmonics: int = 3) -> dict[str, object]:
    return {"kind": "fourier", "period_seconds": period, "harmonics": harmonics}


@pytest.fixture(params=["looked up", "computed"])
def way(request, monkeypatch) -> None:
    """Everything holds for a table and without one."""
    if request.param == "computed":
        monkeypatch.setattr("stepstate.models.timeline.MAX_TABLE_CELLS", 0)


@pytest.mark.parametrize("interval", [3600, 900, 86_400, 7, 5400])
@pytest.mark.parametrize("time", TIMES, ids=str)
@pytest.mark.usefixtures("way")
def test_rows_have_what_the_calendar_says_of_their_time(interval, time):
    network, profiles = timed_network()
    network.manifest["step_interval_seconds"] = interval
    model = model_of(network, profiles)
    steps = [build_timeline(model).phase(time) + ahead for ahead in (0, 1, 5, 1000)]
    step = timedelta(seconds=interval)
    at = floored(time.astimezone(UTC), step)
    want = [slow_row(model, at + ahead * step) for ahead in (0, 1, 5, 1000)]
    for part, expected in zip(told(model, steps), zip(*want, strict=True), strict=True):
        assert np.allclose(part, expected, atol=1e-5, rtol=0)


WEEK, YEAR = 7 * 86_400, 31_557_600
LONG = {
    "a week and a year": ([fourier(WEEK), fourier(YEAR), {"kind": "day_of_week"}], 300, 288),
    "a day and a year": ([fourier(86_400), fourier(YEAR, 10)], 60, 1440),
    "a tide": ([fourier(44_714.16), fourier(86_164.0905)], 600, 1),
    "tenths of a second": ([fourier(0.7), fourier(86_400), {"kind": "day_of_week"}], 0.1, 600),
    "no whole number of anything": ([fourier(86_400 / 7, 20)], 3600, 7),
    "microseconds": ([fourier(1 / 3, 5), fourier(WEEK)], 1e-6, 1),
    "days": ([{"kind": "day_of_week"}, fourier(YEAR)], 86_400, 1461),
}
FAR = [0, 1, 2**32 - 1, 2**32, 9_999_998, 10_000_000]


@pytest.mark.parametrize("name", LONG)
def test_ten_million_rows_on_the_calendar_is_still_right_to_a_millionth(name):
    """The reference reduces exact fractions, and then takes the sine in float64."""
    parts, interval, profile = LONG[name]
    model = with_calendar(*parts, interval=interval, profile=profile)
    start = build_timeline(model).phase(datetime(2026, 11, 28, 12, 34, 56, tzinfo=UTC))
    steps = [start + ahead for ahead in FAR if interval < 1 or ahead != 2**32]
    levels, calendar, bases = told(model, steps)
    turn = model.tensors["turn"].astype(float)
    seconds = Fraction(str(interval))
    origin = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)
    first = (origin - EPOCH) // timedelta(seconds=interval)
    for row, step in enumerate(steps):
        expected: list[float] = []
        for part in parts:
            if part["kind"] == "day_of_week":
                day = (step * seconds // 86_400 + 3) % 7
                expected += [float(day == number) for number in range(7)]
                continue
            period = Fraction(str(part["period_seconds"]))
            for k in range(1, part["harmonics"] + 1):
                angle = 2 * math.pi * float(k * step * seconds / period % 1)
                expected += [math.sin(angle), math.cos(angle)]
        assert np.abs(calendar[row] - expected).max() <= 1e-6
        assert abs(levels[row][0] - 3.0 - turn[(step - first) % profile]) <= 1e-6
        assert abs(bases[row][0] - turn[(step + 7 - first) % profile]) <= 1e-6


@pytest.mark.parametrize("name", LONG)
def test_ten_million_rows_agree_with_float64_arithmetic_on_seconds(name):
    """What a user computes offline: `np.sin(2 * np.pi * k * (seconds % period) / period)`."""
    parts, interval, profile = LONG[name]
    steps = np.array([0, 1, 9_999_998, 10_000_000])
    _, calendar, _ = told(with_calendar(*parts, interval=interval, profile=profile), steps)
    column = 0
    for part in parts:
        if part["kind"] == "day_of_week":
            column += 7
            continue
        for k in range(1, part["harmonics"] + 1):
            angle = 2 * np.pi * k * (steps * interval % part["period_seconds"])
            angle /= part["period_seconds"]
            assert np.abs(calendar[:, column] - np.sin(angle)).max() <= 1e-6
            assert np.abs(calendar[:, column + 1] - np.cos(angle)).max() <= 1e-6
            column += 2


def test_what_soon_repeats_is_looked_up_and_the_rest_computed():
    timeline = build_timeline(model_of(*timed_network()))
    both = math.lcm(24, 7 * 24, 5)
    assert timeline.table_lengths == (both, both)
    late = build_timeline(with_calendar(fourier(31_556_953), interval=3600, profile=24))
    assert late.calendar_repeats == 31_556_953
    assert late.table_lengths == (24, None)


@pytest.mark.parametrize("before", [0, 10_000_000, -10_000_000])
def test_a_table_holds_what_is_computed(before, monkeypatch):
    model = model_of(*timed_network())
    steps = np.arange(before, before + 1000)
    looked_up = told(model, steps)
    monkeypatch.setattr("stepstate.models.timeline.MAX_TABLE_CELLS", 0)
    for found, computed in zip(looked_up, told(model, steps), strict=True):
        assert np.abs(found - computed).max() <= 1e-7


def test_a_model_that_knows_no_time_has_one_step(model):
    timeline = build_timeline(model)
    assert timeline.table_lengths == (1, 1)
    calendar = Calendar(timeline)
    assert calendar.inputs(calendar.place(torch.zeros(1, dtype=torch.int64))).shape == (1, 0)
