"""The demo's picture: forecasts against truth, and accuracy by horizon."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from series import HORIZONS, STEPS_PER_DAY, STEPS_PER_WEEK, Floats, Rows, Series

mpl.use("Agg")
from matplotlib import dates, pyplot

TRUTH, LIVE, NAIVE = "#222222", "#0a7d8c", "#c4762b"


def draw(
    path: Path, series: Series, origins: Rows, forecasts: Floats, scores: tuple[Floats, Floats]
) -> None:
    """Draws the last test week with the forecasts made at each midnight, and both errors.

    Args:
        path: where the PNG goes.
        series: the whole series.
        origins: [N], rows.
        forecasts: [N, 48] in MW.
        scores: MAPE [48] of the forecasts and of the weekly seasonal naive.
    """
    figure, (week, errors) = pyplot.subplots(
        2, 1, figsize=(11, 8), height_ratios=(2, 1), layout="constrained"
    )
    _draw_week(week, series, origins, forecasts)
    _draw_errors(errors, *scores)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_week(axes: Axes, series: Series, origins: Rows, forecasts: Floats) -> None:
    last = slice(len(series.demand) - STEPS_PER_WEEK, len(series.demand))
    axes.plot(series.times[last], series.demand[last] / 1000, color=TRUTH, lw=2.2, label="truth")
    label = "forecast of the next 24 h, made at midnight"
    for place in np.flatnonzero((origins + 1) % STEPS_PER_DAY == 0):
        rows = origins[place] + np.arange(1, HORIZONS + 1)
        if rows[0] >= last.start:
            axes.plot(
                series.times[rows], forecasts[place] / 1000, "--", color=LIVE, lw=1.6, label=label
            )
            axes.plot(series.times[rows[0]], forecasts[place, 0] / 1000, "o", color=LIVE, ms=4)
            label = "_"
    axes.set(title="Demand in England and Wales, the last test week", ylabel="GW")
    axes.xaxis.set_major_locator(dates.DayLocator())
    axes.xaxis.set_major_formatter(dates.DateFormatter("%a %d %b"))
    axes.legend(frameon=False, loc="lower left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_errors(axes: Axes, live: Floats, weekly: Floats) -> None:
    hours = np.arange(1, HORIZONS + 1) / 2
    axes.plot(hours, weekly, color=NAIVE, lw=2, label="seasonal naive, weekly")
    axes.plot(hours, live, color=LIVE, lw=2, label="Stepstate, live")
    axes.set(
        title="Mean absolute percentage error over the four test weeks",
        xlabel="hours ahead",
        ylabel="%",
        ylim=(0, None),
        xlim=(0, 24.2),
    )
    axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(3))
    axes.legend(frameon=False, loc="center right")
    axes.spines[["top", "right"]].set_visible(False)
