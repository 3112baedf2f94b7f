"""Where the parts of a session's state lie in its one row: the cell's state, past rows, tracking.

    [ h and c of the cell: Rc | past rows: N x D | what is tracked of its forecasts: Q ]

The past rows are a ring, in raw units: row t of the session is at place t % N, NaN where
there was none yet. D inputs, R = Rc + N D + Q.
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
    """The past rows [B, N, D] of sessions that stand at `at` [B], the oldest first."""
    length = rings.shape[1]
    found: Floats = rings[slots[:, None], (at[:, None] + np.arange(length)) % length]
    return found


def append_row(rings: Floats, slots: NDArray[np.int64], at: NDArray[np.int64], x: Floats) -> None:
    """Puts row `at` [B] of each session, x [B, D], in the place of its oldest one."""
    rings[slots, at % rings.shape[1]] = x


def append_rows(ring: Floats, at: int, x: Floats) -> None:
    """Puts the rows from `at` on, x [T, D], into one ring [N, D]."""
    length = len(ring)
    kept = x[-length:]
    first = at + len(x) - len(kept)
    ring[(first + np.arange(len(kept))) % length] = kept
