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
    │   ├── SequenceNotStarted   at the Triton door: no start flag, and nothing to go on with
    │   └── StepMismatch        this t was already applied, with another payload
    ├── StepAhead               t is larger than the rows applied so far
    ├── StepTooOld              t is older than the replay window
    ├── StepPositionUnknown            no t, after a restart that may have set the session back
    ├── StaleOwner              another server has taken the session over
    ├── ForecastImpossible      the model can't look so far ahead, or not without a scenario
    ├── RowsMissing             raised by the client: rows to send again are not kept any more
    ├── SnapshotModelMismatch         a snapshot of a model that is not loaded here
    ├── SnapshotCorrupt         bytes that are no whole snapshot
    ├── SnapshotTooLarge        a snapshot that no message can hold
    ├── SessionUnreadable       what the store has of a session can't be read
    ├── SessionLimit            no room for one more session
    ├── Unavailable             try again, after retry_after_seconds
    │   ├── QueueFull
    │   ├── Draining
    │   ├── StoreUnavailable    the store does not answer, or can't write
    │   └── ServerUnreachable   raised by the client: no answer from the server
    ├── Cancelled               raised by the client: the call was given up
    ├── UnexpectedStatus        raised by the client: an error that is not Stepstate's
    ├── Internal                a surprise; its id is in the server's log
    └── ModelInvalid            a model's folder can't be served (never on the wire)

An error holds fields and composes its message from them: what, which id, what
to do next. The server puts the fields on the wire and the client raises the
same class again, so both sides share this file. It knows no status codes:
`stepstate.transport.status` maps each type to one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

_BY_REASON: dict[str, type[StepstateError]] = {}


@dataclass(eq=False)
class StepstateError(Exception):
    """Base of every error; `reason` is its name on the wire."""

    reason: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        reason = cls.__dict__.get("reason", "")
        if reason:
            _BY_REASON[reason] = cls

    def fields(self) -> dict[str, str]:
        """The fields as text, as they travel in `google.rpc.ErrorInfo.metadata`."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}


def restore(reason: str, metadata: dict[str, str]) -> StepstateError | None:
    """Makes the error again that `fields` described, or None if it can't be told which."""
    cls = _BY_REASON.get(reason)
    if cls is None:
        return None
    cast = {"int": int, "float": float, "str": str}
    try:
        known = (f for f in fields(cls) if f.name in metadata)  # others have defaults, or fail
        return cls(**{f.name: cast[str(f.type)](metadata[f.name]) for f in known})
    except (KeyError, TypeError, ValueError):
        return None


class NotFound(StepstateError):
    """What was asked for is not here, and never comes back by itself."""


@dataclass(eq=False)
class SessionUnknown(NotFound):
    """No session of this id is known."""

    reason = "SESSION_UNKNOWN"
    session_id: str

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} is unknown: it was never opened on this server, "
            "or it ended so long ago that the reason is forgotten; open it"
        )


@dataclass(eq=False)
class SessionExpired(NotFound):
    """The session was idle for longer than its timeout."""

    reason = "SESSION_EXPIRED"
    session_id: str
    t: int
    idle_timeout_seconds: float
    restore_until: str
    """When it is deleted, by the server's clock; empty: it is."""

    def __str__(self) -> str:
        told = (
            f"session {self.session_id!r} expired at t={self.t} after "
            f"{self.idle_timeout_seconds:g} s without a step"
        )
        if self.restore_until:
            told += (
                f"; it is kept until {self.restore_until}: restore it (`stepstate sessions restore "
                f"{self.session_id}`, RestoreSession), or open it again to start anew"
            )
        else:
            told += " and was deleted: open it again and send its history"
        return f"{told}; ask for a longer idle_timeout if steps come less often"


@dataclass(eq=False)
class SessionClosed(NotFound):
    """The session was closed by a client."""

    reason = "SESSION_CLOSED"
    session_id: str
    t: int

    def __str__(self) -> str:
        return f"session {self.session_id!r} was closed at t={self.t}; open it again to start anew"


@dataclass(eq=False)
class SessionLost(NotFound):
    """The session was kept in memory only, and the server that had it ended."""

    reason = "SESSION_LOST"
    session_id: str

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} is lost: it was opened with durability none, and the "
            "server that had it ended or lost it to another; open it again and send its history, "
            "and choose durability async or sync for sessions that must outlive a server"
        )


@dataclass(eq=False)
class ModelUnknown(NotFound):
    """No such model, or no such version of it, is loaded."""

    reason = "MODEL_UNKNOWN"
    model: str
    version: str
    loaded: str

    def __str__(self) -> str:
        wanted = f"{self.model}/{self.version}" if self.version else self.model
        return f"model {wanted!r} is not loaded; loaded: {self.loaded or 'none'}"


