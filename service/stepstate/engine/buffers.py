"""Where rows lie while an LSTM steps them in place.

A row is [x | h of every layer | c of every layer]: what a layer takes, x or the h of the layer
below, lies beside its own h, so nothing is put together between the layers. The views are made
once for each batch size: in Python a view costs about as much as the arithmetic of one row.

B rows of different sessions, F inputs, L layers, H hidden units, P = width of a layer's h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 256
"""Larger batches get tensors of their own each time: there the arithmetic hides what they cost."""


@dataclass(frozen=True, slots=True)
class LayerViews:
    """One layer's part of B rows: its product's input [B, F + P], its h [B, P] and c [B, H]."""

    inputs: Tensor
    h: Tensor
    c: Tensor


@dataclass(frozen=True, slots=True)
class Views:
    """B rows: x [B, F], the state [B, L (P + H)], layers, and the gates of one layer at a time.

    `gates` [B, 4 H] holds i, f, o and g side by side, `sigmoids` the first three; `m` is [B, H].
    """

    x: Tensor
    state: Tensor
    layers: tuple[LayerViews, ...]
    gates: Tensor
    sigmoids: Tensor
    i: Tensor
    f: Tensor
    o: Tensor
    g: Tensor
    m: Tensor


class Buffers:
    """Memory for one forward at a time of up to MAX_ROWS rows, and its views by batch size."""

    def __init__(
        self, *, inputs: int, layers: int, hidden: int, output: int, device: torch.device
    ) -> None:
        self._device = device
        self._inputs, self._layers = inputs, layers
        self._hidden, self._output = hidden, output
        self._memory = self._allocate(MAX_ROWS)
        self._views: dict[int, Views] = {}

    def of(self, batch: int) -> Views:
        """The views of B rows; they hold what the last forward left."""
        views = self._views.get(batch)
        if views is None:
            if batch > MAX_ROWS:
                return self._cut(*self._allocate(batch))
            views = self._views[batch] = self._cut(*(part[:batch] for part in self._memory))
        return views

    def _allocate(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        width = self._inputs + self._layers * (self._output + self._hidden)
        sizes = (width, 4 * self._hidden, self._hidden)
        whole, gates, m = (torch.empty(rows, size, device=self._device) for size in sizes)
        return whole, gates, m

    def _cut(self, whole: Tensor, gates: Tensor, m: Tensor) -> Views:
        inputs, hidden = self._inputs, self._hidden
        i, f, o, g = gates.split(hidden, dim=1)
        layers = tuple(self._layer(whole, layer) for layer in range(self._layers))
        x, state = whole[:, :inputs], whole[:, inputs:]
        return Views(x, state, layers, gates, gates[:, : 3 * hidden], i, f, o, g, m)

    def _layer(self, whole: Tensor, layer: int) -> LayerViews:
        output, hidden = self._output, self._hidden
        h = self._inputs + layer * output
        c = self._inputs + self._layers * output + layer * hidden
        taken = h - output if layer else 0
        return LayerViews(
            whole[:, taken : h + output], whole[:, h : h + output], whole[:, c : c + hidden]
        )
