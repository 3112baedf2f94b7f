"""One forward of single rows: stand-ins, the network, what is tracked; then states are written.

Rule 1: nothing is changed before all is computed, so what raises has changed no state, and the
        same rows may be stepped again without those that it raised for.

B rows of different slots, D inputs, O outputs, Q the width of what is tracked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stepstate.engine.arena import Arena
from stepstate.engine.batch import RowColumns
from stepstate.engine.device_forward import DeviceForward
from stepstate.engine.imputation import Imputer
from stepstate.engine.network import Network, RowHistory
from stepstate.engine.tracking.scores import ScoreTotals
from stepstate.engine.tracking.tracker import Tracker
from stepstate.engine.work import Floats


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What a forward gave: rows x [B, D] as they came, and outputs y [B, O].

    `fine` [B]: for which rows y and the state are finite; None: for all. The others are as they
    were, and their y is NaN.
    """

    x: Floats
    y: Floats
    fine: NDArray[np.bool_] | None


class Forward:
    """Steps rows, on the host or on an accelerator.

    Args:
        arena: the states.
        network: the model, on the host.
        on_device: the forward on the accelerator, if there is one.
        stand_ins: fill rows in which something is missing.
        tracker: tracks forecasts, if the model has that.
        tally: counts what is scored.
    """

    def __init__(
        self,
        arena: Arena,
        network: Network,
        on_device: DeviceForward | None,
        *,
        stand_ins: Imputer,
        tracker: Tracker | None,
        tally: ScoreTotals,
    ) -> None:
        self._arena = arena
        self._network = network
        self._on_device = on_device
        self._stand_ins = stand_ins
        self._tracker = tracker
        self._tally = tally

    def step(self, rows: RowColumns) -> ForwardResult:
        """Applies rows to their slots, all at once."""
        if self._on_device is not None and rows.impute is None:
            return self._step_there(self._on_device, rows)
        slots, at, x = rows.slots, rows.at, rows.x
        phase = torch.from_numpy(rows.phase)
        states = torch.from_numpy(self._arena.gather(slots))
        if rows.impute is None:
            past = self._past(slots, at) if self._network.lagged else None
            y, states = self._network.step(torch.from_numpy(x), phase, states, past)
            applied = x
        else:
            kept, y, states = self._stand_ins.apply(
                torch.from_numpy(x)[:, None],
                phase[:, None],
                states,
                self._past(slots, at),
                impute=torch.from_numpy(rows.impute),
            )
            applied, y = kept[:, 0].numpy(), y[:, 0]
        told, after = y.numpy(), states.numpy()
        outputs, fine = told, None
        if not (_finite(told) and _finite(after)):
            fine = (y.isfinite().all(dim=1) & states.isfinite().all(dim=1)).numpy()
            told[~fine] = math.nan
            slots, at, x = slots[fine], at[fine], x[fine]
            applied, told, after = applied[fine], told[fine], after[fine]
        tracked = self._track(slots, at, x, told)
        self._arena.scatter(slots, after)  # first, as on a device it may raise
        self._write_host(slots, at, applied, tracked)
        return ForwardResult(rows.x, outputs, fine)

    def _past(self, slots: NDArray[np.int64], at: NDArray[np.int64]) -> RowHistory:
        """The past rows of sessions: all where the model looks back, else the last one."""
        if self._network.lagged:
            rows = self._arena.past(slots, at)
        else:
            rows = self._arena.past_row(slots, at - 1)[:, None]
        return RowHistory(torch.from_numpy(rows), torch.from_numpy(at))

    def _step_there(self, forward: DeviceForward, rows: RowColumns) -> ForwardResult:
        """The same on the accelerator; past rows and what is tracked are the host's."""
        slots, at, x = rows.slots, rows.at, rows.x
        y, fine = forward.step(slots, x, rows.phase)
        told = y
        if fine is not None:
            slots, at, x, told = slots[fine], at[fine], x[fine], told[fine]
        tracked = self._track(slots, at, x, told)
        forward.commit()
        self._write_host(slots, at, x, tracked)
        return ForwardResult(rows.x, y, fine)

    def _write_host(
        self,
        slots: NDArray[np.int64],
        at: NDArray[np.int64],
        applied: Floats,
        tracked: tuple[Floats, ScoreTotals] | None,
    ) -> None:
        if tracked is not None:
            parts, tally = tracked
            self._arena.write_tracked(slots, parts)
            self._tally.add(tally)
        self._arena.append(slots, at, applied)

    def _track(
        self, slots: NDArray[np.int64], at: NDArray[np.int64], x: Floats, y: Floats
    ) -> tuple[Floats, ScoreTotals] | None:
        """Scores rows x [B, D], as they came, and keeps what their outputs y [B, O] say ahead.

        Returns:
            The tracked parts [B, Q] after them and what was scored; the arena is as it was.
        """
        tracker = self._tracker
        if tracker is None:
            return None
        parts, tally = self._arena.tracked(slots), tracker.tally()
        values: memoryview[float] = memoryview(parts.reshape(-1))  # type: ignore[arg-type]
        tracker.observe_rows(
            values,
            zip(range(0, parts.size, tracker.width), at.tolist(), strict=True),
            x=x,
            before=self._arena.past_row(slots, at - tracker.season),
            y=y,
            tally=tally,
        )
        return parts, tally


def _finite(values: Floats) -> bool:
    """Whether all values are finite: the sum of their squares is not as soon as one value is not.

    That of finite values may overflow too; the exact look that follows then finds nothing. It
    takes a fifth to a half of the time of torch's sum.
    """
    return math.isfinite(np.vdot(values, values))
