"""What training draws from: windows of the training weeks, distorted so that they generalise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from network import lagged_input, network_input
from series import HORIZONS, STEPS_PER_DAY, STEPS_PER_WEEK, Floats, Rows
from settings import Settings


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows [N] of T steps: the network's inputs, the y to come and its demand."""

    x: Tensor  # [N, T, D]
    lagged: Tensor  # [N, T, n]
    y: Tensor  # [N, T, 48], scaled deviations
    demand: Tensor  # [N, T, 48], in the unit of y


@dataclass(frozen=True, slots=True)
class Windows:
    """Draws training windows from whole weeks of demand [T] in MW."""

    demand: Floats
    calendar: Floats
    scale: float
    settings: Settings
    random: np.random.Generator

    def draw(self) -> Batch:
        """One batch."""
        rows = self._rows()
        known = rows >= 0
        demand = self.demand[np.maximum(rows, 0)] * self._levels()
        deviation = demand - np.stack([self._profile(window) for window in rows])
        past, steps = self.settings.past_steps, self.settings.window_steps
        seen = slice(past, past + steps)
        x = network_input(deviation[:, seen] / self.scale, self.calendar[rows[:, seen]])
        lagged = self._lagged(np.where(known, deviation, 0.0)[:, : past + steps])
        return Batch(x, lagged, self._ahead(deviation[:, past:]), self._ahead(demand[:, past:]))

    def _rows(self) -> Rows:
        """Rows [N, past + T + 48]; those before the series are negative."""
        steps = self.settings.window_steps + HORIZONS
        starts = self.random.integers(0, len(self.demand) - steps + 1, self.settings.batch)
        return starts[:, None] + np.arange(-self.settings.past_steps, steps)

    def _levels(self) -> Floats:
        reach = self.settings.level_range
        return self.random.uniform(1.0 - reach, 1.0 + reach, (self.settings.batch, 1))

    def _profile(self, window: Rows) -> Floats:
        # A profile that has seen the window would teach the network to trust it.
        weeks = self.demand.reshape(-1, STEPS_PER_WEEK)
        profile = profile_without(weeks, np.unique(self._left_out(window) // STEPS_PER_WEEK))
        found: Floats = (profile * np.tile(self._distortion(), 7))[window % STEPS_PER_WEEK]
        return found

    def _left_out(self, window: Rows) -> Rows:
        """The window's rows whose weeks its profile must not know.

        The week before was in the profile on the first test week, and on later ones it was not.
        """
        past = self.settings.past_steps
        if past and self.random.random() < self.settings.past_left_out:
            past = 0
        return np.maximum(window[past:], 0)

    def _distortion(self) -> Floats:
        """Factors [48] near 1 for the half-hours of a day, alike for neighbours.

        The same every day of a window: the network learns to see it in the days before.
        """
        white = np.tile(self.random.normal(0.0, 1.0, STEPS_PER_DAY), 3)
        smooth = np.convolve(white, np.ones(5) / np.sqrt(5), "same")
        found: Floats = 1.0 + self.settings.profile_noise * smooth[STEPS_PER_DAY:-STEPS_PER_DAY]
        return found

    def _lagged(self, deviation: Floats) -> Tensor:
        """Lagged inputs; a share of the windows begins a session, which has no past."""
        past = self.settings.past_steps
        if past:
            cold = self.random.random(len(deviation)) < self.settings.cold_share
            deviation = np.where(
                cold[:, None] & (np.arange(deviation.shape[1]) < past), 0.0, deviation
            )
        return lagged_input(deviation / self.scale, self.settings.lags)[:, past:]

    def _ahead(self, values: Floats) -> Tensor:
        ahead = sliding_window_view(values[:, 1:], HORIZONS, axis=1)
        return torch.tensor(ahead / self.scale, dtype=torch.float32)


def profile_without(weeks: Floats, left_out: Rows) -> Floats:
    """The mean [336] of weeks [W, 336] but for those left out."""
    found: Floats = np.delete(weeks, left_out, axis=0).mean(axis=0)
    return found


def deviation_spread(weeks: Floats) -> float:
    """Standard deviation in MW of each of the weeks [W, 336] from the profile of the others."""
    profiles = [profile_without(weeks, np.array([week])) for week in range(len(weeks))]
    return float(np.std(weeks - np.stack(profiles)))
