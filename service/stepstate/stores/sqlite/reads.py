"""Finds, lists and counts sessions.

Each query returns one row of JSON, as every further row costs another wait for the interpreter's
lock. Its texts are in hexadecimal, and its numbers are integers or null: so the JSON can be read
whatever a damaged row contains, and only that row becomes an `UnreadableSession`.
"""

from __future__ import annotations

import heapq
import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from stepstate.errors import InvalidField
from stepstate.identity import SessionKey, split_key
from stepstate.stores.base import UNREADABLE_SECONDS
from stepstate.stores.types import (
    LAST_SECONDS,
    MICROS,
    StoredSession,
    Tombstone,
    UnreadableSession,
    decode_session,
    decode_tombstone,
)

DUE_AT_ONCE = 1024
"""Sessions that are due for a check: how many are read in one call, which takes some 10 ms."""


def _integer(column: str) -> str:
    return f"CASE typeof({column}) WHEN 'integer' THEN {column} END"


def _row_of(key: str) -> str:
    """A session's row as JSON; `key`: the expression for its id."""
    return f"""json_array(hex({key}), hex(model), hex(record), {_integer("t")},
    {_integer("expires")}, {_integer("epoch")}, hex(owner), iif(expired, {_integer("due")}, NULL),
    CASE typeof(snapshot) WHEN 'blob' THEN length(snapshot) ELSE 0 END, sessions.rowid)"""


_SESSIONS = """
SELECT json_group_array(:row) FROM json_each(?1) CROSS JOIN sessions ON session_id = value
""".replace(":row", _row_of("value"))
_ROWS = """
SELECT json_group_array(:row) FROM sessions WHERE rowid IN (SELECT value FROM json_each(?1))
""".replace(":row", _row_of("session_id"))
_TOMBSTONES = """
SELECT json_group_array(json_array(hex(session_id), :epoch, hex(reason), :t,
    hex(idle_timeout_seconds)))
FROM endings WHERE session_id IN (SELECT value FROM json_each(?1)) AND forget > ?2
""".replace(":epoch", _integer("epoch")).replace(":t", _integer("t"))
_LOOK_UP = f"SELECT ({_SESSIONS}), ({_TOMBSTONES})"
_DUE = """
SELECT json_group_array(:row) FROM sessions WHERE rowid IN (
    SELECT rowid FROM sessions WHERE expired = ?1 AND due < ?2 ORDER BY due LIMIT ?3)
""".replace(":row", _row_of("session_id"))
_CHECK_LATER = """
UPDATE sessions SET due = expires WHERE rowid IN (SELECT value FROM json_each(?1))
    AND expired = 0
"""
_POSTPONE = "UPDATE sessions SET due = ?2 WHERE rowid IN (SELECT value FROM json_each(?1))"
_IDS = """
SELECT json_group_array(json_array(hex(tenant), hex(session_id), rowid)) FROM (
    SELECT tenant, session_id, rowid FROM sessions :which
    AND tenant = CAST(?1 AS TEXT) AND session_id > CAST(?2 AS TEXT)
    AND typeof(session_id) = 'text' :others ORDER BY tenant, session_id LIMIT ?3)
"""
_OTHER_TENANTS = """
    AND :model UNION ALL SELECT tenant, session_id, rowid FROM sessions :which
    AND tenant > CAST(?1 AS TEXT) AND typeof(session_id) = 'text' AND :model
""".replace(":model", "(?4 = '' OR model >= ?4 AND model < ?5)")
# Without these indexes it would pass all sessions that are not wanted, or read and sort all others.
_OPEN = "INDEXED BY sessions_open WHERE expired = 0"
_EXPIRED = "INDEXED BY sessions_expired WHERE expired <> 0"
_IDS_OF_TENANT, _IDS_OF_ALL = (
    tuple(_IDS.replace(":others", others).replace(":which", which) for which in (_OPEN, _EXPIRED))
    for others in ("", _OTHER_TENANTS)
)
"""Of open sessions, and of expired ones."""
_IDS_OF_MODEL = _IDS.replace(":others", "").replace(
    ":which", "WHERE model = CAST(?4 AS TEXT) AND expired = ?5"
)
_MODELS = """
WITH RECURSIVE models (model) AS (
    SELECT min(model) FROM sessions WHERE tenant = ?1 AND model >= ?2 AND model < ?3
    UNION ALL SELECT (SELECT min(model) FROM sessions
        WHERE tenant = ?1 AND model > models.model AND model < ?3)
    FROM models WHERE model IS NOT NULL)
SELECT json_group_array(hex(model)) FROM models WHERE model IS NOT NULL
"""
_COUNTS = """
SELECT json_group_array(json_array(hex(tenant), hex(model), sessions))
FROM counts WHERE typeof(sessions) = 'integer' AND sessions > 0
"""
_OPEN_BY_TENANT = """
SELECT json_group_object(value, (SELECT ifnull(sum(sessions), 0) FROM counts WHERE tenant = value))
FROM json_each(?1)
"""
_COUNT_EXPIRED = "SELECT count(*) FROM sessions WHERE expired = 1"


