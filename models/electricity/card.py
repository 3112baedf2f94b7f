"""What the model cards share: tables, the picture of the accuracy, and what is always said."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from series import HORIZONS, STEPS_PER_WEEK, TRAIN_ROWS, Floats, Series

TOLD_HORIZONS = (1, 6, 12, 24, 36, 48)
LOOKS = {
    "this model": ("#0b6e99", 2.6, "top"),
    "double seasonal Holt-Winters": ("#3d8b37", 1.6, "bottom"),
    "seasonal naive, weekly": ("#c8641b", 1.6, "bottom"),
    "seasonal naive, daily": ("#7a5195", 1.6, "bottom"),
    "naive": ("#777777", 1.6, "bottom"),
}
"""Colour, width and side of the label of each line."""
LABEL_HORIZON = 24
"""Where the lines lie furthest apart, so that labels have room."""
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 40)
"""MAPE in %; the axis is logarithmic, or the naive forecast would flatten the others."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one training run has to tell; accuracies are MAPE [48] by horizon, in %."""

    seed: int
    settings: Mapping[str, float]
    seconds: float
    parameters: int
    fingerprint: str
    validation: Mapping[str, Floats]
    test: Mapping[str, Floats]
    primed: Mapping[int, Floats]
    seeds: Mapping[int, Floats] = field(default_factory=dict)
    """Of the same fit with other seeds, on the test weeks."""
    coverage: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Of each kind of interval, by horizon, in %."""
    drift: Mapping[str, str] = field(default_factory=dict)
    """What the drift test says of each of some cases."""

    @property
    def model(self) -> Floats:
        """The model's own accuracy on the test weeks."""
        return self.test["this model"]


def table(first: str, rows: Mapping[str, Floats], digits: int = 2) -> str:
    """Accuracies by horizon, as Markdown."""
    cells = {
        name: [*(mape[horizon - 1] for horizon in TOLD_HORIZONS), mape.mean()]
        for name, mape in rows.items()
    }
    heads = [*(f"h{horizon}" for horizon in TOLD_HORIZONS), f"mean 1–{HORIZONS}"]
    return _lines([first, *heads], cells, digits)


def coverage_table(coverage: Mapping[str, Mapping[int, float]]) -> str:
    """Coverage by horizon, as Markdown."""
    horizons = next(iter(coverage.values()))
    cells = {name: list(found.values()) for name, found in coverage.items()}
    return _lines(["interval", *(f"h{horizon}" for horizon in horizons)], cells, 1)


def _lines(heads: list[str], cells: Mapping[str, list[float]], digits: int) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    lines += [[name, *(f"{value:.{digits}f}" for value in row)] for name, row in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(run: Run) -> str:
    """The settings that are numbers, as Markdown."""
    rows = (f"| {name} | {value:g} |" for name, value in run.settings.items())
    return "\n".join(["| setting | value |", "| --- | ---: |", *rows])


def wins(run: Run, other: str) -> int:
    """At how many horizons the model beats another forecast."""
    return int(np.sum(run.model < run.test[other]))


def test_weeks(series: Series) -> int:
    """How many weeks test."""
    return (len(series.demand) - TRAIN_ROWS) // STEPS_PER_WEEK


def data_section(series: Series) -> str:
    """Where the data is from, and how it is split."""
    return f"""\
## Data

{len(series.demand):,} half-hours, {series.times[0]} to {series.times[-1]}, without gaps: the series
of J. W. Taylor, "Short-term electricity demand forecasting using double seasonal exponential
smoothing", *Journal of the Operational Research Society* 54 (2003), 799–805, also shipped under the
MIT licence by pmdarima. The split is the paper's: the first {TRAIN_ROWS:,} rows
({TRAIN_ROWS // STEPS_PER_WEEK} weeks) train, the last {test_weeks(series)} weeks test."""


def made_on() -> str:
    """What a run's seconds were measured on."""
    return f"{platform.machine()}, PyTorch {torch.__version__}"


def common_limits(series: Series) -> str:
    """What every version lacks."""
    return f"""\
- **One summer.** The model knows {len(series.demand) // STEPS_PER_WEEK} weeks of the year 2000, and
  was trained on {TRAIN_ROWS // STEPS_PER_WEEK} of them. It is a worked example, not a forecast of
  today's grid.
- **No holidays.** The series has no public holiday, so the model knows none.
- **No change of clock.** The series has none, and the model has no notion of daylight saving: an
  hour's shift looks to it like an error of the profile."""


def picture(run: Run) -> Figure:
    """The accuracy of all forecasts by horizon."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for name, mape in run.test.items():
        _draw(axes, name, mape)
    axes.set_title("Electricity demand: error of the forecasts on the test weeks", loc="left")
    axes.set_xlabel("horizon, half-hours ahead")
    axes.set_ylabel("MAPE, % (logarithmic)")
    axes.set_xlim(0, HORIZONS + 1)
    axes.set_xticks([1, *range(6, HORIZONS + 1, 6)])
    ticks = [tick for tick in TICKS if tick >= run.model.min() / 2.5]
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(ticks[0], ticks[-1])
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw(axes: Axes, name: str, mape: Floats) -> None:
    colour, width, side = LOOKS[name]
    axes.plot(np.arange(1, HORIZONS + 1), mape, color=colour, linewidth=width)
    place = (LABEL_HORIZON, mape[LABEL_HORIZON - 1])
    away = (0, 6 if side == "bottom" else -8)
    axes.annotate(
        f"{name}: mean {mape.mean():.2f} %",
        place,
        away,
        textcoords="offset points",
        horizontalalignment="center",
        verticalalignment=side,
        color=colour,
    )
