"""A micro-batch: rows of different slots that are stepped together, as columns.

B rows, D inputs, O outputs.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepstate.engine.work import Floats, WorkItem

W = TypeVar("W", bound=WorkItem)


class PackedWork(ABC):
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
    def stepped(
        self, y: Floats, fine: NDArray[np.bool_] | None, failed: Mapping[int, Exception]
    ) -> None:
        """Its rows were applied, their outputs are y [B, O]; but not those that are not `fine` [B].

        A row that is not fine would have made the state or y non-finite, or what it raised is in
        `failed`, by its place; its state is as it was. `fine` is None: all are.
        """

    @abstractmethod
    def dropped(self) -> None:
        """It was cancelled before it was applied; the states are as they were."""


@dataclass(frozen=True, slots=True)
class RowColumns:
    """Single rows of different slots as columns [B]: x [B, D], and what `WorkItem` says of each."""

    x: Floats
    slots: NDArray[np.int64]
    at: NDArray[np.int64]
    phase: NDArray[np.int64]
    impute: NDArray[np.bool_] | None
    """None: nothing is missing in any of them."""

    def __len__(self) -> int:
        return len(self.slots)


class MicroBatch(Generic[W]):
    """Pieces of work with one row each, then packs: all of different slots."""

    def __init__(self, works: list[W], packs: Sequence[PackedWork]) -> None:
        self.works = works
        self.packs = packs
        self._rows = len(works) + sum(map(len, packs))

    def __len__(self) -> int:
        return self._rows

    def rows(self, first: int, last: int) -> RowColumns:
        """Those from place `first` to before `last`, the works' before the packs'."""
        works, packs = self.works[first:last], list(self._parts(first, last))
        impute = None
        if any(work.missing_rows for work in works):
            impute = np.zeros(last - first, np.bool_)
            impute[: len(works)] = [work.impute for work in works]
        return RowColumns(
            _column([work.x for work in works], [pack.x[part] for pack, part in packs], np.float32),
            _column([work.slot for work in works], [pack.slots[p] for pack, p in packs], np.int64),
            _column([work.at for work in works], [pack.at[p] for pack, p in packs], np.int64),
            _column([work.phase for work in works], [pack.phase[p] for pack, p in packs], np.int64),
            impute,
        )

    def _parts(self, first: int, last: int) -> Iterator[tuple[PackedWork, slice]]:
        """Packs, and which of their rows lie between two places."""
        start = len(self.works)
        for pack in self.packs:
            begin, end = max(first - start, 0), min(last - start, len(pack))
            if begin < end:
                yield pack, slice(begin, end)
            start += len(pack)

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
