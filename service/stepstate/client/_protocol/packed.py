"""One call of a pack: which rows are still to be sent, and the outcome of each. No I/O.

Rule 1: a row has one outcome: its outputs, or the error that says why it was not applied. After a
        refused row no later row of its session is applied in the call.
Rule 2: a row whose reply was lost is sent again with the same t, which applies nothing twice.
Rule 3: if the server was rolled back, a session catches up before its row is sent again.

N rows of a call, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepstate.client import convert
from stepstate.client._protocol.replay import SentRequest
from stepstate.client._protocol.retry import ProgressTimeout, is_retryable
from stepstate.client._protocol.session import BaseSession
from stepstate.client.times import RowsLike, Times, read_rows
from stepstate.client.types import Floats, ModelInfo
from stepstate.errors import InvalidField, StepAhead, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

S = TypeVar("S", bound=BaseSession)

MESSAGE_ROWS = 4096
"""A server's limit for one message."""
MESSAGE_BYTES = 8 * 2**20
"""Half of a server's limit for one message: fewer rows of many inputs fit."""
MAX_BINDINGS = 16_384
"""A server's limit for one message."""
IMPUTED, FALLBACK = 2, 4


@dataclass(frozen=True, slots=True)
class PackedResult:
    """The outcomes of the rows of one call.

    `y` [N, O]: outputs in raw units; NaN where the row was refused. `t` [N]: rows applied to the
    session up to this one; 0 where refused. `durable_t` [N]: rows of it that survive the end of the
    server. `imputed` [N]: a missing value was replaced. `fallback` [N]: a lagged input would have
    been before the session's first row. `errors`: why rows were refused, by their place.
    """

    y: Floats
    t: NDArray[np.int64]
    durable_t: NDArray[np.int64]
    imputed: NDArray[np.bool_]
    fallback: NDArray[np.bool_]
    errors: Mapping[int, StepstateError]


@dataclass(slots=True)
class PackMembers(Generic[S]):
    """The sessions of a pack, of one model, in order; a session's handle is its place."""

    sessions: list[S]
    model: ModelInfo
    busy: NDArray[np.bool_]
    """Those that have rows in flight."""

    @classmethod
    def of(cls, sessions: Sequence[S]) -> PackMembers[S]:
        """Checks the sessions.

        Raises:
            InvalidField: there are none, one comes twice, or they are of several models.
        """
        if not sessions:
            raise InvalidField("sessions", "are none: a pack has at least one")
        model = sessions[0].model
        for session in sessions:
            if (session.model.name, session.model.version) != (model.name, model.version):
                raise InvalidField(
                    "sessions",
                    f"are of {model.name}/{model.version} and {session.model.name}/"
                    f"{session.model.version}: make a pack for each model",
                )
        if len({session.session_id for session in sessions}) < len(sessions):
            raise InvalidField("sessions", "name a session twice; `which` can do that in a step")
        return cls(list(sessions), model, np.zeros(len(sessions), np.bool_))

    def bindings(self) -> Iterator[pb.StreamPackedRequest]:
        """The messages that tell the server the handles."""
        handles = range(len(self.sessions))
        for first in handles[::MAX_BINDINGS]:
            request = pb.StreamPackedRequest()
            for handle in handles[first : first + MAX_BINDINGS]:
                session_id = self.sessions[handle].session_id
                request.bindings.add(handle=handle, session_id=session_id)
            yield request


@dataclass(slots=True, eq=False)
class RowsInFlight:
    """A message with some rows of a call."""

    rows: NDArray[np.int64]
    request: pb.StreamPackedRequest


