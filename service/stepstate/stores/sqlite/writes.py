"""Creates, acquires, saves and ends sessions: many of them in one transaction.

A transaction goes in rounds. No id occurs twice in a round, so its writes may be done in any
order: those of one kind together, in one statement. Nobody else writes between the look at a
session and its write, so epochs are compared here.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from stepstate.stores.base import TOMBSTONE_SECONDS, next_epoch
from stepstate.stores.sqlite.reads import Lookup, Row, look_up
from stepstate.stores.types import (
    MICROS,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    Tombstone,
    UnreadableSession,
)

ROWS_AT_ONCE = 256
"""Of one statement. One with fewer is padded to a power of two, so few have to be prepared."""
READ_BYTES = 16 * 2**20
"""Snapshots that are read together."""

T = TypeVar("T")
Values = tuple[Any, ...]

_SAVE = """
UPDATE sessions SET owner = v.column3, t = v.column4, expires = v.column5,
    snapshot = coalesce(v.column6, snapshot)
FROM (VALUES {}) AS v WHERE session_id = v.column1 AND epoch = v.column2
"""
_CREATE = """
INSERT OR REPLACE INTO sessions
    (session_id, model, record, epoch, owner, t, expires, snapshot, due)
SELECT *, column7 FROM (VALUES {}) WHERE column1 IS NOT NULL
"""
_ACQUIRE = """
UPDATE sessions SET epoch = v.column2, owner = v.column3
FROM (VALUES {}) AS v WHERE session_id = v.column1
"""
_COUNT_HELD = """
SELECT count(*) FROM json_each(?1) JOIN sessions
    ON session_id = json_extract(value, '$[0]') AND epoch = json_extract(value, '$[1]')
"""
_EXPIRE = """
UPDATE sessions SET epoch = epoch + 1, owner = v.column3, t = v.column4, due = v.column5,
    expired = 1, snapshot = coalesce(v.column6, snapshot)
FROM (VALUES {}) AS v WHERE session_id = v.column1 AND epoch = v.column2
"""
_RESTORE = """
UPDATE sessions SET epoch = epoch + 1, expires = v.column2, due = v.column2, expired = 0
FROM (VALUES {}) AS v WHERE session_id = v.column1
"""
_SNAPSHOTS = """
SELECT json_group_array(json_array(rowid, ifnull(length(CAST(snapshot AS BLOB)), 0))),
    CAST(group_concat(CAST(CAST(snapshot AS BLOB) AS TEXT), '') AS BLOB)
