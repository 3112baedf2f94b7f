"""Steps, from a `StepRequest` to its reply: the unary `Step`, and one `StreamSteps` call.

Rule 1: replies of one session leave in the order of its requests, errors too.
Rule 2: what does not fit the session's model, or has too large a reply, is refused before the work.

What bounds a streaming call is in `bidi`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import numpy as np

from stepstate.budget import MemoryUse, call_memory
from stepstate.errors import InvalidField, MemoryLimit, NonFiniteInput, StepstateError
from stepstate.identity import SessionKey
from stepstate.models import Manifest, Model
from stepstate.sessions import ID_LENGTH, Hold, ReplyTo, ResidentSession, SingleRow, Step
from stepstate.stores import MissingPolicy
from stepstate.transport.authentication import current_principal
from stepstate.transport.bidi import STEP_BYTES, Backend
from stepstate.transport.convert import REPLY_BYTES
from stepstate.transport.interceptor import SENT, MessageChannel
from stepstate.transport.peers import current_peer
from stepstate.transport.row_codec import saved
from stepstate.transport.row_stream import RowStream
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import FEW_VALUES, put_floats, x_of

REQUEST_VALUES = 4_000_000
"""What the longest message holds; `advance` must not ask for more in ten bytes."""
REQUEST_ROWS = 100_000
"""About ten weeks of minutes in one request; more history goes in several."""

ADVANCE_REPLY_BYTES = 2**18
"""Of the outputs of all rows of `advance`, which is a request of some ten bytes."""
_VALUE_BYTES = 4

_Y = pb.StepResponse.Y_FIELD_NUMBER
_LAYER_FIELDS = {field.name: field.number for field in pb.LayerTrace.DESCRIPTOR.fields}


class StepStream(RowStream[pb.StepRequest, pb.StepResponse, pb.StepRequest]):
    """One StreamSteps call: a `ReplyTo` for all its steps; see `BidiStream` for its arguments."""

    def __init__(self, backend: Backend, messages: MessageChannel) -> None:
        self._expected = backend.expected.of(current_principal.get().tenant)
        super().__init__(backend, messages, self._expected.take)

    def _make_step(self, request: pb.StepRequest, session: ResidentSession) -> Step:
        return decode_step(request, session, self)

    def _encode_refusal(self, request: pb.StepRequest, error: StepstateError) -> pb.StepResponse:
        return self._error(request.session_id[:ID_LENGTH], error)

    def _encode_row(self, row: SingleRow, y: bytes, durable_t: int) -> bytes:
        reply = row.reply_head + y
        return reply + saved(durable_t) if durable_t else reply

    def _take(self, request: pb.StepRequest) -> None:
        key = self._principal.key(request.session_id)
        session = self._sessions.find(key)
        if session is None:
            self._wait(key, request, STEP_BYTES + request.ByteSize())
            return
        try:
            self._accept(request, session)
        except MemoryLimit:  # it is taken later
            raise
        except StepstateError as error:
            self._refuse(request, error)

    def _accept(self, waiting: pb.StepRequest, session: ResidentSession) -> None:
        step = self._make_step(waiting, session)
        self._submit(step)
        if step.t is not None and step.single:
            self._expected.expect(session, self._sessions.ref_of(session), step.t + 1)

    def _refuse(self, waiting: pb.StepRequest, error: StepstateError) -> None:
        key = self._principal.key(waiting.session_id)
        if not self._refuse_in_order(key, error, self):
            self._reply(self._encode_refusal(waiting, error))

    def _encode_failure(self, error: StepstateError) -> pb.StepResponse:
        return self._error("", error)

    def _encode(self, outcome: Step) -> pb.StepResponse:
        if outcome.error is not None:
            return self._error(outcome.session.session_id, outcome.error)
        return encode_step(outcome)

    def _error(self, session_id: str, error: StepstateError) -> pb.StepResponse:
        self._count_refusal(error)
        return pb.StepResponse(session_id=session_id, error=status_of(error))


class UnaryReply:
    """A `ReplyTo` for one unary call."""

    def __init__(self) -> None:
        self.cancelled = False
        self.source = current_peer.get().source
        self.held_bytes = 0
        """Of its step, once that is accepted."""
        # It does not hold the step, which leads back here.
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def deliver(self, step: Step) -> None:  # noqa: ARG002 - it has its outcome now
        """See `ReplyTo`."""
        if not self.answered.done():
            self.answered.set_result(None)


async def apply_step(
    backend: Backend,
    key: SessionKey,
    make: Callable[[ResidentSession, ReplyTo], Step],
    *,
    patience_seconds: float = 0.0,
    hold: Hold | None = None,
) -> Step:
    """Applies the step of a unary call in its session's turn; returns it with its outcome.

    What it reserves is released when this returns: whoever makes the reply counts that.

    Args:
        backend: serves it.
        key: of the session.
        make: makes the step of the session.
        patience_seconds: see `SessionService.in_turn`.
        hold: see `SessionService.in_turn`.

    Raises:
        StepstateError: it was not accepted.
    """
    sessions, memory, call = backend.sessions, call_memory.get(), UnaryReply()

    def accept(session: ResidentSession) -> Step:
        step = make(session, call)
        memory.reserve(MemoryUse.REPLIES, step.held_bytes)
        try:
            sessions.submit(step)
        except StepstateError:
            memory.release(MemoryUse.REPLIES, step.held_bytes)
            raise
        call.held_bytes = step.held_bytes
        return step

    try:
        step = await sessions.in_turn(key, accept, patience_seconds=patience_seconds, hold=hold)
        await call.answered
    except asyncio.CancelledError:
        call.cancelled = True
        raise
    else:
        return step
    finally:
        memory.release(MemoryUse.REPLIES, call.held_bytes)


def decode_step(request: pb.StepRequest, session: ResidentSession, reply_to: ReplyTo) -> Step:
    """Checks a request against its session's model.

    Raises:
        InvalidField: x is not whole rows, or the reply would be too large.
        NonFiniteInput: it names row and column.
    """
    count = len(request.x)
    rows, rest = divmod(count, session.model.manifest.input_width)
    x: Sequence[float] | np.ndarray
    if request.advance:
        rows, x, finite = request.advance, _missing_values(request, session), False
    elif rest or not rows:
        raise _wrong_width(session, count)
    elif count <= FEW_VALUES:
        x = request.x[:]
        finite = math.isfinite(sum(x))  # float32 values can't overflow a float64 sum
    else:
        x = x_of(request)
        finite = bool(np.isfinite(x).all())
    return make_step(
        session,
        x,
        rows,
        finite=finite,
        t=request.t if request.HasField("t") else None,
        inspect=request.inspect,
        last_only=request.last_only,
        reply_to=reply_to,
    )


def make_step(
    session: ResidentSession,
    x: Sequence[float] | np.ndarray,
    rows: int,
    *,
    finite: bool,
    t: int | None,
    reply_to: ReplyTo,
    inspect: bool = False,
    last_only: bool = False,
) -> Step:
    """A step of x, row-major [T, D]; `finite`: it holds neither NaN nor an infinity.

    Raises:
        InvalidField: the reply would be too large, or these are too many rows.
        NonFiniteInput: it names row and column.
    """
    missing_rows = 0 if finite else _missing_rows(session, x)
    last_only = last_only and rows > 1
    model = session.model
    reply_bytes = 4 * model.manifest.output_width
    if rows > 1 or inspect:
        reply_bytes = _reply_bytes(model, rows, 1 if last_only else rows, inspect=inspect)
    held_bytes = STEP_BYTES + SENT * reply_bytes + _VALUE_BYTES * len(x)
    step = Step(x, rows, inspect, last_only, reply_to, session, t, held_bytes)
    if missing_rows:
        step.missing_rows = missing_rows
        step.impute = session.record.missing is MissingPolicy.IMPUTE
    return step


def encode_step(step: Step) -> pb.StepResponse:
    """The reply to an applied or replayed step."""
    session = step.session
    response = pb.StepResponse(
        session_id=session.record.session_id, t=step.t_after, durable_t=step.durable_t
    )
    if step.replayed:
        response.replayed = True
    if step.missing_rows:
        response.imputed_rows = step.missing_rows
    lag_rows = session.model.manifest.lag_rows
    if step.t_after - step.rows < lag_rows:
        response.fallback_rows = min(step.rows, lag_rows - step.t_after + step.rows)
    put_floats(response, _Y, step.y)
    for layer in step.layers or ():
        trace = response.layers.add()
        for name, values in layer.items():
            put_floats(trace, _LAYER_FIELDS[name], values.astype("<f4", copy=False).tobytes())
    return response


def non_finite(
    session_id: str, manifest: Manifest, x: Sequence[float] | np.ndarray, *, takes_nan: bool
) -> NonFiniteInput:
    """Why x, row-major [T, D], is refused: it names the first bad value."""
    values = np.asarray(x, np.float32).reshape(-1, manifest.input_width)
    bad = np.isinf(values) if takes_nan else ~np.isfinite(values)
    row, column = np.argwhere(bad)[0].tolist()
    name, value = manifest.inputs[column].name, float(values[row, column])
    return NonFiniteInput(session_id, row, name, str(value))


def _wrong_width(session: ResidentSession, count: int) -> InvalidField:
    manifest = session.model.manifest
    names = ", ".join(column.name for column in manifest.inputs[:8])
    more = ", …" if manifest.input_width > 8 else ""
    return InvalidField(
        "x",
        f"holds {count} values; session {session.session_id!r} of {session.model.key} "
        f"takes rows of {manifest.input_width} ({names}{more}): send T * "
        f"{manifest.input_width} values, T = 1 or more",
    )


def _missing_values(request: pb.StepRequest, session: ResidentSession) -> np.ndarray:
    """The rows of `advance`: every value is missing."""
    rows, width = request.advance, session.model.manifest.input_width
    if len(request.x):
        raise InvalidField("advance", "is set, and so is x: a request has the one or the other")
    if session.record.missing is MissingPolicy.REJECT:
        raise InvalidField(
            "advance",
            f"asks for missing rows, which session {session.session_id!r} refuses: open it with "
            "missing set to impute or hold",
        )
    if rows > REQUEST_ROWS:
        raise _too_many_rows("advance", rows)
    if rows > REQUEST_VALUES // width:
        raise InvalidField(
            "advance",
            f"is {rows}; of {session.model.key} at most {REQUEST_VALUES // width} a request",
        )
    if not request.last_only:
        reply_bytes = _reply_bytes(session.model, rows, rows, inspect=request.inspect)
        if rows > 1 and reply_bytes > ADVANCE_REPLY_BYTES:
            raise InvalidField(
                "advance",
                f"asks for {reply_bytes} bytes of outputs, more than {ADVANCE_REPLY_BYTES}: set "
                "last_only, or send fewer rows a request",
            )
    return np.full(rows * width, np.nan, np.float32)


def _missing_rows(session: ResidentSession, x: Sequence[float] | np.ndarray) -> int:
    """How many rows have missing values, in a session that takes such rows.

    Raises:
        NonFiniteInput: a value is infinite, or the session takes no NaN.
    """
    manifest = session.model.manifest
    values = np.asarray(x, np.float32).reshape(-1, manifest.input_width)
    takes_nan = session.record.missing is not MissingPolicy.REJECT
    if not takes_nan or np.isinf(values).any():
        raise non_finite(session.session_id, manifest, values, takes_nan=takes_nan)
    return int(np.isnan(values).any(axis=1).sum())


def _reply_bytes(model: Model, rows: int, rows_back: int, *, inspect: bool) -> int:
    """Bytes of the reply to so many rows.

    Raises:
        InvalidField: these are too many.
    """
    if rows > REQUEST_ROWS:
        raise _too_many_rows("x", rows)
    manifest = model.manifest
    values = manifest.output_width
    if inspect:
        values += manifest.cell.num_layers * (
            6 * manifest.cell.hidden_size + manifest.cell.output_size
        )
    reply_bytes = 4 * values * rows_back
    if reply_bytes > REPLY_BYTES:
        raise InvalidField(
            "x",
            f"the reply to {rows_back} rows would take {reply_bytes} bytes, more than "
            f"{REPLY_BYTES}: set last_only, or send at most {REPLY_BYTES // (4 * values)} rows "
            "a request",
        )
    return reply_bytes


def _too_many_rows(field: str, rows: int) -> InvalidField:
    return InvalidField(
        field, f"holds {rows} rows, a request takes at most {REQUEST_ROWS}: send several"
    )
