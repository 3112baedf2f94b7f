"""What is asked of the file without changing it.

Each answer is one row of JSON: a row more is a wait for the interpreter's lock more.
"""

from __future__ import annotations

import heapq
import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stepstate.stores.base import Ending, EndReason, Entry, SessionRecord
from stepstate.stores.sqlite.schema import microseconds

LAST = 2**53 / 1e6
"""The last time that a table can have."""
DUE_AT_ONCE = 1024
"""Sessions whose time to look has come: how many are looked at in one call, some 10 ms."""

_SESSIONS = """
SELECT json_group_array(json_array(record, t, expires, epoch, owner, length(snapshot), rowid,
    iif(expired, due, NULL))) FROM sessions WHERE session_id IN (SELECT value FROM json_each(?1))
"""
_ENDINGS = """
SELECT json_group_array(json_array(session_id, epoch, reason, t, idle_timeout_seconds))
FROM endings WHERE session_id IN (SELECT value FROM json_each(?1)) AND forget > ?2
"""
_KNOWN = f"SELECT ({_SESSIONS}), ({_ENDINGS})"
_DUE = """
SELECT json_group_array(json_array(record, t, expires, epoch, owner, size, rowid,
    iif(expired, due, NULL))) FROM (
    SELECT record, t, expires, epoch, owner, length(snapshot) AS size, rowid, expired, due
    FROM sessions WHERE expired = ?1 AND due < ?2 ORDER BY due LIMIT ?3)
"""
_LOOK_LATER = """
UPDATE sessions SET due = expires WHERE rowid IN (SELECT value FROM json_each(?1))
    AND expired = 0
"""
_IDS = """
SELECT json_group_array(session_id) FROM (SELECT session_id FROM sessions
WHERE model = ?1 AND expired = ?2 AND session_id > ?3 ORDER BY session_id LIMIT ?4)
"""
_COUNTS = """
SELECT json_group_object(model, sessions) FROM
(SELECT model, count(*) AS sessions FROM sessions WHERE +expired = 0 GROUP BY model)
"""
_COUNT_EXPIRED = "SELECT count(*) FROM sessions WHERE expired = 1"


@dataclass(frozen=True, slots=True)
class Row:
    """A session's row, without its snapshot."""

    entry: Entry
    snapshot_bytes: int
    rowid: int


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of some ids."""

    rows: dict[str, Row]
    endings: dict[str, tuple[int, Ending]]
    """With the epochs that they had."""

    def of(self, session_id: str) -> Entry | Ending | None:
        """The session, or how it ended."""
        if session_id in self.rows:
            return self.rows[session_id].entry
        return self.endings[session_id][1] if session_id in self.endings else None

    def epoch(self, session_id: str) -> int:
        """The newest that is known; 0: none."""
        if session_id in self.rows:
            return self.rows[session_id].entry.epoch
        return self.endings[session_id][0] if session_id in self.endings else 0


def look(connection: sqlite3.Connection, session_ids: Iterable[str], now: float) -> Known:
    """What is known of some ids."""
    ids = json.dumps(list(session_ids))
    sessions, endings = connection.execute(_KNOWN, (ids, microseconds(now))).fetchone()
    return Known(
        rows={row.entry.record.session_id: row for row in _rows(sessions)},
        endings={
            session_id: (epoch, Ending(EndReason(reason), t, float(idle)))
            for session_id, epoch, reason, t, idle in json.loads(endings)
        },
    )


def find(connection: sqlite3.Connection, session_id: str, now: float) -> Entry | Ending | None:
    """See `SessionStore.find`."""
    return look(connection, [session_id], now).of(session_id)


def overdue(connection: sqlite3.Connection, before: float, limit: int) -> list[Entry]:
    """See `SessionStore.overdue`. Sessions that were used meanwhile are looked at later."""
    limits = (0, microseconds(before), max(limit, DUE_AT_ONCE))
    rows = _rows(_one(connection, _DUE, limits))
    stale = [row.rowid for row in rows if row.entry.expires_at >= before]
    if stale:
        connection.execute(_LOOK_LATER, (json.dumps(stale),))
    return [row.entry for row in rows if row.entry.expires_at < before][:limit]


def expired(connection: sqlite3.Connection, before: float, limit: int) -> list[Entry]:
    """See `SessionStore.expired`: the oldest."""
    limits = (1, microseconds(min(before, LAST)), limit)
    return [row.entry for row in _rows(_one(connection, _DUE, limits))]


def page(
    connection: sqlite3.Connection,
    token: str,
    size: int,
    models: Collection[str],
    *,
    expired: bool,
) -> tuple[list[Entry], str]:
    """See `SessionStore.page`: in the order of ids, which the index has for each model."""
    of_models = [
        json.loads(_one(connection, _IDS, (model, marked, token, size + 1)))
        for model in set(models)
        for marked in range(1 + expired)
    ]
    ids = heapq.nsmallest(size + 1, (one for some in of_models for one in some))
    rows = _rows(_one(connection, _SESSIONS, (json.dumps(ids[:size]),)))
    entries = sorted((row.entry for row in rows), key=lambda entry: entry.record.session_id)
    return entries, ids[size - 1] if len(ids) > size else ""


def count(connection: sqlite3.Connection) -> Mapping[str, int]:
    """See `SessionStore.count`."""
    counts: dict[str, int] = json.loads(_one(connection, _COUNTS, ()))
    return counts


def count_expired(connection: sqlite3.Connection) -> int:
    """See `SessionStore.count_expired`."""
    (expired,) = connection.execute(_COUNT_EXPIRED).fetchone()
    return int(expired)


def _one(connection: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> str:
    """The only value of the only row."""
    value: str = connection.execute(statement, values).fetchone()[0]
    return value


def _rows(text: str) -> list[Row]:
    return [
        Row(
            Entry(
                SessionRecord.from_json(record),
                t,
                expires / 1e6,
                epoch,
                owner,
                None if delete is None else delete / 1e6,
            ),
            size,
            rowid,
        )
        for record, t, expires, epoch, owner, size, rowid, delete in json.loads(text)
    ]