@dataclass(eq=False)
class SessionExists(StepstateError):
    """The id is already open."""

    reason = "SESSION_EXISTS"
    session_id: str
    t: int

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} is already open at t={self.t}; "
            "go on from there, choose another id, or close it first"
        )


class InvalidRequest(StepstateError):
    """The request is wrong in itself: sent again, it fails again."""


@dataclass(eq=False)
class InvalidField(InvalidRequest):
    """A field of the request can't be accepted."""

    reason = "INVALID_FIELD"
    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


@dataclass(eq=False)
class NonFiniteInput(InvalidRequest):
    """A value of x is NaN or infinite."""

    reason = "NON_FINITE_INPUT"
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
class NonFiniteResult(InvalidRequest):
    """The rows are finite, but would make the state or y non-finite."""

    reason = "NON_FINITE_RESULT"
    session_id: str
    t: int

    def __str__(self) -> str:
        return (
            f"x: applied to session {self.session_id!r} at t={self.t}, these rows overflow "
            "float32; none of them was applied: check the unit of the values"
        )


@dataclass(eq=False)
class SequenceNotStarted(InvalidRequest):
    """At the Triton door: a request without start, of a sequence that is not going on."""

    reason = "SEQUENCE_NOT_STARTED"
    sequence_id: str
    model: str
    cause: str

    def __str__(self) -> str:
        return (  # as Triton says it, and why
            f"inference request for sequence {self.sequence_id} to model {self.model!r} must "
            f"specify the START flag on the first request of the sequence: {self.cause}"
        )


@dataclass(eq=False)
class StepMismatch(InvalidRequest):
    """Another payload was already applied at this t."""

    reason = "STEP_MISMATCH"
    session_id: str
    t: int
    expected_t: int

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} has already applied another request at t={self.t}; "
            f"it stands at t={self.expected_t}: a retry must repeat the same rows and options"
        )


@dataclass(eq=False)
class StepAhead(StepstateError):
    """t is larger than the rows applied so far: rows are missing."""

    reason = "STEP_AHEAD"
    session_id: str
    t: int
    expected_t: int

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} stands at t={self.expected_t}, the request is for "
            f"t={self.t}: send the rows from t={self.expected_t} on first"
        )


@dataclass(eq=False)
class StepTooOld(StepstateError):
    """t is older than everything the replay window remembers."""

    reason = "STEP_TOO_OLD"
    session_id: str
    t: int
    expected_t: int

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} stands at t={self.expected_t} and no longer remembers "
            f"the reply for t={self.t}; it was applied: go on from t={self.expected_t}"
        )


@dataclass(eq=False)
class StepPositionUnknown(StepstateError):
    """A request without t, for a session that a restart may have set back."""

    reason = "STEP_POSITION_UNKNOWN"
    session_id: str
    expected_t: int

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} was restored at t={self.expected_t} after its server "
            "ended unexpectedly; rows that were acknowledged after it may be missing: send "
            f"t with the request, and the rows from t={self.expected_t} on"
        )


@dataclass(eq=False)
class StaleOwner(StepstateError):
    """Another server has taken the session over; this one has forgotten its copy."""

    reason = "STALE_OWNER"
    session_id: str
    expected_t: int

    def __str__(self) -> str:
        return (
            f"another server has taken session {self.session_id!r} over, where it is saved up to "
            f"t={self.expected_t}; nothing was committed here: ask where it stands, and send the "
            "rows from there on"
        )


@dataclass(eq=False)
class ForecastImpossible(StepstateError):
    """There is no such forecast."""

    reason = "FORECAST_IMPOSSIBLE"
    subject: str
    problem: str

    def __str__(self) -> str:
        return f"no forecast of {self.subject}: {self.problem}"


@dataclass(eq=False)
class RowsMissing(StepstateError):
    """Raised by the client: the server was set back to before the rows that the client keeps."""

    reason = "ROWS_MISSING"
    session_id: str
    first: int
    last: int

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} needs the rows {self.first} to {self.last} again, and "
            f"the client no longer keeps them: set the session's t to {self.first} and step them "
            "from your own records"
        )


@dataclass(eq=False)
class SnapshotModelMismatch(StepstateError):
    """A snapshot, or a stored session, of a model that is not loaded here."""

    reason = "SNAPSHOT_MODEL_MISMATCH"
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
class SnapshotCorrupt(StepstateError):
    """Bytes that are not a whole snapshot."""

    reason = "SNAPSHOT_CORRUPT"
    problem: str

    def __str__(self) -> str:
        return f"the snapshot can't be read: {self.problem}; take it from its source again"


@dataclass(eq=False)
class SnapshotTooLarge(StepstateError):
    """A snapshot that is larger than what was asked for it can hold."""

    reason = "SNAPSHOT_TOO_LARGE"
    session_id: str
    size: int
    limit: int

    def __str__(self) -> str:
        return (
            f"the snapshot of session {self.session_id!r} takes {self.size} bytes, more than "
            f"{self.limit}: StreamExport and StreamImport take up to 256 MiB in parts (the client "
            "library uses them), and a server with smaller --replay-bytes keeps less"
        )