@dataclass(frozen=True, slots=True)
class Row:
    """A session's row, without its snapshot."""

    key: SessionKey
    session: StoredSession | UnreadableSession
    epoch: int
    """0: it can't be read."""
    snapshot_bytes: int
    rowid: int


@dataclass(frozen=True, slots=True)
class Lookup:
    """The sessions and tombstones of some keys."""

    rows: dict[SessionKey, Row]
    tombstones: dict[SessionKey, tuple[int, Tombstone | None]]
    """With the epochs of their sessions; None: it can't be read."""

    def of(self, key: SessionKey) -> StoredSession | UnreadableSession | Tombstone | None:
        """The session, or its tombstone."""
        if key in self.rows:
            return self.rows[key].session
        return self.tombstones.get(key, (0, None))[1]

    def epoch(self, key: SessionKey) -> int:
        """The newest; 0: none is stored."""
        if key in self.rows:
            return self.rows[key].epoch
        return self.tombstones.get(key, (0, None))[0]


@dataclass(frozen=True, slots=True)
class Due:
    """Sessions that are due, and rowids of those to check again later."""

    sessions: list[StoredSession]
    used: list[int]
    """They were used since their last check."""
    unreadable: list[int]


def look_up(connection: sqlite3.Connection, keys: Iterable[SessionKey], now: float) -> Lookup:
    """The sessions and tombstones of some keys."""
    names = json.dumps(list(keys))
    sessions, tombstones = connection.execute(_LOOK_UP, (names, round(now * MICROS))).fetchone()
    return Lookup(
        rows={row.key: row for row in _rows(sessions)},
        tombstones={
            SessionKey(_name(key)): (epoch or 0, decode_tombstone(_text(reason), t, _text(idle)))
            for key, epoch, reason, t, idle in json.loads(tombstones)
        },
    )


def overdue(connection: sqlite3.Connection, before: float, limit: int) -> Due:
    """See `SessionStore.overdue`."""
    sessions, unreadable = _due(connection, 0, before, max(limit, DUE_AT_ONCE))
    used = [rowid for rowid, session in sessions.items() if session.expires_at >= before]
    overdue = [session for session in sessions.values() if session.expires_at < before]
    return Due(overdue[:limit], used, unreadable)


def expired(connection: sqlite3.Connection, before: float, limit: int) -> Due:
    """See `SessionStore.expired`: the oldest."""
    sessions, unreadable = _due(connection, 1, min(before, LAST_SECONDS), limit)
    return Due(list(sessions.values()), [], unreadable)


def postpone(connection: sqlite3.Connection, due: Due, before: float) -> None:
    """Moves the next check of rows: else they would always come first, and hide all others."""
    if due.used:
        connection.execute(_CHECK_LATER, (json.dumps(due.used),))
    if due.unreadable:
        later = round(min(before + UNREADABLE_SECONDS, LAST_SECONDS) * MICROS)
        connection.execute(_POSTPONE, (json.dumps(due.unreadable), later))


