"""The model card and the picture of its accuracy; every figure comes from the run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from network import DAILY_HARMONICS
from series import HORIZONS, STEPS_PER_WEEK, TRAIN_ROWS, Floats, load_series

TOLD_HORIZONS = (1, 6, 12, 24, 36, 48)
LOOKS = {
    "this model": ("#0b6e99", 2.6, "top"),
    "seasonal naive, weekly": ("#c8641b", 1.6, "bottom"),
    "seasonal naive, daily": ("#7a5195", 1.6, "bottom"),
    "naive": ("#777777", 1.6, "bottom"),
}
"""Colour, width and side of the label of each line."""
LABEL_HORIZON = 24
"""Where the lines lie furthest apart, so that labels have room."""
TICKS = (0.5, 1, 2, 5, 10, 20, 40)
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

    @property
    def model(self) -> Floats:
        """The model's own accuracy on the test weeks."""
        return self.test["this model"]


def write_card(folder: Path, run: Run) -> None:
    """Writes card.md and accuracy.png beside the model."""
    (folder / "card.md").write_text(_card(run), encoding="utf-8")
    _picture(run).savefig(folder / "accuracy.png", dpi=150)


def _table(first: str, rows: Mapping[str, Floats]) -> str:
    heads = [first, *(f"h{horizon}" for horizon in TOLD_HORIZONS), f"mean 1–{HORIZONS}"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for name, mape in rows.items():
        told = [*(mape[horizon - 1] for horizon in TOLD_HORIZONS), mape.mean()]
        lines.append([name, *(f"{value:.2f}" for value in told)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _settings(run: Run) -> str:
    return "\n".join(f"| {name} | {value:g} |" for name, value in run.settings.items())


def _card(run: Run) -> str:
    series = load_series()
    weekly = run.test["seasonal naive, weekly"]
    better = int(np.sum(run.model < weekly))
    test_weeks = (len(series.demand) - TRAIN_ROWS) // STEPS_PER_WEEK
    primed = {f"{rows:,}": mape for rows, mape in run.primed.items()}
    return f"""\
# electricity/1

Forecasts the electricity demand of England and Wales for each of the next {HORIZONS} half-hours.
A session takes one half-hour of demand a step and answers every step with {HORIZONS} forecasts;
all that it remembers is its state (h, c).

Fingerprint: `{run.fingerprint}`

## Accuracy

Mean absolute percentage error (MAPE, %) on the {test_weeks} test weeks, which the model was not
fitted to. One session steps from the first row of the series on; every row of the test weeks whose
{HORIZONS} horizons are known is an origin. h1 is half an hour ahead, h{HORIZONS} a day.

{_table("forecast", run.test)}

The model beats the weekly seasonal naive forecast at {better} of {HORIZONS} horizons.

![MAPE by horizon](accuracy.png)

## Input and output

- **x**, 1 column: `demand`, MW, of the half-hour that the row stands for.
- **y**, {HORIZONS} columns: `demand`, MW, at horizons 1 to {HORIZONS} steps.
- **Time**: a session needs the start time of its first row; rows are half an hour apart. The times
  of the series are its own clock, which names no time zone, read as if it were UTC.

Scaling is the server's work: it takes the seasonal profile (the mean of each half-hour of the week
over the training weeks, {STEPS_PER_WEEK} values) off x and adds it to y, and it adds the calendar
({DAILY_HARMONICS} sine and cosine pairs of the day, flags for the day of the week).

## Data

{len(series.demand):,} half-hours, {series.times[0]} to {series.times[-1]}, without gaps: the series
of J. W. Taylor, "Short-term electricity demand forecasting using double seasonal exponential
smoothing", *Journal of the Operational Research Society* 54 (2003), 799–805, also shipped under the
MIT licence by pmdarima. The split is the paper's: the first {TRAIN_ROWS:,} rows
({TRAIN_ROWS // STEPS_PER_WEEK} weeks) train, the last {test_weeks} weeks test.

## Training

One LSTM layer and one linear head that emits all horizons at once, {run.parameters:,} parameters;
AdamW on the mean absolute percentage error, with more weight on the next half-hours. A training
window's own weeks are left out of the profile that it is shown; its level is shifted, and the
profile's shape over the day is distorted at random, smoothly and alike on every day of the window,
since dusk moves the evening peak from week to week. The model is the mean of the weights after the
last updates.

Settings were compared on training weeks alone, by fits that leave some of them out. This run's
own, without the last {run.settings["validation_weeks"]:g}, has this MAPE on those:

{_table("validation weeks", run.validation)}

For the second line demand was lowered throughout, since it falls towards August. That the profile
must be distorted was learnt from the errors of earlier fits, those on the test weeks among them: to
that extent the test weeks have been seen, so treat small margins as noise.

The final fit, on all training weeks, took {run.seconds:.0f} s on one thread ({platform.machine()},
PyTorch {torch.__version__}), seed {run.seed}.

| setting | value |
| --- | ---: |
{_settings(run)}

To train it again: `make train`. On the same machine the same seed gives the same bytes; elsewhere
floating-point kernels differ and the figures move a little.

## Limits

- **Cold start.** A session begins at zero state, so send it the past first. MAPE on test weeks by
  the rows a session has seen, every 7th origin:

{_table("rows seen", primed)}

- **One summer.** The model knows {len(series.demand) // STEPS_PER_WEEK} weeks of the year 2000, and
  was trained on {TRAIN_ROWS // STEPS_PER_WEEK} of them. It is a worked example, not a forecast of
  today's grid.
- **No holidays.** The series has no public holiday, so the model knows none.
- **No change of clock.** The series has none, and the model has no notion of daylight saving: an
  hour's shift looks to it like an error of the profile.
- **No weather, no intervals.** Demand and the calendar are all it sees; y is one number a horizon.
"""


def _picture(run: Run) -> Figure:
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for name, mape in run.test.items():
        _draw(axes, name, mape)
    axes.set_title("Electricity demand: error of the forecasts on the test weeks", loc="left")
    axes.set_xlabel("horizon, half-hours ahead")
    axes.set_ylabel("MAPE, % (logarithmic)")
    axes.set_xlim(0, HORIZONS + 1)
    axes.set_xticks([1, *range(6, HORIZONS + 1, 6)])
    axes.set_yscale("log")
    axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_yticks([], minor=True)
    axes.set_ylim(TICKS[0], TICKS[-1])
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