@dataclass(eq=False)
class SessionUnreadable(StepstateError):
    """What the store has of a session can't be read: its record or its snapshot is damaged."""

    reason = "SESSION_UNREADABLE"
    session_id: str
    problem: str

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} can't be read from the store: {self.problem}; bring back "
            "a copy of the store from before it was damaged, or close it (stepstate sessions close "
            f"{self.session_id}), open it again and send its history"
        )


@dataclass(eq=False)
class SessionLimit(StepstateError):
    """No room for one more session."""

    reason = "SESSION_LIMIT"
    limit: int

    def __str__(self) -> str:
        return (
            f"all {self.limit} sessions of this server are open; close some, let idle ones "
            "expire, or start the server with a larger --max-sessions (without a durable store "
            "every session needs one of its --slots, too)"
        )


class Unavailable(StepstateError):
    """Not now: the same request may succeed later. Nothing was applied."""


@dataclass(eq=False)
class QueueFull(Unavailable):
    """Too many rows or requests are already waiting."""

    reason = "QUEUE_FULL"
    what: str
    limit: int
    retry_after_seconds: float = 0.05

    def __str__(self) -> str:
        return (
            f"{self.what}: the limit of {self.limit} is reached; nothing was applied: "
            f"retry after {self.retry_after_seconds:g} s, and wait for replies before sending more"
        )


@dataclass(eq=False)
class Draining(Unavailable):
    """The server is about to stop."""

    reason = "DRAINING"
    retry_after_seconds: float = 1.0

    def __str__(self) -> str:
        return (
            "the server is draining: it finishes accepted requests and takes no new ones; "
            "nothing was applied: retry on another server, or here when it is back"
        )


STORE_CAUSES = (
    "disconnected",
    "timeout",
    "readonly",
    "masterdown",
    "loading",
    "noreplicas",
    "oom",
    "misconf",
    "cluster",
    "full",
    "wal",
    "busy",
    "io",
    "corrupt",
    "other",
)
"""Why a store can't do what it is asked: Redis's error codes (those of a cluster that changes are
one), what SQLite says of its file, and the network between."""


@dataclass(eq=False)
class StoreUnavailable(Unavailable):
    """The store of sessions does not answer, or can't write; `cause` is one of STORE_CAUSES."""

    reason = "STORE_UNAVAILABLE"
    problem: str
    retry_after_seconds: float = 0.25
    cause: str = "other"

    def __str__(self) -> str:
        return (
            f"the server's store of sessions is away ({self.cause}): {self.problem}; "
            "whether the request was "
            "committed is settled by a retry with the same t: it is applied once"
        )


@dataclass(eq=False)
class ServerUnreachable(Unavailable):
    """Raised by the client: the server gave no answer within the deadline."""

    reason = "SERVER_UNREACHABLE"
    target: str
    detail: str

    def __str__(self) -> str:
        return (
            f"no answer from {self.target}: {self.detail}; a request that carries t may be "
            "sent again safely: it is applied once"
        )


@dataclass(eq=False)
class Cancelled(StepstateError):
    """Raised by the client: the call was cancelled, or its stream ended, before the answer."""

    reason = "CANCELLED"
    detail: str

    def __str__(self) -> str:
        return (
            f"no answer, the call ended first: {self.detail}; the rows may or may not have been "
            "applied: send the same request with the same t to find out"
        )


@dataclass(eq=False)
class UnexpectedStatus(StepstateError):
    """Raised by the client: an answer that no Stepstate server of this version gives."""

    reason = "UNEXPECTED_STATUS"
    code: str
    detail: str

    def __str__(self) -> str:
        hint = "is it a Stepstate server?"
        if self.code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            hint = "give the client `credentials` or `metadata` that what is at this address takes"
        return f"the server answered {self.code}: {self.detail}; {hint}"


@dataclass(eq=False)
class Internal(StepstateError):
    """A surprise on the server."""

    reason = "INTERNAL"
    error_id: str

    def __str__(self) -> str:
        return f"internal error {self.error_id}: look for this id in the server's log"


@dataclass(eq=False)
class ModelInvalid(StepstateError):
    """A model's folder can't be served. Never on the wire: the server does not start."""

    folder: str
    problem: str

    def __str__(self) -> str:
        return f"{self.folder}: {self.problem}"


_CLIENTS_OWN = (ServerUnreachable, Cancelled, UnexpectedStatus, RowsMissing)
REASONS = tuple(reason for reason, cls in _BY_REASON.items() if cls not in _CLIENTS_OWN)
"""Every reason that a server gives."""
