"""Recurrent cells as pure functions: (x, state) -> (h, state').

Each cell is written from its equations and shares one whole-sequence kernel,
PyTorch's own, with the same weights. Sources: the equations of DESIGN for the
LSTM; torch.nn.LSTM, GRU and RNN for gate order, biases and projection.

B rows of different sessions, L layers, H hidden units, P = width of a layer's
h (the projection's, else H), R = width of a state. A state row holds h of every
layer, the lowest first, then c of every layer where the cell has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from stepstate.models import CellKind, CellSpec

_M = TypeVar("_M", bound=nn.RNNBase)

Trace = list[dict[str, Tensor]]
"""What each layer computed, by gate or state, the lowest layer first."""


class Cell(Protocol):
    """A stacked recurrent network."""

    state_width: int

    def step(self, x: Tensor, state: Tensor, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
        """Applies one row to each of B states.

        Args:
            x: [B, F], the network's input.
            state: [B, R].
            trace: if given, filled with the gates and states [B, H] of every layer.

        Returns:
            The top layer's h [B, P], and the new states [B, R].
        """
        ...

    def sequence(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Applies T rows to each of B states.

        Args:
            x: [B, T, F].
            state: [B, R].

        Returns:
            The top layer's h of every row [B, T, P], and the new states [B, R].
        """
        ...


def build_cell(spec: CellSpec, input_size: int, tensors: dict[str, Tensor]) -> Cell:
    """Makes the cell that a manifest names, with its weights (named as in torch.nn)."""
    if spec.kind is CellKind.LSTM:
        return LstmCell(spec, input_size, tensors)
    if spec.kind is CellKind.GRU:
        return GruCell(spec, input_size, tensors)
    return RnnCell(spec, input_size, tensors)


