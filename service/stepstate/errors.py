"""Every error that Stepstate answers with, as one tree.

    StepstateError
    ├── NotFound
    │   ├── SessionUnknown      never opened here, or its end is no longer remembered
    │   ├── SessionExpired      idle for longer than its timeout
    │   ├── SessionClosed       closed by a client
    │   ├── SessionLost         it was kept in memory only, and its server ended
    │   └── ModelUnknown        no such model or version is loaded
    ├── SessionExists           the id is already open
    ├── InvalidRequest
    │   ├── InvalidField        a field that no session could accept
    │   ├── NonFiniteInput      NaN or infinity in x
    │   ├── NonFiniteResult     the rows would make the state or y non-finite
    │   ├── SequenceNotStarted  of the Triton API: no start flag, and no open sequence
    │   └── StepMismatch        this t was already applied, with another payload
    ├── StepAhead               t is larger than the rows applied so far
    ├── StepTooOld              t is older than the replay window
    ├── StepPositionUnknown     no t, after a restart that may have rolled the session back
    ├── StaleOwner              another server has taken the session over
    ├── ForecastImpossible      the model can't forecast so far, or not without a scenario
    ├── RowsMissing             raised by the client: rows to be sent again are no longer kept
    ├── SnapshotModelMismatch   a snapshot of a model that is not loaded here
    ├── SnapshotCorrupt         bytes that are not a whole snapshot
    ├── SnapshotUntrusted       a snapshot that no server with a key of this one's has signed
    ├── SnapshotTooLarge        a snapshot that no message can hold
    ├── SessionUnreadable       what the store has of a session can't be read
    ├── SessionLimit            no room for one more session
    ├── Unauthenticated         no credential, or one that proves nothing
    ├── PermissionDenied        the credential lacks a scope
    ├── Unavailable             try again, after retry_after_seconds
    │   ├── QueueFull
    │   ├── MemoryLimit         the client makes the server hold too many bytes
    │   ├── TooManyCalls        the client has too many calls under way
    │   ├── TenantLimitReached  a tenant has, or asks for, as much as it may
    │   ├── TooManyAuthFailures too many credentials of this client proved nothing
    │   ├── KeysUnavailable     the key of a JWT is not known yet
    │   ├── Draining
    │   ├── StoreUnavailable    the store does not answer, or can't write
    │   └── ServerUnreachable   raised by the client: no answer from the server
    ├── Cancelled               raised by the client: the call ended before its answer
    ├── UnexpectedStatus        raised by the client: an error that is not Stepstate's
    ├── Internal                an unexpected error; its id is in the server's log
    └── StartError              the server can't start (never on the wire)
        ├── ModelInvalid        a model's folder can't be served
        ├── DeviceUnavailable   there is no such device
        ├── RuntimeUnavailable  a package of the engine is not installed
        ├── StoreOpenError      the store can't be opened
        ├── SnapshotKeyInvalid  the keys of snapshots can't be read
        ├── TlsInvalid          a certificate or its key can't be used
        ├── CredentialsInvalid  tokens, or keys of JWTs, can't be read
        ├── AuditLogError       the audit log can't be written
        ├── ListenError         an address can't be listened on
        └── InsecureAddress     other machines could reach sessions that nothing protects

An error holds fields and composes its message from them: what, which id, what
to do next. The server puts the fields on the wire and the client raises the
same class again, so both sides share this file. It knows no status codes:
`stepstate.transport.status` maps each type to one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

E = TypeVar("E", bound=BaseException)

_BY_REASON: dict[str, type[StepstateError]] = {}


@dataclass(eq=False)
class StepstateError(Exception):
    """Base of every error: `reason` is its name on the wire, `message` a format of its fields."""

    reason: ClassVar[str] = ""
    message: ClassVar[str] = ""

    def __init_subclass__(cls, *, reason: str = "") -> None:
        if reason:
            cls.reason = reason
            _BY_REASON[reason] = cls

    def __str__(self) -> str:
        return self.message.format_map(vars(self))

    def fields(self) -> dict[str, str]:
        """The fields as text, as they travel in `google.rpc.ErrorInfo.metadata`."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}


