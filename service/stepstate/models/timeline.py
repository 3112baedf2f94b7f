"""What a model's network is told about time: one table over all phases of its calendar.

Everything a manifest derives from time repeats after a whole number of steps,
the least common multiple of its periods. So it is computed once, when the
model is loaded, and a step costs one look-up by phase. Times off the grid of
the step interval are taken down to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from stepstate.errors import ModelInvalid
from stepstate.models.files import Model
from stepstate.models.manifest import DayOfWeek, Fourier

MOST_PHASES = 2_000_000
"""A calendar that repeats later than this is a mistake: a table of it would not fit memory."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """What depends on the phase; a model that knows no time has one phase.

    `levels` [phases, D] is what is taken off x (profile and mean, raw units),
    `calendar` [phases, C] the calendar inputs, `bases` [phases, O] what is
    added to the scaled y (profile and mean, raw units).
    """

    step_interval_seconds: int
    levels: NDArray[np.float32]
    calendar: NDArray[np.float32]
    bases: NDArray[np.float32]

    @property
    def phases(self) -> int:
        """After this many steps everything repeats."""
        return len(self.levels)

    def phase(self, time: datetime) -> int:
        """The phase of a time."""
        return math.floor(time.timestamp() / self.step_interval_seconds) % self.phases


def build_timeline(model: Model) -> Timeline:
    """Computes a model's table.

    Raises:
        ModelInvalid: the calendar repeats too late for a table.
    """
    manifest = model.manifest
    interval = manifest.step_interval_seconds or 1
    periods = [part.period_seconds for part in manifest.calendar]
    periods += [profile.period_steps * interval for profile in manifest.profiles.values()]
    phases = math.lcm(interval, *periods) // interval if periods else 1
    if phases > MOST_PHASES:
        raise ModelInvalid(
            model.key,
            f"its calendar repeats after {phases} steps, more than {MOST_PHASES}: use periods "
            "that share a smaller common multiple",
        )
    steps = np.arange(phases, dtype=np.int64)
    levels = [
        _profile(model, column.profile, steps, interval) + column.mean for column in manifest.inputs
    ]
    calendar = [wave for part in manifest.calendar for wave in _calendar(part, steps * interval)]
    bases = [
        _profile(model, output.profile, steps + horizon, interval) + output.mean
        for output in manifest.outputs
        for horizon in output.horizons
        for _ in range(output.columns)
    ]
    return Timeline(interval, *(_table(phases, part) for part in (levels, calendar, bases)))


def _table(phases: int, columns: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    table = np.empty((phases, len(columns)), np.float32)
    for place, column in enumerate(columns):
        table[:, place] = column
    return table


def _profile(
    model: Model, name: str | None, steps: NDArray[np.int64], interval: int
) -> NDArray[np.float64]:
    if name is None:
        return np.zeros(len(steps))
    profile = model.manifest.profiles[name]
    origin = math.floor(profile.origin.timestamp() / interval)
    values = model.tensors[name].astype(np.float64)
    found: NDArray[np.float64] = values[(steps - origin) % profile.period_steps]
    return found


def _calendar(part: Fourier | DayOfWeek, seconds: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    if isinstance(part, DayOfWeek):
        weekday = (seconds // 86_400 + 3) % 7  # day 0 of Unix time was a Thursday
        return [(weekday == day).astype(np.float64) for day in range(7)]
    angle = 2 * np.pi * (seconds % part.period_seconds) / part.period_seconds
    return [wave(k * angle) for k in range(1, part.harmonics + 1) for wave in (np.sin, np.cos)]
