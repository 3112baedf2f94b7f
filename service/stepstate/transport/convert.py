"""Between messages of `stepstate.v1` and the values of the sessions layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from stepstate.engine import ForecastQuality
from stepstate.errors import InvalidField, NonFiniteInput
from stepstate.models import Manifest, Model
from stepstate.sessions import (
    CopyOptions,
    OpenOptions,
    ReplyTo,
    ResidentSession,
    SessionStatus,
    SessionSummary,
    Step,
    new_id,
)
from stepstate.stores import Durability, MissingPolicy, UnreadableSession
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import FEW_VALUES, put_floats, x_of

T = TypeVar("T")

REPLY_BYTES = 4_000_000
"""A client with gRPC's default limit of 4 MiB can read every reply."""
REQUEST_VALUES = 4_000_000
"""What the longest message holds; `advance` must not ask for more in ten bytes."""
REQUEST_ROWS = 100_000
"""About ten weeks of minutes in one request; more history goes in several."""

_DURABILITY_NUMBERS = {
    Durability.NONE: pb.DURABILITY_NONE,
    Durability.ASYNC: pb.DURABILITY_ASYNC,
    Durability.SYNC: pb.DURABILITY_SYNC,
}
_DURABILITIES: dict[int, Durability | None] = {
    pb.DURABILITY_UNSPECIFIED: None,
    **{number: durability for durability, number in _DURABILITY_NUMBERS.items()},
}
_MISSING_NUMBERS = {
    MissingPolicy.REJECT: pb.MISSING_POLICY_REJECT,
    MissingPolicy.IMPUTE: pb.MISSING_POLICY_IMPUTE,
    MissingPolicy.HOLD: pb.MISSING_POLICY_HOLD,
}
_MISSING: dict[int, MissingPolicy] = {
    pb.MISSING_POLICY_UNSPECIFIED: MissingPolicy.REJECT,
    **{number: policy for policy, number in _MISSING_NUMBERS.items()},
}
_STATUS_NUMBERS = {
    SessionStatus.OPEN: pb.SESSION_STATUS_OPEN,
    SessionStatus.EXPIRED: pb.SESSION_STATUS_EXPIRED,
    SessionStatus.MODEL_MISSING: pb.SESSION_STATUS_MODEL_MISSING,
}
_Y = pb.StepResponse.Y_FIELD_NUMBER
_LAYER_FIELDS = {field.name: field.number for field in pb.LayerTrace.DESCRIPTOR.fields}


