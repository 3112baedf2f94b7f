"""Files of SQLite as earlier versions made them, and what those versions do to a file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.stores import record

SCHEMAS = {
    1: """
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY NOT NULL,
    model TEXT NOT NULL,
    record TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    owner TEXT NOT NULL,
    t INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    due INTEGER NOT NULL,
    snapshot BLOB NOT NULL
);
CREATE INDEX sessions_by_model ON sessions (model, session_id);
CREATE INDEX sessions_by_due ON sessions (due);
CREATE TRIGGER due_follows AFTER UPDATE OF expires ON sessions WHEN NEW.expires < NEW.due BEGIN
    UPDATE sessions SET due = NEW.expires WHERE rowid = NEW.rowid;
END;
CREATE TABLE endings (
    session_id TEXT PRIMARY KEY NOT NULL,
    epoch INTEGER NOT NULL,
    reason TEXT NOT NULL,
    t INTEGER NOT NULL,
    idle_timeout_seconds TEXT NOT NULL,
    forget INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX endings_by_forget ON endings (forget);
PRAGMA application_id = 0x53544550;
PRAGMA user_version = 1;
""",
    2: """
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY NOT NULL,
    model TEXT NOT NULL,
    record TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    owner TEXT NOT NULL,
    t INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    due INTEGER NOT NULL,
    expired INTEGER NOT NULL DEFAULT 0,
    snapshot BLOB NOT NULL
);
CREATE TRIGGER due_follows AFTER UPDATE OF expires ON sessions WHEN NEW.expires < NEW.due BEGIN
    UPDATE sessions SET due = NEW.expires WHERE rowid = NEW.rowid;
END;
CREATE TABLE endings (
    session_id TEXT PRIMARY KEY NOT NULL,
    epoch INTEGER NOT NULL,
    reason TEXT NOT NULL,
    t INTEGER NOT NULL,
    idle_timeout_seconds TEXT NOT NULL,
    forget INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX endings_by_forget ON endings (forget);
PRAGMA application_id = 0x53544550;
CREATE INDEX sessions_by_model ON sessions (model, expired, session_id);
CREATE INDEX sessions_by_due ON sessions (expired, due);
CREATE INDEX sessions_open ON sessions (session_id) WHERE expired = 0;
CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 0), micros INTEGER NOT NULL);
PRAGMA user_version = 2;
""",
}
"""The tables of a version, as its servers made them."""

SAVE = """
UPDATE sessions SET owner = v.column3, t = v.column4, expires = v.column5,
    snapshot = coalesce(v.column6, snapshot)
FROM (VALUES (?, ?, ?, ?, ?, ?)) AS v WHERE session_id = v.column1 AND epoch = v.column2
"""
CREATE = """
INSERT OR REPLACE INTO sessions
    (session_id, model, record, epoch, owner, t, expires, snapshot, due)
SELECT *, column7 FROM (VALUES (?, ?, ?, ?, ?, ?, ?, ?)) WHERE column1 IS NOT NULL
"""
EXPIRE = """
UPDATE sessions SET epoch = epoch + 1, owner = v.column3, t = v.column4, due = v.column5,
    expired = 1, snapshot = coalesce(v.column6, snapshot)
FROM (VALUES (?, ?, ?, ?, ?, ?)) AS v WHERE session_id = v.column1 AND epoch = v.column2
"""
RESTORE = """
UPDATE sessions SET epoch = epoch + 1, expires = v.column2, due = v.column2, expired = 0
FROM (VALUES (?, ?)) AS v WHERE session_id = v.column1
"""
END = "DELETE FROM sessions WHERE session_id IN (SELECT value FROM json_each(?1))"
PAGE = """
SELECT json_group_array(json_array(hex(session_id), rowid)) FROM (
    SELECT session_id, rowid FROM sessions INDEXED BY sessions_open
    WHERE expired = 0 AND session_id > CAST(?1 AS TEXT) AND typeof(session_id) = 'text'
    ORDER BY session_id LIMIT ?2)
"""
"""Statements of version 2."""


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection as that of an earlier version."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def make(
    path: Path, version: int, sessions: Iterable[str], *, now: float, snapshot: bytes = b"old"
) -> None:
    """A file of a version with sessions that are open for a minute, in WAL mode as all are."""
    with opened(path) as file:
        file.execute("PRAGMA journal_mode = WAL")
        file.executescript(SCHEMAS[version])
        at = round((now + 60) * 1e6)
        file.execute("BEGIN")
        file.executemany(
            "INSERT INTO sessions (session_id, model, record, epoch, owner, t, expires, due, "
            "snapshot) VALUES (?, 'lstm/1', ?, 1, '', 7, ?, ?, ?)",
            ((name, _record(name), at, at, snapshot) for name in sessions),
        )
        if version > 1:
            file.execute("INSERT INTO clock VALUES (0, ?)", (round(now * 1e6),))
        file.execute("COMMIT")


def _record(name: str) -> str:
    """Its record as versions without tenants wrote it."""
    return record(name).to_json().replace(',"tenant":"default"', "")
