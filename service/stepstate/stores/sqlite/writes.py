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

from stepstate.identity import SessionKey, split_key
from stepstate.stores.base import TOMBSTONE_SECONDS, next_epoch
from stepstate.stores.sqlite.reads import Lookup, Row, look_up, open_by_tenant
from stepstate.stores.types import (
    MICROS,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    TenantFull,
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
    (session_id, tenant, model, record, epoch, owner, t, expires, snapshot, due)
SELECT *, column8 FROM (VALUES {}) WHERE column1 IS NOT NULL
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

    key: SessionKey
    result: T = field(init=False)


@dataclass(slots=True, eq=False)
class Create(Write[int | StoredSession | UnreadableSession | TenantFull]):
    """See `SessionStore.create`."""

    record: SessionRecord
    owner: str
    t: int
    expires_at: float
    snapshot: bytes
    replacing: int
    max_open_sessions: int | None = None


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
class Restore(Write[bool | TenantFull]):
    """See `SessionStore.restore`."""

    epoch: int
    expires_at: float
    max_open_sessions: int | None = None


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
    transaction = _Transaction(connection, now, unix_time)
    if len(writes) == 1 and isinstance(writes[0], SaveOne):
        # One statement is its own transaction. With more saves it is not known which of them it
        # did: before the epochs are looked at, another server may take what was saved.
        transaction.save([writes[0]])
        return
    connection.execute("BEGIN IMMEDIATE")
    for some in _rounds(writes):
        transaction.save(_of(SaveOne, some))
        transaction.expire(_of(Expire, some))
        transaction.change([one for one in some if not isinstance(one, SaveOne | Expire)])
    connection.execute("COMMIT")


def _rounds(writes: Iterable[Write[Any]]) -> list[list[Write[Any]]]:
    rounds: list[list[Write[Any]]] = []
    met: dict[str, int] = {}
    for one in writes:
        before = met.get(one.key, 0)
        met[one.key] = before + 1
        if before == len(rounds):
            rounds.append([])
        rounds[before].append(one)
    return rounds


def _of(kind: type[T], writes: Iterable[Write[Any]]) -> list[T]:
    return [one for one in writes if isinstance(one, kind)]


@dataclass(slots=True, eq=False)
class _Transaction:
    connection: sqlite3.Connection
    now: float
    unix_time: float

    def save(self, writes: list[SaveOne]) -> None:
        if writes:
            rows = [_values(one.save, one.save.expires_at) for one in writes]
            self._set_results(writes, self._execute_many(_SAVE, rows))

    def expire(self, writes: list[Expire]) -> None:
        """Like `save`; but it raises the epochs, so they are compared before."""
        if not writes:
            return
        ids = json.dumps([[one.key, one.save.epoch] for one in writes])
        (held,) = self.connection.execute(_COUNT_HELD, (ids,)).fetchone()
        self._set_results(writes, held)
        rows = [_values(one.save, one.delete_at) for one in writes if one.result is SaveResult.DONE]
        self._execute_many(_EXPIRE, rows)

    def change(self, writes: list[Write[Any]]) -> None:
        """Does all other writes."""
        if writes:
            found = self._look_up(writes)
            self._create(found, _of(Create, writes))
            self._acquire(found, _of(Acquire, writes))
            self._restore(found, _of(Restore, writes))
            self._end(found, _of(End, writes))

    def _look_up(self, writes: Iterable[Write[Any]]) -> Lookup:
        return look_up(self.connection, [one.key for one in writes], self.now)

    def _set_results(self, writes: Sequence[SaveOne | Expire], done: int) -> None:
        """Sets the results of writes; `done`: how many have the newest epoch of their session."""
        for one in writes:
            one.result = SaveResult.DONE
        if done == len(writes):
            return
        found = self._look_up(writes)
        for one in writes:
            stored = one.key in found.rows
            if not stored and one.key not in found.tombstones:
                one.result = SaveResult.MISSING
            elif not stored or found.epoch(one.key) != one.save.epoch:
                one.result = SaveResult.FENCED

    def _create(self, found: Lookup, writes: list[Create]) -> None:
        new: list[Values] = []
        room = self._open_by_tenant(writes)
        for one in writes:
            row = found.rows.get(one.key)
            if row and not (row.epoch == one.replacing and self._is_overdue(row.session)):
                one.result = row.session
                continue
            if not (row and _is_open(row.session)) and (full := _take_room(room, one)):
                one.result = full
                continue
            one.result = next_epoch(found.epoch(one.key), self.unix_time)
            record, expires = one.record, round(one.expires_at * MICROS)
            columns = (record.key, record.tenant, record.model_key, record.to_json(), one.result)
            new.append((*columns, one.owner, one.t, expires, one.snapshot))
        self._execute_many(_CREATE, new)
        if ended := [key for key, *_ in new if key in found.tombstones]:
            self.connection.execute(_DELETE_TOMBSTONES, (json.dumps(ended),))

    def _acquire(self, found: Lookup, writes: list[Acquire]) -> None:
        taken: dict[int, tuple[Acquire, StoredSession]] = {}
        rows: list[Row] = []
        for one in writes:
            one.result = found.of(one.key)
            row = found.rows.get(one.key)
            if row and (session := self._acquired(row, one.fingerprints)):
                taken[row.rowid] = one, session
                rows.append(row)
        owners = [(one.key, session.epoch, one.owner) for one, session in taken.values()]
        self._execute_many(_ACQUIRE, owners)
        for rowid, snapshot in self._snapshots(rows):
            one, session = taken[rowid]
            one.result = session, snapshot

    def _acquired(self, row: Row, fingerprints: Collection[str]) -> StoredSession | None:
        """A session with the epoch of a new lease; None: it can't be taken."""
        session = row.session
        if isinstance(session, UnreadableSession) or self._is_overdue(session):
            return None
        if session.record.fingerprint not in fingerprints:
            return None
        return replace(session, epoch=next_epoch(session.epoch, self.unix_time))

    def _snapshots(self, rows: Sequence[Row]) -> Iterator[tuple[int, bytes]]:
        for some in _chunks_of_bytes(rows):
            rowids = json.dumps([row.rowid for row in some])
            sizes, joined = self.connection.execute(_SNAPSHOTS, (rowids,)).fetchone()
            start = 0
            for rowid, size in json.loads(sizes):
                yield rowid, joined[start : start + size]
                start += size

    def _restore(self, found: Lookup, writes: list[Restore]) -> None:
        rows: list[Values] = []
        room = self._open_by_tenant(writes)
        for one in writes:
            session = found.of(one.key)
            one.result = (
                isinstance(session, StoredSession)
                and session.epoch == one.epoch
                and session.delete_at is not None
            )
            if one.result and (full := _take_room(room, one)):
                one.result = full
            elif one.result:
                rows.append((one.key, round(one.expires_at * MICROS)))
        self._execute_many(_RESTORE, rows)

    def _end(self, found: Lookup, writes: list[End]) -> None:
        forget = round((self.now + TOMBSTONE_SECONDS) * MICROS)
        rows: list[Values] = []
        for one in writes:
            one.result = _may_end(one, found.rows.get(one.key))
            if one.result:
                tombstone, idle = one.tombstone, repr(one.tombstone.idle_timeout_seconds)
                columns = (tombstone.reason.value, tombstone.t, idle, forget)
                rows.append((one.key, found.epoch(one.key), *columns))
        if rows:
            self.connection.execute(_DELETE_SESSIONS, (json.dumps([row[0] for row in rows]),))
            self.connection.execute(_DELETE_OLD_TOMBSTONES, (round(self.now * MICROS),))
            self._execute_many(_ADD_TOMBSTONES, rows)

    def _open_by_tenant(self, writes: Iterable[Create | Restore]) -> dict[str, int]:
        """How many open sessions those tenants have that a write limits."""
        limited = {split_key(one.key)[0] for one in writes if one.max_open_sessions is not None}
        return open_by_tenant(self.connection, limited) if limited else {}

    def _is_overdue(self, session: StoredSession | UnreadableSession) -> bool:
        if isinstance(session, UnreadableSession):
            return False
        return session.delete_at is not None or session.expires_at <= self.now

    def _execute_many(self, statement: str, rows: list[Values]) -> int:
        """Executes a statement with all rows in its VALUES; returns how many it changed."""
        changed = 0
        for first in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[first : first + ROWS_AT_ONCE]
            length = 1 << (len(some) - 1).bit_length()
            width = len(some[0])
            values = [value for row in some for value in row]
            values += [None] * (width * (length - len(some)))  # no session has an id of NULL
            marks = ",".join(["(" + ",".join("?" * width) + ")"] * length)
            changed += self.connection.execute(statement.format(marks), values).rowcount
        return changed


def _take_room(room: dict[str, int], one: Create | Restore) -> TenantFull | None:
    """Counts one more open session of its tenant; or says that it may have no more."""
    tenant, limit = split_key(one.key)[0], one.max_open_sessions
    count = room.get(tenant, 0)
    if limit is not None and count >= limit:
        return TenantFull(count, limit)
    room[tenant] = count + 1
    return None


def _is_open(session: StoredSession | UnreadableSession) -> bool:
    return isinstance(session, StoredSession) and session.delete_at is None


def _values(save: SaveRequest, at: float) -> Values:
    micros = round(at * MICROS)
    return (save.key, save.epoch, save.owner, save.t, micros, save.snapshot)


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


def _may_end(one: End, row: Row | None) -> bool:
    if row is None:
        return False
    if one.epoch is None:
        return isinstance(row.session, UnreadableSession)
    return row.epoch == one.epoch