FROM sessions WHERE rowid IN (SELECT value FROM json_each(?1))
"""
_DELETE_SESSIONS = "DELETE FROM sessions WHERE session_id IN (SELECT value FROM json_each(?1))"
_DELETE_TOMBSTONES = "DELETE FROM endings WHERE session_id IN (SELECT value FROM json_each(?1))"
_DELETE_OLD_TOMBSTONES = "DELETE FROM endings WHERE forget <= ?1"
_ADD_TOMBSTONES = """
INSERT OR REPLACE INTO endings (session_id, epoch, reason, t, idle_timeout_seconds, forget)
SELECT * FROM (VALUES {}) WHERE column1 IS NOT NULL
"""


@dataclass(slots=True, eq=False)
class Write(Generic[T]):
    """One write to one session; `write` sets its result."""

    session_id: str
    result: T = field(init=False)


@dataclass(slots=True, eq=False)
class Create(Write[int | StoredSession | UnreadableSession]):
    """See `SessionStore.create`."""

    record: SessionRecord
    owner: str
    t: int
    expires_at: float
    snapshot: bytes
    replacing: int


@dataclass(slots=True, eq=False)
class Acquire(
    Write[tuple[StoredSession, bytes] | StoredSession | UnreadableSession | Tombstone | None]
):
    """See `SessionStore.acquire`."""

    owner: str
    fingerprints: Collection[str]


@dataclass(slots=True, eq=False)
class SaveOne(Write[SaveResult]):
    """One request of `SessionStore.save`."""

    save: SaveRequest


@dataclass(slots=True, eq=False)
class Expire(Write[SaveResult]):
    """One request of `SessionStore.expire`."""

    save: SaveRequest
    delete_at: float


@dataclass(slots=True, eq=False)
class Restore(Write[bool]):
    """See `SessionStore.restore`."""

    epoch: int
    expires_at: float


@dataclass(slots=True, eq=False)
class End(Write[bool]):
    """See `SessionStore.end` and, with an epoch of None, `SessionStore.discard`."""

    epoch: int | None
    tombstone: Tombstone


def write(
    connection: sqlite3.Connection, writes: Sequence[Write[Any]], *, now: float, unix_time: float
) -> None:
    """Does all writes, or none, and sets their results.

    Args:
        connection: to the file.
        writes: what to write.
        now: by the store's clock.
        unix_time: in seconds, for new epochs.

    Raises:
        sqlite3.Error: nothing was written, or that is unknown; the transaction may be open.
    """
    rounds = _rounds(writes)
    saves = _of(SaveOne, writes)
    if len(rounds) == 1 and len(saves) == len(writes) <= ROWS_AT_ONCE:
        _save(connection, saves, now)  # one statement is its own transaction
        return
    connection.execute("BEGIN IMMEDIATE")
    for some in rounds:
        _save(connection, _of(SaveOne, some), now)
        _expire(connection, _of(Expire, some), now)
        _change(connection, some, now, unix_time)
    connection.execute("COMMIT")


def _rounds(writes: Iterable[Write[Any]]) -> list[list[Write[Any]]]:
    rounds: list[list[Write[Any]]] = []
    met: dict[str, int] = {}
    for one in writes:
        before = met.get(one.session_id, 0)
        met[one.session_id] = before + 1
        if before == len(rounds):
            rounds.append([])
        rounds[before].append(one)
    return rounds


def _of(kind: type[T], writes: Iterable[Write[Any]]) -> list[T]:
    return [one for one in writes if isinstance(one, kind)]


def _save(connection: sqlite3.Connection, writes: list[SaveOne], now: float) -> None:
    if not writes:
        return
    rows = [_values(one.save, one.save.expires_at) for one in writes]
    saved = _execute_many(connection, _SAVE, rows)
    _set_results(connection, writes, saved, now)


def _expire(connection: sqlite3.Connection, writes: list[Expire], now: float) -> None:
    """Like `_save`; but it raises the epochs, so they are compared before."""
    if not writes:
        return
    ids = json.dumps([[one.session_id, one.save.epoch] for one in writes])
    (held,) = connection.execute(_COUNT_HELD, (ids,)).fetchone()
    _set_results(connection, writes, held, now)
    rows = [_values(one.save, one.delete_at) for one in writes if one.result is SaveResult.DONE]
    _execute_many(connection, _EXPIRE, rows)


def _values(save: SaveRequest, at: float) -> Values:
    micros = round(at * MICROS)
    return (save.session_id, save.epoch, save.owner, save.t, micros, save.snapshot)


def _set_results(
    connection: sqlite3.Connection, writes: Sequence[SaveOne | Expire], done: int, now: float
) -> None:
    """Sets the results of writes; `done`: how many have the newest epoch of their session."""
    for one in writes:
        one.result = SaveResult.DONE
    if done == len(writes):
        return
    found = look_up(connection, [one.session_id for one in writes], now)
    for one in writes:
        if one.session_id in found.rows:
            if found.epoch(one.session_id) != one.save.epoch:
                one.result = SaveResult.FENCED
        else:
            gone = one.session_id in found.tombstones
            one.result = SaveResult.FENCED if gone else SaveResult.MISSING


def _change(
    connection: sqlite3.Connection, writes: list[Write[Any]], now: float, unix_time: float
) -> None:
    ids = [one.session_id for one in writes if not isinstance(one, SaveOne | Expire)]
    if not ids:
        return
    found = look_up(connection, ids, now)
    _create(connection, found, _of(Create, writes), now, unix_time)
    _acquire(connection, found, _of(Acquire, writes), now, unix_time)
    _restore(connection, found, _of(Restore, writes))
    _end(connection, found, _of(End, writes), now)


def _is_overdue(session: StoredSession | UnreadableSession, now: float) -> bool:
    if isinstance(session, UnreadableSession):
        return False
    return session.delete_at is not None or session.expires_at <= now


def _create(
    connection: sqlite3.Connection,
    found: Lookup,
    writes: list[Create],
    now: float,
    unix_time: float,
) -> None:
    new: list[Values] = []
    for one in writes:
        row = found.rows.get(one.session_id)
        if row is not None and not (row.epoch == one.replacing and _is_overdue(row.session, now)):
            one.result = row.session
            continue
        one.result = next_epoch(found.epoch(one.session_id), unix_time)
        record, expires = one.record, round(one.expires_at * MICROS)
        columns = (record.session_id, record.model_key, record.to_json(), one.result)
        new.append((*columns, one.owner, one.t, expires, one.snapshot))
    _execute_many(connection, _CREATE, new)
    ended = [one.session_id for one in writes if one.session_id in found.tombstones]
    if ended:
        connection.execute(_DELETE_TOMBSTONES, (json.dumps(ended),))


def _acquire(
    connection: sqlite3.Connection,
    found: Lookup,
    writes: list[Acquire],
    now: float,
    unix_time: float,
) -> None:
    taken: dict[int, tuple[Acquire, StoredSession]] = {}
    rows: list[Row] = []
    for one in writes:
        one.result = found.of(one.session_id)
        row = found.rows.get(one.session_id)
        if row is None or not isinstance(row.session, StoredSession):
            continue
        if row.session.record.fingerprint in one.fingerprints and not _is_overdue(row.session, now):
            session = replace(row.session, epoch=next_epoch(row.session.epoch, unix_time))
            taken[row.rowid] = one, session
            rows.append(row)
    owners = [(one.session_id, session.epoch, one.owner) for one, session in taken.values()]
    _execute_many(connection, _ACQUIRE, owners)
    for rowid, snapshot in _snapshots(connection, rows):
        one, session = taken[rowid]
        one.result = session, snapshot


def _snapshots(connection: sqlite3.Connection, rows: Sequence[Row]) -> Iterator[tuple[int, bytes]]:
    for some in _chunks_of_bytes(rows):
        rowids = json.dumps([row.rowid for row in some])
        sizes, joined = connection.execute(_SNAPSHOTS, (rowids,)).fetchone()
        start = 0
        for rowid, size in json.loads(sizes):
            yield rowid, joined[start : start + size]
            start += size


def _chunks_of_bytes(rows: Sequence[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        if chunk and size + row.snapshot_bytes > READ_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += row.snapshot_bytes
    if chunk:
        yield chunk


def _restore(connection: sqlite3.Connection, found: Lookup, writes: list[Restore]) -> None:
    for one in writes:
        row = found.rows.get(one.session_id)
        session = None if row is None else row.session
        one.result = (
            isinstance(session, StoredSession)
            and session.epoch == one.epoch
            and session.delete_at is not None
        )
    rows = [(one.session_id, round(one.expires_at * MICROS)) for one in writes if one.result]
    _execute_many(connection, _RESTORE, rows)


def _end(connection: sqlite3.Connection, found: Lookup, writes: list[End], now: float) -> None:
    forget = round((now + TOMBSTONE_SECONDS) * MICROS)
    rows: list[Values] = []
    for one in writes:
        one.result = _may_end(one, found.rows.get(one.session_id))
        if one.result:
            tombstone, idle = one.tombstone, repr(one.tombstone.idle_timeout_seconds)
            columns = (tombstone.reason.value, tombstone.t, idle, forget)
            rows.append((one.session_id, found.epoch(one.session_id), *columns))
    if rows:
        connection.execute(_DELETE_SESSIONS, (json.dumps([row[0] for row in rows]),))
        connection.execute(_DELETE_OLD_TOMBSTONES, (round(now * MICROS),))
        _execute_many(connection, _ADD_TOMBSTONES, rows)


def _may_end(one: End, row: Row | None) -> bool:
    if row is None:
        return False
    if one.epoch is None:
        return isinstance(row.session, UnreadableSession)
    return row.epoch == one.epoch


def _execute_many(connection: sqlite3.Connection, statement: str, rows: list[Values]) -> int:
    """Executes a statement with all rows in its VALUES; returns how many it changed."""
    changed = 0
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[first : first + ROWS_AT_ONCE]
        length = 1 << (len(some) - 1).bit_length()
        width = len(some[0])
        values = [value for row in some for value in row]
        values += [None] * (width * (length - len(some)))  # no session has an id of NULL
        marks = ",".join(["(" + ",".join("?" * width) + ")"] * length)
        changed += connection.execute(statement.format(marks), values).rowcount
    return changed
