"""What stands in for missing values: the model's own forecast, or the row before.

B rows of different sessions, D inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepstate.engine.network import Network, Past
from stepstate.models import Manifest


class StandIns:
    """Fills rows in which values are missing."""

    def __init__(self, manifest: Manifest, network: Network) -> None:
        self._network = network
        self._columns = next_columns(manifest)

    def filled(
        self, x: Tensor, phase: Tensor, state: Tensor, past: Past, *, impute: Tensor
    ) -> Tensor:
        """Rows x [B, D] without NaN, but for sessions whose last row is not known.

        Args:
            x: raw units, NaN is missing.
            phase: [B], the steps of these rows.
            state: [B, Rc], the cells' states before them.
            past: the rows before them.
            impute: [B], where the model's forecast is to stand in, if it has one for the column.
        """
        stand_in = past.rows[:, -1]
        if self._columns and impute.any():
            y = self._network.read(phase, state, past)
            forecast = torch.full_like(x, torch.nan)
            forecast[:, list(self._columns)] = y[:, list(self._columns.values())]
            stand_in = torch.where(impute[:, None] & ~forecast.isnan(), forecast, stand_in)
        return torch.where(x.isnan(), stand_in, x)


def next_columns(manifest: Manifest) -> dict[int, int]:
    """The inputs that the model forecasts a row ahead: their column of x, and that of y."""
    found: dict[int, int] = {}
    for output, first, fed in manifest.placed_outputs():
        if fed is not None and 1 in output.horizons:
            found.setdefault(fed, first + output.column(1) + output.median)
    return found
