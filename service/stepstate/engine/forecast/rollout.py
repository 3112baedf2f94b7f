"""Forecasts from the current states of sessions, on copies of them.

The forecast of the row k ahead (horizon k) is read from the state after j more rows, with the
model's own horizon k - j: with j = 0 where the model has that horizon ("direct"). Beyond that,
forecasts are fed back as rows: the fewest that bring k into the model's reach. The rows of a
scenario are all applied first.

B states, D inputs, O outputs, K horizons, P rows of a scenario, R the width of a state.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stepstate.engine.arena import Layout, append_rows, past_rows
from stepstate.engine.network import Network, RowHistory
from stepstate.engine.work import Floats
from stepstate.errors import ForecastImpossible
from stepstate.models import Manifest, OutputSpec


class Method(enum.IntEnum):
    """How the forecast of a horizon was made."""

    NONE = 0
    """There is none."""
    DIRECT = 1
    """The model's own output."""
    FED_BACK = 2
    """The model's own output after forecasts were fed back as rows."""
    GIVEN = 3
    """The value of the scenario."""


@dataclass(frozen=True, slots=True)
class ForecastOrigins:
    """The start of forecasts: states [B, R], rows applied [B], steps [B] of the next rows."""

    rows: Floats
    at: NDArray[np.int64]
    phase: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HorizonForecast:
    """One output's forecast: values [B, K, quantile columns], and the `Method` of each [B, K]."""

    output: OutputSpec
    values: Floats
    methods: NDArray[np.uint8]


@dataclass(slots=True)
class _Reading:
    """After how many rows, and where in y, one output's horizons are read."""

    output: OutputSpec
    sources: NDArray[np.int64]
    """[K], the rows applied before; -1: it can't be read."""
    columns: NDArray[np.int64]
    """[K], the first of its columns of y."""
    fed: int | None
    """The input that it forecasts."""


