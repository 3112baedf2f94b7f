"""What a client may ask for when it opens a session."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

from stepstate.errors import InvalidField
from stepstate.models import Manifest
from stepstate.stores import SessionRecord

ID_LENGTH = 128
_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{ID_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds that sessions keep."""

    queued_requests: int
    queued_rows: int
    default_idle_seconds: float
    most_idle_seconds: float


@dataclass(frozen=True, slots=True)
class Opening:
    """What a client asks for; an empty id, version or model leaves the choice to the server."""

    session_id: str
    model: str
    version: str
    idle_timeout_seconds: float | None
    start_time: datetime | None


def make_record(opening: Opening, manifest: Manifest, limits: Limits) -> SessionRecord:
    """Checks what a client asks for against the model, and fixes the rest.

    Raises:
        InvalidField: it names the field.
    """
    session_id = opening.session_id or f"s-{uuid.uuid4().hex}"
    check_id(session_id)
    if manifest.needs_time and opening.start_time is None:
        raise InvalidField(
            "start_time",
            f"is missing: {manifest.name}/{manifest.version} has calendar inputs or a seasonal "
            "profile; give the time of the first row",
        )
    return SessionRecord(
        session_id=session_id,
        model=manifest.name,
        version=manifest.version,
        fingerprint=manifest.fingerprint,
        idle_timeout_seconds=_idle_timeout(opening.idle_timeout_seconds, limits),
        start_time=opening.start_time,
        open_time=datetime.now(UTC),
    )


def check_id(session_id: str) -> None:
    """Refuses an id that no session can have.

    Raises:
        InvalidField: it says what an id looks like.
    """
    if not _ID.fullmatch(session_id):
        shown = session_id if len(session_id) <= ID_LENGTH else f"{session_id[:32]}…"
        raise InvalidField(
            "session_id",
            f"is {shown!r} ({len(session_id)} characters), expected 1 to {ID_LENGTH} of "
            "A-Z a-z 0-9 . _ : -",
        )


def _idle_timeout(asked: float | None, limits: Limits) -> float:
    if asked is None:
        return limits.default_idle_seconds
    if not 0 < asked <= limits.most_idle_seconds:
        raise InvalidField(
            "idle_timeout",
            f"is {asked:g} s, expected more than 0 and at most {limits.most_idle_seconds:g} s",
        )
    return asked
