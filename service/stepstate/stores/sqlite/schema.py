"""The tables of the file, and the settings of a connection to it.

Times are whole microseconds of the store's own clock (see `base`), which is in the file too. It
starts at the Unix time at which the file is made, and stands still while no server is up.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stepstate.stores.types import MAX_MICROS, MICROS

log = logging.getLogger(__name__)

APPLICATION_ID = 0x53544550
""" "STEP": marks our files (PRAGMA application_id)."""
VERSION = 3
"""Of the tables below (PRAGMA user_version). Version 1 had no expired sessions and no clock,
version 2 no tenants."""
WAL_PAGES = 8192
"""32 MiB of WAL between checkpoints: one takes some 20 ms, and pages that were written many
times since the last are copied once. A restart after kill -9 reads it in some 30 ms."""
WAL_BYTES = 64 * 2**20
"""A WAL that grew further, because of a reader, is truncated to this size."""

# `session_id` is a `SessionKey`: "TENANT/ID", or the id alone for the tenant `default`. So the
# tenant is in the primary keys, and files of earlier versions get it without a copy of their rows,
# whose sessions are those of `default`. `tenant` repeats it for people and for indexes.
# `due` is never later than `expires`, and it is indexed: so a save changes `expires` without
# writing to an index, which halves what it writes, and `reads.postpone` moves `due` later. Only
# when `expires` moves back, `due` has to follow at once.
# An expired session has `expired` = 1, and is deleted when `due` has passed.
# The snapshot is the last column, so that the others are read without its pages (in files that had
# an earlier version `tenant` and `expired` come after it; they are read from indexes).
# `sessions_by_model`, `sessions_open` and `sessions_expired` serve pages without reading rows.
_TABLES = (
    """\
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
    tenant TEXT NOT NULL DEFAULT 'default',
    snapshot BLOB NOT NULL
)""",
    """\
CREATE TRIGGER due_follows AFTER UPDATE OF expires ON sessions WHEN NEW.expires < NEW.due BEGIN
    UPDATE sessions SET due = NEW.expires WHERE rowid = NEW.rowid;
END""",
    """\
CREATE TABLE endings (
    session_id TEXT PRIMARY KEY NOT NULL,
    epoch INTEGER NOT NULL,
    reason TEXT NOT NULL,
    t INTEGER NOT NULL,
    idle_timeout_seconds TEXT NOT NULL,
    forget INTEGER NOT NULL
) WITHOUT ROWID""",
    "CREATE INDEX endings_by_forget ON endings (forget)",
    f"PRAGMA application_id = {APPLICATION_ID}",
)
_SINCE_VERSION_2 = (
    "CREATE INDEX sessions_by_due ON sessions (expired, due)",
    "CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 0), micros INTEGER NOT NULL)",
)
_COUNT_ONE_MORE = """
    INSERT INTO counts SELECT NEW.tenant, NEW.model, 1 WHERE NEW.expired = 0
        ON CONFLICT (tenant, model) DO UPDATE SET sessions = sessions + 1;"""
_COUNT_ONE_LESS = """
    UPDATE counts SET sessions = sessions - 1
        WHERE OLD.expired = 0 AND (tenant, model) = (OLD.tenant, OLD.model);
    DELETE FROM counts WHERE (tenant, model) = (OLD.tenant, OLD.model) AND sessions <= 0;"""
# A row that INSERT OR REPLACE replaces fires no trigger of DELETE, hence `counts_replaced`. The
# triggers are in the file, so they count what servers of version 2 do too that still have it open.
_SINCE_VERSION_3 = (
    "CREATE INDEX sessions_by_model ON sessions (tenant, model, expired, session_id)",
    "CREATE INDEX sessions_open ON sessions (tenant, session_id) WHERE expired = 0",
    "CREATE INDEX sessions_expired ON sessions (tenant, session_id) WHERE expired <> 0",
    """\
CREATE TABLE counts (
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    sessions INTEGER NOT NULL,
    PRIMARY KEY (tenant, model)
) WITHOUT ROWID""",
    """\
INSERT INTO counts
SELECT tenant, model, count(*) FROM sessions WHERE +expired = 0 GROUP BY tenant, model""",
    """\
CREATE TRIGGER counts_replaced BEFORE INSERT ON sessions BEGIN
    UPDATE sessions SET expired = 1 WHERE session_id = NEW.session_id AND expired = 0;
END""",
    f"CREATE TRIGGER counts_inserted AFTER INSERT ON sessions BEGIN{_COUNT_ONE_MORE}\nEND",
    f"CREATE TRIGGER counts_deleted AFTER DELETE ON sessions BEGIN{_COUNT_ONE_LESS}\nEND",
    f"""\