class LstmCell:
    """i, f, o = sigmoid(...), g = tanh(...), c' = f c + i g, m = tanh(c'), h' = o m.

    With a projection, h' = W_hr (o m), as in torch.nn.LSTM.
    """

    def __init__(self, spec: CellSpec, input_size: int, tensors: dict[str, Tensor]) -> None:
        module = nn.LSTM(
            input_size,
            spec.hidden_size,
            spec.num_layers,
            batch_first=True,
            proj_size=spec.proj_size,
        )
        self._module = _load(module, tensors)
        layers = range(spec.num_layers)
        # The sigmoid gates side by side, so that one operation serves all three.
        self._weights = [_Weights(tensors, layer, order=(0, 1, 3, 2)) for layer in layers]
        self._projections = [
            tensors[f"weight_hr_l{layer}"].t() if spec.proj_size else None for layer in layers
        ]
        self._hidden = spec.hidden_size
        self._sizes = [spec.output_size] * len(layers) + [spec.hidden_size] * len(layers)
        self.state_width = sum(self._sizes)

    def step(self, x: Tensor, state: Tensor, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
        """See `Cell.step`; traces i, f, g, o, c, m and h."""
        parts = state.split(self._sizes, dim=1)
        depth = len(self._weights)
        hidden, memory = [], []
        for layer, (weights, projection) in enumerate(
            zip(self._weights, self._projections, strict=True)
        ):
            total = weights.apply(x, parts[layer])
            gates, candidate = total.split((3 * self._hidden, self._hidden), dim=1)
            i, f, o = gates.sigmoid_().chunk(3, dim=1)
            g = candidate.tanh_()
            c = torch.mul(f, parts[depth + layer]).addcmul_(i, g)
            m = c.tanh()
            x = o * m
            if projection is not None:
                x = x @ projection
            hidden.append(x)
            memory.append(c)
            if trace is not None:
                trace.append({"i": i, "f": f, "g": g, "o": o, "c": c, "m": m, "h": x})
        return x, torch.cat(hidden + memory, dim=1)

    def sequence(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Cell.sequence`; torch.nn.LSTM's kernel."""
        depth = len(self._weights)
        parts = state.split(self._sizes, dim=1)
        h, (h_last, c_last) = self._module(x, (_stack(parts[:depth]), _stack(parts[depth:])))
        return h, torch.cat((*h_last, *c_last), dim=1)


class GruCell:
    """r, z = sigmoid(...), n = tanh(W_n x + b + r (W_hn h + b_hn)), h' = (1 - z) n + z h."""

    def __init__(self, spec: CellSpec, input_size: int, tensors: dict[str, Tensor]) -> None:
        module = nn.GRU(input_size, spec.hidden_size, spec.num_layers, batch_first=True)
        self._module = _load(module, tensors)
        self._weights = [_Weights(tensors, layer) for layer in range(spec.num_layers)]
        self._hidden = spec.hidden_size
        self.state_width = spec.num_layers * spec.hidden_size

    def step(self, x: Tensor, state: Tensor, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
        """See `Cell.step`; traces r, z, n and h."""
        hidden = []
        for weights, h in zip(self._weights, state.split(self._hidden, dim=1), strict=True):
            from_x, from_h = weights.products(x, h)
            gates = (from_x[:, : 2 * self._hidden] + from_h[:, : 2 * self._hidden]).sigmoid_()
            r, z = gates.chunk(2, dim=1)
            n = torch.addcmul(from_x[:, 2 * self._hidden :], r, from_h[:, 2 * self._hidden :])
            n.tanh_()
            x = torch.lerp(n, h, z)
            hidden.append(x)
            if trace is not None:
                trace.append({"r": r, "z": z, "n": n, "h": x})
        return x, torch.cat(hidden, dim=1)

    def sequence(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Cell.sequence`; torch.nn.GRU's kernel."""
        h, last = self._module(x, _stack(state.split(self._hidden, dim=1)))
        return h, torch.cat(tuple(last), dim=1)


class RnnCell:
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of the same."""

    def __init__(self, spec: CellSpec, input_size: int, tensors: dict[str, Tensor]) -> None:
        tanh = spec.kind is CellKind.RNN_TANH
        module = nn.RNN(
            input_size,
            spec.hidden_size,
            spec.num_layers,
            batch_first=True,
            nonlinearity="tanh" if tanh else "relu",
        )
        self._module = _load(module, tensors)
        self._weights = [_Weights(tensors, layer) for layer in range(spec.num_layers)]
        self._activate = torch.tanh_ if tanh else torch.relu_
        self._hidden = spec.hidden_size
        self.state_width = spec.num_layers * spec.hidden_size

    def step(self, x: Tensor, state: Tensor, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
        """See `Cell.step`; traces h."""
        hidden = []
        for weights, h in zip(self._weights, state.split(self._hidden, dim=1), strict=True):
            x = self._activate(weights.apply(x, h))
            hidden.append(x)
            if trace is not None:
                trace.append({"h": x})
        return x, torch.cat(hidden, dim=1)

    def sequence(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Cell.sequence`; torch.nn.RNN's kernel."""
        h, last = self._module(x, _stack(state.split(self._hidden, dim=1)))
        return h, torch.cat(tuple(last), dim=1)


class _Weights:
    """One layer's matrices, transposed once, with the gate blocks in a chosen order."""

    def __init__(
        self, tensors: dict[str, Tensor], layer: int, *, order: tuple[int, ...] | None = None
    ) -> None:
        def arranged(name: str) -> Tensor:
            blocks = tensors[f"{name}_l{layer}"]
            if order is None:
                return blocks
            chunks = blocks.chunk(len(order))
            return torch.cat([chunks[place] for place in order])

        self._from_x = arranged("weight_ih").t().contiguous()
        self._from_h = arranged("weight_hh").t().contiguous()
        self._bias_x = arranged("bias_ih")
        self._bias_h = arranged("bias_hh")
        self._bias = self._bias_x + self._bias_h

    def apply(self, x: Tensor, h: Tensor) -> Tensor:
        """W_ih x + b_ih + W_hh h + b_hh, [B, gates H]."""
        return torch.addmm(self._bias, x, self._from_x).addmm_(h, self._from_h)

    def products(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """W_ih x + b_ih and W_hh h + b_hh, apart."""
        from_x = torch.addmm(self._bias_x, x, self._from_x)
        return from_x, torch.addmm(self._bias_h, h, self._from_h)


def _load(module: _M, tensors: dict[str, Tensor]) -> _M:
    module.load_state_dict(tensors)
    return module.eval().requires_grad_(requires_grad=False)


def _stack(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(parts))
