"""The preallocated states of a model's sessions, and where the parts of a state are in its row.

    [ h and c of the cell: Rc | past rows: N x D | tracked part of its forecasts: Q ]

Rule 1: only the engine touches the arena.
Rule 2: a session's state is one contiguous row, so a snapshot is one copy and a gather is one
        look-up. The rows are NumPy's, whose scatter takes a third of the time of torch's.
Rule 3: a free slot may hold anything; `claim` makes it blank.

The past rows are a ring in raw units: row t of the session is at place t % N, and NaN stands
where there was no row yet. B slots, D inputs, R = Rc + N D + Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepstate.engine.work import Floats


@dataclass(frozen=True, slots=True)
class Layout:
    """The widths of the parts: `cell` Rc, `history` N rows of `inputs` D, `tracked` Q."""

    cell: int
    history: int
    inputs: int
    tracked: int

    @property
    def tracked_from(self) -> int:
        """Where the tracked part begins."""
        return self.cell + self.history * self.inputs

    @property
    def width(self) -> int:
        """R."""
        return self.tracked_from + self.tracked

    def blank(self, tracked: Floats) -> Floats:
        """The state [R] of a session without rows: zeros, no past rows, and `tracked` [Q]."""
        row = np.zeros(self.width, np.float32)
        row[self.cell : self.tracked_from] = np.nan
        row[self.tracked_from :] = tracked
        return row

    def rings(self, rows: Floats) -> Floats:
        """The past rows [B, N, D] of state rows [B, R]; a view."""
        part = rows[:, self.cell : self.tracked_from]
        return part.reshape(len(rows), self.history, self.inputs)


def past_rows(rings: Floats, slots: NDArray[np.int64], at: NDArray[np.int64]) -> Floats:
    """The past rows [B, N, D] of sessions with `at` [B] rows applied, the oldest first."""
    length = rings.shape[1]
    found: Floats = rings[slots[:, None], (at[:, None] + np.arange(length)) % length]
    return found


def append_rows(ring: Floats, at: int, x: Floats) -> None:
    """Puts the rows from `at` on, x [T, D], into one ring [N, D]."""
    length = len(ring)
    kept = x[-length:]
    first = at + len(x) - len(kept)
    ring[(first + np.arange(len(kept))) % length] = kept


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
        self._cells = self._rows[:, : layout.cell]
        self._rings = layout.rings(self._rows)
        self._last = self._rings[:, 0]
        self._tracked = self._rows[:, layout.tracked_from :]
        self._blank = blank
        self._free = list(range(capacity - 1, -1, -1))
        self._capacity = capacity

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
        """Copies the past rows [B, N, D] of slots [B] with `at` [B] rows, the oldest first."""
        return past_rows(self._rings, slots, at)

    def past_row(self, slots: NDArray[np.int64], row: NDArray[np.int64]) -> Floats:
        """Copies one past row [B, D] of each slot: row `row` [B], of the last N."""
        found: Floats = self._rings[slots, row % self._rings.shape[1]]
        return found

    def append(self, slots: NDArray[np.int64], at: NDArray[np.int64], x: Floats) -> None:
        """Puts row `at` [B], x [B, D], in the place of the oldest past row of slots [B]."""
        if self._rings.shape[1] == 1:  # as in most models, without lagged inputs
            self._last[slots] = x
        else:
            self._rings[slots, at % self._rings.shape[1]] = x

    def tracked(self, slots: NDArray[np.int64]) -> Floats:
        """Copies the tracked parts [B, Q] of slots [B]."""
        return self._tracked[slots]

    def write_tracked(self, slots: NDArray[np.int64], parts: Floats) -> None:
        """Writes the tracked parts [B, Q] of different slots [B]."""
        self._tracked[slots] = parts

    def read(self, slots: NDArray[np.int64]) -> Floats:
        """Copies whole states [B, R] of slots [B]."""
        return self._rows[slots]

    def write(self, slot: int, state: Floats) -> None:
        """Writes a whole state [R] into a slot."""
        self._rows[slot] = state
