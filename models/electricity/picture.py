"""The demo's picture: forecasts and their intervals against truth, accuracy, coverage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from series import HORIZONS, STEPS_PER_DAY, STEPS_PER_WEEK, Floats, Rows, Series

mpl.use("Agg")
from matplotlib import dates, pyplot

TRUTH, LIVE, NAIVE = "#222222", "#0a7d8c", "#c4762b"
HOURS = np.arange(1, HORIZONS + 1) / 2
NOMINAL = 90.0


def draw(
    path: Path,
    series: Series,
    origins: Rows,
    forecasts: Floats,
    *,
    scores: Mapping[str, Floats],
    coverage: Floats,
) -> None:
    """Draws the last test week with the forecasts made at each midnight, errors and coverage.

    Args:
        path: where the PNG goes.
        series: the whole series.
        origins: [N], rows.
        forecasts: low, median and high [N, 48, 3] in MW.
        scores: MAPE [48] in %, by name; the first is the live one.
        coverage: shares of truths within the intervals [48], in %.
    """
    figure, places = pyplot.subplot_mosaic(
        [["week", "week"], ["errors", "coverage"]],
        figsize=(11, 8),
        height_ratios=(2, 1),
        layout="constrained",
    )
    _draw_week(places["week"], series, origins, forecasts)
    _draw_errors(places["errors"], scores)
    _draw_coverage(places["coverage"], coverage)
    for axes in places.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_week(axes: Axes, series: Series, origins: Rows, forecasts: Floats) -> None:
    last = slice(len(series.demand) - STEPS_PER_WEEK, len(series.demand))
    axes.plot(series.times[last], series.demand[last] / 1000, color=TRUTH, lw=1.6, label="truth")
    labels = "forecast of the next 24 h, made at midnight", "its interval, to cover 90 %"
    for place in np.flatnonzero((origins + 1) % STEPS_PER_DAY == 0):
        rows = origins[place] + np.arange(1, HORIZONS + 1)
        if rows[0] >= last.start:
            low, median, high = forecasts[place].T / 1000
            times = series.times[rows]
            axes.plot(times, median, "--", color=LIVE, lw=1.4, label=labels[0])
            axes.fill_between(times, low, high, color=LIVE, alpha=0.25, lw=0, label=labels[1])
            axes.plot(times[0], median[0], "o", color=LIVE, ms=4)
            labels = "_", "_"
    axes.set(title="Demand in England and Wales, the last test week", ylabel="GW")
    axes.xaxis.set_major_locator(dates.DayLocator())
    axes.xaxis.set_major_formatter(dates.DateFormatter("%a %d %b"))
    axes.legend(frameon=False, loc="lower left", ncols=3)


def _draw_errors(axes: Axes, scores: Mapping[str, Floats]) -> None:
    for (name, mape), colour in zip(scores.items(), (LIVE, NAIVE), strict=True):
        axes.plot(HOURS, mape, color=colour, lw=2, label=f"{name}: mean {mape.mean():.2f} %")
    axes.set(
        title="Mean absolute percentage error, four test weeks",
        xlabel="hours ahead",
        ylabel="%",
        ylim=(0, None),
    )
    _mark_hours(axes)
    axes.legend(frameon=False, loc=(0.3, 0.6))


def _draw_coverage(axes: Axes, coverage: Floats) -> None:
    axes.axhline(NOMINAL, color=TRUTH, lw=1, ls=":", label=f"wanted: {NOMINAL:g} %")
    axes.plot(HOURS, coverage, color=LIVE, lw=2, label=f"reached: mean {coverage.mean():.1f} %")
    axes.set(
        title="Truths within the interval, four test weeks",
        xlabel="hours ahead",
        ylabel="%",
        ylim=(min(80.0, coverage.min() - 1), 100),
    )
    _mark_hours(axes)
    axes.legend(frameon=False, loc="lower right")


def _mark_hours(axes: Axes) -> None:
    axes.set_xlim(0, 24.2)
    axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(3))
