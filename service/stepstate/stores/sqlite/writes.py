"""Creates, acquires, saves, ends and so on: what came together goes into one transaction.

A transaction goes in rounds. No id is twice in a round, so its parts may be written in any
order: those of a kind together, in one statement. Between looking at a session and writing
it nobody else writes, so epochs are compared here.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from stepstate.stores.base import (
    ENDING_SECONDS,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    Tombstone,
    UnreadableSession,
)
from stepstate.stores.epochs import next_epoch
from stepstate.stores.sqlite.reads import Lookup, Row, look
from stepstate.stores.sqlite.schema import microseconds

ROWS_AT_ONCE = 256
"""Of one statement; a statement of fewer is filled up, so that few have to be prepared."""
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
_TAKE = """
UPDATE sessions SET epoch = v.column2, owner = v.column3
FROM (VALUES {}) AS v WHERE session_id = v.column1
"""
_HELD = """
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
_FORGET_SESSIONS = "DELETE FROM sessions WHERE session_id IN (SELECT value FROM json_each(?1))"
_FORGET_ENDINGS = "DELETE FROM endings WHERE session_id IN (SELECT value FROM json_each(?1))"
_FORGET_OLD = "DELETE FROM endings WHERE forget <= ?1"
_ENDED = """
INSERT OR REPLACE INTO endings (session_id, epoch, reason, t, idle_timeout_seconds, forget)
SELECT * FROM (VALUES {}) WHERE column1 IS NOT NULL
"""


@dataclass(slots=True, eq=False)
class Create:
    """See `SessionStore.create`."""

    record: SessionRecord
    owner: str
    t: int
    expires_at: float
    snapshot: bytes
    replacing: int = 0
    answer: int | StoredSession | UnreadableSession = 0

    @property
    def session_id(self) -> str:
        """Its id."""
        return self.record.session_id


@dataclass(slots=True, eq=False)
class Acquire:
    """See `SessionStore.acquire`."""

    session_id: str
    owner: str
    fingerprints: Collection[str]
    answer: tuple[StoredSession, bytes] | StoredSession | UnreadableSession | Tombstone | None = (
        None
    )


@dataclass(slots=True, eq=False)
class SaveOne:
    """One of the saves of `SessionStore.save`."""

    session_id: str
    save: SaveRequest
    answer: SaveResult = SaveResult.MISSING


@dataclass(slots=True, eq=False)
class Expire:
    """One of the saves of `SessionStore.expire`."""

    session_id: str
    save: SaveRequest
    delete_at: float
    answer: SaveResult = SaveResult.MISSING


@dataclass(slots=True, eq=False)
class Restore:
    """See `SessionStore.restore`."""

    session_id: str
    epoch: int
    expires_at: float
    answer: bool = False


@dataclass(slots=True, eq=False)
class End:
    """See `SessionStore.end`."""

    session_id: str
    epoch: int
    ending: Tombstone
    answer: bool = False


@dataclass(slots=True, eq=False)
class Discard:
    """See `SessionStore.discard`."""

    session_id: str
    ending: Tombstone
    answer: bool = False


Part = Create | Acquire | SaveOne | Expire | Restore | End | Discard


def write(
    connection: sqlite3.Connection, parts: Sequence[Part], *, now: float, unix_time: float
) -> None:
    """Writes all parts, or none, and gives each its answer.

    Args:
        connection: to the file.
        parts: what to write.
        now: by the store's clock.
        wall: Unix seconds, for new epochs.

    Raises:
        sqlite3.Error: nothing was written, or it is not known; the transaction may be open.
    """
    rounds = _rounds(parts)
    if len(rounds) == 1 and len(saves := _of(SaveOne, parts)) == len(parts) <= ROWS_AT_ONCE:
        _save(connection, saves, now)  # one statement is its own transaction
        return
    connection.execute("BEGIN IMMEDIATE")
    for some in rounds:
        _save(connection, _of(SaveOne, some), now)
        _expire(connection, _of(Expire, some), now)
        others: list[Part] = [p for p in some if not isinstance(p, SaveOne | Expire)]
        _change(connection, others, now, unix_time)
    connection.execute("COMMIT")


def _rounds(parts: Iterable[Part]) -> list[list[Part]]:
    rounds: list[list[Part]] = []
    met: dict[str, int] = {}
    for part in parts:
        before = met.get(part.session_id, 0)
        met[part.session_id] = before + 1
        if before == len(rounds):
            rounds.append([])
        rounds[before].append(part)
    return rounds


def _of(kind: type[T], parts: Iterable[Part]) -> list[T]:
    return [part for part in parts if isinstance(part, kind)]


def _save(connection: sqlite3.Connection, parts: list[SaveOne], now: float) -> None:
    if not parts:
        return
    done = _execute_many(connection, _SAVE, [_saved(part.save) for part in parts])
    for part in parts:
        part.answer = SaveResult.DONE
    if done < len(parts):
        _tell_apart(look(connection, [part.session_id for part in parts], now), parts)


def _expire(connection: sqlite3.Connection, parts: list[Expire], now: float) -> None:
    """Like `_save`; but its epoch rises, so what is known is looked at before."""
    if not parts:
        return
    ids = json.dumps([[part.session_id, part.save.epoch] for part in parts])
    (known,) = connection.execute(_HELD, (ids,)).fetchone()
    for part in parts:
        part.answer = SaveResult.DONE
    if known < len(parts):
        _tell_apart(look(connection, [part.session_id for part in parts], now), parts)
    rows = [_expired(part) for part in parts if part.answer is SaveResult.DONE]
    _execute_many(connection, _EXPIRE, rows)


