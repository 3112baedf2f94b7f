"""Rows of many sessions that came in one message, and go to the engine without a loop over them.

Rule 1: a row goes straight only if its session is seated, idle and takes steps now, if its t
        fits, and if nothing of it is missing. Every other row is a `Step` of its own, with all
        that a step has: loading, replays, refusals, sync durability.
Rule 2: of a session at most one row is in the engine; while it is, the session is busy.

N rows of a message, B of them in a pack, D inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from stepstate.engine import Floats, PackedWork
from stepstate.errors import StepstateError
from stepstate.sessions.table import Table
from stepstate.sessions.types import ResidentSession

if TYPE_CHECKING:
    from stepstate.sessions.scheduler import StepScheduler


@dataclass(frozen=True, slots=True)
class SessionRef:
    """Where a session was when it was last looked at; it goes straight as long as that holds."""

    handle: int
    generation: int


@dataclass(frozen=True, slots=True)
class RowBatch:
    """N rows: seats (generation 0: none), the t that each is to be applied at, if told, and x."""

    handles: NDArray[np.int64]
    generations: NDArray[np.int64]
    t: NDArray[np.int64] | None
    x: Floats

    def __len__(self) -> int:
        return len(self.handles)

    def some(self, rows: NDArray[np.int64]) -> RowBatch:
        """Some of the rows."""
        t = None if self.t is None else self.t[rows]
        return RowBatch(self.handles[rows], self.generations[rows], t, self.x[rows])


class PackedReplyTo(Protocol):
    """Where a pack's outcome goes."""

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more."""
        ...

    def deliver_pack(self, pack: PackedStep) -> None:
        """Takes a pack that has its outcome; called once, on the event loop."""
        ...


class DeferredRows(Protocol):
    """Packed rows that wait for rows of the same sessions before them."""

    def flush(self, handle: int) -> None:
        """Sends the rows of a session on their way alone, in order."""
        ...


class PackedStep(PackedWork):
    """Rows that go to the engine as columns, and their outcome."""

    def __init__(self, columns: RowBatch, table: Table, reply_to: PackedReplyTo) -> None:
        handles = columns.handles
        at = table.t_array[handles]
        super().__init__(
            columns.x,
            table.slot_array[handles],
            at,
            table.phase_array[handles] + at,
        )
        self.handles = handles
        self.generations = columns.generations
        self.reply_to = reply_to
        self.y: Floats = np.zeros((0, 0), np.float32)
        """Outputs [B, O]; those of refused rows mean nothing."""
        self.durable_t: NDArray[np.int64] = np.zeros(0, np.int64)
        self.errors: list[tuple[int, StepstateError]] = []
        """Rows that were not applied, and why."""

    @property
    def cancelled(self) -> bool:
        """See `PackedWork`."""
        return self.reply_to.cancelled


def seat_of(session: ResidentSession, table: Table) -> SessionRef | None:
    """Where a resident session's rows go straight to; None: they can't for now."""
    if session.sync or session.barred or session.position_unknown or session.lease_in_doubt:
        return None
    return SessionRef(session.handle, int(table.generation_array[session.handle]))


def lane_of(columns: RowBatch, table: Table) -> StepScheduler | None:
    """The lane of the first row whose seat holds."""
    holds = table.generation_array[columns.handles] == columns.generations
    first = int(holds.argmax())
    session = table.at(int(columns.handles[first])) if holds[first] else None
    return None if session is None else session.scheduler


def fast_path_mask(
    columns: RowBatch, table: Table, *, scheduler: int, now: float, backlog_rows: int
) -> NDArray[np.bool_]:
    """Which rows [N] go straight (rule 1); of the rows of one session only the first may."""
    handles = columns.handles
    at = table.t_array[handles]
    good: NDArray[np.bool_] = table.generation_array[handles] == columns.generations
    good &= table.lane_array[handles] == scheduler
    good &= ~table.busy_array[handles]
    good &= table.expires_at_array[handles] > now
    behind = at - table.durable_t_array[handles]
    good &= (behind < backlog_rows) | ~table.saved_behind_array[handles]
    if columns.t is not None:
        good &= columns.t == at
    good &= np.isfinite(columns.x).all(axis=1)
    good &= table.first_of(handles)
    return good
