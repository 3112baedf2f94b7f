"""What both clients know of a session."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepstate.client._protocol.replay import ReplayBuffer
from stepstate.client.outputs import Outputs
from stepstate.client.times import RowClock, read_rows
from stepstate.client.types import Floats, ModelInfo, SessionInfo
from stepstate.errors import NonFiniteInput, StepstateError

A = TypeVar("A", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class PlacedRows:
    """Rows [T, D] to be applied next: those that were given, and those missing between them.

    `alone`: one row was given, as one. `given`: the places of the given rows;
    None: all of them.
    """

    rows: Floats
    alone: bool
    given: NDArray[np.int64] | None = None

    def of_given(self, values: NDArray[A]) -> NDArray[A]:
        """Of something for each row [T, ...] that of the given rows."""
        return values if self.given is None else values[self.given]

    def named(self, error: StepstateError) -> StepstateError:
        """An error about a row, as one about that of the given rows."""
        if isinstance(error, NonFiniteInput) and self.given is not None:
            return replace(error, row=int(np.searchsorted(self.given, error.row)))
        return error


class BaseSession:
    """Where the application stands in a session, and the rows to get a server there again.

    Attributes:
        t: rows whose outputs the application has.
        durable_t: rows that survive the end of the server, by its last word.
        info: where the session stood when it was opened, or last asked about.
        imputed_rows: rows of the last call, or the last item of a stream, in which
            something stood in for a missing value.
        fallback_rows: rows of it for which the model's lagged inputs reached back
            before the session's first row, so that its fallback stood in.
        clock: the times of its rows.
        closed: it was closed here, or the server said that it has ended.
    """

    def __init__(
        self, model: ModelInfo, info: SessionInfo, *, t: int | None = None, resume_rows: int
    ) -> None:
        self.session_id = info.session_id
        self.model = model
        self.info = info
        self.t = info.t if t is None else t
        self.durable_t = info.durable_t
        self.imputed_rows = self.fallback_rows = 0
        self.closed = False
        self.clock = RowClock(
            f"{model.name}/{model.version}",
            model.step_interval,
            info.start_time,
            takes_missing=info.missing in ("impute", "hold"),
        )
        limit = resume_rows if info.resumable else 0
        self.backlog = ReplayBuffer(info.session_id, model.input_width, limit, self.t)

    def __repr__(self) -> str:
        moment = self.time()
        at = f", time={moment:%F %T}Z" if moment else ""
        state = "closed" if self.closed else "open"
        return (
            f"<{type(self).__name__} {self.session_id!r} of {self.info.model}/{self.info.version}, "
            f"{state}, t={self.t}, durable_t={self.durable_t}{at}>"
        )

    def time(self, t: int | None = None) -> datetime | None:
        """The time of row t, in UTC; left out: of the last row, t - 1.

        It is None where the model knows no time or the session's start is not
        known, and of the last row where there is none yet.
        """
        if t is None and not self.t:
            return None
        return self.clock.time(self.t - 1 if t is None else t)

    def place(self, x: Any, t: int, field: str = "x", *, first_row: int = 0) -> PlacedRows:
        """Rows as the model takes them, with rows of NaN where by their times some are missing.

        Args:
            x: as `step` takes it.
            t: rows that the session has before them.
            field: what they were given as, for errors.
            first_row: the number of the first of them, for errors.

        Raises:
            InvalidField: x has another shape, or times that do not go on from row t.
        """
        rows, alone, times = read_rows(self.model, x, field)
        if times is None:
            return PlacedRows(rows, alone)
        after = self.clock.place(times, t, field, first_row=first_row)
        return fill(rows, after, alone=alone)

    def named(self, y: Floats, placed: PlacedRows | None = None) -> Outputs:
        """Outputs that were given last, by name: [O] of the last row, or [T, O] of placed rows."""
        ts = np.arange(self.t - (len(placed.rows) if placed else 1), self.t)
        ts = ts[-1:] if y.ndim == 1 or placed is None else placed.of_given(ts)
        return Outputs(self.model, y, ts, self.clock.times(ts))

    def arrived(self, t: int, *, imputed_rows: int, fallback_rows: int) -> None:
        """The application has the outputs of t rows now."""
        self.t = t
        self.imputed_rows = imputed_rows
        self.fallback_rows = fallback_rows

    def saved(self, durable_t: int) -> None:
        """Takes the server's word for what survives it."""
        if durable_t > self.durable_t:
            self.durable_t = durable_t
            self.backlog.forget(durable_t)

    def placed(self, info: SessionInfo) -> None:
        """Takes the server's word for where the session stands.

        A server that was set back is brought up by the next step if all the
        rows for it are kept: t stays then.
        """
        self.info = info
        self.saved(info.durable_t)
        if info.t >= self.t or not self.backlog.holds(info.t, self.t - 1):
            self.t = info.t

    def follow(self, source: BaseSession, *, resume_rows: int) -> None:
        """Stands where the session stands that it is a fork of, with the same rows kept."""
        self.t = source.t
        limit = resume_rows if self.info.resumable else 0
        self.backlog = source.backlog.copy(self.session_id, limit=limit)
        self.backlog.forget(self.durable_t)
        self.clock.follow(source.clock)


def fill(rows: Floats, after: NDArray[np.int64], *, alone: bool) -> PlacedRows:
    """Rows [T, D] that come so many rows after the first place, with rows of NaN between."""
    count = int(after[-1]) + 1
    if count == len(rows):
        return PlacedRows(rows, alone)
    filled = np.full((count, rows.shape[1]), np.nan, np.float32)
    filled[after] = rows
    return PlacedRows(filled, alone, after)
