"""Quantiles of forecasts: the model's own, or those of its errors, with the tracked offsets.

Between the model's levels, and beyond its outermost ones, quantiles are interpolated as those of
a normal distribution on either side of the median: linear in the normal deviate z.

B sessions, K horizons, Q levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stepstate.engine.forecast.rollout import HorizonForecast, Method
from stepstate.engine.tracking.scores import OFFSET, SCALE, SCALE_N
from stepstate.engine.tracking.tracker import MEAN_ERROR, Tracker, deviate
from stepstate.engine.work import Floats
from stepstate.models import OutputSpec

Wide = NDArray[np.float64]


def quantiles_of(
    forecast: HorizonForecast, levels: Sequence[float], tracker: Tracker | None, parts: Floats
) -> Floats:
    """The quantiles [B, K, Q] of an output's forecast; NaN where they are unknown.

    Args:
        forecast: the forecast, [B, K, columns].
        levels: the wanted levels [Q].
        tracker: reads the offsets, if the model tracks its forecasts.
        parts: the sessions' tracked parts [B, .].
    """
    output = forecast.output
    values = forecast.values.astype(np.float64)
    median = values[:, :, output.median]
    horizon = median.shape[1]
    offsets, errors = np.zeros_like(median), np.full_like(median, np.nan)
    outer = np.ones(len(values))
    if tracker is not None:
        offsets, errors = _tracked(tracker, parts, output, horizon) or (offsets, errors)
        outer = np.array([deviate((1 + tracker.level(part)) / 2) for part in parts])
    found = np.empty((*median.shape, len(levels)), np.float32)
    least = {side: np.zeros_like(median) for side in (-1.0, 0.0, 1.0)}
    deviates = [deviate(level) for level in levels]
    for place in sorted(range(len(levels)), key=lambda place: abs(deviates[place])):
        z = deviates[place]
        if output.quantiles:
            away = _distance(values, output.quantiles, output.median, z)
        else:
            away = MEAN_ERROR * abs(z) * errors
        away = np.maximum(away + offsets * (abs(z) / outer)[:, None], 0.0)
        away[forecast.methods == Method.GIVEN] = 0.0
        # A farther quantile is never nearer to the median, however negative the offset is.
        away = least[float(np.sign(z))] = np.fmax(away, least[float(np.sign(z))])
        found[:, :, place] = median + np.sign(z) * away if z else median
    return found


def _distance(values: Wide, levels: Sequence[float], median: int, z: float) -> Wide:
    """The distances [B, K] of the model's quantile at a normal deviate from the median."""
    side = range(median - 1, -1, -1) if z < 0 else range(median + 1, len(levels))
    deviates = np.array([0.0, *(abs(deviate(levels[place])) for place in side)])
    apart = [np.sign(z) * (values[:, :, place] - values[:, :, median]) for place in side]
    away = np.maximum.accumulate([np.zeros_like(apart[0]), *apart], axis=0)
    if abs(z) >= deviates[-1]:
        beyond: Wide = away[-1] * (abs(z) / deviates[-1])
        return beyond
    upper = int(np.searchsorted(deviates, abs(z), side="right"))
    share = (abs(z) - deviates[upper - 1]) / (deviates[upper] - deviates[upper - 1])
    between: Wide = away[upper - 1] + share * (away[upper] - away[upper - 1])
    return between


def _tracked(
    tracker: Tracker, parts: Floats, output: OutputSpec, horizon: int
) -> tuple[Wide, Wide] | None:
    """Offsets [B, K] and mean absolute errors [B, K] at horizons 1 to K, interpolated.

    None: the output is not tracked. NaN: no error is known yet.
    """
    target = next((target for target in tracker.targets if target.output is output), None)
    if target is None:
        return None
    known = sorted(target.horizons, key=lambda each: each.horizon)
    weights = _weights([each.horizon for each in known], horizon)
    places = np.array([each.place for each in known])
    offsets = parts[:, places + OFFSET].astype(np.float64)
    scales = parts[:, places + SCALE].astype(np.float64)
    scales[parts[:, places + SCALE_N] == 0] = np.nan
    between = np.where(weights > 0, scales[:, :, None] * weights, 0.0).sum(axis=1)
    return offsets @ weights, between


def _weights(known: list[int], horizon: int) -> Wide:
    """The weights [S, K] of tracked horizons [S] at 1 to K: linear between, constant outside."""
    ahead = np.arange(1, horizon + 1)
    return np.stack([np.interp(ahead, known, one) for one in np.eye(len(known))])