class Plan:
    """How to forecast K horizons when a scenario gives the first P rows.

    Args:
        manifest: of the model.
        horizon: K.
        given: which values the scenario gives [P, D].

    Raises:
        ForecastImpossible: the model can't reach the last horizon.
    """

    def __init__(self, manifest: Manifest, horizon: int, given: NDArray[np.bool_]) -> None:
        self.horizon = horizon
        self.readings = list(_readings(manifest, horizon, len(given)))
        columns = range(manifest.input_width)
        self._feeds = [next((r for r in self.readings if r.fed == c), None) for c in columns]
        wanted = np.ones((horizon, manifest.input_width), np.bool_)
        wanted[: len(given)] = ~given[:horizon]
        needs = np.stack([self._needs(column, wanted[:, column]) for column in columns])
        self._row_needs: NDArray[np.int64] = needs.max(axis=0)
        self._drop_unreachable(manifest, needs)
        self.fed_rows = max(int(reading.sources.max()) for reading in self.readings)

    def feedable(self, fed: int) -> int:
        """How many rows can be fed at once after `fed` of them, as all they need has been read."""
        late = np.flatnonzero(self._row_needs[fed : self.fed_rows] > fed)
        return int(late[0]) if len(late) else self.fed_rows - fed

    def feeds(self) -> Iterator[tuple[int, _Reading]]:
        """The inputs that the model forecasts, and where they are read."""
        for column, reading in enumerate(self._feeds):
            if reading is not None:
                yield column, reading

    def _needs(self, column: int, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
        """For each row ahead [K]: after how many fed rows this column of it can be read."""
        reading = self._feeds[column]
        sources = np.full(self.horizon, -1) if reading is None else reading.sources
        return np.where(wanted, np.where(sources < 0, self.horizon, sources), 0)

    def _drop_unreachable(self, manifest: Manifest, needs: NDArray[np.int64]) -> None:
        rows = np.arange(self.horizon)
        stuck = np.flatnonzero(self._row_needs > rows)
        reach = int(stuck[0]) if len(stuck) else self.horizon
        for reading in self.readings:
            reading.sources[reading.sources > reach] = -1
        if any(reading.sources[-1] >= 0 for reading in self.readings):
            return
        if not self.readings or not len(stuck):
            problem = "none of its outputs looks ahead: give the rows to come as a scenario"
        else:
            column = manifest.inputs[int(np.argmax(needs[:, reach]))].name
            problem = (
                f"the row {reach + 1} ahead has to be fed back for horizon {self.horizon}, and the "
                f"model does not forecast its column {column!r}: give it in a scenario, or ask for "
                "a shorter horizon"
            )
        raise ForecastImpossible(f"{manifest.name}/{manifest.version}", problem)


class Rollout:
    """Carries out a plan for B states. It changes copies only.

    Args:
        plan: how far to forecast.
        network: the model.
        layout: the parts of a state.
        origins: the states, and their rows applied.
        scenario: their rows [B, P, D]; NaN where the plan's `given` is false.
    """

    def __init__(
        self,
        plan: Plan,
        network: Network,
        layout: Layout,
        origins: ForecastOrigins,
        scenario: Floats,
    ) -> None:
        self._plan = plan
        self._network = network
        self._at = origins.at
        self._phase = torch.from_numpy(origins.phase)
        self._cells = torch.from_numpy(np.ascontiguousarray(origins.rows[:, : layout.cell]))
        self._rings = layout.rings(origins.rows.copy()) if network.lagged else None
        batch = len(origins.rows)
        self._rows = np.full((batch, plan.horizon, layout.inputs), np.nan, np.float32)
        kept = scenario[:, : plan.horizon]
        self._rows[:, : kept.shape[1]] = kept
        self._given = ~np.isnan(self._rows)
        self.forecasts = [
            HorizonForecast(
                reading.output,
                np.full((batch, plan.horizon, reading.output.columns), np.nan, np.float32),
                np.zeros((batch, plan.horizon), np.uint8),
            )
            for reading in plan.readings
        ]
        self._fed = 0

    def run(self, max_rows: int) -> Iterator[None]:
        """Runs to the end, and yields after at most so many rows of all states together."""
        with torch.inference_mode():
            y = self._network.read(self._phase, self._cells, self._past())
            self._read(0, y[:, None].numpy())
        while self._fed < self._plan.fed_rows:
            yield
            rows = min(self._plan.feedable(self._fed), max(1, max_rows // len(self._at)))
            with torch.inference_mode():
                self._feed(rows)

    def _feed(self, rows: int) -> None:
        """Applies the next rows, given or forecast, and reads the horizons after them."""
        x = self._rows[:, self._fed : self._fed + rows]
        phases = self._phase[:, None] + torch.arange(self._fed, self._fed + rows)
        y, self._cells = self._network.sequence(
            torch.from_numpy(x), phases, self._cells, self._past()
        )
        if self._rings is not None:
            for ring, at, applied in zip(self._rings, self._at, x, strict=True):
                append_rows(ring, at + self._fed, applied)
        self._fed += rows
        self._read(self._fed - rows + 1, y.numpy())

    def _past(self) -> RowHistory | None:
        if self._rings is None:
            return None
        at = self._at + self._fed
        rows = past_rows(self._rings, np.arange(len(at)), at)
        return RowHistory(torch.from_numpy(rows), torch.from_numpy(at))

    def _read(self, first: int, y: Floats) -> None:
        """Takes outputs y [B, T, O] of the states after `first`, `first` + 1, ... fed rows."""
        for forecast, reading in zip(self.forecasts, self._plan.readings, strict=True):
            places = reading.sources - first
            here = np.flatnonzero((places >= 0) & (places < y.shape[1]))
            columns = reading.columns[here, None] + np.arange(reading.output.columns)
            values = y[:, places[here, None], columns]
            known = np.isfinite(values).all(axis=2)
            values[~known] = np.nan
            method = Method.FED_BACK if first else Method.DIRECT
            forecast.values[:, here] = values
            forecast.methods[:, here] = np.where(known, method, Method.NONE)
        self._complete_rows()

    def _complete_rows(self) -> None:
        """Puts forecasts into the future rows, and the values of a scenario into the forecasts."""
        for column, reading in self._plan.feeds():
            forecast = self.forecasts[self._plan.readings.index(reading)]
            rows, given = self._rows[:, :, column], self._given[:, :, column]
            rows[~given] = forecast.values[:, :, forecast.output.median][~given]
            forecast.values[given] = rows[given][:, None]
            forecast.methods[given] = Method.GIVEN


def _readings(manifest: Manifest, horizon: int, scenario_rows: int) -> Iterator[_Reading]:
    for output, first, fed in manifest.placed_outputs():
        if scenario_rows or max(output.horizons) > 0:
            yield _reading(output, first, fed, horizon, scenario_rows)


def _reading(
    output: OutputSpec, first: int, fed: int | None, horizon: int, scenario_rows: int
) -> _Reading:
    """Each row ahead is read with the longest of the output's horizons that reaches it."""
    ahead = np.arange(1, horizon + 1)
    floor = np.minimum(scenario_rows, ahead - 1)
    if fed is None:  # of a given row, the model's output for the row itself is the best one
        floor = np.minimum(scenario_rows, ahead)
    known = np.sort(output.horizons)
    place = np.searchsorted(known, ahead - floor, side="right") - 1
    steps = known[np.maximum(place, 0)]
    columns = [first + output.column(int(step)) for step in steps]
    sources = np.where(place < 0, -1, ahead - steps)
    return _Reading(output, sources, np.array(columns), fed)
