"""Lagged inputs: what the network is told of past rows, as the manifest declares it.

B sessions, W rows of a window of which the last T are being applied, D inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepstate.models import Lag, LaggedInput, Manifest, Rolling


class LaggedInputs:
    """The lagged inputs that the cell takes, or those that the head takes."""

    def __init__(self, manifest: Manifest, into: str) -> None:
        names = [column.name for column in manifest.inputs]
        self._parts: Sequence[tuple[LaggedInput, int]] = [
            (part, names.index(part.input)) for part in manifest.lags if part.into == into
        ]
        self._steps = [
            torch.tensor(part.steps if isinstance(part, Lag) else (part.steps,))
            for part, _ in self._parts
        ]

    def __bool__(self) -> bool:
        return bool(self._parts)

    def of(self, window: Tensor, rows: int) -> Tensor:
        """Their columns [B, T, n], for the last T rows of a window [B, W, D] as the network saw it.

        Args:
            window: past and present rows.
            rows: T.
        """
        columns = [
            self._rolled(part, window[:, :, column], rows)
            if isinstance(part, Rolling)
            else self._lagged(steps, window[:, :, column], rows)
            for (part, column), steps in zip(self._parts, self._steps, strict=True)
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=2)

    @staticmethod
    def _lagged(steps: Tensor, column: Tensor, rows: int) -> Tensor:
        first = column.shape[1] - rows
        places = torch.arange(first, first + rows)[:, None] - steps
        return column.index_select(1, places.flatten()).view(len(column), rows, len(steps))

    @staticmethod
    def _rolled(part: Rolling, column: Tensor, rows: int) -> Tensor:
        windows = column[:, -(rows + part.steps - 1) :].unfold(1, part.steps, 1)
        if part.statistic == "mean":
            return windows.mean(dim=2, keepdim=True)
        if part.statistic == "min":
            return windows.amin(dim=2, keepdim=True)
        return windows.amax(dim=2, keepdim=True)


def fill_unknown(window: Tensor, first: Tensor | None) -> Tensor:
    """Puts the declared fallback where a window [B, W, D] is NaN: there was no row yet.

    Args:
        window: rows as the network sees them.
        first: [B], the places of the sessions' first rows, which stand in (beyond the window:
            there is none yet); None: 0, the columns' level, does.
    """
    if first is not None:
        places = first.clamp(min=0, max=window.shape[1] - 1)[:, None, None].expand(
            -1, 1, window.shape[2]
        )
        window = torch.where(window.isnan(), window.gather(1, places), window)
    return window.nan_to_num(0.0)
