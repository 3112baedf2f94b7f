from __future__ import annotations

import pytest
from google.protobuf.message import Message
from grpc import StatusCode

from stepstate import errors
from stepstate.client.convert import from_status
from stepstate.transport.status import code_of, status_of
from stepstate.v1.google_rpc import (
    BadRequest,
    ErrorInfo,
    PreconditionFailure,
    QuotaFailure,
    RetryInfo,
)
from tests.unit.test_errors import LEAVES, sample

# DESIGN's table.
CODES = {
    errors.SessionUnknown: StatusCode.NOT_FOUND,
    errors.SessionExpired: StatusCode.NOT_FOUND,
    errors.SessionClosed: StatusCode.NOT_FOUND,
    errors.ModelUnknown: StatusCode.NOT_FOUND,
    errors.SessionExists: StatusCode.ALREADY_EXISTS,
    errors.InvalidField: StatusCode.INVALID_ARGUMENT,
    errors.NonFiniteInput: StatusCode.INVALID_ARGUMENT,
    errors.NonFiniteResult: StatusCode.INVALID_ARGUMENT,
    errors.StepMismatch: StatusCode.INVALID_ARGUMENT,
    errors.StepAhead: StatusCode.ABORTED,
    errors.StepTooOld: StatusCode.OUT_OF_RANGE,
    errors.SessionLost: StatusCode.NOT_FOUND,
    errors.StepPositionUnknown: StatusCode.ABORTED,
    errors.StaleOwner: StatusCode.ABORTED,
    errors.SnapshotModelMismatch: StatusCode.FAILED_PRECONDITION,
    errors.ForecastImpossible: StatusCode.FAILED_PRECONDITION,
    errors.SnapshotCorrupt: StatusCode.DATA_LOSS,
    errors.SnapshotUntrusted: StatusCode.FAILED_PRECONDITION,
    errors.SnapshotTooLarge: StatusCode.FAILED_PRECONDITION,
    errors.SessionUnreadable: StatusCode.DATA_LOSS,
    errors.StoreUnavailable: StatusCode.UNAVAILABLE,
    errors.SequenceNotStarted: StatusCode.INVALID_ARGUMENT,
    errors.SessionLimit: StatusCode.RESOURCE_EXHAUSTED,
    errors.QueueFull: StatusCode.UNAVAILABLE,
    errors.MemoryLimit: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyCalls: StatusCode.RESOURCE_EXHAUSTED,
    errors.TenantLimitReached: StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: StatusCode.PERMISSION_DENIED,
    errors.TooManyAuthFailures: StatusCode.RESOURCE_EXHAUSTED,
    errors.KeysUnavailable: StatusCode.UNAVAILABLE,
    errors.Draining: StatusCode.UNAVAILABLE,
    errors.Internal: StatusCode.INTERNAL,
}
NEVER_SENT = {
    errors.ServerUnreachable,
    errors.Cancelled,
    errors.UnexpectedStatus,
    errors.RowsMissing,
    errors.ModelInvalid,
    errors.DeviceUnavailable,
    errors.RuntimeUnavailable,
    errors.StoreOpenError,
    errors.SnapshotKeyInvalid,
    errors.CredentialsInvalid,
    errors.ListenError,
    errors.InsecureAddress,
    errors.TlsInvalid,
    errors.AuditLogError,
}


def details(error: errors.StepstateError) -> dict[type[Message], Message]:
    """The details of an error's status, by type."""
    found = {}
    for packed in status_of(error).details:
        for kind in (ErrorInfo, BadRequest, PreconditionFailure, QuotaFailure, RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                found[kind] = kind.FromString(packed.value)
    assert len(found) == len(status_of(error).details)
    return found


def test_every_error_that_a_server_sends_is_in_the_table():
    assert set(LEAVES) == set(CODES) | NEVER_SENT


@pytest.mark.parametrize(("cls", "code"), CODES.items())
def test_an_error_has_the_code_of_the_design(cls, code):
    error = sample(cls)
    assert code_of(error) is code
    status = status_of(error)
    assert status.code == code.value[0]
    assert status.message == str(error)


@pytest.mark.parametrize("cls", CODES)
def test_an_error_has_the_details_of_the_design(cls):
    wanted = {ErrorInfo}
    if issubclass(cls, errors.InvalidRequest):
        wanted.add(BadRequest)
    if cls in (
        errors.SnapshotModelMismatch,
        errors.SnapshotUntrusted,
        errors.ForecastImpossible,
    ):
        wanted.add(PreconditionFailure)
    if code_of(sample(cls)) is StatusCode.RESOURCE_EXHAUSTED:
        wanted.add(QuotaFailure)
    if issubclass(cls, errors.Unavailable):
        wanted.add(RetryInfo)
    assert set(details(sample(cls))) == wanted


@pytest.mark.parametrize("cls", CODES)
def test_the_client_raises_what_the_server_refused_with(cls):
    error = sample(cls)
    again = from_status(status_of(error))
    assert type(again) is cls
    assert again.fields() == error.fields()


def test_error_info_has_reason_domain_and_fields():
    info = details(errors.StepAhead("a", 9, 4))[ErrorInfo]
    assert (info.reason, info.domain) == ("STEP_AHEAD", "stepstate")
    assert dict(info.metadata) == {"session_id": "a", "t": "9", "expected_t": "4"}


def test_bad_request_names_the_field():
    for error, field in (
        (errors.InvalidField("page_size", "is 0"), "page_size"),
        (errors.NonFiniteInput("a", 1, "load", "nan"), "x"),
        (errors.NonFiniteResult("a", 1), "x"),
        (errors.StepMismatch("a", 1, 2), "x"),
    ):
        (violation,) = details(error)[BadRequest].field_violations
        assert violation.field == field
        assert violation.description == str(error)


def test_retry_info_has_the_seconds_of_the_error():
    delay = details(errors.QueueFull("rows", 3, 0.25))[RetryInfo].retry_delay
    assert (delay.seconds, delay.nanos) == (0, 250_000_000)