def restore(reason: str, metadata: dict[str, str]) -> StepstateError | None:
    """Makes an error from what its `fields` returned; None if the reason or a field is unknown."""
    cls = _BY_REASON.get(reason)
    if cls is None:
        return None
    cast = {"int": int, "float": float, "str": str}
    try:
        known = (f for f in fields(cls) if f.name in metadata)  # the others have defaults
        return cls(**{f.name: cast[str(f.type)](metadata[f.name]) for f in known})
    except (KeyError, TypeError, ValueError):
        return None


class NotFound(StepstateError):
    """What the request names is not here, and will not come back by itself."""


@dataclass(eq=False)
class SessionUnknown(NotFound, reason="SESSION_UNKNOWN"):
    """No session of this id is known."""

    message = (
        "session {session_id!r} is unknown: it was never opened on this server, or it ended so "
        "long ago that the reason is forgotten; open it"
    )
    session_id: str


@dataclass(eq=False)
class SessionExpired(NotFound, reason="SESSION_EXPIRED"):
    """The session was idle for longer than its timeout."""

    session_id: str
    t: int
    idle_timeout_seconds: float
    restore_until: str
    """When it will be deleted, by the server's clock; empty: it has been."""

    def __str__(self) -> str:
        text = (
            f"session {self.session_id!r} expired at t={self.t} after "
            f"{self.idle_timeout_seconds:g} s without a step"
        )
        if self.restore_until:
            text += (
                f"; it is kept until {self.restore_until}: restore it (`stepstate sessions restore "
                f"{self.session_id}`, RestoreSession), or open it again to start anew"
            )
        else:
            text += " and was deleted: open it again and send its history"
        return f"{text}; ask for a longer idle_timeout if steps come less often"


@dataclass(eq=False)
class SessionClosed(NotFound, reason="SESSION_CLOSED"):
    """The session was closed by a client."""

    message = "session {session_id!r} was closed at t={t}; open it again to start anew"
    session_id: str
    t: int


@dataclass(eq=False)
class SessionLost(NotFound, reason="SESSION_LOST"):
    """The session was kept in memory only, and the server that had it ended."""

    message = (
        "session {session_id!r} is lost: it was opened with durability none, and the server that "
        "had it ended or lost it to another; open it again and send its history, and choose "
        "durability async or sync for sessions that must outlive a server"
    )
    session_id: str


@dataclass(eq=False)
class ModelUnknown(NotFound, reason="MODEL_UNKNOWN"):
    """No such model, or no such version of it, is loaded."""

    model: str
    version: str
    loaded: str

    def __str__(self) -> str:
        wanted = f"{self.model}/{self.version}" if self.version else self.model
        return f"model {wanted!r} is not loaded; loaded: {self.loaded or 'none'}"


@dataclass(eq=False)
class SessionExists(StepstateError, reason="SESSION_EXISTS"):
    """The id is already open."""

    message = (
        "session {session_id!r} is already open at t={t}; go on from there, choose another id, or "
        "close it first"
    )
    session_id: str
    t: int


class InvalidRequest(StepstateError):
    """The request itself is wrong: sent again, it fails again."""


@dataclass(eq=False)
class InvalidField(InvalidRequest, reason="INVALID_FIELD"):
    """A field of the request can't be accepted."""

    message = "{field}: {problem}"
    field: str
    problem: str


@dataclass(eq=False)
class NonFiniteInput(InvalidRequest, reason="NON_FINITE_INPUT"):
    """A value of x is NaN or infinite."""

    session_id: str
    row: int
    column: str
    value: str

    def __str__(self) -> str:
        hint = ", or open the session with a missing policy" if self.value == "nan" else ""
        return (
            f"x: row {self.row}, input {self.column!r} of session {self.session_id!r} is "
            f"{self.value}; no row of its request was applied: send finite values only{hint}"
        )


