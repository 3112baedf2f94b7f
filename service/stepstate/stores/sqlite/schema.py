"""What is in the file.

Times are whole microseconds of the store's own clock (see `base`), which is in the file too. It
begins at the Unix time at which the file is made, and falls behind by all the time in which no
server was up.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from stepstate.stores.decoding import MAX_MICROSECONDS

APPLICATION_ID = 0x53544550
""" "STEP": tells our files from those of others (PRAGMA application_id)."""
VERSION = 2
"""Of the tables below (PRAGMA user_version). Version 1 knew no expired sessions and no clock."""

# `due` is no later than `expires`, and is what the index is on: a save moves `expires` without
# touching an index, which halves what it writes; `reads.postpone` moves `due` after it. Only when
# `expires` moves back does `due` have to follow at once.
# An expired session has `expired` = 1, and is deleted when `due` is over.
# The snapshot is the last column, so that the others are read without its pages (in files that
# had version 1 `expired` comes after it).
# `sessions_by_model` and `sessions_open` serve counts and pages without reading rows.
TABLES = """
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
CREATE INDEX sessions_by_model ON sessions (model, expired, session_id);
CREATE INDEX sessions_by_due ON sessions (expired, due);
CREATE INDEX sessions_open ON sessions (session_id) WHERE expired = 0;
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
CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 0), micros INTEGER NOT NULL)
"""

_FROM_VERSION_1 = (
    "ALTER TABLE sessions ADD COLUMN expired INTEGER NOT NULL DEFAULT 0",
    "DROP INDEX sessions_by_model",
    "DROP INDEX sessions_by_due",
    "CREATE INDEX sessions_by_model ON sessions (model, expired, session_id)",
    "CREATE INDEX sessions_by_due ON sessions (expired, due)",
    "CREATE INDEX sessions_open ON sessions (session_id) WHERE expired = 0",
    "CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 0), micros INTEGER NOT NULL)",
    f"PRAGMA user_version = {VERSION}",
)
_SOUND = f"typeof(clock.micros) = 'integer' AND clock.micros BETWEEN 0 AND {MAX_MICROSECONDS}"
_CLOCK = "SELECT micros FROM clock WHERE id = 0 AND :sound".replace(":sound", _SOUND)
_BEAT = """
INSERT INTO clock VALUES (0, ?1) ON CONFLICT (id) DO UPDATE
SET micros = iif(:sound, max(micros, min(excluded.micros, micros + ?2)), excluded.micros)
""".replace(":sound", _SOUND)
# A clock that the file has not, or not any more, begins at the time of the last step that the file
# tells of, and not later than now: then times stay as they are, and every session has the idle
# time left that it had then. It is no matter how long the file lay, or what the wall clock has
# been set to meanwhile. A session whose time can't be (it is damaged, or the clock was wrong) tells
# nothing.
_BEGIN_CLOCK = """
INSERT OR REPLACE INTO clock SELECT 0, ifnull(CAST(max(at) AS INTEGER), ?1) FROM (
    SELECT expires - 1e6
    * iif(json_valid(record), json_extract(record, '$.idle_timeout_seconds'), NULL) AS at
    FROM sessions WHERE typeof(expires) = 'integer') WHERE at BETWEEN 0 AND ?1
"""


class NotAStepstateFile(sqlite3.DatabaseError):
    """The file is not one of ours, or of a later version."""


def prepare(connection: sqlite3.Connection, now: float) -> float:
    """Makes the tables in an empty file, and checks those of any other, for writing.

    Args:
        connection: to the file.
        now: what the file's clock is to begin at if it has none.

    Returns:
        What its clock shows.

    Raises:
        ForeignFile: it is not a file that this version can use; nothing was changed.
        sqlite3.Error: it can't be read or written.
    """
    with _transaction(connection, "BEGIN"):  # no lock for writing on what may be somebody else's
        _check(connection)
    with _transaction(connection, "BEGIN IMMEDIATE"):
        version = _check(connection)
        if version == 0:
            _make(connection)
        elif version == 1:
            _bring_up(connection)
        if connection.execute(_CLOCK).fetchone() is None:
            connection.execute(_BEGIN_CLOCK, (microseconds(now),))
        return _clock(connection)


def beat(connection: sqlite3.Connection, now: float, since: float) -> float:
    """Moves the file's clock on to `now`, by at most `since`; returns what it shows then."""
    connection.execute(_BEAT, (microseconds(now), microseconds(since)))
    return _clock(connection)


def probe(connection: sqlite3.Connection) -> None:
    """Writes a page as it is, and thereby all that a commit writes.

    Raises:
        sqlite3.Error: it can't be.
    """
    with _transaction(connection, "BEGIN IMMEDIATE"):
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {version}")


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    """All that is read inside is of one moment, all that is written happens or not."""
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def microseconds(seconds: float) -> int:
    """A time as the tables have it."""
    return round(seconds * 1e6)


def _clock(connection: sqlite3.Connection) -> float:
    (micros,) = connection.execute(_CLOCK).fetchone()
    return float(micros) / 1e6


def _bring_up(connection: sqlite3.Connection) -> None:
    for statement in _FROM_VERSION_1:
        connection.execute(statement)


def _make(connection: sqlite3.Connection) -> None:
    # One by one: `executescript` would commit. The trigger holds the only inner semicolon.
    statement = ""
    for line in TABLES.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""
    connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _check(connection: sqlite3.Connection) -> int:
    """The file's version; 0: it is empty."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == 0 and version == 0 and tables == 0:
        return 0
    if application != APPLICATION_ID:
        raise NotAStepstateFile("it is the database of another program: give a path of its own")
    if version > VERSION:
        raise NotAStepstateFile(
            f"it has version {version} of the tables and this server knows up to {VERSION}: "
            "start the Stepstate that wrote it, or give another path"
        )
    return int(version)
