"""Forecasts as values.

K horizons, Q quantile levels, P rows of a scenario, D inputs a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepstate.client.times import RowsLike
from stepstate.client.types import Floats, data_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

Method = Literal["direct", "fed back", "given", ""]
"""How a value was made: read from the state; read after forecasts or a scenario's rows were fed
back on a copy of the state; given by the scenario. Empty: there is no value."""
Scenarios = Mapping[str, RowsLike]
"""Assumed future rows, [P, D] by name; NaN means the model's own forecast of a value."""
Levels = Sequence[float] | NDArray[np.floating]
"""Quantile levels, each more than 0 and less than 1."""


@dataclass(frozen=True, slots=True, eq=False)
class OutputForecast:
    """The forecast of one output.

    `values` [K, Q] at horizons 1 to K and the quantile `levels`, in `unit`; NaN if not known.
    `methods` [K].
    """

    name: str
    unit: str
    levels: tuple[float, ...]
    values: Floats
    methods: tuple[Method, ...]

    @property
    def median(self) -> Floats:
        """[K]; NaN if the level 0.5 was not asked for."""
        return self.at(0.5)

    @property
    def low(self) -> Floats:
        """The lowest quantile [K]; NaN if there is none below the median."""
        return self.at(min((level for level in self.levels if level < 0.5), default=0.0))

    @property
    def high(self) -> Floats:
        """The highest quantile [K]; NaN if there is none above the median."""
        return self.at(max((level for level in self.levels if level > 0.5), default=0.0))

    def at(self, level: float) -> Floats:
        """The quantile of a level [K]; NaN if it was not asked for."""
        if level in self.levels:
            return self.values[:, self.levels.index(level)]
        return np.full(len(self.values), np.nan, np.float32)

    @property
    def label(self) -> str:
        """Its name and unit."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Forecast:
    """A model's forecast of the next rows of a session.

    `t` rows were applied: horizon k is the row of index t + k - 1. `times` [K] are those of the
    rows, in UTC; None if the model knows no time. `levels` are the quantile levels, Q of them.
    `outputs` are the outputs that look ahead, by name; `forecast["demand"]` is one of them.
    `values` [K, Q], `median`, `low`, `high` [K] and `methods` [K] are those of the first one, often
    the only one. `scenario` is the name of the scenario, empty without one.
    """

    session_id: str
    t: int
    scenario: str
    levels: tuple[float, ...]
    outputs: Mapping[str, OutputForecast]
    times: NDArray[np.datetime64] | None = None

    def __getitem__(self, output: str) -> OutputForecast:
        return self.outputs[output]

    def __len__(self) -> int:
        """K."""
        return len(self.values)

    def __repr__(self) -> str:
        scenario = f", scenario={self.scenario!r}" if self.scenario else ""
        return (
            f"Forecast(session_id={self.session_id!r}, t={self.t}{scenario}, "
            f"outputs={list(self.outputs)}, horizons=1..{len(self)}, levels={list(self.levels)})"
        )

    def __str__(self) -> str:
        scenario = f" under {self.scenario!r}" if self.scenario else ""
        return f"{self.session_id} from t={self.t}{scenario}: " + "; ".join(
            _in_short(output) for output in self.outputs.values()
        )

    @property
    def horizons(self) -> NDArray[np.int64]:
        """Steps ahead [K], from 1 on."""
        return np.arange(1, len(self) + 1)

    @property
    def values(self) -> Floats:
        """Of the first output [K, Q]."""
        return self.first.values

    @property
    def median(self) -> Floats:
        """Of the first output [K]."""
        return self.first.median

    @property
    def low(self) -> Floats:
        """The lowest quantile of the first output [K]."""
        return self.first.low

    @property
    def high(self) -> Floats:
        """The highest quantile of the first output [K]."""
        return self.first.high

    @property
    def methods(self) -> tuple[Method, ...]:
        """Of the first output [K]."""
        return self.first.methods

    @property
    def first(self) -> OutputForecast:
        """The first output."""
        return next(iter(self.outputs.values()))

    def to_pandas(self) -> DataFrame:
        """A table with a row for each horizon, indexed by time (UTC), or by horizon without one.

        Its columns are "demand@0.5" for the quantiles of the output demand, and "demand method".

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        columns: dict[str, Any] = {}
        for output in self.outputs.values():
            for place, level in enumerate(self.levels):
                columns[f"{output.name}@{level:g}"] = output.values[:, place]
            columns[f"{output.name} method"] = list(output.methods)
        return data_frame(
            columns,
            times=self.times,
            index=self.horizons,
            index_name="horizon",
            needed_by="Forecast.to_pandas",
        )

    def plot(self, ax: Axes | None = None, *, output: str | None = None) -> Axes:
        """Draws the median as a line, and the intervals around it.

        A level without a counterpart on the other side of the median is a dashed line. Each
        forecast on the same axes has a color of its own.

        Args:
            ax: where to draw; default: a new figure.
            output: its name; default: the first one.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from stepstate.client.plot import draw  # noqa: PLC0415 - the client does without it
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"Forecast.plot needs {error.name}: pip install 'stepstate[plot]'", name=error.name
            ) from error
        drawn = self.first if output is None else self[output]
        quantiles = {level: drawn.at(level) for level in drawn.levels}
        across = self.horizons if self.times is None else self.times
        ax = draw(ax, across, quantiles, scenario=self.scenario)
        ax.set_ylabel(drawn.label)
        ax.set_title(f"{self.session_id} from t={self.t}")
        return ax


def _in_short(output: OutputForecast) -> str:
    """Its first and last median, with unit; without a median, its lowest to highest quantile."""
    levels = [0.5] if 0.5 in output.levels else sorted({min(output.levels), max(output.levels)})
    # A single quantile that is not the median must not be taken for it.
    name = output.name if levels == [0.5] or len(levels) > 1 else f"{output.name}@{levels[0]:g}"
    rows = np.stack([output.at(level) for level in levels], axis=1)
    ends = rows if len(rows) == 1 else rows[[0, -1]]
    text = " … ".join(" to ".join(f"{value:.6g}" for value in end) for end in ends)
    unit = f" {output.unit}" if output.unit else ""
    return f"{name} {text}{unit}, {len(rows)} ahead"