@dataclass(eq=False)
class NonFiniteResult(InvalidRequest, reason="NON_FINITE_RESULT"):
    """The rows are finite, but would make the state or y non-finite."""

    message = (
        "x: applied to session {session_id!r} at t={t}, these rows overflow float32; none of them "
        "was applied: check the unit of the values"
    )
    session_id: str
    t: int


@dataclass(eq=False)
class SequenceNotStarted(InvalidRequest, reason="SEQUENCE_NOT_STARTED"):
    """Of the Triton API: a request without the start flag, for a sequence that is not open."""

    message = (  # as Triton words it, and why
        "inference request for sequence {sequence_id} to model {model!r} must specify the START "
        "flag on the first request of the sequence: {cause}"
    )
    sequence_id: str
    model: str
    cause: str


@dataclass(eq=False)
class StepMismatch(InvalidRequest, reason="STEP_MISMATCH"):
    """Another payload was already applied at this t."""

    message = (
        "session {session_id!r} has already applied another request at t={t}; it is at "
        "t={expected_t}: a retry must repeat the same rows and options"
    )
    session_id: str
    t: int
    expected_t: int


@dataclass(eq=False)
class StepAhead(StepstateError, reason="STEP_AHEAD"):
    """t is larger than the rows applied so far: rows are missing."""

    message = (
        "session {session_id!r} is at t={expected_t}, the request is for t={t}: send the rows "
        "from t={expected_t} on first"
    )
    session_id: str
    t: int
    expected_t: int


@dataclass(eq=False)
class StepTooOld(StepstateError, reason="STEP_TOO_OLD"):
    """t is older than everything the replay window remembers."""

    message = (
        "session {session_id!r} is at t={expected_t} and no longer remembers the reply for "
        "t={t}; it was applied: go on from t={expected_t}"
    )
    session_id: str
    t: int
    expected_t: int


@dataclass(eq=False)
class StepPositionUnknown(StepstateError, reason="STEP_POSITION_UNKNOWN"):
    """A request without t, for a session that a restart may have rolled back."""

    message = (
        "session {session_id!r} was restored at t={expected_t} after its server ended "
        "unexpectedly; rows that were acknowledged after it may be missing: send t with the "
        "request, and the rows from t={expected_t} on"
    )
    session_id: str
    expected_t: int


@dataclass(eq=False)
class StaleOwner(StepstateError, reason="STALE_OWNER"):
    """Another server has taken the session over; this one has dropped its copy."""

    message = (
        "another server has taken session {session_id!r} over, where it is saved up to "
        "t={expected_t}; nothing was committed here: ask where it stands, and send the rows from "
        "there on"
    )
    session_id: str
    expected_t: int


@dataclass(eq=False)
class ForecastImpossible(StepstateError, reason="FORECAST_IMPOSSIBLE"):
    """The model can't make this forecast."""

    message = "no forecast of {subject}: {problem}"
    subject: str
    problem: str


@dataclass(eq=False)
class RowsMissing(StepstateError, reason="ROWS_MISSING"):
    """Raised by the client: the session was rolled back further than the rows that it keeps."""

    message = (
        "session {session_id!r} needs the rows {first} to {last} again, and the client no longer "
        "keeps them: set the session's t to {first} and step them from your own records"
    )
    session_id: str
    first: int
    last: int


@dataclass(eq=False)
class SnapshotModelMismatch(StepstateError, reason="SNAPSHOT_MODEL_MISMATCH"):
    """A snapshot, or a stored session, of a model that is not loaded here."""

    session_id: str
    model: str
    fingerprint: str
    loaded: str

    def __str__(self) -> str:
        here = f"{self.model} is loaded here as {self.loaded}" if self.loaded else "not loaded here"
        return (
            f"session {self.session_id!r} belongs to model {self.model} with fingerprint "
            f"{self.fingerprint}, {here}: its state means nothing to other weights; serve that "
            "very model version beside the new one or, if it is this server's and not wanted any "
            f"more, close it: stepstate sessions close {self.session_id}"
        )


