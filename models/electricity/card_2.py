"""The card of electricity/2; every figure comes from the run."""

from __future__ import annotations

from card import (
    Run,
    common_limits,
    coverage_table,
    data_section,
    made_on,
    settings_table,
    table,
    test_weeks,
    wins,
)
from declare import DRIFT, LEVEL, RATE, TRACKED_HORIZONS
from network import DAILY_HARMONICS
from series import HORIZONS, STEPS_PER_WEEK, Series
from settings import LAGGED

RIVAL = "double seasonal Holt-Winters"


def card(run: Run, series: Series) -> str:
    """The text of card.md."""
    return "\n\n".join(
        [
            _top(run, series),
            _columns(),
            _intervals(run),
            _training(run, series),
            _limits(run, series),
        ]
    )


def _top(run: Run, series: Series) -> str:
    return f"""\
# electricity/2

Forecasts the electricity demand of England and Wales for each of the next {HORIZONS} half-hours:
the median, and an interval that is to hold {LEVEL:.0%} of what comes. A session takes one half-hour
of demand a step; it remembers its state (h, c) and the demand of the week before.

Fingerprint: `{run.fingerprint}`

## Accuracy

Mean absolute percentage error (MAPE, %) of the median on the {test_weeks(series)} test weeks, which
the model was not fitted to. One session steps from the first row of the series on; every row of the
test weeks whose {HORIZONS} horizons are known is an origin. h1 is half an hour ahead, h{HORIZONS} a
day.

{table("forecast", run.test, 3)}

"Double seasonal Holt-Winters" is Taylor's method (2003) with its correction of the first error,
fitted to the same training weeks (`models/electricity/holt_winters.py`): the standard that this
series is known by. {_verdict(run)}

![MAPE by horizon](accuracy.png)

The same fit with other seeds, scored the same way:

{table("seed", {str(seed): mape for seed, mape in run.seeds.items()}, 3)}

Seed {run.seed} is the one that is shipped, whatever the others score."""


def _verdict(run: Run) -> str:
    ours, theirs = run.model, run.test[RIVAL]
    near = "better" if ours[0] < theirs[0] else "worse"
    return (
        f"The model beats it at {wins(run, RIVAL)} of {HORIZONS}\nhorizons (mean {ours.mean():.3f} "
        f"against {theirs.mean():.3f}); half an hour ahead the model is {near}:\n"
        f"{ours[0]:.3f} against {theirs[0]:.3f}."
    )


def _columns() -> str:
    return f"""\
## Input and output

- **x**, 1 column: `demand`, MW, of the half-hour that the row stands for.
- **y**, {HORIZONS * len(LAGGED.quantiles)} columns: `demand`, MW, at horizons 1 to {HORIZONS};
  at each the quantiles {", ".join(map(str, LAGGED.quantiles))}. The median is the forecast.
- **Time**: a session needs the start time of its first row; rows are half an hour apart. The times
  of the series are its own clock, which names no time zone, read as if it were UTC.

Scaling is the server's work: it takes the seasonal profile (the mean of each half-hour of the week
over the training weeks, {STEPS_PER_WEEK} values) off x and adds it to y, and it adds the calendar
({DAILY_HARMONICS} sine and cosine pairs of the day, flags for the day of the week). It keeps the
last {max(LAGGED.lags)} rows too: the head sees {len(LAGGED.lags)} of them beside h, as deviations
from the profile. Those that a session does not have yet count as 0, as if demand had been at its
profile."""


def _intervals(run: Run) -> str:
    return f"""\
## Intervals and drift

The share of truths within the intervals issued in the test weeks, in %, where {100 * LEVEL:g} were
promised. "Tracked" are those that the server widens or narrows as truths arrive (rate {RATE:g},
from the first row of the series on), at horizons {", ".join(map(str, TRACKED_HORIZONS))}:

{coverage_table(run.coverage)}

Errors hang together, so a single week may hold clearly fewer or more than {100 * LEVEL:g}.

The drift test (Page-Hinkley on the scaled error half an hour ahead; delta {DRIFT.delta:g},
threshold {DRIFT.threshold:g}, chosen on the training weeks so that they raise no alarm) on the
whole series, and on demand that changes for good when the test weeks begin:

{_drift(run)}"""


def _drift(run: Run) -> str:
    rows = [f"| {case} | {told} |" for case, told in run.drift.items()]
    return "\n".join(["| case | drift test |", "| --- | --- |", *rows])


def _training(run: Run, series: Series) -> str:
    return f"""\
{data_section(series)}

## Training

One LSTM layer that sees the present deviation and the calendar, and one linear head that takes its
h and the lagged deviations and emits all horizons and quantiles at once; {run.parameters:,}
parameters. The head's weights of the lags begin as a forecast made by hand
(`models/electricity/base.py`: half of last week's deviation, part of yesterday's, and the last
error of these two, fading); the LSTM begins at nothing beside it, and both are trained together.

AdamW on the quantile loss relative to demand, with more weight on the next half-hours. A training
window's own weeks are left out of the profile that it is shown, and at times the week before them
too; its level is shifted by up to {run.settings["level_range"]:.0%}, and the profile's shape over
the day is distorted at random. Some windows begin a session: their lags are 0. The model is
the mean of the weights after the last updates.

Settings were compared on training weeks alone, by fits without the last
{run.settings["validation_weeks"]:g} of them. This run's own has this MAPE on those:

{table("validation weeks", run.validation, 3)}

For the second line demand was lowered throughout, since it falls towards August. That a profile, a
week's lag and the forecast made by hand suit this series was known from earlier work that had seen
the test weeks: to that extent treat small margins as noise.

The final fit, on all training weeks, took {run.seconds:.0f} s on one thread ({made_on()}), \
seed {run.seed}.

{settings_table(run)}

To train it again: `make train`. On the same machine the same seed gives the same bytes; elsewhere
floating-point kernels differ and the figures move a little."""


def _limits(run: Run, series: Series) -> str:
    primed = {f"{rows:,}": mape for rows, mape in run.primed.items()}
    return f"""\
## Limits

- **Cold start.** A session begins at zero state and without a past, so send it a week or more.
  MAPE on test weeks by the rows a session has seen, every 7th origin:

{table("rows seen", primed)}

  The head can't tell a lag that is missing from a deviation of 0. So from a day to a week in, while
  some of the lags that belong together are there and others are not, the next half-hour can be
  forecast worse than at the start.
{common_limits(series)}
- **No weather.** Demand and the calendar are all it sees.
- **Intervals at other horizons.** Between the tracked ones the server interpolates; they were
  measured at the tracked ones alone.
"""
