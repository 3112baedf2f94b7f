"""What a client may ask for when it opens a session."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from stepstate.config import LONGEST_IDLE_SECONDS
from stepstate.errors import InvalidField
from stepstate.identity import DEFAULT_TENANT, SessionKey, session_key
from stepstate.models import MAX_LEVEL, MIN_LEVEL, Manifest
from stepstate.sessions.context import Limits
from stepstate.stores import Durability, MissingPolicy, SessionRecord, to_utc

IDLE_INTERVALS = 5
"""Step intervals that a session may always be idle for: a daily series that has no rows on days
off outlives a long weekend."""
ID_LENGTH = 128
_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{ID_LENGTH}}}")


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
    tenant: str = DEFAULT_TENANT
    """Whose it will be."""


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """What a client asks for when it forks or imports; what is left out stays as in the source."""

    session_id: str
    idle_timeout_seconds: float | None
    durability: Durability | None
    tenant: str = DEFAULT_TENANT
    """Whose the copy will be, whoever the source's is."""

    @property
    def key(self) -> SessionKey:
        """Of the copy."""
        return session_key(self.tenant, self.session_id)


def make_record(options: OpenOptions, manifest: Manifest, limits: Limits) -> SessionRecord:
    """Checks what a client asks for against the model, and fixes the rest.

    Raises:
        InvalidField: it names the field.
    """
    session_id = options.session_id or new_id()
    check_id(session_id)
    if manifest.needs_time and options.start_time is None:
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
        idle_timeout_seconds=_idle_timeout(options.idle_timeout_seconds, manifest, limits),
        start_time=_start_time(options.start_time),
        open_time=datetime.now(UTC),
        durability=_durability(options.durability, limits),
        missing=options.missing,
        interval_level=_interval_level(options.interval_level, manifest),
        tenant=options.tenant,
    )


def copy_record(
    source: SessionRecord, options: CopyOptions, manifest: Manifest, limits: Limits
) -> SessionRecord:
    """The record of a session that starts from another's state, of the same model.

    Raises:
        InvalidField: it names the field.
    """
    check_id(options.session_id)
    idle = options.idle_timeout_seconds
    if idle is None:  # another server may have allowed more
        idle = min(source.idle_timeout_seconds, max_idle_timeout(manifest, limits))
    durability = options.durability
    if durability is None:
        durability = source.durability if limits.durable else Durability.NONE
    return replace(
        source,
        session_id=options.session_id,
        idle_timeout_seconds=_idle_timeout(idle, manifest, limits),
        open_time=datetime.now(UTC),
        durability=_durability(durability, limits),
        tenant=options.tenant,
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


def _start_time(wanted: datetime | None) -> datetime | None:
    try:
        return None if wanted is None else to_utc(wanted)
    except ValueError as error:
        raise InvalidField("start_time", str(error)) from error


def _durability(wanted: Durability | None, limits: Limits) -> Durability:
    if wanted is None:
        return limits.durability if limits.durable else Durability.NONE
    if wanted is not Durability.NONE and not limits.durable:
        raise InvalidField(
            "durability",
            f"is {wanted.value}, but this server keeps sessions in memory only: ask for none, or "
            "start the server with a --store that lasts",
        )
    return wanted


def _interval_level(wanted: float | None, manifest: Manifest) -> float | None:
    if wanted is None:
        return None
    if not MIN_LEVEL <= wanted <= MAX_LEVEL:
        raise InvalidField(
            "interval_level", f"is {wanted:g}, expected {MIN_LEVEL:g} to {MAX_LEVEL:g}"
        )
    if manifest.tracking is None:
        raise InvalidField(
            "interval_level",
            f"is {wanted:g}, but {manifest.name}/{manifest.version} tracks no horizon: its "
            "manifest has no `tracking`",
        )
    return wanted


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


def _idle_timeout(wanted: float | None, manifest: Manifest, limits: Limits) -> float:
    if wanted is None:
        return default_idle_timeout(manifest, limits)
    longest = max_idle_timeout(manifest, limits)
    if not 0 < wanted <= longest:
        raise InvalidField(
            "idle_timeout", f"is {wanted:g} s, expected more than 0 and at most {longest:g} s"
        )
    return wanted
