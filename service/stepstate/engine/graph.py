"""One step of a model as an ONNX graph, which `runtimes.OnnxStepper` runs.

The equations are those of `cells`, gate by gate: each gate has a product of its own, so that ONNX
Runtime computes its sigmoid or tanh in place. What depends on time or on past rows is given:

    x [B, D] raw, state [B, Rc]
    levels [B, D], bases [B, O]     of a model that depends on time: the levels of x and y
    columns [B, n]                  calendar, and lagged inputs of the cell, if there are any
    features [B, m]                 lagged inputs of the head, if there are any
    -> y [B, O] raw, quantiles in no order; after [B, Rc]

B rows of different sessions, D inputs, O outputs, P the width of a layer's h, H hidden units,
Rc the width of a state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from stepstate.engine.network import Network
from stepstate.engine.work import Floats
from stepstate.models import CellKind, CellSpec, Model

OPSET, IR_VERSION = 17, 8
"""Of 2022: ONNX Runtime reads them since 1.13, and warns of none."""

Weights = Mapping[str, Floats]
"""The weights of a cell, named as in torch.nn."""


def build_step_graph(model: Model, network: Network) -> bytes:
    """The graph of a model's step, serialized; `network` is of the same model, in float32."""
    manifest, prefix = model.manifest, "cell."
    weights = {n.removeprefix(prefix): w for n, w in model.tensors.items() if n.startswith(prefix)}
    graph = _Graph()
    inputs = [_scaled(graph, network, manifest.input_width)]
    if manifest.network_width > manifest.input_width:
        inputs.append(graph.input("columns", manifest.network_width - manifest.input_width))
    h, after = _stepped(graph, manifest.cell, weights, graph.joined(*inputs))
    top = [h]
    if manifest.head_lags:
        top.append(graph.input("features", manifest.head_lags))
    weight, bias = network.linear_head
    y = graph.product(graph.joined(*top), weight, bias)
    if network.timed:
        y = graph.add("Add", y, graph.input("bases", manifest.output_width))
    return graph.serialized(y, after)


class _Graph:
    """A graph in the making. Values [B, n] are known by their names."""

    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        self._inputs: dict[str, int] = {}

    def input(self, name: str, width: int) -> str:
        """Rows [B, width] that are given to each run."""
        self._inputs[name] = width
        return name

    def constant(self, values: NDArray[np.generic]) -> str:
        """Values that are the same in each run."""
        name = f"constant{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def number(self, value: float) -> str:
        """A constant of one float32."""
        return self.constant(np.array(value, np.float32))

    def add(self, operator: str, *inputs: str, **attributes: int) -> str:
        """An operator's one result."""
        name = f"value{len(self._nodes)}"
        node = helper.make_node(operator, inputs, [name], **attributes)  # type: ignore[arg-type]
        self._nodes.append(node)
        return name

    def product(self, rows: str, weight: Floats, bias: Floats | None = None) -> str:
        """W v + b of rows [B, n]; the weight is [outputs, n]."""
        parts = [weight] if bias is None else [weight, bias]
        return self.add("Gemm", rows, *map(self.constant, parts), transB=1)

    def joined(self, *parts: str) -> str:
        """Rows side by side."""
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=1)

    def split(self, rows: str, widths: Sequence[int]) -> list[str]:
        """The parts of rows of these widths."""
        names = [f"part{place}" for place in range(len(widths))]
        sizes = self.constant(np.array(widths, np.int64))
        self._nodes.append(helper.make_node("Split", [rows, sizes], names, axis=1))
        return names

    def serialized(self, *outputs: str) -> bytes:
        """The whole graph, with these outputs in this order."""
        made = helper.make_graph(
            self._nodes,
            "step",
            [_rows(name, width) for name, width in self._inputs.items()],
            [_rows(name, None) for name in outputs],
            self._constants,
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(
            made, opset_imports=[opset], ir_version=IR_VERSION
        ).SerializeToString()


def _rows(name: str, width: int | None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])


