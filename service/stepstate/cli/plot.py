"""Forecasts as plots in the terminal, by uniplot.

uniplot is pure Python, needs little but NumPy, has types, and keeps no state between two plots.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from uniplot import plot_to_string

from stepstate.client import Forecast, OutputForecast

_COLORS = ("cyan", "magenta", "yellow", "green", "red")
_BOUNDS = "blue"
_MAX_WIDTH, _FRAME = 100, 12  # columns; the frame has the numbers of the axis


def plot_forecasts(forecasts: Sequence[Forecast], *, color: bool) -> str:
    """A plot for each output: each scenario's median, and the bounds of its interval."""
    width = min(_MAX_WIDTH, shutil.get_terminal_size().columns) - _FRAME
    plots = [_plot(forecasts, name, max(20, width), color=color) for name in _names(forecasts)]
    return "\n".join(plots)


def _plot(forecasts: Sequence[Forecast], name: str, width: int, *, color: bool) -> str:
    curves = [
        (np.arange(1, len(forecast) + 1) if forecast.times is None else forecast.times, *curve)
        for number, forecast in enumerate(forecasts)
        if name in forecast.outputs
        for curve in _curves(forecast[name], forecast.scenario, _COLORS[number % len(_COLORS)])
    ]
    return plot_to_string(
        xs=[x for x, *_ in curves],
        ys=[values for _, values, _, _ in curves],
        lines=True,
        width=width,
        height=14,
        title=next(one[name].label for one in forecasts if name in one.outputs),
        legend_labels=[label for *_, label, _ in curves],
        color=[shade for *_, shade in curves] if color else False,
        x_gridlines=[],
        y_gridlines=[],
    )


def _curves(output: OutputForecast, scenario: str, color: str) -> Iterator[tuple[Any, str, str]]:
    """The values, label and color of each line that can be drawn."""
    named = f"{scenario} " if scenario else ""
    bounds = {min(output.levels), max(output.levels)} - {0.5}
    curves = {f"{named}{level:g}": (output.at(level), _BOUNDS) for level in sorted(bounds)}
    curves[f"{named}median"] = (output.median, color)
    for label, (values, shade) in curves.items():
        if np.isfinite(values).any():
            yield values, label, shade


def _names(forecasts: Sequence[Forecast]) -> list[str]:
    """The outputs that have a value to draw."""
    return list(
        dict.fromkeys(
            output.name
            for forecast in forecasts
            for output in forecast.outputs.values()
            if np.isfinite(output.values).any()
        )
    )