@dataclass(eq=False)
class SnapshotCorrupt(StepstateError, reason="SNAPSHOT_CORRUPT"):
    """Bytes that are not a whole snapshot."""

    message = "the snapshot can't be read: {problem}; take it from its source again"
    problem: str


@dataclass(eq=False)
class SnapshotUntrusted(StepstateError, reason="SNAPSHOT_UNTRUSTED"):
    """A snapshot without a signature that this server accepts."""

    message = (
        "the snapshot is not accepted: {problem}; export it from a server whose --snapshot-key "
        "begins with a key that this server has, too"
    )
    problem: str


@dataclass(eq=False)
class SnapshotTooLarge(StepstateError, reason="SNAPSHOT_TOO_LARGE"):
    """A snapshot that is larger than a message can hold."""

    message = (
        "the snapshot of session {session_id!r} takes {size} bytes, more than {limit}: "
        "StreamExport and StreamImport take up to 256 MiB in parts (the client library uses "
        "them), and a server with smaller --replay-bytes keeps less"
    )
    session_id: str
    size: int
    limit: int


@dataclass(eq=False)
class SessionUnreadable(StepstateError, reason="SESSION_UNREADABLE"):
    """What the store has of a session can't be read: its record or its snapshot is damaged."""

    message = (
        "session {session_id!r} can't be read from the store: {problem}; bring back a copy of the "
        "store from before it was damaged, or close it (stepstate sessions close {session_id}), "
        "open it again and send its history"
    )
    session_id: str
    problem: str


@dataclass(eq=False)
class SessionLimit(StepstateError, reason="SESSION_LIMIT"):
    """No room for one more session."""

    message = (
        "all {limit} sessions of this server are open; close some, let idle ones expire, or start "
        "the server with a larger --max-sessions (without a durable store every session needs one "
        "of its --slots, too)"
    )
    limit: int


AUTH_CAUSES = (
    "missing", "malformed", "unknown_token", "revoked", "expired", "unknown_key", "bad_signature",
    "bad_claims", "unmapped_certificate", "scope", "limited", "keys_unavailable", "other",
)  # fmt: skip
"""Why a credential is refused."""


@dataclass(eq=False)
class Unauthenticated(StepstateError, reason="UNAUTHENTICATED"):
    """Who calls is not known; `cause` is one of AUTH_CAUSES."""

    message = "{problem} ({cause})"
    problem: str
    cause: str = "other"


@dataclass(eq=False)
class PermissionDenied(StepstateError, reason="PERMISSION_DENIED"):
    """Who calls is known, and may not do that."""

    message = "{identity} lacks the scope {missing} for this call: use a credential that has it"
    identity: str
    missing: str
    cause: ClassVar[str] = "scope"


class Unavailable(StepstateError):
    """Not now: the same request may succeed later. Nothing was applied."""


@dataclass(eq=False)
class QueueFull(Unavailable, reason="QUEUE_FULL"):
    """Too many rows or requests are already waiting."""

    message = (
        "{what}: the limit of {limit} is reached; nothing was applied: retry after "
        "{retry_after_seconds:g} s, and wait for replies before sending more"
    )
    what: str
    limit: int
    retry_after_seconds: float = 0.05


@dataclass(eq=False)
class MemoryLimit(Unavailable, reason="MEMORY_LIMIT"):
    """What clients make the server hold would pass its limit."""

    message = (
        "{size} bytes more do not fit: this client makes the server hold {held}, and may hold as "
        "much as is free, {free} of {limit}; nothing was applied: retry after "
        "{retry_after_seconds:g} s, read the replies, and have fewer requests under way (the "
        "limit is --memory-limit)"
    )
    size: int
    held: int
    free: int
    limit: int
    retry_after_seconds: float = 0.5