def decode_step(request: pb.StepRequest, session: ResidentSession, reply_to: ReplyTo) -> Step:
    """Checks a request against its session's model.

    Raises:
        InvalidField: x is not whole rows, or the reply would be too large.
        NonFiniteInput: it names row and column.
    """
    count = len(request.x)
    width = session.model.manifest.input_width
    rows, rest = divmod(count, width)
    x: Sequence[float] | np.ndarray
    if request.advance:
        rows, x, finite = request.advance, _nothing(request, session), False
    elif rest or not rows:
        raise _wrong_width(session, count)
    elif count <= FEW_VALUES:
        x = request.x[:]
        finite = math.isfinite(sum(x))  # float32 values can't overflow a float64 sum
    else:
        x = x_of(request)
        finite = bool(np.isfinite(x).all())
    t = request.t if request.HasField("t") else None
    return make_step(
        session,
        x,
        rows,
        finite=finite,
        t=t,
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
        reply_bytes = _check_reply(model, rows, 1 if last_only else rows, inspect=inspect)
    step = Step(x, rows, inspect, last_only, session, t, reply_to, reply_bytes)
    if missing_rows:
        step.missing_rows = missing_rows
        step.impute = session.record.missing is MissingPolicy.IMPUTE
    return step


def encode_step(step: Step) -> pb.StepResponse:
    """The reply to an applied or replayed step."""
    response = pb.StepResponse(
        session_id=step.session.session_id, t=step.t_after, durable_t=step.durable_t
    )
    if step.replayed:
        response.replayed = True
    if step.missing_rows:
        response.imputed_rows = step.missing_rows
    lag_rows = step.session.model.manifest.lag_rows
    if step.t_after - step.rows < lag_rows:
        response.fallback_rows = min(step.rows, lag_rows - step.t_after + step.rows)
    put_floats(response, _Y, step.y)
    for layer in step.layers or ():
        trace = response.layers.add()
        for name, values in layer.items():
            put_floats(trace, _LAYER_FIELDS[name], values.astype("<f4", copy=False).tobytes())
    return response


def decode_opening(request: pb.OpenSessionRequest) -> OpenOptions:
    """What a client asks for when it opens a session."""
    return OpenOptions(
        session_id=request.session_id,
        model=request.model,
        version=request.version,
        idle_timeout_seconds=_idle_timeout(request),
        start_time=_moment(request) if request.HasField("start_time") else None,
        durability=_durability(request.durability),
        missing=_known("missing", request.missing, _MISSING),
        interval_level=request.interval_level or None,
    )


def decode_fork(request: pb.ForkSessionRequest) -> CopyOptions:
    """What a client asks for when it forks a session."""
    session_id = request.new_session_id or new_id()
    return CopyOptions(session_id, _idle_timeout(request), _durability(request.durability))


def decode_import(request: pb.ImportSessionRequest | pb.StreamImportRequest) -> CopyOptions:
    """What a client asks for when it imports a session, beside the snapshot."""
    return CopyOptions(request.session_id, _idle_timeout(request), _durability(request.durability))


def encode_session(standing: SessionSummary | UnreadableSession) -> pb.Session:
    """Where a session stands."""
    if isinstance(standing, UnreadableSession):
        return pb.Session(session_id=standing.session_id, status=pb.SESSION_STATUS_UNREADABLE)
    record, now = standing.record, datetime.now(UTC)
    return pb.Session(
        session_id=record.session_id,
        model=record.model,
        version=record.version,
        fingerprint=record.fingerprint,
        t=standing.t,
        idle_timeout=duration(record.idle_timeout_seconds),
        start_time=None if record.start_time is None else timestamp(record.start_time),
        open_time=timestamp(record.open_time),
        expire_time=_later(now, standing.seconds_left),
        queued_requests=standing.queued_requests,
        durable_t=standing.durable_t,
        durability=_DURABILITY_NUMBERS[record.durability],
        residency=pb.RESIDENCY_RESIDENT if standing.resident else pb.RESIDENCY_SPILLED,
        owner=standing.owner,
        epoch=standing.epoch,
        missing=_MISSING_NUMBERS[record.missing],
        status=_STATUS_NUMBERS[standing.status],
        **_quality(standing.quality),
        purge_time=None
        if standing.delete_seconds is None
        else _later(now, standing.delete_seconds),
    )


def _later(now: datetime, seconds: float) -> Timestamp:
    try:
        return timestamp(now + timedelta(seconds=seconds))
    except OverflowError:  # a damaged store may tell of the year 10,000
        return timestamp(datetime.max.replace(tzinfo=UTC))


def _quality(quality: ForecastQuality | None) -> dict[str, Any]:
    """The fields of a session that tell how good its forecasts are."""
    if quality is None:
        return {}
    drift = quality.drift
    return {
        "interval_level": quality.level,
        "accuracy": [
            pb.Accuracy(
                output=one.output,
                horizon=one.horizon,
                scored=one.lifetime.scored,
                mean_absolute_error=one.lifetime.mean_absolute_error,
                mean_absolute_scaled_error=one.lifetime.mean_absolute_scaled_error,
                coverage=one.lifetime.coverage,
                offset=one.offset,
                recent_scored=one.recent.scored,
                recent_mean_absolute_error=one.recent.mean_absolute_error,
                recent_mean_absolute_scaled_error=one.recent.mean_absolute_scaled_error,
                recent_coverage=one.recent.coverage,
                recent_median_absolute_error=one.median_absolute_error,
            )
            for one in quality.accuracy
        ],
        "drift": pb.Drift(
            drifting=drift.drifting,
            alarms=drift.alarms,
            last_t=drift.last_t,
            learning=drift.learning,
            score=drift.score,
        ),
    }


def encode_model(model: Model) -> pb.Model:
    """A loaded model, as its manifest describes it."""
    manifest = model.manifest
    cell = manifest.cell
    interval = manifest.step_interval_seconds
    return pb.Model(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        fingerprint=manifest.fingerprint,
        cell=pb.Cell(
            kind=cell.kind.value,
            hidden_size=cell.hidden_size,
            num_layers=cell.num_layers,
            proj_size=cell.proj_size,
        ),
        inputs=[pb.Input(name=column.name, unit=column.unit) for column in manifest.inputs],
        outputs=[
            pb.Output(
                name=output.name,
                unit=output.unit,
                horizons=output.horizons,
                quantiles=output.quantiles,
            )
            for output in manifest.outputs
        ],
        step_interval=None if interval is None else duration(interval),
        needs_start_time=manifest.needs_time,
        lag_rows=manifest.lag_rows,
        tracked_horizons=manifest.tracking.horizons if manifest.tracking else (),
    )


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


def _nothing(request: pb.StepRequest, session: ResidentSession) -> np.ndarray:
    """Rows in which everything is missing."""
    if len(request.x):
        raise InvalidField("advance", "is set, and so is x: a request has the one or the other")
    if session.record.missing is MissingPolicy.REJECT:
        raise InvalidField(
            "advance",
            f"asks for missing rows, which session {session.session_id!r} refuses: open it with "
            "missing set to impute or hold",
        )
    if request.advance > REQUEST_ROWS:
        raise _too_many_rows("advance", request.advance)
    most = REQUEST_VALUES // session.model.manifest.input_width
    if request.advance > most:
        raise InvalidField(
            "advance",
            f"is {request.advance}; of {session.model.key} at most {most} a request",
        )
    return np.full(request.advance * session.model.manifest.input_width, np.nan, np.float32)


def _missing_rows(session: ResidentSession, x: Sequence[float] | np.ndarray) -> int:
    """How many rows miss something, in a session that takes such rows.

    Raises:
        NonFiniteInput: a value is infinite, or the session takes no NaN.
    """
    values = np.asarray(x, np.float32).reshape(-1, session.model.manifest.input_width)
    takes_nan = session.record.missing is not MissingPolicy.REJECT
    if not takes_nan or np.isinf(values).any():
        manifest = session.model.manifest
        raise non_finite(session.session_id, manifest, values, takes_nan=takes_nan)
    return int(np.isnan(values).any(axis=1).sum())


def non_finite(
    session_id: str, manifest: Manifest, x: Sequence[float] | np.ndarray, *, takes_nan: bool
) -> NonFiniteInput:
    """Why x, row-major [T, D], is refused: it names the first bad value."""
    values = np.asarray(x, np.float32).reshape(-1, manifest.input_width)
    bad = np.isinf(values) if takes_nan else ~np.isfinite(values)
    row, column = np.argwhere(bad)[0].tolist()
    name, value = manifest.inputs[column].name, float(values[row, column])
    return NonFiniteInput(session_id, row, name, str(value))


def _check_reply(model: Model, rows: int, rows_back: int, *, inspect: bool) -> int:
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


def _known(field: str, number: int, meanings: Mapping[int, T]) -> T:
    """What a number of an enum means; that of a later contract means nothing here."""
    if number not in meanings:
        raise InvalidField(field, f"is {number}, which means nothing to this server")
    return meanings[number]


def _idle_timeout(
    request: pb.OpenSessionRequest
    | pb.ForkSessionRequest
    | pb.ImportSessionRequest
    | pb.StreamImportRequest,
) -> float | None:
    if not request.HasField("idle_timeout"):
        return None
    idle = request.idle_timeout  # as a float it can be beyond every timedelta, and then be refused
    return idle.seconds + idle.nanos / 1e9


def _durability(number: int) -> Durability | None:
    return _known("durability", number, _DURABILITIES)


def _moment(request: pb.OpenSessionRequest) -> datetime:
    try:
        return request.start_time.ToDatetime(tzinfo=UTC)
    except ValueError as error:
        raise InvalidField("start_time", f"is not a time: {error}") from error


def duration(seconds: float) -> Duration:
    """A span of time as a message."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e6) * 1_000)
    return duration


def timestamp(moment: datetime) -> Timestamp:
    """A time as a message."""
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp
