"""Pictures of forecasts, by matplotlib. Imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from stepstate.client.types import Floats

_FAINTEST, _STRONGEST = 0.18, 0.38  # of the widest and the narrowest interval


def draw(
    ax: Axes | None, across: Any, quantiles: Mapping[float, Floats], *, scenario: str = ""
) -> Axes:
    """Draws a median as a line, and the intervals from the widest to the narrowest.

    A level that bounds no interval is a line, too. The labels name the scenario.

    Args:
        ax: where; None: a new figure.
        across: horizons or times [K].
        quantiles: values [K] by level.
        scenario: its name.
    """
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    prefix = f"{scenario} " if scenario else ""
    pairs = _pairs(quantiles)
    color = _next_color(ax)
    for place, (low, high) in enumerate(pairs):
        alpha = _FAINTEST + (_STRONGEST - _FAINTEST) * place / max(1, len(pairs) - 1)
        ax.fill_between(
            across,
            quantiles[low],
            quantiles[high],
            color=color,
            alpha=alpha,
            linewidth=0,
            label=f"{prefix}{low:g} to {high:g}",
        )
    for level in sorted(set(quantiles) - {bound for pair in pairs for bound in pair}):
        name, style = ("median", "-") if level == 0.5 else (f"{level:g}", "--")
        ax.plot(across, quantiles[level], style, color=color, label=prefix + name)
    _label_across(ax, across)
    ax.legend(frameon=False)
    return ax


def _next_color(ax: Axes) -> Any:
    """The next color of the axes' cycle; only what is drawn moves the cycle on."""
    (line,) = ax.plot([], [])
    line.remove()
    return line.get_color()


def _label_across(ax: Axes, across: Any) -> None:
    if not np.issubdtype(across.dtype, np.datetime64):
        ax.set_xlabel("steps ahead")
        return
    ax.set_xlabel("time (UTC)")
    locator = AutoDateLocator()
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _pairs(levels: Mapping[float, Floats]) -> list[tuple[float, float]]:
    """Levels below and above the median, the outermost pair first."""
    below = sorted(level for level in levels if level < 0.5)
    above = sorted((level for level in levels if level > 0.5), reverse=True)
    return list(zip(below, above, strict=False))
