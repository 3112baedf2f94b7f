"""Errors as gRPC statuses: the one table from an error's type to its code, and the details.

The details are those of google.rpc: ErrorInfo for every error (its reason and its fields), and
BadRequest, PreconditionFailure, QuotaFailure and RetryInfo for some.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc import StatusCode

from stepstate import errors
from stepstate.v1.google_rpc import (
    BadRequest,
    ErrorInfo,
    PreconditionFailure,
    QuotaFailure,
    RetryInfo,
    Status,
)

DOMAIN = "stepstate"
MAX_TEXT = 600
DETAILS_KEY = "grpc-status-details-bin"

_CODES: dict[type[errors.StepstateError], StatusCode] = {
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.SessionExists: StatusCode.ALREADY_EXISTS,
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.StepAhead: StatusCode.ABORTED,
    errors.StepPositionUnknown: StatusCode.ABORTED,
    errors.StaleOwner: StatusCode.ABORTED,
    errors.StepTooOld: StatusCode.OUT_OF_RANGE,
    errors.SnapshotModelMismatch: StatusCode.FAILED_PRECONDITION,
    errors.ForecastImpossible: StatusCode.FAILED_PRECONDITION,
    errors.SnapshotTooLarge: StatusCode.FAILED_PRECONDITION,
    errors.SnapshotCorrupt: StatusCode.DATA_LOSS,
    errors.SnapshotUntrusted: StatusCode.FAILED_PRECONDITION,
    errors.SessionUnreadable: StatusCode.DATA_LOSS,
    errors.SessionLimit: StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: StatusCode.PERMISSION_DENIED,
    errors.MemoryLimit: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyCalls: StatusCode.RESOURCE_EXHAUSTED,
    errors.TenantLimitReached: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyAuthFailures: StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: StatusCode.UNAVAILABLE,
    errors.Internal: StatusCode.INTERNAL,
}

_FIELDS: dict[type[errors.StepstateError], str] = {
    errors.NonFiniteInput: "x",
    errors.NonFiniteResult: "x",
    errors.StepMismatch: "x",
    errors.SequenceNotStarted: "sequence_id",
}
"""The field of the request that an error is about, if the error does not say it."""

_QUOTAS: dict[type[errors.StepstateError], str] = {
    errors.SessionLimit: "server:sessions",
    errors.MemoryLimit: "client:memory",
    errors.TooManyCalls: "client:calls",
    errors.TooManyAuthFailures: "client:credentials",
}
"""Whose quota of what is used up."""
_RETRYABLE = (
    errors.QueueFull,
    errors.MemoryLimit,
    errors.TooManyCalls,
    errors.TenantLimitReached,
    errors.TooManyAuthFailures,
    errors.KeysUnavailable,
    errors.Draining,
    errors.StoreUnavailable,
)
"""Errors that say when to try again."""


def code_of(error: errors.StepstateError) -> StatusCode:
    """The code of an error: that of the nearest type in the table."""
    return next(_CODES[cls] for cls in type(error).__mro__ if cls in _CODES)


def status_of(error: errors.StepstateError) -> Status:
    """An error as `google.rpc.Status`, with its details."""
    number: int = code_of(error).value[0]
    status = Status(code=number, message=_cut(str(error)))
    for detail in _details(error):
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _cut(text: str) -> str:
    """Cuts a text, so that a whole status fits into gRPC's metadata, 8 KiB by default."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def _details(error: errors.StepstateError) -> Iterator[Message]:
    fields = {name: _cut(value) for name, value in error.fields().items()}
    yield ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=fields)
    if isinstance(error, errors.InvalidRequest):
        field = error.field if isinstance(error, errors.InvalidField) else _FIELDS[type(error)]
        violation = BadRequest.FieldViolation(field=field, description=_cut(str(error)))
        yield BadRequest(field_violations=[violation])
    if (subject := _quota(error)) is not None:
        quota = QuotaFailure.Violation(subject=subject, description=_cut(str(error)))
        yield QuotaFailure(violations=[quota])
    if isinstance(error, errors.ForecastImpossible):
        yield _precondition("FORECAST", error.subject, error)
    if isinstance(error, errors.SnapshotUntrusted):
        yield _precondition("SIGNATURE", "snapshot", error)
    if isinstance(error, errors.SnapshotModelMismatch):
        yield _precondition("MODEL", error.model, error)
    if isinstance(error, _RETRYABLE):
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        yield RetryInfo(retry_delay=delay)


def _quota(error: errors.StepstateError) -> str | None:
    """Whose quota of what is used up; None: none is."""
    if isinstance(error, errors.TenantLimitReached):
        owner = f"tenant:{error.tenant}" if error.tenant else "server"
        return _cut(f"{owner}:{error.limit}")
    return _QUOTAS.get(type(error))


def _precondition(kind: str, subject: str, error: errors.StepstateError) -> PreconditionFailure:
    violation = PreconditionFailure.Violation(
        type=kind, subject=_cut(subject), description=_cut(str(error))
    )
    return PreconditionFailure(violations=[violation])