@dataclass(eq=False)
class TooManyCalls(Unavailable, reason="TOO_MANY_CALLS"):
    """A client has as many calls under way as it may."""

    message = (
        "{what}: this client has {held}, and may have as many as are free, {free} of {limit}; "
        "nothing was applied: retry after {retry_after_seconds:g} s, and have fewer under way"
    )
    what: str
    held: int
    free: int
    limit: int
    retry_after_seconds: float = 0.5


@dataclass(eq=False)
class TenantLimitReached(Unavailable, reason="TENANT_LIMIT"):
    """A tenant has, or asks for, as much as it may."""

    tenant: str
    """Whose limit it is; empty: of all tenants together."""
    limit: str
    """Its name, as in the configuration."""
    value: float
    retry_after_seconds: float

    def __str__(self) -> str:
        owner = f"tenant {self.tenant!r} has" if self.tenant else "all tenants together have"
        return (
            f"{owner} reached {self.limit} = {self.value:g}; nothing was applied: retry after "
            f"{self.retry_after_seconds:g} s, ask for less, or ask whoever runs the server for a "
            "higher limit"
        )


@dataclass(eq=False)
class TooManyAuthFailures(Unavailable, reason="TOO_MANY_AUTH_FAILURES"):
    """Many credentials from the client's address proved nothing: none is checked for now."""

    message = (
        "too many credentials from this address proved nothing: retry after "
        "{retry_after_seconds:g} s with one that does; those that were accepted lately still are"
    )
    retry_after_seconds: float = 1.0
    cause: ClassVar[str] = "limited"


@dataclass(eq=False)
class KeysUnavailable(Unavailable, reason="KEYS_UNAVAILABLE"):
    """The key of a JWT is not known, and can't be asked for now."""

    message = (
        "the key that signed this JWT is not known here: {problem}; retry after "
        "{retry_after_seconds:g} s"
    )
    problem: str
    retry_after_seconds: float = 1.0
    cause: ClassVar[str] = "keys_unavailable"


@dataclass(eq=False)
class Draining(Unavailable, reason="DRAINING"):
    """The server is about to stop."""

    message = (
        "the server is draining: it finishes accepted requests and takes no new ones; nothing was "
        "applied: retry on another server, or here when it is back"
    )
    retry_after_seconds: float = 1.0


STORE_CAUSES = (
    "disconnected", "timeout", "readonly", "masterdown", "loading", "noreplicas", "oom", "misconf",
    "cluster", "full", "wal", "busy", "io", "corrupt", "other",
)  # fmt: skip
"""Why a store fails: Redis's error codes (one for all of a changing cluster), SQLite's, and the
network's."""


@dataclass(eq=False)
class StoreUnavailable(Unavailable, reason="STORE_UNAVAILABLE"):
    """The store of sessions does not answer, or can't write; `cause` is one of STORE_CAUSES."""

    message = (
        "the server's store of sessions is away ({cause}): {problem}; whether the request was "
        "committed is settled by a retry with the same t: it is applied once"
    )
    problem: str
    retry_after_seconds: float = 0.25
    cause: str = "other"


@dataclass(eq=False)
class ServerUnreachable(Unavailable, reason="SERVER_UNREACHABLE"):
    """Raised by the client: the server gave no answer within the deadline."""

    message = (
        "no answer from {target}: {detail}; a request that carries t may be sent again safely: it "
        "is applied once"
    )
    target: str
    detail: str


@dataclass(eq=False)
class Cancelled(StepstateError, reason="CANCELLED"):
    """Raised by the client: the call was cancelled, or its stream ended, before the answer."""

    message = (
        "no answer, the call ended first: {detail}; the rows may or may not have been applied: "
        "send the same request with the same t to find out"
    )
    detail: str


