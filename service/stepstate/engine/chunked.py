"""Requests with many rows, or with `inspect`: run in chunks, on a copy of the state.

T rows of a request, B requests, D inputs, O outputs, N past rows, Rc the width of the cell's state,
R of a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepstate.engine.arena import Layout, append_rows, past_rows
from stepstate.engine.imputation import Imputer
from stepstate.engine.network import Network, RowHistory
from stepstate.engine.tracking.scores import ScoreTotals
from stepstate.engine.tracking.tracker import Tracker
from stepstate.engine.work import Floats, Layers, W

MAX_ROWS_ONE_BY_ONE = 16
"""Of a request in one chunk: rows that need the forecast of the row before; about a millisecond."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The result of T rows: x [T, D] as applied, y [T, O], the cell's state [Rc] after them.

    `layers`: what every layer computed for the one row, [H] each; empty unless `inspect`.
    """

    x: Floats
    y: Floats
    cell: Floats
    layers: Layers


class ChunkedRequest(Generic[W]):
    """A request in progress: how many of its rows are done, and its state so far.

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
        self.totals = tracker.new_totals() if tracker else ScoreTotals()
        self._one_by_one: NDArray[np.int64] = np.zeros(0, np.int64)
        self._state: Floats | None = None  # [R], a copy, from the first chunk on
        self._tracker = tracker
        self._layout = layout
        self._y: Floats | None = None  # [T, O], or [1, O] with last_only
        self._layers: Layers = []  # [T, H] each, or [1, H]

    @property
    def begun(self) -> bool:
        """Whether it has its rows and state."""
        return self._state is not None

    def begin(self, state: Floats, imputer: Imputer) -> None:
        """Reads its rows, and takes a copy [R] of its slot's state."""
        work = self.work
        self.x = np.array(work.x, np.float32).reshape(work.rows, self._layout.inputs)
        if self.imputes:
            self._one_by_one = imputer.one_by_one(self.x)
        self._state = state

    def fail(self, error: Exception) -> None:
        """Ends it, as its rows raised."""
        self.error = error

    @property
    def over(self) -> bool:
        """Whether it has ended with its state unchanged."""
        return self.overflowed or self.error is not None

    @property
    def ended(self) -> bool:
        """Whether none of its rows is to be run any more."""
        return self.over or not self.left

    @property
    def left(self) -> int:
        """Rows still to run."""
        return self.work.rows - self.done

    @property
    def at(self) -> int:
        """Rows that were applied before the next one."""
        return self.work.at + self.done

    @property
    def imputes(self) -> bool:
        """Whether forecasts of the model fill its missing values."""
        return self.work.impute and bool(self.work.missing_rows)

    @property
    def kind(self) -> tuple[bool, bool]:
        """Requests of one kind share chunks: row by row ones would slow the others down."""
        return self.work.inspect, self.imputes

    def max_rows(self) -> int:
        """How many of its next rows a chunk may hold, with at most 16 that go one by one."""
        place = int(np.searchsorted(self._one_by_one, self.done)) + MAX_ROWS_ONE_BY_ONE
        if place < len(self._one_by_one):
            return int(self._one_by_one[place]) - self.done
        return self.left

    def phases(self, rows: int) -> Tensor:
        """The steps [rows] of the next rows in the model's timeline."""
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

    def take(self, chunk: Chunk) -> None:
        """Keeps the results of its next rows."""
        y = chunk.y
        self._track(chunk.x, y)
        append_rows(self._rings[0], self.at, chunk.x)
        self.cell[:] = chunk.cell
        self._keep(y[-1:] if self.work.last_only else y, chunk.layers)
        self.done += len(chunk.x)
        self.overflowed = not bool(np.isfinite(y).all() and np.isfinite(chunk.cell).all())

    def _keep(self, y: Floats, layers: Layers) -> None:
        """Copies results to their place among all of the request.

        An array for each row and each gate would take ten times the memory of its values.
        """
        rows, at = (1, 0) if self.work.last_only else (self.work.rows, self.done)
        if self._y is None:
            self._y = np.empty((rows, y.shape[1]), np.float32)
            self._layers = [
                {name: np.empty((rows, len(values)), np.float32) for name, values in one.items()}
                for one in layers
            ]
        self._y[at : at + len(y)] = y
        for kept, one in zip(self._layers, layers, strict=True):
            for name, values in one.items():
                kept[name][at] = values

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
            totals=self.totals,
        )

    def results(self) -> tuple[Floats, Layers | None]:
        """Outputs [T, O] ([1, O] with last_only), and with inspect the layers' traces."""
        assert self._y is not None
        return self._y, self._layers or None


def compute_chunk(
    requests: Sequence[ChunkedRequest[W]], network: Network, imputer: Imputer, chunk_rows: int
) -> list[Chunk]:
    """Computes the next rows of each of B requests of one kind, which it does not change.

    Args:
        requests: they have begun.
        network: the model.
        imputer: applies rows that have missing values.
        chunk_rows: most rows of all requests together.
    """
    inspect = requests[0].work.inspect
    rows = 1 if inspect else max(1, chunk_rows // len(requests))
    rows = min(rows, *(request.max_rows() for request in requests))
    x = torch.from_numpy(np.stack([each.x[each.done : each.done + rows] for each in requests]))
    phase = torch.stack([request.phases(rows) for request in requests])
    states = torch.from_numpy(np.stack([request.cell for request in requests]))
    missing = any(request.work.missing_rows for request in requests)
    past = _past_of(requests) if network.lagged or missing else None
    trace: list[dict[str, Tensor]] | None = [] if inspect else None
    if missing and past is not None:
        impute = torch.tensor([request.work.impute for request in requests])
        x, y, states = imputer.apply(x, phase, states, past, impute=impute, trace=trace)
    elif inspect:
        y, states = network.step(x[:, 0], phase[:, 0], states, past, trace)
        y = y[:, None]
    else:
        y, states = network.sequence(x, phase, states, past)
    parts = zip(x.numpy(), y.numpy(), states.numpy(), strict=True)
    return [Chunk(*part, _traced(trace or (), place)) for place, part in enumerate(parts)]


def _past_of(requests: Sequence[ChunkedRequest[W]]) -> RowHistory:
    rows = torch.from_numpy(np.stack([request.past for request in requests]))
    return RowHistory(rows, torch.tensor([request.at for request in requests]))


def _traced(trace: Sequence[Mapping[str, Tensor]], place: int) -> Layers:
    """What every layer computed for one of several requests."""
    return [{name: part[place].numpy() for name, part in layer.items()} for layer in trace]
