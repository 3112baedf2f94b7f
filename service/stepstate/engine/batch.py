"""A micro-batch: rows of different slots that are stepped together, as columns.

B rows, D inputs, O outputs.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepstate.engine.work import Floats, Work

W = TypeVar("W", bound=Work)


class Pack(ABC):
    """Single rows of different slots that came together, as columns; it takes its own outcome.

    Args:
        x: [B, D], raw units, finite.
        slots: [B], all different.
        at: [B], rows applied to each slot's state before.
        phase: [B], steps of the rows in the model's timeline.
    """

    def __init__(
        self, x: Floats, slots: NDArray[np.int64], at: NDArray[np.int64], phase: NDArray[np.int64]
    ) -> None:
        self.x = x
        self.slots = slots
        self.at = at
        self.phase = phase
        self.queued_at = time.perf_counter()

    def __len__(self) -> int:
        return len(self.slots)

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""

    @abstractmethod
    def stepped(self, y: Floats, fine: NDArray[np.bool_] | None) -> None:
        """Its rows were applied, their outputs are y [B, O]; but not those that are not `fine` [B].

        A row that is not fine would have made the state or y non-finite; its state is as it was.
        """

    @abstractmethod
    def dropped(self) -> None:
        """It was cancelled before it was applied; the states are as they were."""

    @abstractmethod
    def failed(self, error: Exception) -> None:
        """The forward raised; the states are as they were."""


class MicroBatch(Generic[W]):
    """Pieces of work with one row each, then packs: all of different slots."""

    def __init__(self, works: list[W], packs: Sequence[Pack]) -> None:
        self.works = works
        self.packs = packs
        self.x: Floats = _column([work.x for work in works], [pack.x for pack in packs], np.float32)
        self.slots: NDArray[np.int64] = _column(
            [work.slot for work in works], [pack.slots for pack in packs], np.int64
        )
        self.at: NDArray[np.int64] = _column(
            [work.at for work in works], [pack.at for pack in packs], np.int64
        )
        self.phase: NDArray[np.int64] = _column(
            [work.phase for work in works], [pack.phase for pack in packs], np.int64
        )

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def missing(self) -> bool:
        """Whether something is missing in a row."""
        return any(work.missing_rows for work in self.works)

    @property
    def impute(self) -> NDArray[np.bool_]:
        """Whether the model's own forecast stands in for what is missing in a row [B]."""
        wanted = np.zeros(len(self), np.bool_)
        wanted[: len(self.works)] = [work.impute for work in self.works]
        return wanted

    def queued_at(self) -> list[float]:
        """When each row was queued [B], seconds of `time.perf_counter`."""
        times = [work.queued_at for work in self.works]
        for pack in self.packs:
            times += [pack.queued_at] * len(pack)
        return times


def _column(
    singles: Sequence[object], packed: list[np.ndarray], dtype: type[np.generic]
) -> np.ndarray:
    if not packed:
        return np.array(singles, dtype)
    if singles:
        return np.concatenate((np.array(singles, dtype), *packed))
    return packed[0] if len(packed) == 1 else np.concatenate(packed)
