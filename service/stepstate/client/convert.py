"""Between the client's values and the contract, for both clients. No I/O here."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage

from stepstate.client._protocol.replay import SentRequest
from stepstate.client.forecast import Forecast, Method, OutputForecast
from stepstate.client.types import (
    Accuracy,
    Drift,
    Floats,
    Inspection,
    ModelInfo,
    Output,
    SessionInfo,
)
from stepstate.errors import (
    Cancelled,
    InvalidField,
    ServerUnreachable,
    StaleOwner,
    StepstateError,
    Unavailable,
    UnexpectedStatus,
    restore,
)
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import array_of, put_floats, y_of
from stepstate.v1.google_rpc import ErrorInfo, Status

_DURABILITY_NUMBERS = {
    "none": pb.DURABILITY_NONE,
    "async": pb.DURABILITY_ASYNC,
    "sync": pb.DURABILITY_SYNC,
}
_DURABILITIES = {number: name for name, number in _DURABILITY_NUMBERS.items()}
_METHODS: dict[int, Method] = {
    pb.FORECAST_METHOD_DIRECT: "direct",
    pb.FORECAST_METHOD_FED_BACK: "fed back",
    pb.FORECAST_METHOD_GIVEN: "given",
}
_MISSING_NUMBERS = {
    "reject": pb.MISSING_POLICY_REJECT,
    "impute": pb.MISSING_POLICY_IMPUTE,
    "hold": pb.MISSING_POLICY_HOLD,
}
_MISSING = {number: name for name, number in _MISSING_NUMBERS.items()}
_RESIDENCIES = {pb.RESIDENCY_RESIDENT: "resident", pb.RESIDENCY_SPILLED: "spilled"}
_STATUSES = {
    pb.SESSION_STATUS_OPEN: "open",
    pb.SESSION_STATUS_EXPIRED: "expired",
    pb.SESSION_STATUS_MODEL_MISSING: "model_missing",
    pb.SESSION_STATUS_UNREADABLE: "unreadable",
}
PART_BYTES = 2**20
"""Of a snapshot in one message."""
_DETAILS_KEY = "grpc-status-details-bin"
_TOO_LARGE = "message larger than max"
"""What gRPC itself says of a message beyond a limit, of this side or the other."""
# What gRPC itself says of a connection that broke, beside UNAVAILABLE; Stepstate's own errors,
# INTERNAL too, carry details.
_NO_ANSWER = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    # A server that ends its last calls; what the caller gives up itself is told by _GIVEN_UP.
    grpc.StatusCode.CANCELLED,
)
# How grpcio begins the text of a CANCELLED that it made in this process.
_GIVEN_UP = ("Channel closed", "Locally cancelled")
DISCONNECTED = "the client was disconnected, make a new one"


def opening(
    model: str,
    version: str,
    session_id: str | None,
    *,
    start_time: datetime | None,
    idle_timeout: timedelta | None,
    durability: str | None,
    missing: str | None = None,
    interval_level: float | None = None,
) -> pb.OpenSessionRequest:
    """A request for a session. The client makes the id, so that the request can be repeated.

    Raises:
        InvalidField: start_time or idle_timeout is of another type; durability,
            missing or interval_level is nothing that exists.
    """
    request = pb.OpenSessionRequest(session_id=session_id or new_id(), model=model, version=version)
    if start_time is not None:
        _check_type("start_time", start_time, datetime)
        aware = start_time if start_time.tzinfo else start_time.replace(tzinfo=UTC)
        request.start_time.FromDatetime(aware.astimezone(UTC))
    if missing is not None:
        request.missing = _number("missing", missing, _MISSING_NUMBERS)
    if interval_level is not None:
        if interval_level == 0:  # on the wire it would mean the model's own
            raise InvalidField("interval_level", "is 0, expected more than 0 and less than 1")
        request.interval_level = interval_level
    _put_wishes(request, idle_timeout, durability)
    return request


def forking(
    session_id: str, new_id_: str | None, idle_timeout: timedelta | None, durability: str | None
) -> pb.ForkSessionRequest:
    """A request for a copy of a session; its id is made here too."""
    request = pb.ForkSessionRequest(session_id=session_id, new_session_id=new_id_ or new_id())
    _put_wishes(request, idle_timeout, durability)
    return request


def importing(
    snapshot: bytes,
    session_id: str | None,
    idle_timeout: timedelta | None,
    durability: str | None,
) -> list[pb.StreamImportRequest]:
    """The requests for a session from a snapshot; without an id it keeps its own."""
    first = pb.StreamImportRequest(size=len(snapshot), session_id=session_id or "")
    _put_wishes(first, idle_timeout, durability)
    first.data = snapshot[:PART_BYTES]
    places = range(PART_BYTES, len(snapshot), PART_BYTES)
    rest = [pb.StreamImportRequest(data=snapshot[at : at + PART_BYTES]) for at in places]
    return [first, *rest]


def new_id() -> str:
    """An id for a session of this client."""
    return f"c-{uuid.uuid4().hex}"


def _put_wishes(
    request: pb.OpenSessionRequest | pb.ForkSessionRequest | pb.StreamImportRequest,
    idle_timeout: timedelta | None,
    durability: str | None,
) -> None:
    if idle_timeout is not None:
        _check_type("idle_timeout", idle_timeout, timedelta)
        request.idle_timeout.FromTimedelta(idle_timeout)
    if durability is not None:
        request.durability = _number("durability", durability, _DURABILITY_NUMBERS)


def _check_type(field: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise InvalidField(field, f"is {value!r}, expected a {kind.__name__}")


def _number(field: str, name: str, numbers: dict[str, Any]) -> Any:
    if name not in numbers:
        raise InvalidField(field, f"is {name!r}, expected one of {', '.join(numbers)}")
    return numbers[name]


def step_request(session_id: str, sent: SentRequest) -> pb.StepRequest:
    """A request to apply rows."""
    request = pb.StepRequest(
        session_id=session_id, t=sent.t, inspect=sent.inspect, last_only=sent.last_only
    )
    put_floats(request, pb.StepRequest.X_FIELD_NUMBER, sent.data)
    return request


def outputs(response: pb.StepResponse, model: ModelInfo) -> Floats:
    """y [T, O] of a reply.

    Raises:
        StepstateError: the reply is an error.
    """
    if response.HasField("error"):
        raise from_status(response.error)
    return y_of(response).reshape(-1, model.output_width)


def forecast(message: pb.SessionForecast) -> Forecast:
    """A session's forecast; it is no error."""
    levels = tuple(message.quantiles)
    outputs = {one.name: _output_forecast(one, levels) for one in message.outputs}
    times = None
    if message.HasField("first_time"):
        first = np.datetime64(message.first_time.ToDatetime(), "us")
        count = max((len(output.values) for output in outputs.values()), default=0)
        step = np.timedelta64(message.step_interval.ToMicroseconds(), "us")
        times = first + np.arange(count) * step
        if not message.first_time.nanos and not message.step_interval.nanos:
            times = times.astype("datetime64[s]")
    return Forecast(
        session_id=message.session_id,
        t=message.t,
        scenario=message.scenario,
        levels=levels,
        outputs=outputs,
        times=times,
    )


