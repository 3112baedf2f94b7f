"""What a client may ask for when it opens a session."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from stepstate.config import LONGEST_IDLE_SECONDS
from stepstate.errors import InvalidField
from stepstate.models import MAX_LEVEL, MIN_LEVEL, Manifest
from stepstate.stores import Durability, MissingPolicy, SessionRecord

IDLE_INTERVALS = 5
"""Step intervals that a session may always be idle for: a daily series that has no rows on days
off outlives a long weekend."""
ID_LENGTH = 128
_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{ID_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds that sessions keep."""

    queued_requests: int
    queued_rows: int
    default_idle_seconds: float
    max_idle_seconds: float
    expired_grace_seconds: float
    """How long expired sessions can be restored."""
    sessions: int
    """Open sessions, resident and spilled."""
    durability: Durability
    """Of sessions that ask for none in particular."""
    durable: bool
    """Whether there is a store that outlives the server."""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """What a client asks for; an empty id, version or model leaves the choice to the server."""

    session_id: str
    model: str
    version: str
    idle_timeout_seconds: float | None
    start_time: datetime | None
    durability: Durability | None = None
    missing: MissingPolicy = MissingPolicy.REJECT
    interval_level: float | None = None


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """What a client asks for when it forks or imports; what is left out stays as in the source."""

    session_id: str
    idle_timeout_seconds: float | None
    durability: Durability | None


def make_record(opening: OpenOptions, manifest: Manifest, limits: Limits) -> SessionRecord:
    """Checks what a client asks for against the model, and fixes the rest.

    Raises:
        InvalidField: it names the field.
    """
    session_id = opening.session_id or new_id()
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
        idle_timeout_seconds=_idle_timeout(opening.idle_timeout_seconds, manifest, limits),
        start_time=opening.start_time,
        open_time=datetime.now(UTC),
        durability=_durability(opening.durability, limits),
        missing=opening.missing,
        interval_level=_interval_level(opening.interval_level, manifest),
    )


def copy_record(
    source: SessionRecord, copying: CopyOptions, manifest: Manifest, limits: Limits
) -> SessionRecord:
    """The record of a session that starts from another's state, of the same model.

    Raises:
        InvalidField: it names the field.
    """
    check_id(copying.session_id)
    idle = copying.idle_timeout_seconds
    if idle is None:  # another server may have allowed more
        idle = min(source.idle_timeout_seconds, max_idle_timeout(manifest, limits))
    durability = copying.durability
    if durability is None:
        durability = source.durability if limits.durable else Durability.NONE
    return replace(
        source,
        session_id=copying.session_id,
        idle_timeout_seconds=_idle_timeout(idle, manifest, limits),
        open_time=datetime.now(UTC),
        durability=_durability(durability, limits),
    )


def new_id() -> str:
    """An id for a client that has not chosen one."""
    return f"s-{uuid.uuid4().hex}"


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


def _durability(asked: Durability | None, limits: Limits) -> Durability:
    if asked is None:
        return limits.durability if limits.durable else Durability.NONE
    if asked is not Durability.NONE and not limits.durable:
        raise InvalidField(
            "durability",
            f"is {asked.value}, but this server keeps sessions in memory only: ask for none, or "
            "start the server with a --store that lasts",
        )
    return asked


def _interval_level(asked: float | None, manifest: Manifest) -> float | None:
    if asked is None:
        return None
    if not MIN_LEVEL <= asked <= MAX_LEVEL:
        raise InvalidField(
            "interval_level", f"is {asked:g}, expected {MIN_LEVEL:g} to {MAX_LEVEL:g}"
        )
    if manifest.tracking is None:
        raise InvalidField(
            "interval_level",
            f"is {asked:g}, but {manifest.name}/{manifest.version} tracks no horizon: its manifest "
            "has no `tracking`",
        )
    return asked


def default_idle_timeout(manifest: Manifest, limits: Limits) -> float:
    """Seconds without a step after which a session expires that asks for none in particular.

    The server's setting, or a few of the model's step intervals where they are longer.
    """
    return max(limits.default_idle_seconds, _some_intervals(manifest))


def max_idle_timeout(manifest: Manifest, limits: Limits) -> float:
    """The longest idle timeout that a session of a model may ask for, in seconds."""
    return max(limits.max_idle_seconds, _some_intervals(manifest))


def _some_intervals(manifest: Manifest) -> float:
    return min(IDLE_INTERVALS * float(manifest.step_interval_seconds or 0), LONGEST_IDLE_SECONDS)


def _idle_timeout(asked: float | None, manifest: Manifest, limits: Limits) -> float:
    if asked is None:
        return default_idle_timeout(manifest, limits)
    longest = max_idle_timeout(manifest, limits)
    if not 0 < asked <= longest:
        raise InvalidField(
            "idle_timeout", f"is {asked:g} s, expected more than 0 and at most {longest:g} s"
        )
    return asked