def _scaled(graph: _Graph, network: Network, width: int) -> str:
    """`Network.scaled`."""
    x = graph.input("x", width)
    scaling = network.scaling
    if not scaling.identity:
        levels = graph.input("levels", width) if network.timed else graph.constant(scaling.levels)
        x = graph.add("Sub", x, levels)
        x = graph.add("Mul", x, graph.constant(scaling.inverse_scale))
    too_large = graph.add("Greater", graph.add("Abs", x), graph.number(scaling.largest))
    return graph.add("Where", too_large, graph.number(math.nan), x)


def _stepped(graph: _Graph, spec: CellSpec, weights: Weights, x: str) -> tuple[str, str]:
    """The top layer's h [B, P], and the new state."""
    layers, has_c = spec.num_layers, spec.kind is CellKind.LSTM
    widths = [spec.output_size] * layers + [spec.hidden_size] * (layers if has_c else 0)
    parts = graph.split(graph.input("state", sum(widths)), widths)
    hs, cs = parts[:layers], parts[layers:]
    for layer in range(layers):
        own = _Layer(graph, weights, layer, x, hs[layer])
        if spec.kind is CellKind.LSTM:
            hs[layer], cs[layer] = own.lstm(cs[layer])
        elif spec.kind is CellKind.GRU:
            hs[layer] = own.gru()
        else:
            hs[layer] = own.rnn(spec.kind)
        x = hs[layer]
    return x, graph.joined(*hs, *cs)


class _Layer:
    """One layer: what it gets from below [B, F], and its own h [B, P]."""

    def __init__(self, graph: _Graph, weights: Weights, layer: int, x: str, h: str) -> None:
        self._graph = graph
        self._x, self._h, self._joined = x, h, graph.joined(x, h)
        self._ih, self._hh = weights[f"weight_ih_l{layer}"], weights[f"weight_hh_l{layer}"]
        self._bias_ih, self._bias_hh = weights[f"bias_ih_l{layer}"], weights[f"bias_hh_l{layer}"]
        self._projection = weights.get(f"weight_hr_l{layer}")
        self._hidden = self._hh.shape[1] if self._projection is None else self._projection.shape[1]

    def lstm(self, c: str) -> tuple[str, str]:
        """The new h and c; torch.nn.LSTM has its gates in the order i, f, g, o."""
        add = self._graph.add
        i, f, o = (add("Sigmoid", self._gate(place)) for place in (0, 1, 3))
        g = add("Tanh", self._gate(2))
        c = add("Add", add("Mul", f, c), add("Mul", i, g))
        h = add("Mul", o, add("Tanh", c))
        if self._projection is not None:
            h = self._graph.product(h, self._projection)
        return h, c

    def gru(self) -> str:
        """The new h; torch.nn.GRU has its gates in the order r, z, n.

        Not n + z (h - n): where z is 1, h has to stay as it is for thousands of rows.
        """
        graph, add, n = self._graph, self._graph.add, self._rows_of(2)
        r, z = (add("Sigmoid", self._gate(place)) for place in (0, 1))
        from_x = graph.product(self._x, self._ih[n], self._bias_ih[n])
        from_h = graph.product(self._h, self._hh[n], self._bias_hh[n])
        new = add("Tanh", add("Add", from_x, add("Mul", r, from_h)))
        kept = add("Mul", z, self._h)
        return add("Add", add("Mul", add("Sub", graph.number(1.0), z), new), kept)

    def rnn(self, kind: CellKind) -> str:
        """The new h."""
        return self._graph.add("Tanh" if kind is CellKind.RNN_TANH else "Relu", self._gate(0))

    def _gate(self, place: int) -> str:
        """W_ih x + b_ih + W_hh h + b_hh of one gate [B, H]."""
        rows = self._rows_of(place)
        weight = np.concatenate((self._ih[rows], self._hh[rows]), axis=1)
        return self._graph.product(self._joined, weight, self._bias_ih[rows] + self._bias_hh[rows])

    def _rows_of(self, place: int) -> slice:
        return slice(place * self._hidden, (place + 1) * self._hidden)
