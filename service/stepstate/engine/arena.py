"""The preallocated states of a model's sessions.

Rule 1: only the engine touches the arena.
Rule 2: one session's state is one contiguous row, so a snapshot is one copy
        and a gather one `index_select`.
Rule 3: a free slot may hold anything; `claim` zeroes it.
"""

from __future__ import annotations

import numpy as np
import torch


class Arena:
    """States [capacity, R] in float32 and the list of free slots."""

    def __init__(self, capacity: int, state_width: int) -> None:
        # NumPy's zeros are untouched pages: memory is used as slots are, not at start.
        self._states = torch.from_numpy(np.zeros((capacity, state_width), np.float32))
        self._free = list(range(capacity - 1, -1, -1))
        self._row_bytes = 4 * state_width
        self._capacity = capacity

    @property
    def used(self) -> int:
        """Slots that are claimed."""
        return self._capacity - len(self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes of their states."""
        return self.used * self._row_bytes

    def claim(self) -> int:
        """Takes a free slot, with zero state. The caller has checked that one is free."""
        slot = self._free.pop()
        self._states[slot].zero_()
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        self._free.append(slot)

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """Copies the states [B, R] of slots [B]."""
        return self._states.index_select(0, slots)

    def read(self, slots: np.ndarray) -> np.ndarray:
        """Copies the states [B, R] of slots [B] out, for snapshots."""
        states: np.ndarray = self.gather(torch.from_numpy(slots)).numpy()
        return states

    def write(self, slot: int, state: np.ndarray) -> None:
        """Puts a saved state [R] into a slot."""
        self._states[slot] = torch.tensor(state)

    def scatter(self, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Writes the states [B, R] of different slots [B]."""
        self._states.index_copy_(0, slots, states)