def _expired(part: Expire) -> Values:
    save, due = part.save, microseconds(part.delete_at)
    return (save.session_id, save.epoch, save.owner, save.t, due, save.snapshot)


def _saved(save: SaveRequest) -> Values:
    expires = microseconds(save.expires_at)
    return (save.session_id, save.epoch, save.owner, save.t, expires, save.snapshot)


def _tell_apart(known: Lookup, parts: Sequence[SaveOne | Expire]) -> None:
    for part in parts:
        if part.session_id in known.rows:
            fenced = known.epoch(part.session_id) != part.save.epoch
            part.answer = SaveResult.FENCED if fenced else SaveResult.DONE
        else:
            part.answer = (
                SaveResult.FENCED if part.session_id in known.endings else SaveResult.MISSING
            )


def _change(
    connection: sqlite3.Connection, parts: list[Part], now: float, unix_time: float
) -> None:
    if not parts:
        return
    known = look(connection, [part.session_id for part in parts], now)
    _create(connection, known, _of(Create, parts), now, unix_time)
    _acquire(connection, known, _of(Acquire, parts), now, unix_time)
    _restore(connection, known, _of(Restore, parts))
    ends: list[End | Discard] = [*_of(End, parts), *_of(Discard, parts)]
    _end(connection, known, ends, now)


def _past(entry: StoredSession | UnreadableSession, now: float) -> bool:
    if isinstance(entry, UnreadableSession):
        return False
    return entry.delete_at is not None or entry.expires_at <= now


def _create(
    connection: sqlite3.Connection, known: Lookup, parts: list[Create], now: float, unix_time: float
) -> None:
    new: list[Values] = []
    for part in parts:
        row = known.rows.get(part.session_id)
        if row is not None and not (row.epoch == part.replacing and _past(row.entry, now)):
            part.answer = row.entry
            continue
        part.answer = next_epoch(known.epoch(part.session_id), unix_time)
        record, expires = part.record, microseconds(part.expires_at)
        what = (record.session_id, record.model_key, record.to_json(), part.answer)
        new.append((*what, part.owner, part.t, expires, part.snapshot))
    _execute_many(connection, _CREATE, new)
    ended = [part.session_id for part in parts if part.session_id in known.endings]
    if ended:
        connection.execute(_FORGET_ENDINGS, (json.dumps(ended),))


def _acquire(
    connection: sqlite3.Connection,
    known: Lookup,
    parts: list[Acquire],
    now: float,
    unix_time: float,
) -> None:
    taken: dict[int, tuple[Acquire, StoredSession]] = {}
    rows: list[Row] = []
    for part in parts:
        part.answer = known.of(part.session_id)
        row = known.rows.get(part.session_id)
        if row is None or not isinstance(row.entry, StoredSession) or _past(row.entry, now):
            continue
        if row.entry.record.fingerprint in part.fingerprints:
            entry = replace(row.entry, epoch=next_epoch(row.entry.epoch, unix_time))
            taken[row.rowid] = part, entry
            rows.append(row)
    owners = [(part.session_id, entry.epoch, part.owner) for part, entry in taken.values()]
    _execute_many(connection, _TAKE, owners)
    for rowid, snapshot in _snapshots(connection, rows):
        part, entry = taken[rowid]
        part.answer = entry, snapshot


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


def _restore(connection: sqlite3.Connection, known: Lookup, parts: list[Restore]) -> None:
    for part in parts:
        row = known.rows.get(part.session_id)
        part.answer = (
            row is not None
            and isinstance(row.entry, StoredSession)
            and row.entry.epoch == part.epoch
            and row.entry.delete_at is not None
        )
    done = [(part.session_id, microseconds(part.expires_at)) for part in parts if part.answer]
    _execute_many(connection, _RESTORE, done)


def _end(
    connection: sqlite3.Connection, known: Lookup, parts: Sequence[End | Discard], now: float
) -> None:
    forget = microseconds(now + ENDING_SECONDS)
    rows: list[Values] = []
    for part in parts:
        part.answer = _may_end(part, known.rows.get(part.session_id))
        if part.answer:
            ending, idle = part.ending, repr(part.ending.idle_timeout_seconds)
            how = (ending.reason.value, ending.t, idle, forget)
            rows.append((part.session_id, known.epoch(part.session_id), *how))
    if rows:
        connection.execute(_FORGET_SESSIONS, (json.dumps([row[0] for row in rows]),))
        connection.execute(_FORGET_OLD, (microseconds(now),))
        _execute_many(connection, _ENDED, rows)


def _may_end(part: End | Discard, row: Row | None) -> bool:
    if row is None:
        return False
    if isinstance(part, Discard):
        return isinstance(row.entry, UnreadableSession)
    return row.epoch == part.epoch


def _execute_many(connection: sqlite3.Connection, statement: str, rows: list[Values]) -> int:
    """Executes a statement with all rows in its VALUES; returns how many it changed."""
    changed = 0
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[first : first + ROWS_AT_ONCE]
        length = 1 << (len(some) - 1).bit_length()
        width = len(some[0])
        values = [value for row in some for value in row]
        values += [None] * (width * (length - len(some)))  # an id of NULL is nobody's
        marks = ",".join(["(" + ",".join("?" * width) + ")"] * length)
        changed += connection.execute(statement.format(marks), values).rowcount
    return changed
