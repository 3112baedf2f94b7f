"""The forecast that version 2 begins from; it is linear in the lagged deviations.

With d(t) = v(t) - v(t-336) / 2, what is left of a deviation v when half of last
week's is taken as known, it forecasts for h steps ahead

    v(t+h) = v(t+h-336) / 2 + 0.6 d(t+h-48) + 0.97^h (d(t) - 0.6 d(t-48)):

half of last week, part of yesterday, and the last error of these two, fading.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from series import HORIZONS, STEPS_PER_DAY, STEPS_PER_WEEK, Floats

HALF, YESTERDAY, FADE = 0.5, 0.6, 0.97


def base_weights(lags: Sequence[int]) -> Floats:
    """Its weights [48, n] of deviations so many steps back.

    Raises:
        ValueError: a lag that it needs is missing.
    """
    places = {lag: place for place, lag in enumerate(lags)}
    weights = np.zeros((HORIZONS, len(places)))
    for horizon in range(1, HORIZONS + 1):
        for lag, weight in _terms(horizon):
            if lag not in places:
                raise ValueError(f"lags: {lag} is missing")
            weights[horizon - 1, places[lag]] += weight
    return weights


def _terms(horizon: int) -> list[tuple[int, float]]:
    fading = FADE**horizon
    return [
        (STEPS_PER_WEEK - horizon, HALF),
        *_d(STEPS_PER_DAY - horizon, YESTERDAY),
        *_d(0, fading),
        *_d(STEPS_PER_DAY, -YESTERDAY * fading),
    ]


def _d(lag: int, weight: float) -> list[tuple[int, float]]:
    return [(lag, weight), (lag + STEPS_PER_WEEK, -HALF * weight)]
