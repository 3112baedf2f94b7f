"""The network offline: what it is fed, LSTM and head, and its forecasts in MW.

The network sees and predicts deviations from a seasonal profile. Its input at
one row is the deviation of demand, then what the calendar tells, in the order
that `manifest.json` declares. Its head may also take past deviations straight
from the rows: those `lags` steps back, 0 where a session has no such row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from series import HORIZONS, STEPS_PER_WEEK, Floats, Rows, Series, forecast_rows

DAY_SECONDS = 86_400
DAILY_HARMONICS = 3
"""Sine and cosine pairs of the day: enough for its two peaks."""


class Head(nn.Linear):
    """A linear layer; one with lags has a second weight, for the lagged deviations."""

    def __init__(self, hidden_size: int, outputs: int, lags: int) -> None:
        super().__init__(hidden_size, outputs)
        self.lags = nn.Parameter(torch.zeros(outputs, lags)) if lags else None


class Network(nn.Module):
    """LSTM and direct head; its tensors have the names that a model's file wants.

    y has Q columns a horizon, one for each of `quantiles`; `lags` [n] are in steps.
    """

    def __init__(
        self,
        inputs: int,
        hidden_size: int,
        dropout: float,
        *,
        quantiles: Sequence[float] = (0.5,),
        lags: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.quantiles, self.lags = tuple(quantiles), tuple(lags)
        self.cell = nn.LSTM(inputs, hidden_size, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = Head(hidden_size, HORIZONS * len(self.quantiles), len(self.lags))

    def forward(self, x: Tensor, lagged: Tensor) -> Tensor:
        """From zero state: x [N, T, D] and lagged [N, T, n] to y [N, T, 48, Q], deviations."""
        h, _ = self.cell(x)
        y: Tensor = self.head(self.dropout(h))
        if self.head.lags is not None:
            y = y + lagged @ self.head.lags.T
        return y.reshape(*y.shape[:2], HORIZONS, len(self.quantiles))


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained network, its profile [336] in MW, its scale in MW and the seconds it took."""

    network: Network
    profile: Floats
    scale: float
    seconds: float


def calendar_inputs(times: NDArray[np.datetime64]) -> Floats:
    """What is known of times [T] in advance, [T, 13]: sine and cosine pairs, weekday flags."""
    seconds = times.astype("datetime64[s]").astype(np.int64)
    angle = 2 * np.pi * (seconds % DAY_SECONDS) / DAY_SECONDS
    waves = [wave(k * angle) for k in range(1, DAILY_HARMONICS + 1) for wave in (np.sin, np.cos)]
    weekday = (seconds // DAY_SECONDS + 3) % 7  # day 0 of Unix time was a Thursday
    return np.stack([*waves, *(weekday == day for day in range(7))], axis=1).astype(np.float64)


def network_input(deviation: Floats, calendar: Floats) -> Tensor:
    """The network's x [N, T, 14] for scaled deviations [N, T] and calendar [N, T, 13]."""
    return torch.tensor(np.concatenate([deviation[..., None], calendar], 2), dtype=torch.float32)


def lagged_input(deviation: Floats, lags: Sequence[int]) -> Tensor:
    """Scaled deviations [N, T] so many steps back, [N, T, n]; 0 before the first row."""
    steps = np.array(lags, np.int64)
    reach = int(steps.max(initial=0))
    padded = np.pad(deviation.astype(np.float32), ((0, 0), (reach, 0)))
    rows = np.arange(reach, padded.shape[1])
    return torch.from_numpy(padded[:, rows[:, None] - steps])


def forecast_streamed(adapt: Fitted, series: Series, origins: Rows) -> Floats:
    """Forecasts [N, 48, Q] in MW, all from one session that steps from the first row on."""
    y = _run(adapt, series, np.arange(len(series.demand))[None])
    return _in_megawatts(adapt, y[0, origins], origins)


def forecast_primed(adapt: Fitted, series: Series, origins: Rows, rows: int) -> Floats:
    """Forecasts [N, 48, Q] in MW, each from a session that has seen just so many rows."""
    y = _run(adapt, series, origins[:, None] - np.arange(rows)[::-1])
    return _in_megawatts(adapt, y[:, -1], origins)


def point_forecasts(forecasts: Floats) -> Floats:
    """The median [N, 48] of forecasts [N, 48, Q] whose quantiles lie evenly about it."""
    median: Floats = forecasts[..., forecasts.shape[-1] // 2]
    return median


def _run(adapt: Fitted, series: Series, rows: Rows) -> Tensor:
    network = adapt.network
    profile = adapt.profile[rows % STEPS_PER_WEEK]
    deviation = (series.demand[rows] - profile) / adapt.scale
    x = network_input(deviation, calendar_inputs(series.times)[rows])
    with torch.inference_mode():
        y: Tensor = network(x, lagged_input(deviation, network.lags))
    return y


def _in_megawatts(adapt: Fitted, y: Tensor, origins: Rows) -> Floats:
    base = adapt.profile[forecast_rows(origins) % STEPS_PER_WEEK]
    forecasts: Floats = y.numpy().astype(np.float64) * adapt.scale + base[..., None]
    return forecasts
