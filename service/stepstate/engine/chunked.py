"""Requests with many rows, or with `inspect`: run in chunks, on a copy of the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepstate.engine.layout import Layout, append_rows, past_rows
from stepstate.engine.tracking.scores import ScoreTotals
from stepstate.engine.tracking.tracker import Tracker
from stepstate.engine.work import Floats, Layers, WorkItem

W = TypeVar("W", bound=WorkItem)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What T rows of a request gave: x [T, D] as applied, y [T, O], the cell's state [Rc] after.

    `layers`: what every layer computed for the one row, [H] each; empty unless `inspect`.
    """

    x: Floats
    y: Floats
    cell: Floats
    layers: Layers


def traced(trace: Sequence[Mapping[str, Tensor]], place: int) -> Layers:
    """What every layer computed for one of several rows."""
    return [{name: part[place].numpy() for name, part in layer.items()} for layer in trace]


class ChunkedRequest(Generic[W]):
    """One such request under way: what is done of it, and its state so far.

    Args:
        work: the request.
        layout: the parts of a state.
        tracker: tracks its forecasts, if the model has that.
    """

    def __init__(self, work: W, layout: Layout, tracker: Tracker | None) -> None:
        self.work = work
        self.x: Floats = np.zeros((0, layout.inputs), np.float32)
        self.done = 0
        self.overflowed = False
        self.error: Exception | None = None
        """What its rows raised."""
        self._one_by_one: NDArray[np.int64] = np.zeros(0, np.int64)
        self._state: Floats | None = None  # [R], a copy, from the first chunk on
        self.tally = tracker.tally() if tracker else ScoreTotals()
        self._tracker = tracker
        self._layout = layout
        self._outputs: list[Floats] = []
        self._layers: list[Layers] = []

    @property
    def begun(self) -> bool:
        """Whether it has its rows and state."""
        return self._state is not None

    def begin(self, state: Floats, one_by_one: Callable[[Floats], NDArray[np.int64]]) -> None:
        """Reads its rows, and takes a copy [R] of its slot's state.

        Args:
            state: the copy.
            one_by_one: tells the places of the rows that need the forecast of the row before.
        """
        work = self.work
        self.x = np.array(work.x, np.float32).reshape(work.rows, self._layout.inputs)
        if self._imputes:
            self._one_by_one = one_by_one(self.x)
        self._state = state

    def fail(self, error: Exception) -> None:
        """Ends it: its rows raised."""
        self.error = error

    @property
    def over(self) -> bool:
        """Whether it has ended with its state as it was."""
        return self.overflowed or self.error is not None

    @property
    def left(self) -> int:
        """Rows still to run."""
        return self.work.rows - self.done

    @property
    def at(self) -> int:
        """Rows that were applied before the next one."""
        return self.work.at + self.done

    def takes(self, most: int) -> int:
        """How many of the next rows have at most so many among them that go one by one."""
        place = int(np.searchsorted(self._one_by_one, self.done)) + most
        if place < len(self._one_by_one):
            return int(self._one_by_one[place]) - self.done
        return self.left

    @property
    def _imputes(self) -> bool:
        return self.work.impute and bool(self.work.missing_rows)

    @property
    def kind(self) -> tuple[bool, bool]:
        """Jobs of one kind share chunks: those that go row by row would hold up all others."""
        return self.work.inspect, self._imputes

    def phases(self, rows: int) -> Tensor:
        """The steps of the next rows in the model's timeline."""
        return torch.arange(self.done, self.done + rows).add_(self.work.phase)

    @property
    def cell(self) -> Floats:
        """The cell's state [Rc] so far."""
        return self.whole_state[: self._layout.cell]

    @property
    def whole_state(self) -> Floats:
        """The state [R] so far."""
        assert self._state is not None
        return self._state

    @property
    def past(self) -> Floats:
        """The past rows [N, D] so far, the oldest first."""
        rows: Floats = past_rows(self._rings, np.zeros(1, np.int64), np.array([self.at]))[0]
        return rows

    @property
    def _rings(self) -> Floats:
        return self._layout.rings(self.whole_state[None])

    def take(self, part: Chunk) -> None:
        """Keeps what its next rows gave."""
        y = part.y
        self._track(part.x, y)
        append_rows(self._rings[0], self.at, part.x)
        self.cell[:] = part.cell
        self.done += len(part.x)
        self.overflowed = not bool(np.isfinite(y).all() and np.isfinite(part.cell).all())
        if self.work.last_only:
            self._outputs.clear()
            self._layers.clear()
            y = y[-1:]
        self._outputs.append(y)
        if part.layers:
            self._layers.append(part.layers)

    def _track(self, x: Floats, y: Floats) -> None:
        tracker = self._tracker
        if tracker is None:
            return
        before = np.concatenate((self.past[-tracker.season :], x))[: len(x)]
        values: memoryview[float] = memoryview(self.whole_state)  # type: ignore[arg-type]
        tracker.observe_rows(
            values,
            [(self._layout.tracked_from, self.at + place) for place in range(len(x))],
            x=self.x[self.done : self.done + len(x)],
            before=before,
            y=y,
            tally=self.tally,
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
