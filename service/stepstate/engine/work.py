"""Work for the engine: single items, packed rows, and the micro-batch that is made of both.

`WorkItem` and `PackedWork` have the same fields twice, as numbers and as columns: at one row
arrays cost more than the cell, at 256 rows a loop over items does.

T rows of one request, B rows of different slots, D inputs, O outputs, H hidden units.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepstate.tenants import WorkSource

Floats = NDArray[np.float32]
Layers = list[dict[str, Floats]]
"""What each layer computed, by gate or state, [T, H] each, the lowest layer first."""


class Caller(Protocol):
    """Whoever waits for the outcome of work."""

    @property
    def cancelled(self) -> bool:
        """It does not wait any more."""
        ...

    @property
    def source(self) -> WorkSource:
        """Whose work it is: senders take turns."""
        ...


@dataclass(slots=True, eq=False)
class WorkItem:
    """Rows to apply to the state in one slot.

    A slot has at most one item in the engine: the next one is submitted after its end.
    """

    x: Sequence[float] | Floats
    """Row-major [T, D], raw units; finite, or NaN where a value is missing."""
    rows: int
    """T."""
    inspect: bool
    """Also return what every layer computed."""
    last_only: bool
    """Only the last row's outputs are wanted."""
    reply_to: Caller
    missing_rows: int = field(init=False, default=0)
    """Rows that hold NaN, and so have to be imputed."""
    impute: bool = field(init=False, default=False)
    """Impute with the model's own forecast where it has one; else with the row before."""
    slot: int = field(init=False, default=0)
    at: int = field(init=False, default=0)
    """Rows applied to the slot's state before it."""
    phase: int = field(init=False, default=0)
    """Step of the first row in the model's timeline."""
    queued_at: float = field(init=False, default=0.0)
    """Seconds of `time.perf_counter`."""

    @property
    def single(self) -> bool:
        """Whether it can share a forward with others: one row, and only y is wanted."""
        return self.rows == 1 and not self.inspect


class PackedWork:
    """Single rows of different slots that were sent together, as columns.

    Args:
        x: [B, D], raw units, finite.
        slots: [B], all different.
        at: [B], rows applied to each slot's state before.
        phase: [B], steps of the rows in the model's timeline.
        reply_to: waits for all of them.
    """

    def __init__(
        self,
        x: Floats,
        slots: NDArray[np.int64],
        at: NDArray[np.int64],
        phase: NDArray[np.int64],
        *,
        reply_to: Caller,
    ) -> None:
        self.x = x
        self.slots = slots
        self.at = at
        self.phase = phase
        self.reply_to = reply_to
        self.queued_at = time.perf_counter()

    def __len__(self) -> int:
        return len(self.slots)


W = TypeVar("W", bound=WorkItem)
P = TypeVar("P", bound=PackedWork)
W_contra = TypeVar("W_contra", bound=WorkItem, contravariant=True)
P_contra = TypeVar("P_contra", bound=PackedWork, contravariant=True)


class CompletionSink(Protocol[W_contra, P_contra]):
    """Gets the outcome of submitted work. Each item or pack ends in exactly one of these calls."""

    def stepped(self, works: Sequence[W_contra], x: Floats, y: Floats) -> None:
        """Single rows x [B, D] were applied, their outputs are y [B, O]."""
        ...

    def stepped_pack(
        self,
        pack: P_contra,
        y: Floats,
        finite: NDArray[np.bool_] | None,
        failed: Mapping[int, Exception],
    ) -> None:
        """The rows of a pack were applied where `finite` [B], their outputs are y [B, O].

        A row that is not finite would have made the state or y non-finite, or it raised what
        `failed` has under its place; its state is unchanged. `finite` is None: all rows were
        applied.
        """
        ...

    def finished(self, work: W_contra, y: Floats, layers: Layers | None) -> None:
        """All rows of a request were applied, their outputs are y [T, O]."""
        ...

    def dropped(self, work: W_contra) -> None:
        """It was cancelled before it was applied; the state is unchanged."""
        ...

    def dropped_pack(self, pack: P_contra) -> None:
        """It was cancelled before it was applied; the states are unchanged."""
        ...

    def overflowed(self, work: W_contra) -> None:
        """It would have made the state or y non-finite; the state is unchanged."""
        ...

    def failed(self, work: W_contra, error: Exception) -> None:
        """Its rows raised, also when run alone; the state is unchanged."""
        ...


@dataclass(frozen=True, slots=True)
class RowColumns:
    """Single rows of different slots as columns [B]: x [B, D], and the fields of `WorkItem`."""

    x: Floats
    slots: NDArray[np.int64]
    at: NDArray[np.int64]
    phase: NDArray[np.int64]
    impute: NDArray[np.bool_] | None
    """None: no row has missing values."""

    def __len__(self) -> int:
        return len(self.slots)


class MicroBatch(Generic[W, P]):
    """Items with one row each, then packs: all of different slots."""

    def __init__(self, works: list[W], packs: Sequence[P]) -> None:
        self.works = works
        self.packs = packs
        self.queued_at = [work.queued_at for work in works]
        """When each row was queued [B], seconds of `time.perf_counter`."""
        for pack in packs:
            self.queued_at += [pack.queued_at] * len(pack)
        self.size = len(self.queued_at)
        """B."""

    def rows(self, first: int, last: int) -> RowColumns:
        """The rows from place `first` to before `last`; items come before packs."""
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

    def _parts(self, first: int, last: int) -> Iterator[tuple[P, slice]]:
        """The packs with rows between two places, and which rows those are."""
        start = len(self.works)
        for pack in self.packs:
            begin, end = max(first - start, 0), min(last - start, len(pack))
            if begin < end:
                yield pack, slice(begin, end)
            start += len(pack)


def _column(
    singles: Sequence[object], packed: list[np.ndarray], dtype: type[np.generic]
) -> np.ndarray:
    if not packed:
        return np.array(singles, dtype)
    if singles:
        return np.concatenate((np.array(singles, dtype), *packed))
    return packed[0] if len(packed) == 1 else np.concatenate(packed)
