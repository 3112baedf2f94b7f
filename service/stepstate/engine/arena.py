"""The preallocated states of a model's sessions.

Rule 1: only the engine touches the arena.
Rule 2: one session's state is one contiguous row, so a snapshot is one copy
        and a gather one look-up. It is NumPy's, whose scatter takes a third of torch's time.
Rule 3: a free slot may hold anything; `claim` makes it blank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepstate.engine.layout import Layout, append_row, past_rows
from stepstate.engine.work import Floats


class Arena:
    """States [capacity, R] in float32 and the list of free slots.

    Args:
        capacity: slots.
        layout: the parts of a state.
        blank: the state [R] of a session without rows.
    """

    def __init__(self, capacity: int, layout: Layout, blank: Floats) -> None:
        # NumPy's zeros are untouched pages: memory is used as slots are, not at start.
        self._rows = np.zeros((capacity, layout.width), np.float32)
        self._rings = layout.rings(self._rows)
        self._cells = self._rows[:, : layout.cell]
        self._blank = blank
        self._free = list(range(capacity - 1, -1, -1))
        self._capacity = capacity
        self._tracked = self._rows[:, layout.tracked_from :]

    @property
    def used(self) -> int:
        """Slots that are claimed."""
        return self._capacity - len(self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes of their states."""
        return self.used * self._blank.nbytes

    def claim(self) -> int:
        """Takes a free slot, with a blank state. The caller has checked that one is free."""
        slot = self._free.pop()
        self._rows[slot] = self._blank
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        self._free.append(slot)

    def gather(self, slots: NDArray[np.int64]) -> Floats:
        """Copies the cells' states [B, Rc] of slots [B]."""
        return self._cells[slots]

    def scatter(self, slots: NDArray[np.int64], states: Floats) -> None:
        """Writes the cells' states [B, Rc] of different slots [B]."""
        self._cells[slots] = states

    def past(self, slots: NDArray[np.int64], at: NDArray[np.int64]) -> Floats:
        """Copies the past rows [B, N, D] of slots [B] that stand at `at` [B], the oldest first."""
        return past_rows(self._rings, slots, at)

    def past_row(self, slots: NDArray[np.int64], row: NDArray[np.int64]) -> Floats:
        """Copies one past row [B, D] of each slot: row `row` [B], of the last N."""
        found: Floats = self._rings[slots, row % self._rings.shape[1]]
        return found

    def append(self, slots: NDArray[np.int64], at: NDArray[np.int64], x: Floats) -> None:
        """Adds row `at` [B], x [B, D], to the past rows of different slots [B]."""
        append_row(self._rings, slots, at, x)

    def tracked(self, slots: NDArray[np.int64]) -> Floats:
        """Copies what is tracked [B, Q] of slots [B]."""
        return self._tracked[slots]

    def write_tracked(self, slots: NDArray[np.int64], parts: Floats) -> None:
        """Writes what is tracked [B, Q] of different slots [B]."""
        self._tracked[slots] = parts

    def read(self, slots: NDArray[np.int64]) -> Floats:
        """Copies the states [B, R] of slots [B] out, whole."""
        return self._rows[slots]

    def write(self, slot: int, state: Floats) -> None:
        """Puts a state [R] into a slot, whole."""
        self._rows[slot] = state
