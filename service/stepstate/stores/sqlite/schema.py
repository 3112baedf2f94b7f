"""What is in the file. Times are whole microseconds since 1970."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

APPLICATION_ID = 0x53544550
""" "STEP": tells our files from those of others (PRAGMA application_id)."""
VERSION = 1
"""Of the tables below (PRAGMA user_version)."""

# `due` is no later than `expires`, and is what the index is on: a save moves `expires` without
# touching an index, which halves what it writes; `reads.overdue` moves `due` after it. Only when
# `expires` moves back does `due` have to follow at once.
# The snapshot is the last column, so that the others are read without its pages.
# `sessions_by_model` serves counts and pages without reading rows.
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
CREATE INDEX endings_by_forget ON endings (forget)
"""


class ForeignFile(sqlite3.DatabaseError):
    """The file is not one of ours, or of a later version."""


def prepare(connection: sqlite3.Connection) -> None:
    """Makes the tables in an empty file, and checks those of any other, for writing.

    Raises:
        ForeignFile: it is not a file that this version can use; nothing was changed.
        sqlite3.Error: it can't be read or written.
    """
    with _transaction(connection, "BEGIN"):  # no lock for writing on what may be somebody else's
        _check(connection)
    with _transaction(connection, "BEGIN IMMEDIATE"):
        if _check(connection) == 0:
            _make(connection)


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
        raise ForeignFile("it is the database of another program: give a path of its own")
    if version > VERSION:
        raise ForeignFile(
            f"it has version {version} of the tables and this server knows up to {VERSION}: "
            "start the Stepstate that wrote it, or give another path"
        )
    return int(version)
