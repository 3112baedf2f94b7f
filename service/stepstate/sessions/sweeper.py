"""Sessions that were idle for too long: they expire, are kept for a while, and are deleted.

Rule 1: idle time is measured by the store's clock, which runs only while a server is up.
Rule 2: an expired session is kept unchanged for the grace period, and can be restored; a
        deletion is logged and counted.
Rule 3: open and expired sessions together keep the bound on sessions: beyond it the oldest
        expired ones are deleted early.
Rule 4: many sessions are handled in groups, with a rest between two, so that the event loop and
        the store stay free for others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

from stepstate.errors import SessionExpired
from stepstate.logging.audit import AuditEvent, AuditRecord, audit
from stepstate.sessions.context import Limits, SessionContext
from stepstate.sessions.counts import SessionCounts
from stepstate.sessions.snapshots.writer import SnapshotWriter
from stepstate.sessions.types import ResidentSession
from stepstate.stores import (
    EndReason,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    Tombstone,
)

log = logging.getLogger(__name__)

OVERDUE_GRACE_SECONDS = 60.0
"""A server that was cut off from the store has this long to save what it stepped meanwhile."""
GROUP = 256
"""Sessions of one transaction: some 10 ms of a store's time."""
LOOKED_AT_ONCE = 1024
"""Sessions that the store is asked for together."""
REST_SHARE = 0.5
"""The rest after each group, as a share of the time that it took."""
LOGGED_AT_ONCE = 50
"""Ids in one line of the log."""


