"""What calls put on record: see `stepstate.logging.audit` for the lines.

A call is one line at most: when it ends, or, of a stream that lasts, when it begins. What it does
to a session is the event (`METHODS`); any other call of an admin on the sessions of another tenant
is an `ADMIN_ACT`. Steps, reads and forecasts of a tenant's own are not on record. Each Triton
sequence that a request starts or ends is a line, too.

A call that was cancelled may have been carried out: what has begun in the store is finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stepstate.errors import (
    KeysUnavailable,
    PermissionDenied,
    StepstateError,
    TooManyAuthFailures,
    Unauthenticated,
)
from stepstate.logging.audit import AuditEvent, AuditRecord, audit
from stepstate.transport.authentication import current_principal
from stepstate.transport.methods import METHODS
from stepstate.transport.peers import current_peer
from stepstate.transport.status import code_of
from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    from stepstate.transport.peers import Context

MAX_NAMES = 512
"""Characters of the ids of a call that names many sessions; `detail` has their number."""

AuthError = Unauthenticated | PermissionDenied | TooManyAuthFailures | KeysUnavailable
AUTH_ERRORS = (Unauthenticated, PermissionDenied, TooManyAuthFailures, KeysUnavailable)

Behavior = Callable[[Any, "Context"], Awaitable[Any]]


def audited(method: str, behavior: Behavior) -> Behavior:
    """A handler whose calls are put on record.

    Args:
        method: the name of its RPC.
        behavior: takes a request and the context; returns the reply, if there is one.
    """
    policy = METHODS[method]

    async def recorded(request: Any, context: Context) -> Any:
        if policy.event is None and not current_principal.get().acts_for_another:
            return await behavior(request, context)
        record = _record_of_request(policy.event or AuditEvent.ADMIN_ACT, method, request)
        if policy.lasts:
            audit(record)
            return await behavior(request, context)
        with audit_failures(record):
            reply = await behavior(request, context)
        audit(_with_session(record, getattr(reply, "session", None)))
        return reply

    return recorded


def record_of_call(
    event: AuditEvent, method: str, session: str | None, model: str | None
) -> AuditRecord:
    """The record of what the call of this task does.

    Args:
        event: what it does.
        method: the name of its RPC.
        session: the id of the session, without its tenant.
        model: of the session.
    """
    principal = current_principal.get()
    return AuditRecord(
        event=event,
        method=method,
        tenant=principal.tenant,
        identity=principal.identity.name,
        identity_tenant=principal.identity.tenant,
        admin=principal.acts_for_another or event is AuditEvent.ADMIN_ACT,
        peer=current_peer.get().name,
        session=session,
        model=model,
    )


@contextmanager
def audit_failures(record: AuditRecord) -> Iterator[None]:
    """Writes a record if the block fails, with the error."""
    try:
        yield
    except AUTH_ERRORS:
        raise  # `refused_credential` has its line
    except StepstateError as error:
        audit(replace(record, result=code_of(error).name, reason=error.reason))
        raise
    except asyncio.CancelledError:
        audit(replace(record, result="CANCELLED"))
        raise
    except Exception:
        audit(replace(record, result="INTERNAL"))
        raise


def refused_credential(error: AuthError, method: str, peer: str) -> None:
    """Puts on record that a call was refused for what its credential proves, or does not."""
    audit(
        AuditRecord(
            event=AuditEvent.CREDENTIAL_REFUSED,
            result=code_of(error).name,
            reason=error.cause,
            method=method,
            identity=error.identity if isinstance(error, PermissionDenied) else None,
            peer=peer,
            detail=str(error),
        )
    )


def _record_of_request(event: AuditEvent, method: str, request: object) -> AuditRecord:
    named, detail = getattr(request, "session_id", None) or None, None
    if named is not None and not isinstance(named, str):
        named, detail = " ".join(named)[:MAX_NAMES], f"{len(named)} sessions"
    record = record_of_call(event, method, named, getattr(request, "model", None) or None)
    record = replace(record, detail=detail)
    if event is AuditEvent.SESSION_FORKED:
        record = replace(record, session=getattr(request, "new_session_id", None), source=named)
    return record


def _with_session(record: AuditRecord, session: pb.Session | None) -> AuditRecord:
    """The record, with what the reply says of its session."""
    if session is None:
        return record
    model = f"{session.model}/{session.version}"
    return replace(
        record, session=session.session_id, model=model if session.model else record.model
    )
