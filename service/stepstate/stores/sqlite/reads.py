"""What is asked of the file, and what has to be changed so that the next answer is another.

Each answer is one row of JSON: a row more is a wait for the interpreter's lock more. Texts are
in it in hexadecimal, and numbers only if they are whole: so whatever is in a damaged row, the
JSON can be read, and the row alone is `UnreadableSession`.
"""

from __future__ import annotations

import heapq
import json
import re
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from stepstate.errors import InvalidField
from stepstate.stores.base import StoredSession, Tombstone, UnreadableSession
from stepstate.stores.decoding import ending_of, entry_of
from stepstate.stores.sqlite.schema import microseconds

LAST = 2**53 / 1e6
"""The last time that a table can have."""
DUE_AT_ONCE = 1024
"""Sessions whose time to look has come: how many are looked at in one call, some 10 ms."""

UNREADABLE_SECONDS = 3600.0
"""How long the sweep leaves alone a session whose record can't be read."""

_PLAIN = re.compile(r"[A-Za-z0-9._:-]*")


def _integer(column: str) -> str:
    return f"CASE typeof({column}) WHEN 'integer' THEN {column} END"


def _row_of(key: str) -> str:
    """A session's row as JSON; `key` is what it is looked up by."""
    return f"""json_array(hex({key}), hex(model), hex(record), {_integer("t")},
    {_integer("expires")}, {_integer("epoch")}, hex(owner), iif(expired, {_integer("due")}, NULL),
    CASE typeof(snapshot) WHEN 'blob' THEN length(snapshot) ELSE 0 END, sessions.rowid)"""


_SESSIONS = """
SELECT json_group_array(:row) FROM json_each(?1) CROSS JOIN sessions ON session_id = value
""".replace(":row", _row_of("value"))
_ROWS = """
SELECT json_group_array(:row) FROM sessions WHERE rowid IN (SELECT value FROM json_each(?1))
""".replace(":row", _row_of("session_id"))
_ENDINGS = """
SELECT json_group_array(json_array(hex(session_id), :epoch, hex(reason), :t,
    hex(idle_timeout_seconds)))
FROM endings WHERE session_id IN (SELECT value FROM json_each(?1)) AND forget > ?2
""".replace(":epoch", _integer("epoch")).replace(":t", _integer("t"))
_KNOWN = f"SELECT ({_SESSIONS}), ({_ENDINGS})"
_DUE = """
SELECT json_group_array(:row) FROM sessions WHERE rowid IN (
    SELECT rowid FROM sessions WHERE expired = ?1 AND due < ?2 ORDER BY due LIMIT ?3)
""".replace(":row", _row_of("session_id"))
_LOOK_LATER = """
UPDATE sessions SET due = expires WHERE rowid IN (SELECT value FROM json_each(?1))
    AND expired = 0
"""
_POSTPONE = "UPDATE sessions SET due = ?2 WHERE rowid IN (SELECT value FROM json_each(?1))"
_IDS = """
SELECT json_group_array(json_array(hex(session_id), rowid)) FROM (
    SELECT session_id, rowid FROM sessions
    WHERE session_id > CAST(?1 AS TEXT) AND typeof(session_id) = 'text'
    ORDER BY session_id LIMIT ?2)
"""
# Without its own index it would go past all expired sessions, or read and sort all open ones.
_OPEN_IDS = _IDS.replace("WHERE", "INDEXED BY sessions_open WHERE expired = 0 AND")
_IDS_OF_MODEL = """
SELECT json_group_array(json_array(hex(session_id), rowid)) FROM (
    SELECT session_id, rowid FROM sessions
    WHERE model = CAST(?4 AS TEXT) AND expired = ?3 AND session_id > CAST(?1 AS TEXT)
    AND typeof(session_id) = 'text' ORDER BY session_id LIMIT ?2)
"""
_MODELS = """
WITH RECURSIVE models (model) AS (
    SELECT min(model) FROM sessions WHERE model >= ?1 AND model < ?2
    UNION ALL SELECT (SELECT min(model) FROM sessions WHERE model > models.model AND model < ?2)
    FROM models WHERE model IS NOT NULL)
SELECT json_group_array(hex(model)) FROM models WHERE model IS NOT NULL
"""
_COUNTS = """
SELECT json_group_array(json_array(hex(model), sessions)) FROM
(SELECT model, count(*) AS sessions FROM sessions WHERE +expired = 0 GROUP BY model)
"""
_COUNT_EXPIRED = "SELECT count(*) FROM sessions WHERE expired = 1"


@dataclass(frozen=True, slots=True)
class Row:
    """A session's row, without its snapshot."""

    session_id: str
    entry: StoredSession | UnreadableSession
    epoch: int
    """0: none can be read."""
    snapshot_bytes: int
    rowid: int


@dataclass(frozen=True, slots=True)
class Lookup:
    """What is known of some ids."""

    rows: dict[str, Row]
    endings: dict[str, tuple[int, Tombstone | None]]
    """With the epochs that they had; None: it can't be read how it ended."""

    def of(self, session_id: str) -> StoredSession | UnreadableSession | Tombstone | None:
        """The session, or how it ended."""
        if session_id in self.rows:
            return self.rows[session_id].entry
        return self.endings[session_id][1] if session_id in self.endings else None

    def epoch(self, session_id: str) -> int:
        """The newest that is known; 0: none."""
        if session_id in self.rows:
            return self.rows[session_id].epoch
        return self.endings[session_id][0] if session_id in self.endings else 0


