"""Imputes missing values: by the model's own forecast, the row before, or a level.

A missing value becomes the model's forecast of it from the row before, where the session wants
that and the model forecasts the column; else the column's last value; and as long as the column
has had none, its level: what the model subtracts from it, the mean and the profile at that time. A
level is not kept as a value: the past rows keep NaN, so that lagged inputs see their fallback and
no row is scored by it.

B sessions, T rows, D inputs, O outputs, N past rows, Rc the width of the cell's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepstate.engine.cells import Trace
from stepstate.engine.network import Network, RowHistory
from stepstate.engine.work import Floats
from stepstate.models import Manifest


class Imputer:
    """Applies rows that have missing values."""

    def __init__(self, manifest: Manifest, network: Network) -> None:
        self._network = network
        columns = next_columns(manifest)
        self._forecast = list(columns)
        self._inputs = torch.tensor(self._forecast, dtype=torch.int64)
        self._outputs = torch.tensor(list(columns.values()), dtype=torch.int64)

    def one_by_one(self, x: Floats) -> NDArray[np.int64]:
        """The places of those rows of x [T, D] that need the forecast of the row before."""
        missing: NDArray[np.int64] = np.flatnonzero(np.isnan(x[:, self._forecast]).any(axis=1))
        return missing

    def apply(
        self,
        x: Tensor,
        phase: Tensor,
        state: Tensor,
        past: RowHistory,
        *,
        impute: Tensor,
        trace: Trace | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Applies T rows to each of B states.

        Args:
            x: [B, T, D], raw units, NaN is missing.
            phase: [B, T].
            state: [B, Rc].
            past: the rows before; of a model that is not `lagged` the last one is enough.
            impute: [B], which sessions use the model's forecast, if it has one for the column.
            trace: if given, filled with what every layer computed for the one row.

        Returns:
            The rows [B, T, D] to keep, NaN where a level was used; y [B, T, O]; the states after.
        """
        x = x.clone()
        own = self._own(x, past.at, impute)
        _carry_on(x, past.rows[:, -1])
        unknown = x.isnan()
        if unknown.any():
            place = self._network.place(phase.flatten())
            levels = self._network.levels(place).expand(phase.numel(), x.shape[2])
            x = torch.where(unknown, levels.view(x.shape), x)
        span = RowSpan(self._network, phase, state, past, first=x[:, 0], trace=trace)
        y = self._run(span, x, own, past, phase)
        x[unknown & ~own] = torch.nan
        return x, y, span.state

    def _run(
        self, span: RowSpan, x: Tensor, own: Tensor, past: RowHistory, phase: Tensor
    ) -> Tensor:
        """Applies rows, with the model's forecasts in the places of `own` [B, T, D]."""
        found: list[Tensor] = []
        for first, last, alone in _pieces(own.any(dim=2).any(dim=0).tolist()):
            if not alone and last - first > 1:
                found.append(span.sequence(x[:, first:last]))
                continue
            for t in range(first, last):
                if alone and found:
                    self._put(x[:, t], own[:, t], found[-1][:, -1])
                elif alone:
                    y = self._network.read(phase[:, 0], span.state, past)
                    self._put(x[:, t], own[:, t], y)
                found.append(span.step(x[:, t])[:, None])
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _own(self, x: Tensor, at: Tensor, impute: Tensor) -> Tensor:
        """Where [B, T, D] the model's own forecast is used; a session's first row has none."""
        own = torch.zeros(x.shape, dtype=torch.bool)
        if self._forecast and impute.any():
            wanted = impute[:, None] & (at[:, None] + torch.arange(x.shape[1]) > 0)
            own[:, :, self._forecast] = x[:, :, self._forecast].isnan() & wanted[:, :, None]
        return own

    def _put(self, x: Tensor, own: Tensor, y: Tensor) -> None:
        """Puts the forecasts of a row x [B, D] into it, from y [B, O] of the row before."""
        forecast, wanted = y.index_select(1, self._outputs), own.index_select(1, self._inputs)
        given = x.index_select(1, self._inputs)
        x.index_copy_(1, self._inputs, torch.where(wanted, forecast, given))


class RowSpan:
    """T successive rows of B sessions, applied in pieces that share one window of past rows.

    Args:
        network: the model.
        phase: [B, T], the rows' phases.
        state: [B, Rc], the cells' states before them.
        past: the rows before them.
        first: [B, D], the first of them, raw; without gaps where a session has no past rows.
        trace: if given, filled with what every layer computed for rows that are stepped.
    """

    def __init__(
        self,
        network: Network,
        phase: Tensor,
        state: Tensor,
        past: RowHistory,
        *,
        first: Tensor,
        trace: Trace | None = None,
    ) -> None:
        self.state = state
        """[B, Rc], after the rows that have been applied."""
        self._network = network
        self._phase = phase
        self._trace = trace
        self._done = 0
        self._window: Tensor | None = None
        if network.lagged:  # made once for all T rows, and filled as they are applied
            self._history = past.rows.shape[1]
            seen = network.scaled(first, network.place(phase[:, 0]))[:, None]
            known = network.window(past, phase[:, 0], seen)
            later = known.new_zeros(known.shape[0], phase.shape[1] - 1, known.shape[2])
            self._window = torch.cat((known, later), dim=1)

    def step(self, x: Tensor) -> Tensor:
        """Applies the next row x [B, D], raw; returns its y [B, O]."""
        place = self._network.place(self._phase[:, self._done])
        seen = self._network.scaled(x, place)
        window = self._window_with(seen[:, None])
        y, self.state = self._network.step_seen(seen, place, self.state, window, self._trace)
        return y

    def sequence(self, x: Tensor) -> Tensor:
        """Applies the next rows x [B, k, D], raw; returns their y [B, k, O]."""
        batch, rows, width = x.shape
        phase = self._phase[:, self._done : self._done + rows]
        place = self._network.place(phase.flatten())
        seen = self._network.scaled(x.reshape(batch * rows, width), place).view(x.shape)
        window = self._window_with(seen)
        y, self.state = self._network.sequence_seen(seen, place, self.state, window)
        return y

    def _window_with(self, seen: Tensor) -> Tensor | None:
        """The window up to the next rows [B, k, D], as the network sees them."""
        first, self._done = self._done, self._done + seen.shape[1]
        if self._window is None:
            return None
        self._window[:, self._history + first : self._history + self._done] = seen
        return self._window[:, : self._history + self._done]


def next_columns(manifest: Manifest) -> dict[int, int]:
    """The inputs that the model forecasts a row ahead: their column of x, and that of y."""
    found: dict[int, int] = {}
    for output, first, fed in manifest.placed_outputs():
        if fed is not None and 1 in output.horizons:
            found.setdefault(fed, first + output.column(1) + output.median)
    return found


def _carry_on(x: Tensor, before: Tensor) -> None:
    """Fills missing values of rows x [B, T, D] with the column's last value, if it had one."""
    values = torch.cat((before[:, None], x), dim=1)
    places = torch.arange(values.shape[1])[None, :, None].expand(values.shape)
    last = torch.where(values.isnan(), torch.zeros_like(places), places).cummax(dim=1).values
    x.copy_(values.gather(1, last)[:, 1:])


def _pieces(alone: Sequence[bool]) -> Iterator[tuple[int, int, bool]]:
    """Runs of rows: [first, last), and whether all of them need the forecast of the row before."""
    first = 0
    for which, run in groupby(alone):
        last = first + len(list(run))
        yield first, last, which
        first = last