def _due(
    connection: sqlite3.Connection, marked: int, before: float, limit: int
) -> tuple[dict[int, StoredSession], list[int]]:
    """Sessions that are due, by rowid, and the rowids of those that can't be read."""
    rows = _rows(_one(connection, _DUE, (marked, round(before * MICROS), limit)))
    sessions = {row.rowid: row.session for row in rows if isinstance(row.session, StoredSession)}
    return sessions, [row.rowid for row in rows if row.rowid not in sessions]


def page(
    connection: sqlite3.Connection,
    token: str,
    size: int,
    model: str,
    *,
    tenant: str | None,
    expired: bool,
) -> tuple[list[StoredSession | UnreadableSession], str]:
    """See `SessionStore.page`: in the order of tenants and ids, which the indexes have.

    Raises:
        InvalidField: page_token.
    """
    tenant_after, after = _place_after(token)
    marks = range(1 + expired)
    models = (f"{model}/", f"{model}0") if model else ("", "")
    if tenant is None:
        found = [
            _one(connection, _IDS_OF_ALL[mark], (tenant_after, after, size + 1, *models))
            for mark in marks
        ]
    elif model:
        versions = json.loads(_one(connection, _MODELS, (tenant, *models)))
        found = [
            _one(connection, _IDS_OF_MODEL, (tenant, after, size + 1, _text(version), mark))
            for version in versions
            for mark in marks
        ]
    else:
        found = [
            _one(connection, _IDS_OF_TENANT[mark], (tenant, after, size + 1)) for mark in marks
        ]
    ids = heapq.nsmallest(size + 1, chain.from_iterable(map(json.loads, found)))
    rows = _rows(_one(connection, _ROWS, (json.dumps([rowid for *_, rowid in ids[:size]]),)))
    by_rowid = {row.rowid: row for row in rows if tenant in (None, split_key(row.key)[0])}
    sessions = [by_rowid[rowid].session for *_, rowid in ids[:size] if rowid in by_rowid]
    following = ":".join(ids[size - 1][:2]) if len(ids) > size else ""
    return sessions, following


def count(connection: sqlite3.Connection) -> Mapping[tuple[str, str], int]:
    """See `SessionStore.count`."""
    counts = json.loads(_one(connection, _COUNTS, ()))
    return {(_name(tenant), _name(model)): sessions for tenant, model, sessions in counts}


def open_by_tenant(connection: sqlite3.Connection, tenants: Iterable[str]) -> dict[str, int]:
    """How many open sessions some tenants have."""
    counts: dict[str, int] = json.loads(
        _one(connection, _OPEN_BY_TENANT, (json.dumps(list(tenants)),))
    )
    return counts


def count_expired(connection: sqlite3.Connection) -> int:
    """See `SessionStore.count_expired`."""
    return int(_one(connection, _COUNT_EXPIRED, ()))


def _one(connection: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> str:
    """The only value of the only row."""
    value: str = connection.execute(statement, values).fetchone()[0]
    return value


def _rows(text: str) -> list[Row]:
    return [_row(columns) for columns in json.loads(text)]


def _row(columns: list[Any]) -> Row:
    """A row, from the columns of `_row_of`."""
    hex_key, model, record, t, expires, epoch, owner, delete, size, rowid = columns
    session = decode_session(
        key := SessionKey(_name(hex_key)),
        _name(model),
        record=_text(record),
        t=t,
        expires=expires,
        epoch=epoch,
        owner=_text(owner),
        delete=delete,
    )
    return Row(key, session, epoch or 0, size, rowid)


def _text(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal)


def _name(hexadecimal: str) -> str:
    """A text; bytes of a damaged one that are not UTF-8 are escaped."""
    return bytes.fromhex(hexadecimal).decode(errors="backslashreplace")


def _place_after(token: str) -> tuple[bytes, bytes]:
    """The tenant and the key after which a page begins."""
    try:
        tenant, _, key = token.partition(":")
        return bytes.fromhex(tenant), bytes.fromhex(key)
    except ValueError:
        raise InvalidField("page_token", "is not a token of an earlier page") from None