@dataclass(frozen=True, slots=True)
class Due:
    """Sessions whose time has come, and rowids of those that are to be looked at later."""

    entries: list[StoredSession]
    used: list[int]
    """They were used meanwhile."""
    unreadable: list[int]

    @property
    def postponed(self) -> list[int]:
        """All that are to be looked at later."""
        return self.used + self.unreadable


def look(connection: sqlite3.Connection, session_ids: Iterable[str], now: float) -> Lookup:
    """What is known of some ids."""
    ids = json.dumps(list(session_ids))
    sessions, endings = connection.execute(_KNOWN, (ids, microseconds(now))).fetchone()
    return Lookup(
        rows={row.session_id: row for row in _rows(sessions)},
        endings={
            _name(session_id): (epoch or 0, ending_of(_text(reason), t, _text(idle)))
            for session_id, epoch, reason, t, idle in json.loads(endings)
        },
    )


def find(
    connection: sqlite3.Connection, session_id: str, now: float
) -> StoredSession | UnreadableSession | Tombstone | None:
    """See `SessionStore.find`."""
    return look(connection, [session_id], now).of(session_id)


def overdue(connection: sqlite3.Connection, before: float, limit: int) -> Due:
    """See `SessionStore.overdue`."""
    rows, unreadable = _due(connection, 0, before, max(limit, DUE_AT_ONCE))
    used = [rowid for rowid, entry in rows if entry.expires_at >= before]
    entries = [entry for _, entry in rows if entry.expires_at < before]
    return Due(entries[:limit], used, unreadable)


def expired(connection: sqlite3.Connection, before: float, limit: int) -> Due:
    """See `SessionStore.expired`: the oldest."""
    rows, unreadable = _due(connection, 1, min(before, LAST), limit)
    return Due([entry for _, entry in rows], [], unreadable)


def postpone(connection: sqlite3.Connection, due: Due, before: float) -> None:
    """Lets rows be looked at later: they would come first for ever, and hide those behind them."""
    if due.used:
        connection.execute(_LOOK_LATER, (json.dumps(due.used),))
    if due.unreadable:
        later = microseconds(min(before + UNREADABLE_SECONDS, LAST))
        connection.execute(_POSTPONE, (json.dumps(due.unreadable), later))


def _due(
    connection: sqlite3.Connection, marked: int, before: float, limit: int
) -> tuple[list[tuple[int, StoredSession]], list[int]]:
    """Sessions whose time has come, with their rowids; and rowids of those that can't be read."""
    rows = _rows(_one(connection, _DUE, (marked, microseconds(before), limit)))
    unreadable = [row.rowid for row in rows if isinstance(row.entry, UnreadableSession)]
    return [
        (row.rowid, row.entry) for row in rows if isinstance(row.entry, StoredSession)
    ], unreadable


def page(
    connection: sqlite3.Connection, token: str, size: int, model: str, *, expired: bool
) -> tuple[list[StoredSession | UnreadableSession], str]:
    """See `SessionStore.page`: in the order of ids, which the index has for each model.

    Raises:
        InvalidField: page_token.
    """
    limits = (_id_after(token), size + 1)
    if model:
        versions = json.loads(_one(connection, _MODELS, (f"{model}/", f"{model}0")))
        of_models = [
            json.loads(_one(connection, _IDS_OF_MODEL, (*limits, marked, _text(version))))
            for version in versions
            for marked in range(1 + expired)
        ]
        ids = heapq.nsmallest(size + 1, chain.from_iterable(of_models))
    else:
        ids = json.loads(_one(connection, _IDS if expired else _OPEN_IDS, limits))
    rows = _rows(_one(connection, _ROWS, (json.dumps([rowid for _, rowid in ids[:size]]),)))
    entries = [row.entry for row in sorted(rows, key=lambda row: row.session_id)]
    return entries, _token_of(ids[size - 1][0]) if len(ids) > size else ""


def count(connection: sqlite3.Connection) -> Mapping[str, int]:
    """See `SessionStore.count`."""
    counts = json.loads(_one(connection, _COUNTS, ()))
    return {_name(model): sessions for model, sessions in counts}


def count_expired(connection: sqlite3.Connection) -> int:
    """See `SessionStore.count_expired`."""
    (expired,) = connection.execute(_COUNT_EXPIRED).fetchone()
    return int(expired)


def _one(connection: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> str:
    """The only value of the only row."""
    value: str = connection.execute(statement, values).fetchone()[0]
    return value


def _rows(text: str) -> list[Row]:
    return [_row(*values) for values in json.loads(text)]


def _row(  # noqa: PLR0917 - the columns of `_row_of`
    session_id: str,
    model: str,
    record: str,
    t: int | None,
    expires: int | None,
    epoch: int | None,
    owner: str,
    delete: int | None,
    size: int,
    rowid: int,
) -> Row:
    entry = entry_of(
        _name(session_id),
        _name(model),
        record=_text(record),
        t=t,
        expires=expires,
        epoch=epoch,
        owner=_text(owner),
        delete=delete,
    )
    return Row(_name(session_id), entry, epoch or 0, size, rowid)


def _text(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal)


def _name(hexadecimal: str) -> str:
    """A text that may be damaged; then it is told what it holds."""
    return bytes.fromhex(hexadecimal).decode(errors="backslashreplace")


def _token_of(hexadecimal: str) -> str:
    """The token of the page after an id: the id itself, or, as it may be damaged, its bytes."""
    name = _name(hexadecimal)
    return name if _PLAIN.fullmatch(name) else f"~{hexadecimal}"


def _id_after(token: str) -> bytes:
    try:
        return bytes.fromhex(token[1:]) if token.startswith("~") else token.encode()
    except ValueError:
        raise InvalidField("page_token", "is not a token of an earlier page") from None
