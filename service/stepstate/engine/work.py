"""What the engine is asked to do, and whom it tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Layers = list[dict[str, Floats]]
"""What each layer computed, by gate or state, [T, H] each, the lowest layer first."""


@dataclass(slots=True, eq=False)
class WorkItem:
    """Rows to apply to the state in one slot.

    The engine runs one piece of work of a slot at a time: whoever submits it
    waits for the end of it before submitting the next.
    """

    x: Sequence[float] | Floats
    """Row-major [T, D], raw units; finite, or NaN where something is missing."""
    rows: int
    """T."""
    inspect: bool
    """Also keep what every layer computed."""
    last_only: bool
    """Only the last row's outputs are wanted."""
    missing_rows: int = field(init=False, default=0)
    """Rows that hold NaN: something is to stand in for what is missing."""
    impute: bool = field(init=False, default=False)
    """The model's own forecast, where it has one; else the value of the row before."""
    slot: int = field(init=False, default=0)
    at: int = field(init=False, default=0)
    """Rows applied to the slot's state before it."""
    phase: int = field(init=False, default=0)
    """Step of the first row in the model's timeline."""
    queued_at: float = field(init=False, default=0.0)
    """Seconds of `time.perf_counter`."""

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""
        return False

    @property
    def single(self) -> bool:
        """One row, nothing but y wanted: it can share a forward with others."""
        return self.rows == 1 and not self.inspect


W_contra = TypeVar("W_contra", bound=WorkItem, contravariant=True)


class CompletionSink(Protocol[W_contra]):
    """Whoever submits work. Each piece ends in exactly one of these calls."""

    def stepped(self, works: Sequence[W_contra], x: Floats, y: Floats) -> None:
        """Single rows x [B, D] were applied, their outputs are y [B, O]."""
        ...

    def finished(self, work: W_contra, y: Floats, layers: Layers | None) -> None:
        """All rows of a request were applied, their outputs are y [T, O]."""
        ...

    def dropped(self, work: W_contra) -> None:
        """It was cancelled before it was applied; the state is as it was."""
        ...

    def overflowed(self, work: W_contra) -> None:
        """It would have made the state or y non-finite; the state is as it was."""
        ...

    def failed(self, work: W_contra, error: Exception) -> None:
        """Its rows raised, by themselves; the state is as it was."""
        ...
