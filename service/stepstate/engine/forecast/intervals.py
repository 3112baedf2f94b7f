"""Quantiles of forecasts: the model's own, or those of its errors, with the tracked offsets.

Between the model's levels, and beyond its outermost, quantiles are taken as those of a normal
distribution on either side of the median: linear in the normal deviate z.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepstate.engine.forecast.rollout import HorizonForecast, Method
from stepstate.engine.tracking.tracker import MEAN_ERROR, Tracker, Wide, deviate
from stepstate.engine.work import Floats


def quantiles_of(
    forecast: HorizonForecast, levels: Sequence[float], tracker: Tracker | None, parts: Floats
) -> Floats:
    """The quantiles [B, K, Q] of an output's forecast; NaN where they are not known.

    Args:
        forecast: the forecast, [B, K, columns].
        levels: the levels wanted [Q].
        tracker: tells the offsets, where the model has one.
        parts: the sessions' tracked parts [B, .].
    """
    output = forecast.output
    values = forecast.values.astype(np.float64)
    median = values[:, :, output.median]
    horizon = median.shape[1]
    spread = tracker.spread(parts, output, horizon) if tracker is not None else None
    offsets, errors = spread or (np.zeros_like(median), np.full_like(median, np.nan))
    outer = np.ones(len(values))
    if tracker is not None:
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
        # Farther out is never nearer to the median, whatever the offset takes off.
        away = least[float(np.sign(z))] = np.fmax(away, least[float(np.sign(z))])
        found[:, :, place] = median + np.sign(z) * away if z else median
    return found


def _distance(values: Wide, levels: Sequence[float], median: int, z: float) -> Wide:
    """How far from the median [B, K] the model's quantile at a normal deviate is."""
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
