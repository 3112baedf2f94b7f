"""Pictures of forecasts, by matplotlib. Imported when one is drawn."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from stepstate.client.forecast import Forecast, OutputForecast

_FAINTEST, _STRONGEST = 0.18, 0.38  # of the widest and the narrowest interval


def draw(forecast: Forecast, output: OutputForecast, ax: Axes | None) -> Axes:
    """Draws an output's median, and its intervals from the widest to the narrowest.

    A level that bounds none is a line, too. What a scenario is called, its labels say.
    """
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    across: Any = forecast.horizons if forecast.times is None else forecast.times
    prefix = f"{forecast.scenario} " if forecast.scenario else ""
    pairs = _pairs(output.levels)
    color = _next_color(ax)
    for place, (low, high) in enumerate(pairs):
        alpha = _FAINTEST + (_STRONGEST - _FAINTEST) * place / max(1, len(pairs) - 1)
        ax.fill_between(
            across,
            output.at(low),
            output.at(high),
            color=color,
            alpha=alpha,
            linewidth=0,
            label=f"{prefix}{low:g} to {high:g}",
        )
    for level in sorted(set(output.levels) - {bound for pair in pairs for bound in pair}):
        name, style = ("median", "-") if level == 0.5 else (f"{level:g}", "--")
        ax.plot(across, output.at(level), style, color=color, label=prefix + name)
    ax.set_ylabel(output.label)
    _label_across(ax, forecast)
    ax.set_title(f"{forecast.session_id} from t={forecast.t}")
    ax.legend(frameon=False)
    return ax


def _next_color(ax: Axes) -> Any:
    """Of the axes' cycle, which only what is drawn moves on."""
    (line,) = ax.plot([], [])
    line.remove()
    return line.get_color()


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
