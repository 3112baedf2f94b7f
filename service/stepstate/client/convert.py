"""Conversion between the client's values and the contract's messages, for both clients. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from datetime import UTC
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage

from stepstate.client.forecast import Forecast, Method, OutputForecast
from stepstate.client.types import (
    Accuracy,
    Drift,
    Floats,
    Inspection,
    LimitUsage,
    ModelInfo,
    Output,
    SessionInfo,
    TenantUsage,
)
from stepstate.errors import (
    Cancelled,
    InvalidField,
    ServerUnreachable,
    StepstateError,
    UnexpectedStatus,
    restore,
)
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import array_of, y_of
from stepstate.v1.google_rpc import ErrorInfo, Status

N = TypeVar("N")

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
_DETAILS_KEY = "grpc-status-details-bin"
_TOO_LARGE = "message larger than max"
"""In gRPC's own text about a message over a limit, of this side or the other."""
# gRPC's own codes for a connection that broke; Stepstate's own errors, INTERNAL too, have details.
_NO_ANSWER = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    # A server that ends its last calls; _GIVEN_UP finds what the caller itself has cancelled.
    grpc.StatusCode.CANCELLED,
)
_ENDED_IN_A_WRITE = "Internal error from Core"
"""The text of an INTERNAL that grpc.aio's client makes itself: a call ended while it was written.
The status that the server sent is lost, so it is tried again, like a call without an answer."""
# How grpcio begins the text of a CANCELLED that it made in this process.
_GIVEN_UP = ("Channel closed", "Locally cancelled")
DISCONNECTED = "the client was disconnected, make a new one"


def durability_number(name: str) -> pb.Durability:
    """The contract's value for a durability.

    Raises:
        InvalidField: there is no such durability.
    """
    return _number("durability", name, _DURABILITY_NUMBERS)


def missing_number(name: str) -> pb.MissingPolicy:
    """The contract's value for a missing policy.

    Raises:
        InvalidField: there is no such policy.
    """
    return _number("missing", name, _MISSING_NUMBERS)


def _number(field: str, name: str, numbers: Mapping[str, N]) -> N:
    if name not in numbers:
        raise InvalidField(field, f"is {name!r}, expected one of {', '.join(numbers)}")
    return numbers[name]


def outputs(response: pb.StepResponse, model: ModelInfo) -> Floats:
    """y [T, O] of a reply.

    Raises:
        StepstateError: the reply is an error.
    """
    if response.HasField("error"):
        raise from_status(response.error)
    return y_of(response).reshape(-1, model.output_width)


def forecast(message: pb.SessionForecast) -> Forecast:
    """A session's forecast, from a message that is no error."""
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


def replaced_rows(response: pb.StepResponse) -> dict[str, int]:
    """In how many rows missing values were replaced."""
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
    """A session's status."""
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
        tenant=session.tenant or "default",
    )


def _accuracy(message: pb.Accuracy) -> Accuracy:
    return Accuracy(**{field.name: getattr(message, field.name) for field in fields(Accuracy)})


def _drift(message: pb.Drift) -> Drift:
    last_t = message.last_t if message.HasField("last_t") else None
    return Drift(
        drifting=message.drifting,
        alarms=message.alarms,
        last_t=last_t,
        learning=message.learning,
        score=message.score,
    )


def tenant_usage(tenant: pb.Tenant) -> TenantUsage:
    """A tenant."""
    limits = {
        one.name: LimitUsage(one.value if one.HasField("value") else None, one.used, one.refused)
        for one in tenant.limits
    }
    return TenantUsage(tenant.name, tenant.weight, limits)


def model_info(model: pb.Model) -> ModelInfo:
    """A model."""
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
    """The error of a failed call: of a `grpc.RpcError`, whose type has no methods."""
    code, detail = error.code(), error.details() or ""
    metadata = dict(error.trailing_metadata() or ())
    if _DETAILS_KEY in metadata:
        return from_status(Status.FromString(metadata[_DETAILS_KEY]))
    if code is grpc.StatusCode.CANCELLED and detail.startswith(_GIVEN_UP):
        return Cancelled(detail)
    if code is grpc.StatusCode.INTERNAL and detail == _ENDED_IN_A_WRITE:
        detail = "the call ended while it was written, and gRPC's client lost its status"
    if code in _NO_ANSWER:
        return ServerUnreachable(target, detail or code.name)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in detail:
        return InvalidField("message", f"{detail}: send less in one request, or ask for less")
    return UnexpectedStatus(code.name, detail)


def from_status(status: Status) -> StepstateError:
    """The error of a status with details."""
    info = _error_info(status.details)
    known = restore(info.reason, dict(info.metadata)) if info is not None else None
    return known or UnexpectedStatus(str(status.code), status.message)


def _error_info(details: Iterable[AnyMessage]) -> ErrorInfo | None:
    for detail in details:
        info = ErrorInfo()
        if detail.Unpack(info):
            return info
    return None
