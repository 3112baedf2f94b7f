"""Recurrent cells as pure functions: (x, state) -> (h, state').

Each cell is written from its equations and shares one whole-sequence kernel,
PyTorch's own, with the same weights. Sources: the equations of DESIGN for the
LSTM; torch.nn.LSTM, GRU and RNN for gate order, biases and projection.

B rows of different sessions, F inputs of the network, L layers, H hidden units,
P = width of a layer's h (the projection's, else H), R = width of a state. A state
row holds h of every layer, the lowest first, then c of every layer where the cell
has one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from stepstate.engine.linear import LinearKernel, Precision, make_linear
from stepstate.models import CellKind, CellSpec

_M = TypeVar("_M", bound=nn.RNNBase)

MANY_ROWS = 16
"""From about here on four cheap operations take less time than one tanh."""
MAX_BUFFERED_ROWS = 256
"""Larger batches get new tensors each time: there the arithmetic hides what they cost."""
_ONE = torch.tensor(1.0)

Trace = list[dict[str, Tensor]]
"""What each layer computed, by gate or state, the lowest layer first."""


TRACE_NAMES = {
    CellKind.LSTM: frozenset("ifgocmh"),
    CellKind.GRU: frozenset("rznh"),
    CellKind.RNN_TANH: frozenset("h"),
    CellKind.RNN_RELU: frozenset("h"),
}
"""The names in a layer's trace: gates, candidates and states."""


class Cell(Protocol):
    """A stacked recurrent network."""

    state_width: int
    output: slice
    """Where in a state the top layer's h is."""

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


def build_cell(
    spec: CellSpec,
    input_size: int,
    tensors: dict[str, Tensor],
    precision: Precision = Precision.FLOAT32,
) -> Cell:
    """Makes the cell that a manifest names, with its weights (named as in torch.nn)."""
    if spec.kind is CellKind.LSTM:
        return LstmCell(spec, input_size, tensors, precision)
    if spec.kind is CellKind.GRU:
        return GruCell(spec, input_size, tensors, precision)
    return RnnCell(spec, input_size, tensors, precision)


