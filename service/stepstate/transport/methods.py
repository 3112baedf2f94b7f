"""What holds for each RPC: how long it takes, who may call it, and what the audit log says of it.

It is one table, for every API and both transports.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from stepstate.identity import Scope
from stepstate.logging.audit import AuditEvent


class CallKind(StrEnum):
    """How long a call takes."""

    SHORT = "short"
    """Rows of one session, or one look into memory or the store."""
    LONG = "long"
    """A millisecond of work and more, or a long reply."""
    STREAM = "stream"
    """As long as its client likes."""


SHORT, LONG, STREAM = CallKind

OPEN: frozenset[Scope] = frozenset()
"""No credential is needed."""
READ = frozenset({Scope.READ})
STEP = frozenset({Scope.STEP})
ADMIN = frozenset({Scope.ADMIN})


@dataclass(frozen=True, slots=True)
class MethodPolicy:
    """What holds for the calls of an RPC."""

    kind: CallKind
    scopes: frozenset[Scope]
    """What a principal must have."""
    event: AuditEvent | None = None
    """What a call does to a session, if that is put on record."""

    @property
    def lasts(self) -> bool:
        """Whether only its client ends a call; a stream with an event ends by itself."""
        return self.kind is STREAM and self.event is None


METHODS = {
    "OpenSession": MethodPolicy(SHORT, STEP, AuditEvent.SESSION_OPENED),
    "GetSession": MethodPolicy(SHORT, READ),
    "ListSessions": MethodPolicy(LONG, READ),
    "RestoreSession": MethodPolicy(SHORT, STEP, AuditEvent.SESSION_RESTORED),
    "CloseSession": MethodPolicy(SHORT, STEP, AuditEvent.SESSION_CLOSED),
    "ResetAccuracy": MethodPolicy(SHORT, STEP),
    "ForkSession": MethodPolicy(SHORT, STEP, AuditEvent.SESSION_FORKED),
    "ExportSession": MethodPolicy(LONG, READ, AuditEvent.SESSION_EXPORTED),
    "ImportSession": MethodPolicy(LONG, STEP, AuditEvent.SESSION_IMPORTED),
    # What is long in these two takes a turn of its own
    "StreamExport": MethodPolicy(STREAM, READ, AuditEvent.SESSION_EXPORTED),
    "StreamImport": MethodPolicy(STREAM, STEP, AuditEvent.SESSION_IMPORTED),
    "Step": MethodPolicy(SHORT, STEP),
    "StreamSteps": MethodPolicy(STREAM, STEP),
    "StreamPacked": MethodPolicy(STREAM, STEP),
    "Forecast": MethodPolicy(LONG, READ),
    "ListModels": MethodPolicy(LONG, READ),
    "GetModel": MethodPolicy(SHORT, READ),
    "ListTenants": MethodPolicy(LONG, ADMIN, AuditEvent.ADMIN_ACT),
    # Triton: a request that starts or ends a sequence is an event, see `triton.sequences`
    "ServerLive": MethodPolicy(SHORT, OPEN),
    "ServerReady": MethodPolicy(SHORT, OPEN),
    "ModelReady": MethodPolicy(SHORT, READ),
    "ServerMetadata": MethodPolicy(SHORT, OPEN),
    "ModelMetadata": MethodPolicy(LONG, READ),
    "ModelConfig": MethodPolicy(LONG, READ),
    "ModelInfer": MethodPolicy(SHORT, STEP),
    "ModelStreamInfer": MethodPolicy(STREAM, STEP),
    "ModelStatistics": MethodPolicy(LONG, READ),
    "RepositoryIndex": MethodPolicy(LONG, READ),
    # Health, reflection
    "Check": MethodPolicy(SHORT, OPEN),
    "Watch": MethodPolicy(STREAM, OPEN),
    "ServerReflectionInfo": MethodPolicy(STREAM, OPEN),
}
"""By name of the method: these are unique over all services."""
