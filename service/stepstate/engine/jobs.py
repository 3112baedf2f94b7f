"""Requests with many rows, or with `inspect`: run in chunks, on a copy of the state."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepstate.engine.layout import Layout, append_rows, past_rows
from stepstate.engine.scores import Tally
from stepstate.engine.tracking import Tracker
from stepstate.engine.work import Floats, Layers, Work

W = TypeVar("W", bound=Work)


class Job(Generic[W]):
    """One such request under way: what is done of it, and its state so far.

    Args:
        work: the request.
        phases: after so many rows the model's calendar repeats.
        layout: the parts of a state.
        tracker: tracks its forecasts, if the model has that.
    """

    def __init__(self, work: W, phases: int, layout: Layout, tracker: Tracker | None) -> None:
        self.work = work
        self.x = np.array(work.x, np.float32).reshape(work.rows, -1)
        self._missing: NDArray[np.int64] | None = None  # the rows that miss something
        if work.missing_rows:
            self._missing = np.flatnonzero(np.isnan(self.x).any(axis=1))
        self.state: Floats | None = None  # [R], a copy, from the first chunk on
        self.done = 0
        self.overflowed = False
        self.tally = tracker.tally() if tracker else Tally()
        self._tracker = tracker
        self._layout = layout
        self._phases = phases
        self._outputs: list[Floats] = []
        self._layers: list[Layers] = []

    @property
    def left(self) -> int:
        """Rows still to run."""
        return self.work.rows - self.done

    @property
    def at(self) -> int:
        """Rows that were applied before the next one."""
        return self.work.at + self.done

    @property
    def whole(self) -> int:
        """How many of the next rows miss nothing."""
        if self._missing is None:
            return self.left
        place = np.searchsorted(self._missing, self.done)
        return int(self._missing[place]) - self.done if place < len(self._missing) else self.left

    @property
    def kind(self) -> tuple[bool, bool]:
        """Jobs of one kind share chunks: those that go row by row would hold up all others."""
        return self.work.inspect, bool(self.work.missing_rows)

    @property
    def goes_on_missing(self) -> bool:
        """Whether there is a next row, and it misses something."""
        return bool(self.left) and not self.overflowed and not self.whole

    def phases(self, rows: int) -> Tensor:
        """The phases of the next rows."""
        return (
            torch.arange(self.done, self.done + rows).add_(self.work.phase).remainder_(self._phases)
        )

    @property
    def cell(self) -> Floats:
        """The cell's state [Rc] so far."""
        assert self.state is not None
        return self.state[: self._layout.cell]

    @property
    def past(self) -> Floats:
        """The past rows [N, D] so far, the oldest first."""
        rows: Floats = past_rows(self._rings, np.zeros(1, np.int64), np.array([self.at]))[0]
        return rows

    @property
    def _rings(self) -> Floats:
        assert self.state is not None
        return self._layout.rings(self.state[None])

    def take(
        self, x: Floats, y: Floats, cell: Floats, trace: list[dict[str, Tensor]], place: int
    ) -> None:
        """Keeps what the next rows gave.

        Args:
            x: [T, D], the rows as they were applied.
            y: [T, O], their outputs.
            cell: [Rc], the cell's state after them.
            trace: what every layer computed for one row of several jobs.
            place: this job's among them.
        """
        self._track(x, y)
        append_rows(self._rings[0], self.at, x)
        self.cell[:] = cell
        self.done += len(x)
        self.overflowed = not bool(np.isfinite(y).all() and np.isfinite(cell).all())
        if self.work.last_only:
            self._outputs.clear()
            self._layers.clear()
            y = y[-1:]
        self._outputs.append(y)
        if trace:
            self._layers.append(
                [{name: part[place].numpy() for name, part in layer.items()} for layer in trace]
            )

    def _track(self, x: Floats, y: Floats) -> None:
        tracker = self._tracker
        if tracker is None or self.state is None:
            return
        before = np.concatenate((self.past[-tracker.season :], x))[: len(x)]
        values: memoryview[float] = memoryview(self.state)  # type: ignore[arg-type]
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