class PackedProtocol(Generic[S]):
    """Rows of many sessions, from the application to their outcomes.

    Args:
        members: the pack's sessions.
        x: the rows [N, D].
        which: the session of each row [N], as its place in the pack; None: each session's.
        timeout: seconds to go on without an answer that makes progress.

    Raises:
        InvalidField: x or `which` has another shape, names no session of the pack, or one that has
            rows in flight in another call.
    """

    def __init__(
        self, members: PackMembers[S], x: RowsLike, which: ArrayLike | None, *, timeout: float
    ) -> None:
        self._members = members
        self._which = _places(members, which)
        self._x, times = _rows(members.model, x, len(self._which))
        count = len(self._which)
        self._named: list[int] = np.unique(self._which).tolist()
        if members.busy[self._named].any():
            raise InvalidField("which", "names a session that has rows on their way already")
        self._before = {place: members.sessions[place].t for place in self._named}
        self._t = _times(self._which, self._before)
        if times is not None:
            self._check_times(times)
        self._waiting = np.arange(count)
        self._refused: dict[int, StepstateError] = {}
        self._late: StepstateError | None = None
        self._timeout = ProgressTimeout(timeout)
        self._result = PackedResult(
            y=np.full((count, members.model.output_width), np.nan, np.float32),
            t=np.zeros(count, np.int64),
            durable_t=np.zeros(count, np.int64),
            imputed=np.zeros(count, np.bool_),
            fallback=np.zeros(count, np.bool_),
            errors={},
        )
        self._errors: dict[int, StepstateError] = {}
        self._ended: dict[int, StepstateError] = {}  # by place: what ended it
        members.busy[self._named] = True
        self._keep()

    @property
    def done(self) -> bool:
        """Whether every row has its outcome."""
        return not len(self._waiting)

    @property
    def left(self) -> float:
        """Seconds until it gives up."""
        return self._timeout.left

    def messages(self) -> Iterator[RowsInFlight]:
        """What is to be sent now: all rows that have no outcome yet, in order."""
        at_once = max(1, min(MESSAGE_ROWS, MESSAGE_BYTES // (4 * self._x.shape[1])))
        for first in range(0, len(self._waiting), at_once):
            rows = self._waiting[first : first + at_once]
            yield RowsInFlight(
                rows,
                pb.StreamPackedRequest(
                    handles=self._which[rows].astype("<u4").tobytes(),
                    t=self._t[rows].astype("<u8").tobytes(),
                    x=self._x[rows].astype("<f4", copy=False).tobytes(),
                ),
            )

    def answered(self, message: RowsInFlight, reply: pb.StreamPackedResponse) -> None:
        """Takes the reply to a message.

        Raises:
            StepstateError: the message was refused, and always will be.
        """
        if reply.HasField("error"):
            error = convert.from_status(reply.error)
            if not is_retryable(error):
                raise error
            self._late = error
            return
        refused = [one.row for one in reply.errors]
        for row, one in zip(message.rows[refused].tolist(), reply.errors, strict=True):
            self._refused[row] = convert.from_status(one.status)
        applied = np.ones(len(message.rows), np.bool_)
        applied[refused] = False
        if applied.any():
            self._timeout.progress()
            self._take(message.rows, applied, reply)

    def broken(self, error: StepstateError) -> None:
        """The stream broke: what was not answered is to be sent again.

        Raises:
            StepstateError: it would break again.
        """
        if not is_retryable(error):
            raise error
        self._late = error

    def settle(self) -> list[tuple[S, int]]:
        """Decides about the refused rows, when all replies that will come have come.

        Returns:
            The sessions in which the server was rolled back, and its t in each: let them catch up,
            or report with `ended` why they can't.
        """
        behind: list[tuple[S, int]] = []
        waits: set[int] = set()
        for row in sorted(self._refused):
            place, error = int(self._which[row]), self._refused[row]
            if place in waits or place in self._ended:  # an earlier row decides
                continue
            if not is_retryable(error) and not isinstance(error, StepAhead):
                self._ended[place] = error
                continue
            waits.add(place)
            self._late = error
            if isinstance(error, StepAhead):
                behind.append((self._members.sessions[place], error.expected_t))
        self._refused.clear()
        self._decide()
        return behind

    def ended(self, session: S, error: StepstateError) -> None:
        """A session can't catch up: its rows are refused."""
        self._ended[self._members.sessions.index(session)] = error
        self._decide()

    def pause(self) -> float:
        """Seconds to wait before what is left is sent again; when time is up it is refused."""
        late, self._late = self._late, None
        if late is None or self.done:
            return 0.0
        try:
            return self._timeout.wait(late)
        except StepstateError as error:
            self._ended.update(dict.fromkeys(self._which[self._waiting].tolist(), error))
            self._decide()
            return 0.0

    def result(self) -> PackedResult:
        """The outcome of every row, once it is done."""
        self._members.busy[self._named] = False
        return replace(self._result, errors=self._errors)

    def given_up(self) -> None:
        """The application does not take the outcome: its sessions get back their t."""
        self._members.busy[self._named] = False
        for place, t in self._before.items():
            self._members.sessions[place].t = t

    def _check_times(self, times: Times) -> None:
        """Each row must be its session's next one: a pack adds no missing rows."""
        for place in self._named:
            rows = np.flatnonzero(self._which == place)
            clock, t = self._members.sessions[place].clock, self._before[place]
            some = Times(times.utc[rows], times.naive)
            clock.place(some, t, f"x of session {place}", takes_missing=False)

    def _keep(self) -> None:
        """Keeps the rows, to send them again to a server that is rolled back later."""
        x = self._x.astype("<f4", copy=False)
        places = zip(self._which.tolist(), self._t.tolist(), x, strict=True)
        for place, t, row in places:
            session = self._members.sessions[place]
            if session.info.resumable:
                session.replay_buffer.put(SentRequest(t, 1, row.tobytes()))

    def _take(
        self, rows: NDArray[np.int64], applied: NDArray[np.bool_], reply: pb.StreamPackedResponse
    ) -> None:
        """Takes the outcomes of a message's rows that were applied."""
        taken, result = rows[applied], self._result
        result.y[taken] = np.frombuffer(reply.y, "<f4").reshape(len(rows), -1)[applied]
        result.t[taken] = np.frombuffer(reply.t, "<u8")[applied]
        result.durable_t[taken] = np.frombuffer(reply.durable_t, "<u8")[applied]
        if reply.flags:
            flags = np.frombuffer(reply.flags, np.uint8)[applied]
            result.imputed[taken] = flags & IMPUTED
            result.fallback[taken] = flags & FALLBACK
        columns = (self._which, result.t, result.durable_t, result.imputed, result.fallback)
        outcomes = zip(*(column[taken].tolist() for column in columns), strict=True)
        for place, t, durable_t, imputed, fallback in outcomes:
            session = self._members.sessions[place]
            session.received(t, imputed_rows=int(imputed), fallback_rows=int(fallback))
            session.mark_durable(durable_t)

    def _decide(self) -> None:
        """Gives the rows of ended sessions their error; the others go on waiting."""
        waiting = self._waiting[self._result.t[self._waiting] == 0]
        for row, place in zip(waiting.tolist(), self._which[waiting].tolist(), strict=True):
            if place in self._ended:
                self._errors[row] = self._ended[place]
        self._waiting = np.array([row for row in waiting.tolist() if row not in self._errors], int)


def _places(members: PackMembers[S], which: ArrayLike | None) -> NDArray[np.int64]:
    if which is None:
        return np.arange(len(members.sessions))
    places = np.asarray(which)
    if places.ndim != 1 or not len(places) or places.dtype.kind not in "iu":
        raise InvalidField("which", "is not a list of places in the pack, such as [0, 3]")
    count = len(members.sessions)
    if places.min() < 0 or places.max() >= count:
        raise InvalidField("which", f"names a place outside 0 to {count - 1}, those of the pack")
    return places.astype(np.int64)


def _rows(model: ModelInfo, x: RowsLike, count: int) -> tuple[Floats, Times | None]:
    rows, _, times = read_rows(model, x, "x")
    if len(rows) != count:
        raise InvalidField("x", f"has {len(rows)} rows for {count} sessions: one each")
    return rows, times


def _times(which: NDArray[np.int64], before: Mapping[int, int]) -> NDArray[np.int64]:
    """t of each row [N]: that of its session, and one more for each earlier row of the session."""
    starts = np.array([before[place] for place in which.tolist()], np.int64)
    order = np.argsort(which, kind="stable")
    ordered = which[order]
    first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    run = np.arange(len(which)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    times = np.empty(len(which), np.int64)
    times[order] = starts[order] + run
    return times
