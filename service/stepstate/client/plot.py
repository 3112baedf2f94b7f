"""Pictures of forecasts, by matplotlib. Imported when one is drawn."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from stepstate.client.forecast import Forecast, OutputForecast

_COLOR = "#1f6f8b"
_FAINTEST, _STRONGEST = 0.18, 0.38  # of the widest and the narrowest interval


def draw(forecast: Forecast, output: OutputForecast, ax: Axes | None) -> Axes:
    """Draws an output's median, and its intervals from the widest to the narrowest."""
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    across: Any = forecast.horizons if forecast.times is None else forecast.times
    pairs = _pairs(output.levels)
    for place, (low, high) in enumerate(pairs):
        alpha = _FAINTEST + (_STRONGEST - _FAINTEST) * place / max(1, len(pairs) - 1)
        ax.fill_between(
            across,
            output.at(low),
            output.at(high),
            color=_COLOR,
            alpha=alpha,
            linewidth=0,
            label=f"{low:g} to {high:g}",
        )
    ax.plot(across, output.median, color=_COLOR, label="median")
    ax.set_ylabel(output.label)
    _label_across(ax, forecast)
    title = f"{forecast.session_id} from t={forecast.t}"
    ax.set_title(f"{title}, {forecast.scenario}" if forecast.scenario else title)
    ax.legend(frameon=False)
    return ax


def _label_across(ax: Axes, forecast: Forecast) -> None:
    if forecast.times is None:
        ax.set_xlabel("steps ahead")
        return
    ax.set_xlabel("time (UTC)")
    locator = AutoDateLocator()
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _pairs(levels: tuple[float, ...]) -> list[tuple[float, float]]:
    """Levels below and above the median, the outermost pair first."""
    below = sorted(level for level in levels if level < 0.5)
    above = sorted((level for level in levels if level > 0.5), reverse=True)
    return list(zip(below, above, strict=False))
