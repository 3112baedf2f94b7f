"""What a store holds, as values: the one place that makes sessions of stored fields.

Any field may be damaged, by a disk, a person or another program. What can't be a
session's is `UnreadableSession` and never raises, so that it stays a matter of that session.
"""

from __future__ import annotations

import re

from pydantic import ValidationError

from stepstate.stores.base import (
    MAX_IDLE_SECONDS,
    MAX_T,
    EndReason,
    SessionRecord,
    StoredSession,
    Tombstone,
    UnreadableSession,
)

MAX_MICROSECONDS = 253_402_300_800_000_000
"""The year 10,000: no time is told from then on."""
MAX_EPOCH = 2**62
"""The next ones fit what SQLite counts to."""
MAX_OWNER = 1024
"""Characters of a server's name, and more."""

_DIGITS = re.compile(rb"[0-9]{1,20}")
_PROBLEM_LENGTH = 200


def entry_of(
    session_id: str,
    model: str,
    *,
    record: object,
    t: object,
    expires: object,
    epoch: object,
    owner: object,
    delete: object,
) -> StoredSession | UnreadableSession:
    """A session, from what a store has under its id.

    Args:
        session_id: the id under which it was found.
        model: the model "name/version" under which it was found.
        record: the text of its `SessionRecord`, in UTF-8.
        t: rows; an integer, or its digits.
        expires: microseconds of the store's clock, as `t`.
        epoch: as `t`.
        owner: in UTF-8.
        delete: as `expires`; None: it is not marked as expired.
    """
    try:
        read = SessionRecord.from_json(_bytes("record", record))
        return StoredSession(
            _same(read, session_id, model),
            t=whole("t", t, MAX_T),
            expires_at=whole("expires", expires, MAX_MICROSECONDS) / 1e6,
            epoch=whole("epoch", epoch, MAX_EPOCH),
            owner=_text("owner", owner, MAX_OWNER),
            delete_at=None if delete is None else whole("delete", delete, MAX_MICROSECONDS) / 1e6,
        )
    except ValueError as error:
        return UnreadableSession(session_id, _problem(error))


def ending_of(reason: object, t: object, idle_timeout_seconds: object) -> Tombstone | None:
    """How a session ended, from what a store has; None: it can't be told any more."""
    try:
        idle = float(_text("idle_timeout_seconds", idle_timeout_seconds, 40))
        ending = Tombstone(EndReason(_text("reason", reason, 40)), whole("t", t, MAX_T), idle)
    except ValueError:
        return None
    return ending if 0 <= idle <= MAX_IDLE_SECONDS else None


def whole(name: str, value: object, end: int) -> int:
    """A number from 0 to below `end`, given as an integer or as digits.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bytes) and _DIGITS.fullmatch(value):
        value = int(value)
    if isinstance(value, int) and 0 <= value < end:
        return value
    raise ValueError(f"its {name} is no number from 0 to {end}")


def _same(record: SessionRecord, session_id: str, model: str) -> SessionRecord:
    if (record.session_id, record.model_key) == (session_id, model):
        return record
    raise ValueError(f"it has the record of {record.session_id!r} of {record.model_key}")


def _bytes(name: str, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    raise ValueError(f"its {name} is no text")


def _text(name: str, value: object, length: int) -> str:
    text = _bytes(name, value).decode()  # its error is a ValueError
    if len(text) > length:
        raise ValueError(f"its {name} has {len(text)} characters")
    return text


def _problem(error: ValueError) -> str:
    """What is wrong, in a line without what it says: that may be anything."""
    if not isinstance(error, ValidationError):
        return str(error)[:_PROBLEM_LENGTH]
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = "".join(f"{part} of " for part in first["loc"][:1])
    return f"{where}its record: {first['msg']}"[:_PROBLEM_LENGTH]
