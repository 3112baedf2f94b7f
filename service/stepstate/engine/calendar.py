"""What the network is told about time: computed from a row's step, or looked up if that is small.

Tables are filled by the computation, so both say the same. B rows, D inputs, C calendar inputs,
O outputs; k is a row's step, counted as in `stepstate.models.timeline`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepstate.models import Timeline
from stepstate.models.timeline import Cycles

HOST = torch.device("cpu")
_RADIANS = 2 * math.pi / 2**64
"""Of one unit of a turn in fixed point."""
_DAY_MICROSECONDS = 86_400_000_000

Columns = Callable[[Tensor], Tensor]
"""Columns [B, N] of rows at steps [B]."""


@dataclass(frozen=True, slots=True)
class TimeIndex:
    """Where rows [B] lie in time: their steps, or what is left of those in a table."""

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
        """What the other methods ask for, from the steps of rows [B]."""
        profiles = step.remainder(self._profiles) if self._profiles else step
        if self._calendar == self._profiles:
            return TimeIndex(profiles, profiles)
        return TimeIndex(profiles, step.remainder(self._calendar) if self._calendar else step)

    def levels(self, place: TimeIndex) -> Tensor:
        """What is taken off x [B, D], raw units."""
        return self.levels_at(place.profiles)

    def inputs(self, place: TimeIndex) -> Tensor:
        """Calendar inputs [B, C]."""
        return self.inputs_at(place.calendar)

    def bases(self, place: TimeIndex) -> Tensor:
        """What is added to the scaled y [B, O], raw units."""
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
