from __future__ import annotations

import pickle
from dataclasses import fields

import pytest

from stepstate import errors
from stepstate.errors import ModelInvalid, StartError, StepstateError, restore

SAMPLES = {"int": 41, "float": 0.1 + 0.2, "str": "a=b, 'ü' 1"}


def leaves(cls: type[StepstateError]) -> list[type[StepstateError]]:
    below = [leaf for sub in cls.__subclasses__() for leaf in leaves(sub)]
    return below or [cls]


LEAVES = leaves(StepstateError)
ON_THE_WIRE = [cls for cls in LEAVES if not issubclass(cls, StartError)]


def sample(cls: type[StepstateError]) -> StepstateError:
    return cls(*(SAMPLES[str(field.type)] for field in fields(cls)))


@pytest.mark.parametrize("cls", ON_THE_WIRE)
def test_an_error_is_made_again_from_its_fields(cls):
    error = sample(cls)
    again = restore(error.reason, error.fields())
    assert type(again) is cls
    assert [getattr(again, f.name) for f in fields(cls)] == [
        getattr(error, f.name) for f in fields(cls)
    ]
    assert str(again) == str(error)


@pytest.mark.parametrize("cls", LEAVES)
def test_a_message_names_what_and_which(cls):
    text = str(sample(cls))
    for field in fields(cls):
        if field.name != "retry_after_seconds":
            shown = SAMPLES[str(field.type)]
            assert (f"{shown:g}" if isinstance(shown, float) else str(shown)) in text.replace(
                "\\'", "'"
            )


WHAT_NEXT = {
    errors.PermissionDenied: "use a credential",
    errors.SessionUnknown: "open it",
    errors.SessionExpired: "open it again",
    errors.SessionClosed: "open it again",
    errors.ModelUnknown: "loaded: ",
    errors.SessionExists: "choose another id",
    errors.NonFiniteInput: "send finite values",
    errors.NonFiniteResult: "check the unit",
    errors.SequenceNotStarted: "must specify the START flag",
    errors.StepMismatch: "must repeat the same rows",
    errors.StepAhead: "send the rows from t=41",
    errors.StepTooOld: "go on from t=41",
    errors.ForecastImpossible: "no forecast of",  # what to do is in its problem
    errors.SessionLost: "choose durability async or sync",
    errors.StepPositionUnknown: "send t with the request",
    errors.StaleOwner: "ask where it stands",
    errors.RowsMissing: "from your own records",
    errors.SnapshotModelMismatch: "serve that very model version",
    errors.SnapshotCorrupt: "from its source again",
    errors.SnapshotKeyInvalid: "write one key a line",
    errors.SnapshotUntrusted: "export it from a server whose --snapshot-key",
    errors.SnapshotTooLarge: "in parts",
    errors.SessionUnreadable: "or close it (stepstate sessions close",
    errors.StoreUnavailable: "a retry with the same t",
    errors.SessionLimit: "--max-sessions",
    errors.QueueFull: "retry after 0.3 s",
    errors.MemoryLimit: "retry after 0.3 s, read the replies",
    errors.TooManyCalls: "retry after 0.3 s, and have fewer under way",
    errors.TenantLimitReached: "retry after 0.3 s, ask for less",
    errors.TooManyAuthFailures: "with one that does",
    errors.KeysUnavailable: "retry after 0.3 s",
    errors.Draining: "retry on another server",
    errors.ServerUnreachable: "sent again safely",
    errors.Cancelled: "send the same request",
    errors.UnexpectedStatus: "is it a Stepstate server?",
    errors.Internal: "server's log",
    errors.DeviceUnavailable: "leave the option out",
    errors.RuntimeUnavailable: "--engine torch",
    errors.AuditLogError: "name a file in a folder",
    errors.ListenError: "choose another, port 0",
    errors.InsecureAddress: "Either give the server TLS and identities",
}


@pytest.mark.parametrize(("cls", "advice"), WHAT_NEXT.items())
def test_a_message_says_what_to_do_next(cls, advice):
    assert advice in str(sample(cls))


def test_every_error_says_what_to_do_next_or_lets_its_maker_say_it():
    says_it = {
        errors.InvalidField,
        errors.Unauthenticated,
        errors.CredentialsInvalid,
        ModelInvalid,
        errors.StoreOpenError,
        errors.TlsInvalid,
    }
    assert set(LEAVES) == set(WHAT_NEXT) | says_it


def test_reasons_are_different_and_look_like_googles():
    reasons = [cls.reason for cls in ON_THE_WIRE]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.replace("_", "").isalpha() and reason.isupper() for reason in reasons)


@pytest.mark.parametrize(
    ("reason", "metadata"),
    [
        ("NO_SUCH_REASON", {}),
        ("", {"folder": "x", "problem": "y"}),
        ("STEP_AHEAD", {"session_id": "a", "t": "1"}),
        ("STEP_AHEAD", {"session_id": "a", "t": "one", "expected_t": "2"}),
    ],
)
def test_what_can_not_be_told_is_not_made_up(reason, metadata):
    assert restore(reason, metadata) is None


def test_fields_that_a_newer_server_adds_are_no_obstacle():
    again = restore("SESSION_UNKNOWN", {"session_id": "a", "later": "x"})
    assert again.session_id == "a"


@pytest.mark.parametrize("cls", LEAVES)
def test_an_error_survives_pickling(cls):
    error = sample(cls)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
