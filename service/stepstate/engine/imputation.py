"""What stands in for missing values: the model's own forecast, the row before, or a level.

A value that is missing is the model's forecast of it from the row before, where the session wants
that and the model forecasts the column; else the column's last value; and as long as the column
has had none, its level: what the model takes off it, the mean and the profile at that time. A
level that stood in is no value: NaN is kept of it, so that lagged inputs see their fallback and no
row is scored by it.

B sessions, T rows, D inputs, O outputs, Rc the width of the cell's state.
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
from stepstate.engine.stretch import RowSpan
from stepstate.engine.work import Floats
from stepstate.models import Manifest


class Imputer:
    """Applies rows in which values are missing."""

    def __init__(self, manifest: Manifest, network: Network) -> None:
        self._network = network
        columns = next_columns(manifest)
        self._forecast = list(columns)
        self._inputs = torch.tensor(self._forecast, dtype=torch.int64)
        self._outputs = torch.tensor(list(columns.values()), dtype=torch.int64)

    def one_by_one(self, x: Floats) -> NDArray[np.int64]:
        """The places of rows [T, D] of a session that need the forecast of the row before."""
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
            impute: [B], where the model's forecast is to stand in, if it has one for the column.
            trace: if given, filled with what every layer computed for the one row.

        Returns:
            The rows [B, T, D] to keep, NaN where a level stood in; y [B, T, O]; the states after.
        """
        x = x.clone()
        own = self._own(x, past.at, impute)
        _carry_on(x, past.rows[:, -1])
        unknown = x.isnan()
        if unknown.any():
            place = self._network.place(phase.flatten())
            levels = self._network.levels(place).expand(phase.numel(), x.shape[2])
            x = torch.where(unknown, levels.view(x.shape), x)
        stretch = RowSpan(self._network, phase, state, past, first=x[:, 0], trace=trace)
        y = self._run(stretch, x, own, past, phase)
        x[unknown & ~own] = torch.nan
        return x, y, stretch.state

    def _run(
        self, stretch: RowSpan, x: Tensor, own: Tensor, past: RowHistory, phase: Tensor
    ) -> Tensor:
        """Applies rows, and puts the model's forecasts into them where `own` [B, T, D]."""
        found: list[Tensor] = []
        for first, last, alone in _pieces(own.any(dim=2).any(dim=0).tolist()):
            if not alone and last - first > 1:
                found.append(stretch.sequence(x[:, first:last]))
                continue
            for t in range(first, last):
                if alone:
                    told = found[-1][:, -1] if found else None
                    if told is None:
                        told = self._network.read(phase[:, 0], stretch.state, past)
                    self._put(x[:, t], own[:, t], told)
                found.append(stretch.step(x[:, t])[:, None])
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _own(self, x: Tensor, at: Tensor, impute: Tensor) -> Tensor:
        """Where [B, T, D] the model's own forecast is to stand in; there is none of a first row."""
        own = torch.zeros(x.shape, dtype=torch.bool)
        if self._forecast and impute.any():
            wanted = impute[:, None] & (at[:, None] + torch.arange(x.shape[1]) > 0)
            own[:, :, self._forecast] = x[:, :, self._forecast].isnan() & wanted[:, :, None]
        return own

    def _put(self, x: Tensor, own: Tensor, y: Tensor) -> None:
        """Puts the forecasts of a row x [B, D] into it: y [B, O] of the row before."""
        forecast, wanted = y.index_select(1, self._outputs), own.index_select(1, self._inputs)
        given = x.index_select(1, self._inputs)
        x.index_copy_(1, self._inputs, torch.where(wanted, forecast, given))


def next_columns(manifest: Manifest) -> dict[int, int]:
    """The inputs that the model forecasts a row ahead: their column of x, and that of y."""
    found: dict[int, int] = {}
    for output, first, fed in manifest.placed_outputs():
        if fed is not None and 1 in output.horizons:
            found.setdefault(fed, first + output.column(1) + output.median)
    return found


def _carry_on(x: Tensor, before: Tensor) -> None:
    """Puts each column's last value into rows x [B, T, D] where it is missing, if it had one."""
    values = torch.cat((before[:, None], x), dim=1)
    places = torch.arange(values.shape[1])[None, :, None].expand(values.shape)
    last = torch.where(values.isnan(), torch.zeros_like(places), places).cummax(dim=1).values
    x.copy_(values.gather(1, last)[:, 1:])


def _pieces(alone: Sequence[bool]) -> Iterator[tuple[int, int, bool]]:
    """Runs of rows that all need the forecast of the row before, or that all need none."""
    first = 0
    for which, run in groupby(alone):
        last = first + len(list(run))
        yield first, last, which
        first = last