class LstmCell:
    """i, f, o = sigmoid(...), g = tanh(...), c' = f c + i g, m = tanh(c'), h' = o m.

    With a projection, h' = W_hr (o m), as in torch.nn.LSTM.
    """

    def __init__(
        self, spec: CellSpec, input_size: int, tensors: dict[str, Tensor], precision: Precision
    ) -> None:
        module = nn.LSTM(
            input_size,
            spec.hidden_size,
            spec.num_layers,
            batch_first=True,
            proj_size=spec.proj_size,
        )
        self._module = _load(module, tensors)
        layers = range(spec.num_layers)
        self._gates = [self._layer_gates(tensors, layer, precision) for layer in layers]
        self._projections = [
            tensors[f"weight_hr_l{layer}"].t() if spec.proj_size else None for layer in layers
        ]
        self._sizes = [spec.output_size] * len(layers) + [spec.hidden_size] * len(layers)
        self.state_width = sum(self._sizes)
        self.output = _top(spec)
        self._buffers = Buffers(
            inputs=input_size,
            layers=spec.num_layers,
            hidden=spec.hidden_size,
            output=spec.output_size,
            device=tensors["weight_ih_l0"].device,
        )

    @staticmethod
    def _layer_gates(tensors: dict[str, Tensor], layer: int, precision: Precision) -> LinearKernel:
        """All four gates as one kernel over [x | h], the three of the sigmoid side by side."""
        weight = torch.cat((tensors[f"weight_ih_l{layer}"], tensors[f"weight_hh_l{layer}"]), dim=1)
        bias = tensors[f"bias_ih_l{layer}"] + tensors[f"bias_hh_l{layer}"]
        order = torch.arange(len(bias)).view(4, -1)[[0, 1, 3, 2]].flatten()
        return make_linear(weight[order], bias[order], precision)

    def step(self, x: Tensor, state: Tensor, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
        """See `Cell.step`; traces i, f, g, o, c, m and h.

        It works in place, in buffers that the next step reuses, and returns copies.
        """
        views = self._buffers.of(x.shape[0])
        views.x.copy_(x)
        views.state.copy_(state)
        i, f, o, g, m = views.i, views.f, views.o, views.g, views.m
        for own, gates, projection in zip(
            views.layers, self._gates, self._projections, strict=True
        ):
            gates.into(views.gates, own.inputs)
            views.sigmoids.sigmoid_()
            g.tanh_()
            own.c.mul_(f).addcmul_(i, g)
            _tanh_into(m, own.c)
            if projection is None:
                torch.mul(o, m, out=own.h)
            else:
                torch.mm(o * m, projection, out=own.h)
            if trace is not None:
                traced = {"i": i, "f": f, "g": g, "o": o, "c": own.c, "m": m, "h": own.h}
                trace.append({name: part.clone() for name, part in traced.items()})
        return views.layers[-1].h.clone(), views.state.clone()

    def sequence(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Cell.sequence`; torch.nn.LSTM's kernel."""
        depth = len(self._gates)
        parts = state.split(self._sizes, dim=1)
        h, (h_last, c_last) = self._module(x, (_stack(parts[:depth]), _stack(parts[depth:])))
        return h, torch.cat((*h_last, *c_last), dim=1)


@dataclass(frozen=True, slots=True)
class LayerViews:
    """One layer's part of B rows: its kernel's input [B, F + P], its h [B, P] and c [B, H]."""

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
    """Where rows are while an LSTM steps them in place, up to MAX_BUFFERED_ROWS at a time.

    A row is [x | h of every layer | c of every layer]: what a layer reads, x or the h of the layer
    below, lies beside its own h, so nothing is concatenated between the layers. The views are made
    once for each batch size: in Python a view costs about as much as the arithmetic of one row.
    """

    def __init__(
        self, *, inputs: int, layers: int, hidden: int, output: int, device: torch.device
    ) -> None:
        self._device = device
        self._inputs, self._layers = inputs, layers
        self._hidden, self._output = hidden, output
        self._memory = self._allocate(MAX_BUFFERED_ROWS)
        self._views: dict[int, Views] = {}

    def of(self, batch: int) -> Views:
        """The views of B rows; they hold what the last forward left."""
        views = self._views.get(batch)
        if views is None:
            if batch > MAX_BUFFERED_ROWS:
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
        first = h - output if layer else 0
        return LayerViews(
            whole[:, first : h + output], whole[:, h : h + output], whole[:, c : c + hidden]
        )


class _HiddenCell(ABC):
    """What GRU and RNN share: the state is h alone, and a sequence is torch's kernel."""

    def __init__(
        self, module: nn.RNNBase, spec: CellSpec, tensors: dict[str, Tensor], precision: Precision
    ) -> None:
        self._module = _load(module, tensors)
        layers = range(spec.num_layers)
        self._from_x = [_linear(tensors, "ih", layer, precision) for layer in layers]
        self._from_h = [_linear(tensors, "hh", layer, precision) for layer in layers]
        self._hidden = spec.hidden_size
        self.state_width = spec.num_layers * spec.hidden_size
        self.output = _top(spec)

    def step(self, x: Tensor, state: Tensor, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
        """See `Cell.step`."""
        hidden = []
        for layer, h in enumerate(state.split(self._hidden, dim=1)):
            x = self._step_layer(layer, x, h, trace)
            hidden.append(x)
        return x, torch.cat(hidden, dim=1)

    @abstractmethod
    def _step_layer(self, layer: int, x: Tensor, h: Tensor, trace: Trace | None) -> Tensor:
        """One layer's new h [B, H]."""

    def sequence(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Cell.sequence`; the kernel of torch.nn.GRU or torch.nn.RNN."""
        h, last = self._module(x, _stack(state.split(self._hidden, dim=1)))
        return h, torch.cat(tuple(last), dim=1)


class GruCell(_HiddenCell):
    """r, z = sigmoid(...), n = tanh(W_n x + b + r (W_hn h + b_hn)), h' = (1 - z) n + z h.

    It traces r, z, n and h.
    """

    def __init__(
        self, spec: CellSpec, input_size: int, tensors: dict[str, Tensor], precision: Precision
    ) -> None:
        module = nn.GRU(input_size, spec.hidden_size, spec.num_layers, batch_first=True)
        super().__init__(module, spec, tensors, precision)

    def _step_layer(self, layer: int, x: Tensor, h: Tensor, trace: Trace | None) -> Tensor:
        from_x, from_h = self._from_x[layer](x), self._from_h[layer](h.contiguous())
        gates = (from_x[:, : 2 * self._hidden] + from_h[:, : 2 * self._hidden]).sigmoid_()
        r, z = gates.chunk(2, dim=1)
        n = torch.addcmul(from_x[:, 2 * self._hidden :], r, from_h[:, 2 * self._hidden :])
        n.tanh_()
        new_h = torch.lerp(n, h, z)
        if trace is not None:
            trace.append({"r": r, "z": z, "n": n, "h": new_h})
        return new_h


class RnnCell(_HiddenCell):
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of the same; it traces h."""

    def __init__(
        self, spec: CellSpec, input_size: int, tensors: dict[str, Tensor], precision: Precision
    ) -> None:
        tanh = spec.kind is CellKind.RNN_TANH
        self._activate = torch.tanh_ if tanh else torch.relu_
        kind = "tanh" if tanh else "relu"
        sizes = (input_size, spec.hidden_size, spec.num_layers)
        super().__init__(
            nn.RNN(*sizes, batch_first=True, nonlinearity=kind), spec, tensors, precision
        )

    def _step_layer(self, layer: int, x: Tensor, h: Tensor, trace: Trace | None) -> Tensor:
        new_h = self._activate(self._from_x[layer](x) + self._from_h[layer](h.contiguous()))
        if trace is not None:
            trace.append({"h": new_h})
        return new_h


def _top(spec: CellSpec) -> slice:
    """The top layer's h in a state: the h of all layers come first, the lowest layer's before."""
    last = spec.num_layers * spec.output_size
    return slice(last - spec.output_size, last)


def _linear(
    tensors: dict[str, Tensor], part: str, layer: int, precision: Precision
) -> LinearKernel:
    """The kernel of `weight_<part>` and `bias_<part>`."""
    weight, bias = tensors[f"weight_{part}_l{layer}"], tensors[f"bias_{part}_l{layer}"]
    return make_linear(weight, bias, precision)


def _tanh_into(out: Tensor, a: Tensor) -> None:
    """tanh(a), for many rows as 2 sigmoid(2a) - 1, to 1e-7: of the two sigmoid is the faster.

    Only for what goes no further than h: in g the error would add up in c, step by
    step, where f is near 1. It uses sums and a tensor, because a Python number in an
    operator costs more here than the operator.
    """
    if a.shape[0] < MANY_ROWS:
        torch.tanh(a, out=out)
        return
    torch.add(a, a, out=out).sigmoid_()
    out.add_(out).sub_(_ONE)


def _load(module: _M, tensors: dict[str, Tensor]) -> _M:
    module.to(next(iter(tensors.values())).device).load_state_dict(tensors)
    return module.eval().requires_grad_(requires_grad=False)


def _stack(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(parts))
