"""What stores keep, as values, and how those values are read back from stored fields.

A stored field may be damaged by a disk, a person or another program. What can't belong to a
session is returned as `UnreadableSession`, never raised, so other sessions are not affected.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Annotated, ClassVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from stepstate.identity import DEFAULT_TENANT, SessionKey, session_key, split_key

MAX_T = 2**53
"""No session has applied so many rows; every number below it is exact in Lua and in a float."""
MAX_IDLE_SECONDS = 1e11
"""Some 3,000 years: short enough that every time of expiry can be represented."""
MICROS = 1e6
"""Stores keep times as whole microseconds: `round(seconds * MICROS)`."""
MAX_MICROS = 253_402_300_800_000_000
"""The year 10,000; stored times are below it."""
LAST_SECONDS = 2**53 / MICROS
"""The latest time that an index of sessions can hold."""
MAX_EPOCH = 2**62
"""Below SQLite's largest integer, so that there is room for the epochs that follow."""
FIRST_TIME = datetime(1, 1, 2, tzinfo=UTC)
LAST_TIME = datetime(9999, 12, 30, tzinfo=UTC)
"""A day within what `datetime` can hold, so that these times exist in every time zone."""
MAX_OWNER_LENGTH = 1024
"""Characters; longer than any server's name."""

_DIGITS = re.compile(rb"[0-9]{1,20}")
_PROBLEM_LENGTH = 200


class Durability(enum.Enum):
    """What of a session survives the end of its server."""

    NONE = "none"
    """Saved when it is spilled and when its server drains, and lost otherwise."""
    ASYNC = "async"
    """Saved in the background."""
    SYNC = "sync"
    """Saved before a step is answered."""


class MissingPolicy(enum.Enum):
    """What a NaN in a row means to a session."""

    REJECT = "reject"
    """The request is refused."""
    IMPUTE = "impute"
    """A missing value, replaced by the model's own forecast, or by the value of the last row."""
    HOLD = "hold"
    """A missing value, replaced by the value of the last row; before the first row, by a level."""


class EndReason(enum.Enum):
    """Why a session is gone."""

    EXPIRED = "expired"
    CLOSED = "closed"
    LOST = "lost"


def to_utc(moment: datetime) -> datetime:
    """A time in UTC, where all arithmetic with it is done; without a zone it is UTC already.

    The one check of times that come from outside: requests, snapshots, and what a store has.

    Raises:
        ValueError: it is not between `FIRST_TIME` and `LAST_TIME`.
    """
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if not FIRST_TIME <= aware <= LAST_TIME:
        raise ValueError("is not in the years 1 to 9999 (UTC), or on their first or last day")
    return aware.astimezone(UTC)