@dataclass(eq=False)
class UnexpectedStatus(StepstateError, reason="UNEXPECTED_STATUS"):
    """Raised by the client: a status that no Stepstate server of this version answers with."""

    code: str
    detail: str

    def __str__(self) -> str:
        hint = "is it a Stepstate server?"
        if self.code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            hint = "give the client a `token`, `credentials` or `metadata` that what is there takes"
        return f"the server answered {self.code}: {self.detail}; {hint}"


@dataclass(eq=False)
class Internal(StepstateError, reason="INTERNAL"):
    """An unexpected error on the server."""

    message = "internal error {error_id}: look for this id in the server's log"
    error_id: str


class StartError(StepstateError):
    """The server can't start. Never on the wire."""


@dataclass(eq=False)
class ModelInvalid(StartError):
    """A model's folder can't be served."""

    message = "{folder}: {problem}"
    folder: str
    problem: str


@dataclass(eq=False)
class DeviceUnavailable(StartError):
    """The device that the server is to use is not there."""

    message = (
        "--device {device}: {detail}; check `python -c 'import torch; "
        "print(torch.cuda.is_available())'`, or leave the option out to run on the CPU"
    )
    device: str
    detail: str


@dataclass(eq=False)
class RuntimeUnavailable(StartError):
    """What the server is to compute steps with is not installed."""

    message = (
        "--engine {engine}: not installed: {packages}; `pip install {packages}`, or choose "
        "--engine torch, which is slower"
    )
    engine: str
    packages: str


@dataclass(eq=False)
class StoreOpenError(StartError):
    """A store's URL is wrong, or what it names is not a store; `store` is without its password."""

    message = "store {store}: {problem}"
    store: str
    problem: str


@dataclass(eq=False)
class SnapshotKeyInvalid(StartError):
    """The file with the keys that sign snapshots can't be used."""

    message = (
        "--snapshot-key {file}: {problem}; write one key a line, such as from "
        "`openssl rand -hex 32`"
    )
    file: str
    problem: str


@dataclass(eq=False)
class AuditLogError(StartError):
    """The audit log can't be written."""

    message = (
        "--audit-log {file}: it can't be written ({problem}); name a file in a folder that the "
        "server's user may write"
    )
    file: str
    problem: str


@dataclass(eq=False)
class TlsInvalid(StartError):
    """A certificate, its key or the authority of clients can't be used."""

    message = "{option} {file}: {problem}"
    option: str
    file: str
    problem: str


@dataclass(eq=False)
class CredentialsInvalid(StartError):
    """What says who may call can't be used."""

    message = "--{option} {source}: {problem}"
    option: str
    source: str
    problem: str


@dataclass(eq=False)
class ListenError(StartError):
    """An address can't be listened on."""

    message = (
        "{option} {address}: can't listen there ({detail}); stop what uses the port "
        "(`ss -ltnp` shows it), or choose another, port 0 for any free one"
    )
    option: str
    address: str
    detail: str


@dataclass(eq=False)
class InsecureAddress(StartError):
    """Other machines could reach the server, which lacks TLS, identities or both."""

    message = (
        "--listen {address}: other machines can reach it, and it has no {missing}. Either give "
        "the server TLS and identities: --tls-cert FILE --tls-key FILE, and --tokens-file FILE or "
        "--jwt-jwks FILE; or listen on loopback, behind a proxy that has both; or accept with "
        "--insecure that whoever reaches the address, or reads the network, can read, step and "
        "close the sessions"
    )
    address: str
    missing: str


_CLIENTS_OWN = (ServerUnreachable, Cancelled, UnexpectedStatus, RowsMissing)
REASONS = tuple(reason for reason, cls in _BY_REASON.items() if cls not in _CLIENTS_OWN)
"""Every reason that a server gives."""


def without_frames(error: E) -> E:
    """An error that is kept as an outcome, without its tracebacks and those of its causes.

    They lead to frames that lead to the error: cycles of references, which keep requests and
    replies until the cycle collector runs, and that stops the event loop.
    """
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__context__
    return error
