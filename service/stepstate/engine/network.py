"""From raw x to raw y: scaling and calendar, the cell, the linear head.

B rows, T rows in a row, D inputs, O outputs, F the network's input width, R
the state's width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepstate.engine.cells import Trace, build_cell
from stepstate.models import Manifest, Model, Timeline


class Network:
    """A model as a pure function: (x, phase, state) -> (y, state')."""

    def __init__(self, model: Model, timeline: Timeline) -> None:
        manifest = model.manifest
        tensors = {name: torch.from_numpy(array) for name, array in model.tensors.items()}
        prefix = "cell."
        cell = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self._cell = build_cell(manifest.cell, manifest.network_width, cell)
        self._levels = torch.from_numpy(timeline.levels)
        self._calendar = torch.from_numpy(timeline.calendar)
        self._bases = torch.from_numpy(timeline.bases)
        self._timed = manifest.needs_time
        self._inverse_scale = 1 / torch.tensor([i.scale for i in manifest.inputs])
        self._plain = not self._timed and all(i.scale == 1 and i.mean == 0 for i in manifest.inputs)
        # Beyond it W x may overflow in one order of additions and not in another: whether a row can
        # be applied would depend on its batch. Such rows are made NaN, and so refused.
        weights = tensors["cell.weight_ih_l0"].double().abs().sum(dim=1).max().item()
        self._largest = 1e38 / max(1.0, weights)
        # y's scaling is folded into the head, and so is its level where that is constant.
        scale = _output_scale(manifest)
        self._head = (tensors["head.weight"] * scale[:, None]).t().contiguous()
        self._head_bias = tensors["head.bias"] * scale
        if not self._timed:
            self._head_bias = self._head_bias + self._bases[0]

    @property
    def state_width(self) -> int:
        """R."""
        return self._cell.state_width

    def step(
        self, x: Tensor, phase: Tensor, state: Tensor, trace: Trace | None = None
    ) -> tuple[Tensor, Tensor]:
        """Applies one raw row to each of B states.

        Args:
            x: [B, D], raw units.
            phase: [B], the phases of the rows.
            state: [B, R].
            trace: if given, filled with what every layer computed.

        Returns:
            y [B, O] in raw units, and the new states [B, R].
        """
        h, state = self._cell.step(self._network_input(x, phase), state, trace)
        y = torch.addmm(self._head_bias, h, self._head)
        if self._timed:
            y += self._bases.index_select(0, phase)
        return y, state

    def sequence(self, x: Tensor, phase: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Applies T raw rows to each of B states.

        Args:
            x: [B, T, D], raw units.
            phase: [B, T].
            state: [B, R].

        Returns:
            y [B, T, O] in raw units, and the new states [B, R].
        """
        batch, rows, width = x.shape
        flat = phase.flatten()
        scaled = self._network_input(x.reshape(batch * rows, width), flat)
        h, state = self._cell.sequence(scaled.view(batch, rows, -1), state)
        y = torch.addmm(self._head_bias, h.reshape(batch * rows, -1), self._head)
        if self._timed:
            y += self._bases.index_select(0, flat)
        return y.view(batch, rows, -1), state

    def _network_input(self, x: Tensor, phase: Tensor) -> Tensor:
        x = self._scaled(x, phase)
        if x.abs().max().item() > self._largest:
            x = x.masked_fill(x.abs() > self._largest, math.nan)
        if not self._timed:
            return x
        return torch.cat((x, self._calendar.index_select(0, phase)), dim=1)

    def _scaled(self, x: Tensor, phase: Tensor) -> Tensor:
        if self._plain:
            return x
        levels = self._levels.index_select(0, phase) if self._timed else self._levels
        return (x - levels) * self._inverse_scale


def _output_scale(manifest: Manifest) -> Tensor:
    scales = [output.scale for output in manifest.outputs for _ in output.horizons]
    return torch.tensor(scales, dtype=torch.float32)