class ExpirySweeper:
    """Expires sessions, and deletes those that were kept long enough.

    Args:
        context: the store and the table.
        limits: the grace period, and the bound on sessions.
        writer: saves resident sessions for the last time.
        counts: of the sessions in the store.
    """

    def __init__(
        self, context: SessionContext, limits: Limits, writer: SnapshotWriter, counts: SessionCounts
    ) -> None:
        self.counts = counts
        self._store = context.store
        self._table = context.table
        self._clock = context.clock
        self._observer = context.observer
        self._writer = writer
        self._grace_seconds = limits.expired_grace_seconds
        self._limit = limits.sessions

    def is_past(self, entry: StoredSession) -> bool:
        """Whether a stored session has expired, marked as such or not."""
        return entry.delete_at is not None or entry.expires_at <= self._store.backend.now()

    async def expire_resident(self, sessions: Iterable[ResidentSession]) -> int:
        """Expires those of some resident sessions that are overdue now; returns how many.

        Raises:
            StoreUnavailable: they are open as before.
        """
        table, now = self._table, self._clock()
        overdue = [one for one in sessions if one.open and table.is_overdue(one, now)]
        if not overdue:
            return 0
        for session in overdue:
            table.begin_end(session)
        saves = self._writer.last_saves(overdue)
        try:
            verdicts = await self._mark([save for _, save in saves])
        except BaseException:
            for session in overdue:
                table.reopen(session)
            raise
        expired, missing = [], []
        for (session, _), verdict in zip(saves, verdicts, strict=True):
            if verdict is SaveResult.MISSING:
                table.reopen(session)
                missing.append(session)
            else:
                table.remove(session)
            if verdict is SaveResult.DONE:
                expired.append(session.record)
        self._expired_here(expired)
        await self._writer.save(missing)  # the store has lost them: they are created again first
        return len(expired)

    async def settle(self, entry: StoredSession) -> SessionExpired:
        """Marks a session of the store whose time is up, if it is not; returns its error.

        Raises:
            StoreUnavailable.
        """
        if entry.delete_at is None:
            await self._expire_stored([entry])
            found = await self._store.ask(self._store.backend.find(entry.key))
            entry = found if isinstance(found, StoredSession) else entry
        if entry.delete_at is None:
            delete_in = self._grace_seconds  # it is about to be marked
        else:
            delete_in = entry.delete_at - self._store.backend.now()
        record = entry.record
        return expired_error(record.session_id, entry.t, record.idle_timeout_seconds, delete_in)

    async def sweep(self) -> int:
        """Expires all sessions that are not resident and whose time is up; returns how many.

        Raises:
            StoreUnavailable.
        """
        store, ended = self._store.backend, 0
        while True:
            before = store.now() - OVERDUE_GRACE_SECONDS
            entries = await self._store.ask(store.overdue(before, LOOKED_AT_ONCE))
            gone = [e for e in entries if self._table.get(e.key) is None]
            for group in _groups(gone):
                began = time.perf_counter()
                ended += await self._expire_stored(group)
                await asyncio.sleep(REST_SHARE * (time.perf_counter() - began))
            if len(entries) < LOOKED_AT_ONCE or not gone:
                return ended

    async def purge(self) -> int:
        """Deletes expired sessions: those whose grace is over, and those beyond the bound.

        Raises:
            StoreUnavailable.
        """
        deleted = await self._purge("grace_over", self._store.backend.now(), float("inf"))
        while (excess := self.counts.total + self.counts.expired - self._limit) > 0:
            gone = await self._purge("limit", float("inf"), min(excess, LOOKED_AT_ONCE))
            if not gone:
                break
            deleted += gone
            if self._store.backend.durable:  # other servers delete the same ones meanwhile
                await self.counts.count()
        return deleted

    def replaced(self, entry: StoredSession) -> None:
        """An expired session was deleted, as its id was opened anew."""
        if entry.delete_at is None:  # its time was up, and nobody had seen it yet
            self.counts.expired_here([entry.record.model_key])
        self.counts.expired -= 1
        self._report("replaced", [entry])

    async def _mark(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        """Saves sessions for the last time, and marks them as expired."""
        store = self._store.backend
        delete_at = store.now() + self._grace_seconds
        return await self._store.ask(store.expire(saves, delete_at=delete_at))

    async def _expire_stored(self, entries: Sequence[StoredSession]) -> int:
        if not entries:
            return 0
        verdicts = await self._mark([_last_save(entry) for entry in entries])
        pairs = zip(entries, verdicts, strict=True)
        expired = [entry.record for entry, verdict in pairs if verdict is SaveResult.DONE]
        self._expired_here(expired)
        return len(expired)

    def _expired_here(self, records: Sequence[SessionRecord]) -> None:
        """Sessions were marked as expired by this server."""
        self.counts.expired_here([record.model_key for record in records])
        for record in records:
            extra = {"tenant": record.tenant, "session_id": record.session_id}
            log.debug("a session has expired", extra=extra)
            audit(_audit_record(AuditEvent.SESSION_EXPIRED, record))

    async def _purge(self, reason: str, before: float, most: float) -> int:
        deleted = 0
        while deleted < most:
            limit = int(min(LOOKED_AT_ONCE, most - deleted))
            entries = await self._store.ask(self._store.backend.expired(before, limit))
            gone = 0
            for group in _groups(entries):
                began = time.perf_counter()
                gone += await self._delete(reason, group)
                await asyncio.sleep(REST_SHARE * (time.perf_counter() - began))
            deleted += gone
            if not gone:  # none is left, or other servers were faster
                break
        return deleted

    async def _delete(self, reason: str, entries: Sequence[StoredSession]) -> int:
        store = self._store.backend
        results = await asyncio.gather(  # the store takes them together
            *(store.end(e.key, e.epoch, _ending(e)) for e in entries),
            return_exceptions=True,
        )
        gone = [entry for entry, done in zip(entries, results, strict=True) if done is True]
        self.counts.expired -= len(gone)
        self._report(reason, gone)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return len(gone)

    def _report(self, reason: str, entries: Sequence[StoredSession]) -> None:
        if entries:
            self._observer.deleted(reason, len(entries))
        for first in range(0, len(entries), LOGGED_AT_ONCE):
            keys = [entry.key for entry in entries[first : first + LOGGED_AT_ONCE]]
            extra = {"reason": reason, "count": len(keys), "sessions": " ".join(keys)}
            log.info("expired sessions were deleted", extra=extra)
        for entry in entries:
            audit(_audit_record(AuditEvent.SESSION_DELETED, entry.record, reason))


def expired_error(
    session_id: str, t: int, idle_timeout_seconds: float, seconds_left: float
) -> SessionExpired:
    """The error for an expired session that is kept for `seconds_left`; 0: it is deleted."""
    until = ""
    if seconds_left > 0:
        until = f"{datetime.now(UTC) + timedelta(seconds=seconds_left):%Y-%m-%dT%H:%M:%SZ}"
    return SessionExpired(session_id, t, idle_timeout_seconds, until)


def _audit_record(event: AuditEvent, record: SessionRecord, why: str | None = None) -> AuditRecord:
    tenant, session = record.tenant, record.session_id
    return AuditRecord(
        event=event, tenant=tenant, session=session, model=record.model_key, detail=why
    )


def _groups(entries: Sequence[StoredSession]) -> Iterator[Sequence[StoredSession]]:
    for first in range(0, len(entries), GROUP):
        yield entries[first : first + GROUP]


def _last_save(entry: StoredSession) -> SaveRequest:
    # Its owner stays: a server that ended without giving the lease up may have been further.
    return SaveRequest(entry.key, entry.epoch, entry.owner, entry.t, entry.expires_at, None)


def _ending(entry: StoredSession) -> Tombstone:
    return Tombstone(EndReason.EXPIRED, entry.t, entry.record.idle_timeout_seconds)
