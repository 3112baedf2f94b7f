"""A forward alone: gather, cell and scatter, without queue, sessions and transport.

It is the least that a step can cost; benchmarks compare a server with it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from stepstate.engine.accelerator import place_states
from stepstate.engine.arena import Layout
from stepstate.engine.linear import Precision
from stepstate.engine.network import Network, RowHistory
from stepstate.engine.work import Floats
from stepstate.models import Model, build_timeline


class BareForward:
    """One model and the states of `capacity` sessions, all at the same t.

    Args:
        model: the model.
        capacity: sessions.
        precision: what the weights are kept as.
        accelerator: where states are and steps run, as torch names it; None: the host.
    """

    def __init__(
        self,
        model: Model,
        capacity: int,
        precision: Precision = Precision.FLOAT32,
        accelerator: str | None = None,
    ) -> None:
        manifest = model.manifest
        self._network = Network(model, build_timeline(model), precision)
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
        past = None
        if self._network.lagged:
            past = RowHistory(torch.from_numpy(self._arena.past(slots, at)), torch.from_numpy(at))
        with torch.inference_mode():
            states = torch.from_numpy(self._arena.gather(slots))
            y, states = self._network.step(torch.from_numpy(x), torch.from_numpy(at), states, past)
            self._arena.scatter(slots, states.numpy())
        self._arena.append(slots, at, x)
        return y.numpy()
