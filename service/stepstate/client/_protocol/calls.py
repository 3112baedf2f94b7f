"""The unary calls of both clients: what is asked, and how the reply is read. No I/O."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from stepstate.client import convert
from stepstate.client.types import Durability, MissingPolicy, ModelInfo, SessionInfo, TenantUsage
from stepstate.errors import InvalidField
from stepstate.v1 import stepstate_pb2 as pb

R = TypeVar("R")

SNAPSHOT_PART_BYTES = 2**20
"""Of a snapshot in one message."""
PAGE_SIZE = 1_000
"""Sessions in one reply."""


@dataclass(frozen=True, slots=True, eq=False)
class UnaryCall(Generic[R]):
    """A unary call.

    `rpc`: its name in the contract. `read`: makes the result of its reply. `if_exists`: what to ask
    instead if the session exists already, since the id is new and of this client: a first try,
    whose reply was lost, opened it.
    """

    rpc: str
    request: Any
    read: Callable[[Any], R]
    if_exists: UnaryCall[R] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NewSessionOptions:
    """What a new session may be given, whatever it starts from."""

    idle_timeout: timedelta | None = None
    durability: Durability | None = None

    def put(
        self, request: pb.OpenSessionRequest | pb.ForkSessionRequest | pb.StreamImportRequest
    ) -> None:
        """Puts them into a request.

        Raises:
            InvalidField: one is of another type, or does not exist.
        """
        if self.idle_timeout is not None:
            _check_type("idle_timeout", self.idle_timeout, timedelta)
            request.idle_timeout.FromTimedelta(self.idle_timeout)
        if self.durability is not None:
            request.durability = convert.durability_number(self.durability)


def open_session(
    model: str,
    version: str,
    session_id: str | None,
    options: NewSessionOptions,
    *,
    start_time: datetime | None = None,
    missing: MissingPolicy | None = None,
    interval_level: float | None = None,
) -> UnaryCall[SessionInfo]:
    """Opens a session. The client makes the id, so that the request can be repeated.

    Raises:
        InvalidField: an option is of another type, or does not exist.
    """
    new_id = session_id or _new_id()
    request = pb.OpenSessionRequest(session_id=new_id, model=model, version=version)
    if start_time is not None:
        _check_type("start_time", start_time, datetime)
        aware = start_time if start_time.tzinfo else start_time.replace(tzinfo=UTC)
        request.start_time.FromDatetime(aware.astimezone(UTC))
    if missing is not None:
        request.missing = convert.missing_number(missing)
    if interval_level is not None:
        if interval_level == 0:  # on the wire it would mean the model's own
            raise InvalidField("interval_level", "is 0, expected more than 0 and less than 1")
        request.interval_level = interval_level
    options.put(request)
    return _opening("OpenSession", request, None if session_id is not None else new_id)


def fork_session(
    source_id: str, new_id: str | None, options: NewSessionOptions
) -> UnaryCall[SessionInfo]:
    """Opens a copy of a session; its id is made here too.

    Raises:
        InvalidField: an option is of another type, or does not exist.
    """
    own_id = new_id or _new_id()
    request = pb.ForkSessionRequest(session_id=source_id, new_session_id=own_id)
    options.put(request)
    return _opening("ForkSession", request, None if new_id is not None else own_id)


def import_session(
    snapshot: bytes, session_id: str | None, options: NewSessionOptions
) -> UnaryCall[SessionInfo]:
    """Opens a session from a snapshot; without an id it keeps its own. The request is a stream.

    Raises:
        InvalidField: an option is of another type, or does not exist.
    """
    first = pb.StreamImportRequest(size=len(snapshot), session_id=session_id or "")
    options.put(first)
    first.data = snapshot[:SNAPSHOT_PART_BYTES]
    places = range(SNAPSHOT_PART_BYTES, len(snapshot), SNAPSHOT_PART_BYTES)
    rest = [pb.StreamImportRequest(data=snapshot[at : at + SNAPSHOT_PART_BYTES]) for at in places]
    return UnaryCall("StreamImport", [first, *rest], _session_of)


def restore_session(session_id: str) -> UnaryCall[SessionInfo]:
    """Opens an expired session again."""
    return UnaryCall("RestoreSession", pb.RestoreSessionRequest(session_id=session_id), _session_of)


def get_session(session_id: str) -> UnaryCall[SessionInfo]:
    """Asks for a session's status."""
    return UnaryCall("GetSession", pb.GetSessionRequest(session_id=session_id), _session_of)


def close_session(session_id: str) -> UnaryCall[SessionInfo]:
    """Closes a session."""
    return UnaryCall("CloseSession", pb.CloseSessionRequest(session_id=session_id), _session_of)


def reset_accuracy(session_id: str) -> UnaryCall[SessionInfo]:
    """Resets a session's accuracy and drift."""
    return UnaryCall("ResetAccuracy", pb.ResetAccuracyRequest(session_id=session_id), _session_of)


def get_model(name: str, version: str) -> UnaryCall[ModelInfo]:
    """Asks for one model."""
    request = pb.GetModelRequest(model=name, version=version)
    return UnaryCall("GetModel", request, lambda reply: convert.model_info(reply.model))


@dataclass(frozen=True, slots=True)
class ListPage(Generic[R]):
    """A part of a list, and the call for the next part; None at its end."""

    items: Sequence[R]
    next: UnaryCall[ListPage[R]] | None


def list_sessions(model: str, *, show_expired: bool) -> UnaryCall[ListPage[SessionInfo]]:
    """Asks for the first page of sessions."""
    request = pb.ListSessionsRequest(model=model, page_size=PAGE_SIZE, show_expired=show_expired)
    return _page("ListSessions", request, lambda reply: map(convert.session_info, reply.sessions))


def list_models() -> UnaryCall[ListPage[ModelInfo]]:
    """Asks for the first page of models."""
    request = pb.ListModelsRequest()
    return _page("ListModels", request, lambda reply: map(convert.model_info, reply.models))


def list_tenants() -> UnaryCall[ListPage[TenantUsage]]:
    """Asks for the first page of tenants."""
    request = pb.ListTenantsRequest()
    return _page("ListTenants", request, lambda reply: map(convert.tenant_usage, reply.tenants))


def _page(rpc: str, request: Any, items: Callable[[Any], Iterable[R]]) -> UnaryCall[ListPage[R]]:
    def read(reply: Any) -> ListPage[R]:
        found = tuple(items(reply))
        if not reply.next_page_token:
            return ListPage(found, None)
        request.page_token = reply.next_page_token
        return ListPage(found, UnaryCall(rpc, request, read))

    return UnaryCall(rpc, request, read)


def _opening(rpc: str, request: Any, own_id: str | None) -> UnaryCall[SessionInfo]:
    """`own_id`: the session's id if it was made here, so that nobody else can have opened it."""
    return UnaryCall(rpc, request, _session_of, None if own_id is None else get_session(own_id))


def _session_of(reply: Any) -> SessionInfo:
    return convert.session_info(reply.session)


def _new_id() -> str:
    return f"c-{uuid.uuid4().hex}"


def _check_type(field: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise InvalidField(field, f"is {value!r}, expected a {kind.__name__}")
