"""What both clients know of a session, and what they make of the server's replies. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepstate.client import convert
from stepstate.client._protocol.replay import ReplayBuffer
from stepstate.client.outputs import Outputs
from stepstate.client.times import RowClock, read_rows
from stepstate.client.types import Floats, Inspection, ModelInfo, Result, SessionInfo
from stepstate.errors import NonFiniteInput, SessionClosed, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

A = TypeVar("A", bound=np.generic)
S = TypeVar("S", bound="BaseSession")


@dataclass(frozen=True, slots=True, eq=False)
class PlacedRows:
    """Rows [T, D] to be applied next: those that were given, and missing rows between them.

    `single`: one row was given, without a dimension for rows. `given`: the places of the given
    rows; None: no row is missing.
    """

    rows: Floats
    single: bool
    given: NDArray[np.int64] | None = None

    def of_given(self, values: NDArray[A]) -> NDArray[A]:
        """Of values for each row [T, ...] those of the given rows."""
        return values if self.given is None else values[self.given]

    def error_of_given(self, error: StepstateError) -> StepstateError:
        """An error about a row, with the number of this row among the given ones."""
        if isinstance(error, NonFiniteInput) and self.given is not None:
            return replace(error, row=int(np.searchsorted(self.given, error.row)))
        return error


class BaseSession:
    """The client's side of a session: how far it is, and the rows that a server may need again.

    Attributes:
        t: rows whose outputs the application has.
        durable_t: rows that survive the end of the server, as it last reported.
        info: the session's status when it was opened, or last asked for.
        imputed_rows: rows of the last call, or of the last item of a stream, in which a missing
            value was replaced.
        fallback_rows: rows of it for which the model's lagged inputs would have been before the
            session's first row, so that its fallback was used.
        clock: the times of its rows.
        closed: it was closed here, or the server reported that it has ended.
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
        self.replay_buffer = ReplayBuffer(info.session_id, model.input_width, limit, self.t)

    def __repr__(self) -> str:
        moment = self.time()
        at = f", time={moment:%F %T}Z" if moment else ""
        state = "closed" if self.closed else "open"
        return (
            f"<{type(self).__name__} {self.session_id!r} of {self.info.model}/{self.info.version}, "
            f"{state}, t={self.t}, durable_t={self.durable_t}{at}>"
        )

    def time(self, t: int | None = None) -> datetime | None:
        """The time of row t, in UTC; without t: of the last row, t - 1.

        None if the model knows no time, the session's start is not known, or there is no last row
        yet.
        """
        if t is None and not self.t:
            return None
        return self.clock.time(self.t - 1 if t is None else t)

    def place(self, x: Any, t: int, field: str = "x", *, first_row: int = 0) -> PlacedRows:
        """Rows as the model takes them; where rows are missing by their times, rows of NaN.

        Args:
            x: as `step` takes it.
            t: rows that the session has before them.
            field: the argument's name, for errors.
            first_row: the number of the first of them, for errors.

        Raises:
            InvalidField: x has another shape, or times that do not start with row t.
        """
        rows, single, times = read_rows(self.model, x, field)
        if times is None:
            return PlacedRows(rows, single)
        after = self.clock.place(times, t, field, first_row=first_row)
        return fill(rows, after, single=single)

    # What replies mean.

    def step_result(
        self, response: pb.StepResponse, placed: PlacedRows, *, last_only: bool, named: bool
    ) -> Floats | Outputs:
        """What `step` returns: y [O] or [T, O], or `Outputs`."""
        y = convert.outputs(response, self.model)
        self.received(response.t, **convert.replaced_rows(response))
        y = y[-1] if placed.single or last_only else placed.of_given(y)
        return self.named(y, placed) if named else y

    def inspect_result(self, response: pb.StepResponse, placed: PlacedRows) -> Inspection:
        """What `inspect` returns."""
        inspection = convert.inspection(response, self.model, placed.of_given)
        self.received(response.t, **convert.replaced_rows(response))
        return inspection

    def item_result(self, response: pb.StepResponse) -> Floats:
        """The outputs [O] of an item of a stream, of its last row."""
        y: Floats = convert.outputs(response, self.model)[0]
        self.received(response.t, **convert.replaced_rows(response))
        return y

    def close_result(self, error: SessionClosed) -> SessionInfo:
        """What `close` returns if the session was closed already: perhaps by a first try."""
        return replace(self.info, t=error.t)

    def named(self, y: Floats, placed: PlacedRows | None = None) -> Outputs:
        """The latest outputs by name: [O] of the last row, or [T, O] of placed rows."""
        ts = np.arange(self.t - (len(placed.rows) if placed else 1), self.t)
        ts = ts[-1:] if y.ndim == 1 or placed is None else placed.of_given(ts)
        return Outputs(self.model, y, ts, self.clock.times(ts))

    def received(self, t: int, *, imputed_rows: int, fallback_rows: int) -> None:
        """The application has the outputs of t rows now."""
        self.t = t
        self.imputed_rows = imputed_rows
        self.fallback_rows = fallback_rows

    def mark_durable(self, durable_t: int) -> None:
        """The server reported that so many rows survive its end: they need not be kept here."""
        if durable_t > self.durable_t:
            self.durable_t = durable_t
            self.replay_buffer.drop_before(durable_t)

    def update(self, info: SessionInfo) -> None:
        """Takes the server's status, and its t.

        If the server was rolled back, and all the rows that it lacks are kept here, t stays: the
        next step sends them.
        """
        self.info = info
        self.mark_durable(info.durable_t)
        if info.t >= self.t or not self.replay_buffer.holds(info.t, self.t - 1):
            self.t = info.t

    def continue_from(self, source: BaseSession, *, resume_rows: int) -> None:
        """Makes a fork start at its source's t, with the same rows kept."""
        self.t = source.t
        limit = resume_rows if self.info.resumable else 0
        self.replay_buffer = source.replay_buffer.copy(self.session_id, limit=limit)
        self.replay_buffer.drop_before(self.durable_t)
        self.clock.continue_from(source.clock)


def fill(rows: Floats, after: NDArray[np.int64], *, single: bool) -> PlacedRows:
    """Rows [T, D] with rows of NaN between them; `after` [T]: the place of each among all."""
    count = int(after[-1]) + 1
    if count == len(rows):
        return PlacedRows(rows, single)
    filled = np.full((count, rows.shape[1]), np.nan, np.float32)
    filled[after] = rows
    return PlacedRows(filled, single, after)


def result_of(session: S, y: Floats | None, error: StepstateError | None) -> Result[S]:
    """The result of an item of a stream whose outputs [O] the session has just received."""
    if y is None:
        return Result(session, None, error)
    return Result(
        session,
        y,
        None,
        imputed_rows=session.imputed_rows,
        fallback_rows=session.fallback_rows,
        t=session.t,
        time=session.time(),
    )