def _output_forecast(message: pb.OutputForecast, levels: tuple[float, ...]) -> OutputForecast:
    return OutputForecast(
        name=message.name,
        unit=message.unit,
        levels=levels,
        values=array_of(message.values).reshape(-1, max(1, len(levels))),
        methods=tuple(_METHODS.get(method, "") for method in message.methods),
    )


def stand_ins(response: pb.StepResponse) -> dict[str, int]:
    """In how many rows something stood in for what was missing."""
    return {"imputed_rows": response.imputed_rows, "fallback_rows": response.fallback_rows}


def inspection(
    response: pb.StepResponse, model: ModelInfo, of_given: Callable[[Floats], Floats]
) -> Inspection:
    """Outputs and layers of a reply to a request with `inspect`, of the rows that were given."""
    y = outputs(response, model)
    layers = [
        {
            field.name: of_given(np.array(values, np.float32).reshape(len(y), -1))
            for field, values in layer.ListFields()
        }
        for layer in response.layers
    ]
    return Inspection(of_given(y), tuple(layers))


def session_info(session: pb.Session) -> SessionInfo:
    """A session by the server's word."""
    started = session.start_time.ToDatetime(tzinfo=UTC) if session.HasField("start_time") else None
    purge = session.purge_time.ToDatetime(tzinfo=UTC) if session.HasField("purge_time") else None
    return SessionInfo(
        session_id=session.session_id,
        model=session.model,
        version=session.version,
        fingerprint=session.fingerprint,
        t=session.t,
        idle_timeout=session.idle_timeout.ToTimedelta(),
        start_time=started,
        open_time=session.open_time.ToDatetime(tzinfo=UTC),
        expire_time=session.expire_time.ToDatetime(tzinfo=UTC),
        durable_t=session.durable_t,
        durability=_DURABILITIES.get(session.durability, ""),
        residency=_RESIDENCIES.get(session.residency, ""),
        owner=session.owner,
        epoch=session.epoch,
        missing=_MISSING.get(session.missing, ""),
        interval_level=session.interval_level,
        accuracy=tuple(_accuracy(one) for one in session.accuracy),
        drift=_drift(session.drift),
        status=_STATUSES.get(session.status, ""),
        purge_time=purge,
    )