CREATE TRIGGER counts_updated AFTER UPDATE OF tenant, model, expired ON sessions BEGIN\
{_COUNT_ONE_LESS}{_COUNT_ONE_MORE}
END""",
    f"PRAGMA user_version = {VERSION}",
)
_ADD_TENANT = "ALTER TABLE sessions ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default'"
_UPGRADES = {
    0: (*_TABLES, *_SINCE_VERSION_2, *_SINCE_VERSION_3),
    1: (
        _ADD_TENANT,
        "ALTER TABLE sessions ADD COLUMN expired INTEGER NOT NULL DEFAULT 0",
        "DROP INDEX sessions_by_model",
        "DROP INDEX sessions_by_due",
        *_SINCE_VERSION_2,
        *_SINCE_VERSION_3,
    ),
    2: (
        _ADD_TENANT,
        "DROP INDEX sessions_by_model",
        "DROP INDEX sessions_open",
        *_SINCE_VERSION_3,
    ),
}
"""Statements that turn a file of a version into one of `VERSION`; 0: the file is empty."""
_VALID = f"typeof(clock.micros) = 'integer' AND clock.micros BETWEEN 0 AND {MAX_MICROS}"
_CLOCK = "SELECT micros FROM clock WHERE id = 0 AND :valid".replace(":valid", _VALID)
_BEAT = """
INSERT INTO clock VALUES (0, ?1) ON CONFLICT (id) DO UPDATE
SET micros = iif(:valid, max(micros, min(excluded.micros, micros + ?2)), excluded.micros)
""".replace(":valid", _VALID)
# A clock that is missing or damaged starts at the time of the last step in the file, but not later
# than now: so stored times stay valid, and every session has as much idle time left as it had then,
# however long the file was unused and whatever the wall clock was set to. Sessions with impossible
# times (damaged, or written under a wrong clock) are not considered.
_BEGIN_CLOCK = """
INSERT OR REPLACE INTO clock SELECT 0, ifnull(CAST(max(at) AS INTEGER), ?1) FROM (
    SELECT expires - 1e6
    * iif(json_valid(record), json_extract(record, '$.idle_timeout_seconds'), NULL) AS at
    FROM sessions WHERE typeof(expires) = 'integer') WHERE at BETWEEN 0 AND ?1
"""


class NotAStepstateFile(sqlite3.DatabaseError):
    """The file belongs to another program, or to a later version."""


def prepare(connection: sqlite3.Connection, now: float) -> float:
    """Creates the tables in an empty file, or checks and updates those that are there.

    Args:
        connection: to the file.
        now: where the file's clock starts if it has none.

    Returns:
        The time by its clock.

    Raises:
        NotAStepstateFile: this version can't use it; nothing was changed.
        sqlite3.Error: it can't be read or written.
    """
    # A statement of many rows has a journal of its own, which goes to a temporary file beyond
    # 64 KiB, and so does what is sorted for an index; a container may have no folder for that.
    connection.execute("PRAGMA temp_store = MEMORY")
    with _transaction(connection, "BEGIN"):  # no write lock on another program's file
        _check(connection)
    with _transaction(connection, "BEGIN IMMEDIATE"):
        version = _check(connection)
        for statement in _UPGRADES.get(version, ()):
            connection.execute(statement)
        if version in (1, 2):
            log.info(
                "the store was updated; an earlier Stepstate can't open it any more",
                extra={"from_version": version, "to_version": VERSION},
            )
        if connection.execute(_CLOCK).fetchone() is None:
            connection.execute(_BEGIN_CLOCK, (round(now * MICROS),))
        return _clock(connection)


def configure(connection: sqlite3.Connection, *, fsync: bool, busy_seconds: float) -> None:
    """Sets up a connection to a prepared file.

    Args:
        connection: to the file.
        fsync: whether a commit waits for the disk.
        busy_seconds: how long to wait for another process, if the file is not in WAL mode yet.

    Raises:
        sqlite3.Error: it can't be set up.
    """
    _use_wal(connection, busy_seconds)
    connection.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")
    connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    connection.execute("PRAGMA user_version")  # the first read makes the WAL and its index


def _use_wal(connection: sqlite3.Connection, busy_seconds: float) -> None:
    """Switches to WAL. That needs the file for itself, and SQLite does not wait for it."""
    until = time.monotonic() + busy_seconds
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise sqlite3.NotSupportedError(
            "its file system can't share memory between processes, which WAL needs: "
            "give a path on a local disk"
        )


def heartbeat(connection: sqlite3.Connection, now: float, since: float) -> float:
    """Advances the file's clock to `now`, by at most `since`; returns its new time."""
    connection.execute(_BEAT, (round(now * MICROS), round(since * MICROS)))
    return _clock(connection)


def probe(connection: sqlite3.Connection) -> None:
    """Rewrites a page unchanged, with all that a commit writes.

    Raises:
        sqlite3.Error: it can't be written.
    """
    with _transaction(connection, "BEGIN IMMEDIATE"):
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {version}")


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    """A transaction; it is rolled back if the block raises."""
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _clock(connection: sqlite3.Connection) -> float:
    (micros,) = connection.execute(_CLOCK).fetchone()
    return float(micros) / MICROS


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
