"""Keeps sessions in this process only: a restart forgets them all."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from stepstate.stores.base import (
    ENDING_SECONDS,
    DiskUsage,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    Tombstone,
    UnreadableSession,
)

MAX_ENDINGS = 100_000
"""About 20 MB; the oldest are forgotten first."""


@dataclass(slots=True)
class _Kept:
    entry: StoredSession
    snapshot: bytes


class MemoryStore:
    """The `SessionStore` without durability. No other server shares its clock.

    Args:
        clock: seconds in which this process ran.
        max_endings: how many endings are remembered.
    """

    durable = False

    def __init__(self, clock: Callable[[], float], *, max_endings: int = MAX_ENDINGS) -> None:
        self._clock = clock
        self._max_endings = max_endings
        self._sessions: dict[str, _Kept] = {}
        self._expired: dict[str, _Kept] = {}  # the oldest first
        self._endings: dict[str, tuple[float, Tombstone]] = {}  # the oldest first
        self._epoch = 0

    def now(self) -> float:
        """See `SessionStore.now`."""
        return self._clock()

    async def beat(self) -> None:
        """See `SessionStore.beat`; its clock goes by itself."""
        self._forget()

    async def create(
        self,
        record: SessionRecord,
        *,
        owner: str,
        t: int,
        expires_at: float,
        snapshot: bytes,
        replacing: int = 0,
    ) -> int | StoredSession:
        """See `SessionStore.create`."""
        kept = self._kept(record.session_id)
        if kept is not None and not (kept.entry.epoch == replacing and self._past(kept.entry)):
            return kept.entry
        self._expired.pop(record.session_id, None)
        self._endings.pop(record.session_id, None)
        entry = StoredSession(record, t, expires_at, self._next_epoch(), owner)
        self._sessions[record.session_id] = _Kept(entry, snapshot)
        return entry.epoch

    async def acquire(
        self, session_id: str, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[StoredSession, bytes] | StoredSession | Tombstone | None:
        """See `SessionStore.acquire`."""
        kept = self._kept(session_id)
        if kept is None:
            return await self.find(session_id)
        before = kept.entry
        if before.record.fingerprint not in fingerprints or self._past(before):
            return before
        kept.entry = replace(before, epoch=self._next_epoch(), owner=owner)
        return replace(kept.entry, owner=before.owner), kept.snapshot

    async def find(self, session_id: str) -> StoredSession | Tombstone | None:
        """See `SessionStore.find`."""
        self._forget()
        kept = self._kept(session_id)
        if kept is not None:
            return kept.entry
        ended = self._endings.get(session_id)
        return None if ended is None else ended[1]

    async def save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        """See `SessionStore.save`."""
        return [self._save(save) for save in saves]

    async def expire(self, saves: Sequence[SaveRequest], *, delete_at: float) -> list[SaveResult]:
        """See `SessionStore.expire`."""
        verdicts = []
        for save in saves:
            kept = self._sessions.get(save.session_id)
            before = 0.0 if kept is None else kept.entry.expires_at
            verdict = self._save(replace(save, expires_at=before))
            if verdict is SaveResult.DONE:
                kept = self._sessions.pop(save.session_id)
                kept.entry = replace(kept.entry, epoch=self._next_epoch(), delete_at=delete_at)
                self._expired[save.session_id] = kept
            verdicts.append(verdict)
        return verdicts

    async def restore(self, session_id: str, epoch: int, *, expires_at: float) -> bool:
        """See `SessionStore.restore`."""
        kept = self._expired.get(session_id)
        if kept is None or kept.entry.epoch != epoch:
            return False
        kept.entry = replace(
            kept.entry, epoch=self._next_epoch(), expires_at=expires_at, delete_at=None
        )
        self._sessions[session_id] = self._expired.pop(session_id)
        return True

    async def end(self, session_id: str, epoch: int, ending: Tombstone) -> bool:
        """See `SessionStore.end`."""
        kept = self._kept(session_id)
        if kept is None or kept.entry.epoch != epoch:
            return False
        self._sessions.pop(session_id, None)
        self._expired.pop(session_id, None)
        self._endings[session_id] = (self._clock() + ENDING_SECONDS, ending)
        self._forget()
        return True

    async def discard(self, session_id: str, ending: Tombstone) -> bool:
        """See `SessionStore.discard`: what is in memory can be read."""
        del session_id, ending
        return False

    async def overdue(self, before: float, limit: int) -> list[StoredSession]:
        """See `SessionStore.overdue`."""
        due = (kept.entry for kept in self._sessions.values() if kept.entry.expires_at < before)
        return [entry for entry, _ in zip(due, range(limit), strict=False)]

    async def expired(self, before: float, limit: int) -> list[StoredSession]:
        """See `SessionStore.expired`."""
        oldest = (kept.entry for kept in islice(self._expired.values(), limit))
        return [e for e in oldest if e.delete_at is not None and e.delete_at < before]

    async def page(
        self, token: str, size: int, model: str = "", *, expired: bool = False
    ) -> tuple[list[StoredSession | UnreadableSession], str]:
        """See `SessionStore.page`; the token is the last id."""
        everything = chain(self._sessions.items(), self._expired.items() if expired else ())
        later = (
            (session_id, kept.entry)
            for session_id, kept in everything
            if session_id > token and model in ("", kept.entry.record.model)
        )
        found = heapq.nsmallest(size + 1, later, key=lambda pair: pair[0])
        entries: list[StoredSession | UnreadableSession] = [entry for _, entry in found[:size]]
        return entries, found[size - 1][0] if len(found) > size else ""

    async def count(self) -> Mapping[str, int]:
        """See `SessionStore.count`."""
        return Counter(kept.entry.record.model_key for kept in self._sessions.values())

    async def count_expired(self) -> int:
        """See `SessionStore.count_expired`."""
        return len(self._expired)

    async def probe(self) -> None:
        """See `SessionStore.probe`; memory can always be written."""

    def disk_usage(self) -> DiskUsage | None:
        """See `SessionStore.disk_usage`."""
        return None

    async def close(self) -> None:
        """See `SessionStore.close`; nothing to let go of."""

    def _kept(self, session_id: str) -> _Kept | None:
        return self._sessions.get(session_id) or self._expired.get(session_id)

    def _past(self, entry: StoredSession) -> bool:
        return entry.delete_at is not None or entry.expires_at <= self._clock()

    def _next_epoch(self) -> int:
        self._epoch = max(self._epoch + 1, int(self._clock() * 1e6))
        return self._epoch

    def _save(self, save: SaveRequest) -> SaveResult:
        kept = self._sessions.get(save.session_id)
        if kept is None:
            gone = save.session_id in self._endings or save.session_id in self._expired
            return SaveResult.FENCED if gone else SaveResult.MISSING
        if kept.entry.epoch != save.epoch:
            return SaveResult.FENCED
        kept.entry = replace(kept.entry, owner=save.owner, t=save.t, expires_at=save.expires_at)
        if save.snapshot is not None:
            kept.snapshot = save.snapshot
        return SaveResult.DONE

    def _forget(self) -> None:
        now = self._clock()
        while self._endings:
            oldest = next(iter(self._endings))
            if len(self._endings) <= self._max_endings and self._endings[oldest][0] > now:
                return
            del self._endings[oldest]
