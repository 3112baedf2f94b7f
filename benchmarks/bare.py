"""A forward alone: gather, cell and scatter, without queue, sessions and transport.

It is the least that a step can cost; benchmarks compare a server with it. And its matrix products
alone, which are the least that a forward can cost.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from stepstate.engine.accelerator import place_states
from stepstate.engine.arena import Layout
from stepstate.engine.linear import LinearKernel, Precision, make_linear
from stepstate.engine.network import Network, RowHistory
from stepstate.engine.runtimes import Runtime, make_stepper
from stepstate.engine.work import Floats
from stepstate.models import Model, build_timeline


class BareForward:
    """One model and the states of `capacity` sessions, all at the same t.

    Args:
        model: the model.
        capacity: sessions.
        runtime: what computes the steps on the host.
        accelerator: where states are and steps run, as torch names it; None: the host.
    """

    def __init__(
        self,
        model: Model,
        capacity: int,
        runtime: Runtime = Runtime.ONNX_RUNTIME,
        accelerator: str | None = None,
    ) -> None:
        manifest = model.manifest
        self._network = Network(model, build_timeline(model))
        self._stepper = make_stepper(model, self._network, runtime)
        layout = Layout(
            cell=self._network.state_width,
            history=manifest.history_rows,
            inputs=manifest.input_width,
            tracked=0,
        )
        blank = layout.blank(np.zeros(0, np.float32))
        self._arena, self._on_device = place_states(
            self._network, layout, blank, capacity, accelerator
        )
        for _ in range(capacity):
            self._arena.claim()

    def levels(self, rows: int) -> Floats:
        """The levels of x [T or 1, D] at the first T rows, raw units."""
        found: Floats = self._network.levels(self._network.place(torch.arange(rows))).numpy()
        return found

    def step(self, slots: NDArray[np.int64], x: Floats, t: int) -> Floats:
        """Applies raw row t, x [B, D], to the sessions in different slots [B].

        Returns:
            y [B, O] in raw units.
        """
        at = np.full(len(slots), t)
        if self._on_device is not None:
            outputs, _ = self._on_device.step(slots, x, at)
            self._on_device.commit()
            self._arena.append(slots, at, x)
            return outputs
        y, states = self._computed(slots, x, at, self._arena.gather(slots))
        self._arena.scatter(slots, states)
        self._arena.append(slots, at, x)
        return y

    def compute(self, x: Floats) -> None:
        """Computes row 0 of the first B sessions from blank states, and keeps nothing of it."""
        slots = np.arange(len(x))
        states = np.zeros((len(x), self._network.state_width), np.float32)
        self._computed(slots, x, np.zeros_like(slots), states)

    def _computed(
        self, slots: NDArray[np.int64], x: Floats, at: NDArray[np.int64], states: Floats
    ) -> tuple[Floats, Floats]:
        past = None
        if self._network.lagged:
            past = RowHistory(torch.from_numpy(self._arena.past(slots, at)), torch.from_numpy(at))
        with torch.inference_mode():
            return self._stepper.step(x, at, states, past)


class BareProducts:
    """The matrix products of the cell's layers alone, by the faster of torch's two ways."""

    def __init__(self, model: Model, rows: int) -> None:
        tensors = {name: torch.from_numpy(array) for name, array in model.tensors.items()}
        self._layers: list[tuple[LinearKernel, torch.Tensor]] = []
        for layer in range(model.manifest.cell.num_layers):
            names = (f"cell.weight_ih_l{layer}", f"cell.weight_hh_l{layer}")
            weight = torch.cat([tensors[name] for name in names], dim=1)
            kernel = make_linear(weight, tensors[f"cell.bias_ih_l{layer}"], Precision.FLOAT32)
            self._layers.append((kernel, torch.randn(rows, weight.shape[1])))

    def compute(self) -> None:
        """Multiplies B rows by the weights of every layer."""
        with torch.inference_mode():
            for kernel, rows in self._layers:
                kernel(rows)
