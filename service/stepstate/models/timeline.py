"""What a model's inputs and outputs derive from time, as numbers that the engine computes with.

Rows are counted in steps since 1970-01-01T00:00Z. A wave of period P makes k * S / P turns in k
steps of S seconds. Turns are in fixed point, 64 bits to one turn, so that whole turns overflow
away: turns(k) = (k >> 32) * waves[0] + (k & (2**32 - 1)) * waves[1], in wrapping int64. The two
factors are rounded once, from exact fractions, so the result is exact to 2**-32 turns (1.5e-9
radians) for every k. Times between two steps are rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from stepstate.models.manifest import DayOfWeek, Fourier, InputSpec, Manifest, OutputSpec
from stepstate.models.model import Model

MAX_TABLE_CELLS = 2**22
"""16 MiB: a calendar that repeats within so many numbers is a table, a longer one is computed."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_WEEK = Fraction(7 * 86_400)


@dataclass(frozen=True, slots=True)
class Cycles:
    """Columns of seasonal profiles: `means` + `values`[`offsets` + (k + `shifts`) % `periods`].

    `values` [V] holds all profiles one after the other; the others are [N] for N columns.
    """

    values: NDArray[np.float64]
    offsets: NDArray[np.int64]
    shifts: NDArray[np.int64]
    periods: NDArray[np.int64]
    means: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What depends on a row's time, as functions of its step k.

    `levels` [D] are subtracted from x (profile and mean, raw units), `bases` [O] are added to the
    scaled y. The calendar inputs [C] are the columns `order` of the sines and cosines of all
    `waves` [2, W], followed by the seven days of the week.
    """

    step_interval: timedelta
    profiles_repeat: int
    """The period of all profiles together, in steps."""
    calendar_repeats: int
    """The period of all calendar inputs together, in steps."""
    levels: Cycles
    bases: Cycles
    waves: NDArray[np.int64]
    order: NDArray[np.int64]

    @property
    def table_lengths(self) -> tuple[int | None, int | None]:
        """Steps in tables of the profiles and of the calendar; None: it would be too large.

        The same for both where that is small enough, so that a row has one index in them.
        """
        profiles = len(self.levels.means) + len(self.bases.means)
        both = math.lcm(self.profiles_repeat, self.calendar_repeats)
        if both * (profiles + len(self.order)) <= MAX_TABLE_CELLS:
            return both, both
        return (
            self.profiles_repeat if self.profiles_repeat * profiles <= MAX_TABLE_CELLS else None,
            self.calendar_repeats
            if self.calendar_repeats * len(self.order) <= MAX_TABLE_CELLS
            else None,
        )

    def phase(self, time: datetime) -> int:
        """The step of a time."""
        return (time - EPOCH) // self.step_interval


def build_timeline(model: Model) -> Timeline:
    """What a model's manifest derives from time."""
    manifest = model.manifest
    interval = manifest.step_interval or timedelta(seconds=1)
    seconds = Fraction(interval // _MICROSECOND, 1_000_000)
    turns = [turn for part in manifest.calendar for turn in _turns(part, seconds)]
    outputs = [
        (output, horizon)
        for output in manifest.outputs
        for horizon in output.horizons
        for _ in range(output.columns)
    ]
    return Timeline(
        interval,
        math.lcm(*(profile.period_steps for profile in manifest.profiles.values())),
        _calendar_repeats(manifest, seconds),
        _cycles(model, [(column, 0) for column in manifest.inputs], interval),
        _cycles(model, outputs, interval),
        np.array([[_fixed(turn * 2**32), _fixed(turn)] for turn in turns], np.int64)
        .reshape(-1, 2)
        .T.copy(),
        np.array(list(_order(manifest, len(turns))), np.int64),
    )


def _turns(part: Fourier | DayOfWeek, seconds: Fraction) -> list[Fraction]:
    """The turns that each of its waves makes in a step."""
    if isinstance(part, DayOfWeek):
        return []
    return [k * seconds / _exact(part.period_seconds) for k in range(1, part.harmonics + 1)]


def _fixed(turn: Fraction) -> int:
    """The fraction of a turn, in 2**-64 turns, as a signed 64-bit number."""
    whole = round(turn % 1 * 2**64) % 2**64
    return whole - 2**64 if whole >= 2**63 else whole


def _exact(seconds: float) -> Fraction:
    """The decimal number that a manifest holds."""
    return Fraction(str(seconds))


def _order(manifest: Manifest, waves: int) -> Iterator[int]:
    first = 0
    for part in manifest.calendar:
        if isinstance(part, DayOfWeek):
            yield from range(2 * waves, 2 * waves + part.width)
        else:
            yield from range(first, first + part.width)
            first += part.width


def _calendar_repeats(manifest: Manifest, seconds: Fraction) -> int:
    periods = [
        (_WEEK if isinstance(part, DayOfWeek) else _exact(part.period_seconds)) / seconds
        for part in manifest.calendar
    ]
    return math.lcm(*(period.numerator for period in periods))


def _cycles(
    model: Model,
    columns: Sequence[tuple[InputSpec | OutputSpec, int]],
    interval: timedelta,
) -> Cycles:
    """The profile of each column at its horizon."""
    profiles = model.manifest.profiles
    values: list[NDArray[np.float64]] = [np.zeros(1)]  # of columns without a profile
    found: dict[str | None, tuple[int, int, int]] = {None: (0, 0, 1)}
    used = 1
    for name, profile in profiles.items():
        origin = (profile.origin - EPOCH) // interval
        found[name] = used, -origin % profile.period_steps, profile.period_steps
        values.append(model.tensors[name].astype(np.float64))
        used += profile.period_steps
    of_columns = [found[column.profile] for column, _ in columns]
    offsets, shifts, periods = np.array(of_columns, np.int64).reshape(-1, 3).T
    ahead = np.array([horizon for _, horizon in columns], np.int64)
    means = np.array([column.mean for column, _ in columns])
    return Cycles(np.concatenate(values), offsets, (shifts + ahead) % periods, periods, means)
