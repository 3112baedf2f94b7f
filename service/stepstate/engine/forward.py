"""One forward of single rows: imputation, the network, tracking; then states are written.

Rule 1: nothing is changed before everything is computed. A forward that raises has changed no
        state, and the same rows may be stepped again without those that made it raise.

B rows of different slots, D inputs, O outputs, Q the width of the tracked part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stepstate.engine.accelerator import DeviceForward
from stepstate.engine.arena import Arena
from stepstate.engine.imputation import Imputer
from stepstate.engine.network import Network, RowHistory
from stepstate.engine.runtimes import RowStepper
from stepstate.engine.tracking.scores import ScoreTotals
from stepstate.engine.tracking.tracker import Tracker
from stepstate.engine.work import Floats, RowColumns


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """The result of a forward: rows x [B, D] as they were sent, and outputs y [B, O].

    `finite` [B]: for which rows y and the state are finite; None: for all. The states of the others
    are unchanged, and their y is NaN.
    """

    x: Floats
    y: Floats
    finite: NDArray[np.bool_] | None


class Forward:
    """Steps rows, on the host or on an accelerator.

    Args:
        arena: the states.
        network: the model, on the host.
        stepper: steps single rows on the host, if they have no missing values.
        on_device: the forward on the accelerator, if there is one.
        imputer: applies rows that have missing values.
        tracker: tracks forecasts, if the model has that.
        totals: counts what is scored.
    """

    def __init__(
        self,
        arena: Arena,
        network: Network,
        stepper: RowStepper,
        *,
        on_device: DeviceForward | None,
        imputer: Imputer,
        tracker: Tracker | None,
        totals: ScoreTotals,
    ) -> None:
        self._arena = arena
        self._network = network
        self._stepper = stepper
        self._on_device = on_device
        self._imputer = imputer
        self._tracker = tracker
        self._totals = totals

    def step(self, rows: RowColumns) -> ForwardResult:
        """Applies rows to their slots, all at once."""
        if self._on_device is not None and rows.impute is None:
            return self._step_on_device(self._on_device, rows)
        slots, at, x = rows.slots, rows.at, rows.x
        applied, y, after = self._compute(rows)
        valid = y
        finite = None
        if not (_all_finite(y) and _all_finite(after)):
            finite = _finite_rows(y) & _finite_rows(after)
            y[~finite] = math.nan
            slots, at, x = slots[finite], at[finite], x[finite]
            applied, valid, after = applied[finite], y[finite], after[finite]
        tracked = self._track(slots, at, x, valid)
        self._arena.scatter(slots, after)  # first, as on a device it may raise
        if tracked is not None:
            self._write_tracked(slots, *tracked)
        self._arena.append(slots, at, applied)
        return ForwardResult(rows.x, y, finite)

    def _compute(self, rows: RowColumns) -> tuple[Floats, Floats, Floats]:
        """The rows [B, D] to keep, y [B, O] and the states after them."""
        slots, at, x = rows.slots, rows.at, rows.x
        states = self._arena.gather(slots)
        if rows.impute is None:
            past = self._past(slots, at) if self._network.lagged else None
            return x, *self._stepper.step(x, rows.phase, states, past)
        with torch.inference_mode():
            kept, outputs, after = self._imputer.apply(
                torch.from_numpy(x)[:, None],
                torch.from_numpy(rows.phase)[:, None],
                torch.from_numpy(states),
                self._past(slots, at),
                impute=torch.from_numpy(rows.impute),
            )
        return kept[:, 0].numpy(), outputs[:, 0].numpy(), after.numpy()

    def _past(self, slots: NDArray[np.int64], at: NDArray[np.int64]) -> RowHistory:
        """The past rows of sessions: all where the model looks back, else the last one."""
        if self._network.lagged:
            rows = self._arena.past(slots, at)
        else:
            rows = self._arena.past_row(slots, at - 1)[:, None]
        return RowHistory(torch.from_numpy(rows), torch.from_numpy(at))

    def _step_on_device(self, forward: DeviceForward, rows: RowColumns) -> ForwardResult:
        """The same on the accelerator; past rows and tracked parts stay on the host."""
        slots, at, x = rows.slots, rows.at, rows.x
        y, finite = forward.step(slots, x, rows.phase)
        valid = y
        if finite is not None:
            slots, at, x, valid = slots[finite], at[finite], x[finite], y[finite]
        tracked = self._track(slots, at, x, valid)
        forward.commit()
        if tracked is not None:
            self._write_tracked(slots, *tracked)
        self._arena.append(slots, at, x)
        return ForwardResult(rows.x, y, finite)

    def _write_tracked(self, slots: NDArray[np.int64], parts: Floats, totals: ScoreTotals) -> None:
        self._arena.write_tracked(slots, parts)
        self._totals.add(totals)

    def _track(
        self, slots: NDArray[np.int64], at: NDArray[np.int64], x: Floats, y: Floats
    ) -> tuple[Floats, ScoreTotals] | None:
        """Scores rows x [B, D], as they were sent, and keeps the forecasts in y [B, O].

        Returns:
            The tracked parts [B, Q] after them and what was scored; the arena is unchanged.
        """
        tracker = self._tracker
        if tracker is None:
            return None
        parts, totals = self._arena.tracked(slots), tracker.new_totals()
        values: memoryview[float] = memoryview(parts.reshape(-1))  # type: ignore[arg-type]
        tracker.observe_rows(
            values,
            zip(range(0, parts.size, tracker.width), at.tolist(), strict=True),
            x=x,
            before=self._arena.past_row(slots, at - tracker.season),
            y=y,
            totals=totals,
        )
        return parts, totals


def _all_finite(values: Floats) -> bool:
    """Whether the sum of the squares of all values is finite: one value that is not makes it so.

    It may overflow with finite values too; then the exact test that follows finds no such row. It
    takes a fifth to a half of the time of torch's sum.
    """
    return math.isfinite(np.vdot(values, values))


def _finite_rows(values: Floats) -> NDArray[np.bool_]:
    """Which rows [B] of values [B, n] are finite as a whole."""
    return np.asarray(np.isfinite(values).all(axis=1))
