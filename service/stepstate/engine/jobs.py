"""Requests with many rows, or with `inspect`: run in chunks, on a copy of the state."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from stepstate.engine.work import Floats, Layers, Work

W = TypeVar("W", bound=Work)


class Job(Generic[W]):
    """One such request under way: what is done of it, and its state [R] so far."""

    def __init__(self, work: W, phases: int) -> None:
        self.work = work
        self.x = torch.from_numpy(np.array(work.x, np.float32).reshape(work.rows, -1))
        self.state: Tensor | None = None
        self.done = 0
        self.overflowed = False
        self._phases = phases
        self._outputs: list[Floats] = []
        self._layers: list[Layers] = []

    @property
    def left(self) -> int:
        """Rows still to run."""
        return self.work.rows - self.done

    def phases(self, rows: int) -> Tensor:
        """The phases of the next rows."""
        return (
            torch.arange(self.done, self.done + rows).add_(self.work.phase).remainder_(self._phases)
        )

    def take(
        self, rows: int, y: Tensor, state: Tensor, trace: list[dict[str, Tensor]], place: int
    ) -> None:
        """Keeps what the next rows gave: y [rows, O], the state after them, this row's trace."""
        self.done += rows
        self.state = state
        self.overflowed = not bool(y.isfinite().all() and state.isfinite().all())
        if self.work.last_only:
            self._outputs.clear()
            self._layers.clear()
            y = y[-1:]
        self._outputs.append(y.numpy())
        if trace:
            self._layers.append(
                [{name: part[place].numpy() for name, part in layer.items()} for layer in trace]
            )

    def results(self) -> tuple[Floats, Layers | None]:
        """Outputs [T, O] ([1, O] with last_only), and with inspect the layers' traces."""
        y = np.concatenate(self._outputs)
        if not self._layers:
            return y, None
        depth = range(len(self._layers[0]))
        layers = [
            {name: np.stack([row[layer][name] for row in self._layers]) for name in first}
            for layer in depth
            for first in (self._layers[0][layer],)
        ]
        return y, layers