def _accuracy(one: pb.Accuracy) -> Accuracy:
    return Accuracy(
        output=one.output,
        horizon=one.horizon,
        scored=one.scored,
        mean_absolute_error=one.mean_absolute_error,
        mean_absolute_scaled_error=one.mean_absolute_scaled_error,
        coverage=one.coverage,
        offset=one.offset,
        recent_scored=one.recent_scored,
        recent_mean_absolute_error=one.recent_mean_absolute_error,
        recent_mean_absolute_scaled_error=one.recent_mean_absolute_scaled_error,
        recent_coverage=one.recent_coverage,
        recent_median_absolute_error=one.recent_median_absolute_error,
    )


def _drift(drift: pb.Drift) -> Drift:
    last_t = drift.last_t if drift.HasField("last_t") else None
    return Drift(
        drifting=drift.drifting,
        alarms=drift.alarms,
        last_t=last_t,
        learning=drift.learning,
        score=drift.score,
    )


def model_info(model: pb.Model) -> ModelInfo:
    """A model by the server's word."""
    return ModelInfo(
        name=model.name,
        version=model.version,
        description=model.description,
        fingerprint=model.fingerprint,
        cell=model.cell.kind,
        hidden_size=model.cell.hidden_size,
        num_layers=model.cell.num_layers,
        inputs={column.name: column.unit for column in model.inputs},
        outputs=tuple(
            Output(o.name, o.unit, tuple(o.horizons), tuple(o.quantiles)) for o in model.outputs
        ),
        step_interval=model.step_interval.ToTimedelta()
        if model.HasField("step_interval")
        else None,
        needs_start_time=model.needs_start_time,
        lag_rows=model.lag_rows,
        tracked_horizons=tuple(model.tracked_horizons),
    )


def from_rpc(error: Any, target: str) -> StepstateError:
    """The error that a failed call stands for: a `grpc.RpcError`, which declares nothing."""
    code, detail = error.code(), error.details() or ""
    metadata = dict(error.trailing_metadata() or ())
    if _DETAILS_KEY in metadata:
        return from_status(Status.FromString(metadata[_DETAILS_KEY]))
    if code is grpc.StatusCode.CANCELLED and detail.startswith(_GIVEN_UP):
        return Cancelled(detail)
    if code in _NO_ANSWER:
        return ServerUnreachable(target, detail or code.name)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in detail:
        return InvalidField("message", f"{detail}: send less in one request, or ask for less")
    return UnexpectedStatus(code.name, detail)


def passing(error: StepstateError) -> bool:
    """Whether the same request may succeed a little later."""
    return isinstance(error, Unavailable | StaleOwner)


def from_status(status: Status) -> StepstateError:
    """The error that a status with details stands for."""
    info = _error_info(status.details)
    known = restore(info.reason, dict(info.metadata)) if info is not None else None
    return known or UnexpectedStatus(str(status.code), status.message)


def _error_info(details: Iterable[AnyMessage]) -> ErrorInfo | None:
    for detail in details:
        info = ErrorInfo()
        if detail.Unpack(info):
            return info
    return None
