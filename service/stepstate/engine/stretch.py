"""Rows that follow one another in some sessions, applied piece by piece without looking back twice.

B sessions, T rows, D inputs, O outputs, N past rows, Rc the width of the cell's state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepstate.engine.cells import Trace
from stepstate.engine.network import Network, RowHistory


class RowSpan:
    """T rows of B sessions, of which the first ones are applied and the others are to come.

    Args:
        network: the model.
        phase: [B, T], the rows' phases.
        state: [B, Rc], the cells' states before them.
        past: the rows before them.
        first: [B, D], the first of them, raw; where a session has no past rows it is whole.
        trace: if given, filled with what every layer computed for rows that are stepped.
    """

    def __init__(
        self,
        network: Network,
        phase: Tensor,
        state: Tensor,
        past: RowHistory,
        *,
        first: Tensor,
        trace: Trace | None = None,
    ) -> None:
        self.state = state
        """[B, Rc], after the rows that are applied."""
        self._network = network
        self._phase = phase
        self._trace = trace
        self._done = 0
        self._window: Tensor | None = None
        if network.lagged:  # made once for all T rows, and completed as they are applied
            self._history = past.rows.shape[1]
            seen = network.scaled(first, network.place(phase[:, 0]))[:, None]
            known = network.window(past, phase[:, 0], seen)
            later = known.new_zeros(known.shape[0], phase.shape[1] - 1, known.shape[2])
            self._window = torch.cat((known, later), dim=1)

    def step(self, x: Tensor) -> Tensor:
        """Applies the next row x [B, D], raw; returns its y [B, O]."""
        place = self._network.place(self._phase[:, self._done])
        seen = self._network.scaled(x, place)
        window = self._completed(seen[:, None])
        y, self.state = self._network.step_seen(seen, place, self.state, window, self._trace)
        return y

    def sequence(self, x: Tensor) -> Tensor:
        """Applies the next rows x [B, k, D], raw; returns their y [B, k, O]."""
        batch, rows, width = x.shape
        phase = self._phase[:, self._done : self._done + rows]
        place = self._network.place(phase.flatten())
        seen = self._network.scaled(x.reshape(batch * rows, width), place).view(x.shape)
        window = self._completed(seen)
        y, self.state = self._network.sequence_seen(seen, place, self.state, window)
        return y

    def _completed(self, seen: Tensor) -> Tensor | None:
        """The window up to the next rows [B, k, D], as the network sees them."""
        first, self._done = self._done, self._done + seen.shape[1]
        if self._window is None:
            return None
        self._window[:, self._history + first : self._history + self._done] = seen
        return self._window[:, : self._history + self._done]
