"""The network's inputs beside the row itself: the calendar, and lags of past rows.

What depends on time is computed from a row's step, or looked up in a table where that is small;
tables are filled by the computation, so both give the same. Steps are counted as in
`stepstate.models.timeline`.

B rows or sessions, D inputs, C calendar inputs, O outputs; W rows of a window of which the last T
are being applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepstate.models import Lag, LaggedInput, Manifest, Rolling, Timeline
from stepstate.models.timeline import Cycles

HOST = torch.device("cpu")
_RADIANS = 2 * math.pi / 2**64
"""Of one unit of a turn in fixed point."""
_DAY_MICROSECONDS = 86_400_000_000

Columns = Callable[[Tensor], Tensor]
"""Columns [B, N] of rows at steps [B]."""


@dataclass(frozen=True, slots=True)
class TimeIndex:
    """When rows [B] are: their steps, or the places of those in the tables."""

    profiles: Tensor
    calendar: Tensor


class Calendar:
    """What depends on the time of rows.

    Args:
        timeline: a model's.
        device: where it is computed.
    """

    def __init__(self, timeline: Timeline, device: torch.device = HOST) -> None:
        self._profiles, self._calendar = timeline.table_lengths
        self.levels_at = _columns(_profile(timeline.levels), self._profiles, device)
        self.bases_at = _columns(_profile(timeline.bases), self._profiles, device)
        self.inputs_at = _columns(_waves_and_days(timeline), self._calendar, device)

    def place(self, step: Tensor) -> TimeIndex:
        """The argument of the other methods, from the steps of rows [B]."""
        profiles = step.remainder(self._profiles) if self._profiles else step
        if self._calendar == self._profiles:
            return TimeIndex(profiles, profiles)
        return TimeIndex(profiles, step.remainder(self._calendar) if self._calendar else step)

    def levels(self, place: TimeIndex) -> Tensor:
        """The levels [B, D] that are subtracted from x, raw units."""
        return self.levels_at(place.profiles)

    def inputs(self, place: TimeIndex) -> Tensor:
        """Calendar inputs [B, C]."""
        return self.inputs_at(place.calendar)

    def bases(self, place: TimeIndex) -> Tensor:
        """The levels [B, O] that are added to the scaled y, raw units."""
        return self.bases_at(place.profiles)


def _columns(
    build: Callable[[torch.device], Columns], length: int | None, device: torch.device
) -> Columns:
    """Computed on the device, or looked up there in a table of so many steps."""
    if length is None:
        return build(device)
    table = build(HOST)(torch.arange(length)).to(device)
    return lambda place: table.index_select(0, place)


def _profile(cycles: Cycles) -> Callable[[torch.device], Columns]:
    def build(device: torch.device) -> Columns:
        values, offsets, shifts, periods, means = (
            torch.from_numpy(part).to(device)
            for part in (cycles.values, cycles.offsets, cycles.shifts, cycles.periods, cycles.means)
        )

        def compute(step: Tensor) -> Tensor:
            places = (step[:, None] + shifts).remainder_(periods).add_(offsets)
            return values[places].add_(means).float()

        return compute

    return build


def _waves_and_days(timeline: Timeline) -> Callable[[torch.device], Columns]:
    step_microseconds = round(timeline.step_interval.total_seconds() * 1e6)
    weekly = bool((timeline.order >= 2 * timeline.waves.shape[1]).any())

    def build(device: torch.device) -> Columns:
        per_block, per_step = torch.from_numpy(timeline.waves).to(device)
        order, days = torch.from_numpy(timeline.order).to(device), torch.arange(7, device=device)

        def compute(steps: Tensor) -> Tensor:
            step = steps[:, None]
            turns = (step >> 32) * per_block + (step & 0xFFFFFFFF) * per_step
            angle = turns.double().mul_(_RADIANS)
            columns = torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)
            if weekly:
                day = (step * step_microseconds).div_(_DAY_MICROSECONDS, rounding_mode="floor")
                weekday = day.add_(3).remainder_(7)  # day 0 of Unix time was a Thursday
                columns = torch.cat((columns, (weekday == days).double()), dim=1)
            return columns.index_select(1, order).float()

        return compute

    return build


class LaggedInputs:
    """The lagged inputs that the cell takes, or those that the head takes."""

    def __init__(self, manifest: Manifest, into: str) -> None:
        names = [column.name for column in manifest.inputs]
        self._parts: Sequence[tuple[LaggedInput, int]] = [
            (part, names.index(part.input)) for part in manifest.lags if part.into == into
        ]
        self._steps = [
            torch.tensor(part.steps if isinstance(part, Lag) else (part.steps,))
            for part, _ in self._parts
        ]

    def __bool__(self) -> bool:
        return bool(self._parts)

    def of(self, window: Tensor, rows: int) -> Tensor:
        """Their columns [B, T, n], for the last T = `rows` rows of a window [B, W, D].

        The window holds past and present rows as the network sees them.
        """
        columns = [
            self._rolled(part, window[:, :, column], rows)
            if isinstance(part, Rolling)
            else self._lagged(steps, window[:, :, column], rows)
            for (part, column), steps in zip(self._parts, self._steps, strict=True)
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=2)

    @staticmethod
    def _lagged(steps: Tensor, column: Tensor, rows: int) -> Tensor:
        first = column.shape[1] - rows
        places = torch.arange(first, first + rows)[:, None] - steps
        return column.index_select(1, places.flatten()).view(len(column), rows, len(steps))

    @staticmethod
    def _rolled(part: Rolling, column: Tensor, rows: int) -> Tensor:
        windows = column[:, -(rows + part.steps - 1) :].unfold(1, part.steps, 1)
        if part.statistic == "mean":
            return windows.mean(dim=2, keepdim=True)
        if part.statistic == "min":
            return windows.amin(dim=2, keepdim=True)
        return windows.amax(dim=2, keepdim=True)


def fill_unknown(window: Tensor, first: Tensor | None) -> Tensor:
    """Puts the declared fallback where a window [B, W, D] is NaN, as there was no row yet.

    Args:
        window: rows as the network sees them.
        first: [B], the places of the sessions' first rows, which are the fallback (beyond the
            window: there is none yet); None: the fallback is 0, the columns' level.
    """
    if first is not None:
        places = first.clamp(min=0, max=window.shape[1] - 1)[:, None, None].expand(
            -1, 1, window.shape[2]
        )
        window = torch.where(window.isnan(), window.gather(1, places), window)
    return window.nan_to_num(0.0)