Id = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(max_length=256)]
Seconds = Annotated[float, Field(gt=0, le=MAX_IDLE_SECONDS, allow_inf_nan=False)]
Moment = Annotated[AwareDatetime, AfterValidator(to_utc)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """What is fixed about a session when it is opened.

    The field types state what `from_json` accepts; the constructor checks nothing.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="ignore")

    session_id: Id
    model: Name
    version: Name
    fingerprint: Name
    idle_timeout_seconds: Seconds
    start_time: Moment | None
    open_time: Moment
    durability: Durability
    missing: MissingPolicy = MissingPolicy.REJECT
    interval_level: Share | None = None
    """The share of true values that its intervals should cover; None: the model's own."""
    tenant: Name = DEFAULT_TENANT
    """Whose it is. Its id is unique within the tenant."""

    @property
    def key(self) -> SessionKey:
        """Its name among all sessions of the server."""
        return session_key(self.tenant, self.session_id)

    @property
    def model_key(self) -> str:
        """Its model, "name/version"."""
        return f"{self.model}/{self.version}"

    def to_json(self) -> str:
        """The record as text; `from_json` reads it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(values, separators=(",", ":"), default=_json_value)

    @classmethod
    def from_json(cls, text: str | bytes) -> SessionRecord:
        """The record that `to_json` wrote. Unknown fields, of a later version, are skipped.

        Raises:
            ValueError: it is not such a text.
        """
        try:
            return _RECORDS.validate_json(text)
        except ValidationError as error:
            raise ValueError(_problem(error)) from None


def _json_value(value: datetime | enum.Enum) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value.value)


_RECORDS = TypeAdapter(SessionRecord)


@dataclass(frozen=True, slots=True)
class Tombstone:
    """How a session ended. It is kept for a while, so that its clients can learn of it."""

    reason: EndReason
    t: int
    idle_timeout_seconds: float


@dataclass(frozen=True, slots=True)
class StoredSession:
    """An open or expired session as a store has it, without its snapshot."""

    record: SessionRecord
    t: int
    """Rows in its snapshot."""
    expires_at: float
    """By the store's clock."""
    epoch: int
    owner: str
    """The server that holds its lease. Empty: none does, and the snapshot is up to date."""
    delete_at: float | None = None
    """When it may be deleted, by the store's clock; None: it is not marked as expired."""

    @property
    def key(self) -> SessionKey:
        """Its name among all sessions of the server."""
        return self.record.key

    @property
    def session_id(self) -> str:
        """Its id."""
        return self.record.session_id


@dataclass(frozen=True, slots=True)
class UnreadableSession:
    """A session whose record in the store can't be read. It can be listed and discarded."""

    key: SessionKey
    problem: str
    """What is wrong with the record, for a person."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return split_key(self.key)[0]

    @property
    def session_id(self) -> str:
        """Its id."""
        return split_key(self.key)[1]


@dataclass(frozen=True, slots=True)
class TenantFull:
    """A session was not opened, because its tenant may not have one more."""

    open: int
    """Sessions of the tenant that are open, on all servers of the store."""
    limit: int


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """One session to save."""

    key: SessionKey
    epoch: int
    owner: str
    """Empty: the save also releases the lease."""
    t: int
    expires_at: float
    snapshot: bytes | None
    """None: the stored one stays."""


class SaveResult(enum.Enum):
    """The outcome of a `SaveRequest`."""

    DONE = "done"
    FENCED = "fenced"
    """Another server has a higher epoch, or the session has ended."""
    MISSING = "missing"
    """The store has lost the session: it has neither the session nor its tombstone."""


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes that a store's files take of their volume."""

    database: int
    wal: int
    """Written and not yet copied into the database."""
    reserve: int
    """Kept so that the WAL can be copied when the disk is full."""
    free: int
    volume: int


def decode_session(
    key: SessionKey,
    model: str,
    *,
    record: object,
    t: object,
    expires: object,
    epoch: object,
    owner: object,
    delete: object,
) -> StoredSession | UnreadableSession:
    """A session, from what a store has under its key.

    Args:
        key: the key under which it was found.
        model: the model "name/version" under which it was found.
        record: the text of its `SessionRecord`, in UTF-8.
        t: rows; an integer, or its digits.
        expires: microseconds of the store's clock, as `t`.
        epoch: as `t`.
        owner: in UTF-8.
        delete: as `expires`; None: it is not marked as expired.
    """
    try:
        return StoredSession(
            _record_of(key, model, _bytes("record", record)),
            t=_integer("t", t, MAX_T),
            expires_at=_integer("expires", expires, MAX_MICROS) / MICROS,
            epoch=_integer("epoch", epoch, MAX_EPOCH),
            owner=_text("owner", owner, MAX_OWNER_LENGTH),
            delete_at=None if delete is None else _integer("delete", delete, MAX_MICROS) / MICROS,
        )
    except ValueError as error:
        return UnreadableSession(key, str(error)[:_PROBLEM_LENGTH])


def decode_tombstone(reason: object, t: object, idle_timeout_seconds: object) -> Tombstone | None:
    """How a session ended, from what a store has; None: it can't be read."""
    try:
        idle = float(_text("idle_timeout_seconds", idle_timeout_seconds, 40))
        tombstone = Tombstone(EndReason(_text("reason", reason, 40)), _integer("t", t, MAX_T), idle)
    except ValueError:
        return None
    return tombstone if 0 <= idle <= MAX_IDLE_SECONDS else None


def _integer(name: str, value: object, end: int) -> int:
    """A number from 0 to below `end`, given as an integer or as digits.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bytes) and _DIGITS.fullmatch(value):
        value = int(value)
    if isinstance(value, int) and 0 <= value < end:
        return value
    raise ValueError(f"its {name} is no number from 0 to {end}")


def _record_of(key: SessionKey, model: str, text: bytes) -> SessionRecord:
    record = SessionRecord.from_json(text)
    if (record.key, record.model_key) != (key, model):
        # Which one may be no business of this one's tenant.
        raise ValueError("it has the record of another session")
    return record


def _bytes(name: str, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    raise ValueError(f"its {name} is no text")


def _text(name: str, value: object, length: int) -> str:
    text = _bytes(name, value).decode()  # its error is a ValueError
    if len(text) > length:
        raise ValueError(f"its {name} has {len(text)} characters")
    return text


def _problem(error: ValidationError) -> str:
    """What is wrong, in one line, without the damaged value: it may contain anything."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = "".join(f"{part} of " for part in first["loc"][:1])
    return f"{where}its record: {first['msg']}"
