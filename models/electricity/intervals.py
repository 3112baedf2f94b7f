"""Intervals that are widened or narrowed online until they cover what they promise. Numpy only.

Adaptive conformal inference (Gibbs and Candes, "Adaptive conformal inference
under distribution shift", 2021), with the update scaled by the typical error:
the equations by which the server tracks.
"""

from __future__ import annotations

import numpy as np

from series import Floats

RECENT = 0.02
"""The weight of the newest error in the typical one, once there are 50."""


def tracked_intervals(
    forecasts: Floats, demand: Floats, horizon: int, *, level: float, rate: float
) -> Floats:
    """Intervals [T, 2] issued at each row of a stream for `horizon` steps ahead.

    Args:
        forecasts: low quantile, median and high quantile [T, 3] issued at each row.
        demand: [T], what comes.
        horizon: steps ahead.
        level: the share that the intervals are to cover.
        rate: how fast they adapt.
    """
    issued = np.empty((len(demand), 2))
    offset = scale = 0.0
    for row, (low, median, high) in enumerate(forecasts):
        asked = row - horizon
        if asked >= 0:
            error = abs(demand[row] - forecasts[asked, 1])
            scale += max(1.0 / (asked + 1), RECENT) * (error - scale)
            missed = not issued[asked, 0] <= demand[row] <= issued[asked, 1]
            offset += rate * scale * (missed - (1.0 - level))
        below, above = max(median - low, 0.0) + offset, max(high - median, 0.0) + offset
        issued[row] = median - max(below, 0.0), median + max(above, 0.0)
    return issued


def covered(intervals: Floats, actual: Floats) -> float:
    """The share of actual [N] that lies within intervals [N, 2], in %."""
    return float(100.0 * np.mean((intervals[:, 0] <= actual) & (actual <= intervals[:, 1])))
