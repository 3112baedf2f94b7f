"""Keeps sessions in this process only: a restart loses them all."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from stepstate.identity import SessionKey
from stepstate.stores.base import TOMBSTONE_SECONDS, SessionStore, next_epoch
from stepstate.stores.types import (
    DiskUsage,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    TenantFull,
    Tombstone,
    UnreadableSession,
)

MAX_TOMBSTONES = 100_000
"""About 20 MB; the oldest are deleted first."""


@dataclass(slots=True)
class _Kept:
    session: StoredSession
    snapshot: bytes


class MemoryStore(SessionStore):
    """The `SessionStore` without durability. No other server shares its clock.

    Args:
        clock: seconds in which this process ran.
        max_tombstones: how many tombstones are kept.
    """

    durable = False

    def __init__(self, clock: Callable[[], float], *, max_tombstones: int = MAX_TOMBSTONES) -> None:
        self._clock = clock
        self._max_tombstones = max_tombstones
        self._sessions: dict[SessionKey, _Kept] = {}
        # In order: by tenant; by model "name/version", and whether they are expired.
        self._listed: dict[str, dict[tuple[str, bool], list[SessionKey]]] = {}
        self._expired: dict[SessionKey, _Kept] = {}  # the oldest first
        self._tombstones: dict[SessionKey, tuple[float, Tombstone]] = {}  # the oldest first
        self._epoch = 0

    def now(self) -> float:
        return self._clock()

    async def heartbeat(self) -> None:
        self._delete_old_tombstones()  # the clock runs by itself

    async def create(
        self,
        record: SessionRecord,
        *,
        owner: str,
        t: int,
        expires_at: float,
        snapshot: bytes,
        replacing: int = 0,
        max_open_sessions: int | None = None,
    ) -> int | StoredSession | TenantFull:
        kept = self._kept(record.key)
        if kept and not (kept.session.epoch == replacing and self._is_overdue(kept.session)):
            return kept.session
        if record.key not in self._sessions and (full := self._full(record, max_open_sessions)):
            return full
        self._remove(record.key)
        self._tombstones.pop(record.key, None)
        session = StoredSession(record, t, expires_at, self._next_epoch(), owner)
        self._add(_Kept(session, snapshot))
        return session.epoch

    async def acquire(
        self, key: SessionKey, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[StoredSession, bytes] | StoredSession | Tombstone | None:
        kept = self._kept(key)
        if kept is None:
            return await self.find(key)
        before = kept.session
        if before.record.fingerprint not in fingerprints or self._is_overdue(before):
            return before
        kept.session = replace(before, epoch=self._next_epoch(), owner=owner)
        return replace(kept.session, owner=before.owner), kept.snapshot

    async def find(self, key: SessionKey) -> StoredSession | Tombstone | None:
        self._delete_old_tombstones()
        if kept := self._kept(key):
            return kept.session
        _, tombstone = self._tombstones.get(key, (0.0, None))
        return tombstone

    async def save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        return [self._save(save) for save in saves]

    async def expire(self, saves: Sequence[SaveRequest], *, delete_at: float) -> list[SaveResult]:
        return [self._expire(save, delete_at) for save in saves]

    async def restore(
        self,
        key: SessionKey,
        epoch: int,
        *,
        expires_at: float,
        max_open_sessions: int | None = None,
    ) -> bool | TenantFull:
        kept = self._expired.get(key)
        if kept is None or kept.session.epoch != epoch:
            return False
        if full := self._full(kept.session.record, max_open_sessions):
            return full
        self._remove(key)
        kept.session = replace(
            kept.session, epoch=self._next_epoch(), expires_at=expires_at, delete_at=None
        )
        self._add(kept)
        return True

    async def end(self, key: SessionKey, epoch: int, tombstone: Tombstone) -> bool:
        kept = self._kept(key)
        if kept is None or kept.session.epoch != epoch:
            return False
        self._remove(key)
        self._tombstones[key] = (self._clock() + TOMBSTONE_SECONDS, tombstone)
        self._delete_old_tombstones()
        return True

    async def discard(self, key: SessionKey, tombstone: Tombstone) -> bool:
        del key, tombstone
        return False  # everything in memory can be read

    async def overdue(self, before: float, limit: int) -> list[StoredSession]:
        due = (kept.session for kept in self._sessions.values() if kept.session.expires_at < before)
        return list(islice(due, limit))

    async def expired(self, before: float, limit: int) -> list[StoredSession]:
        oldest = (kept.session for kept in islice(self._expired.values(), limit))
        return [s for s in oldest if s.delete_at is not None and s.delete_at < before]

    async def page(
        self,
        token: str,
        size: int,
        model: str = "",
        *,
        tenant: str | None = None,
        expired: bool = False,
    ) -> tuple[list[StoredSession | UnreadableSession], str]:
        of_tenants = self._listed.values() if tenant is None else [self._listed.get(tenant, {})]
        later = [
            keys[(first := bisect_right(keys, token)) : first + size + 1]
            for listed in of_tenants
            for (name, is_expired), keys in listed.items()
            if model in ("", name.partition("/")[0]) and (expired or not is_expired)
        ]
        found = heapq.nsmallest(size + 1, chain.from_iterable(later))
        kept = filter(None, map(self._kept, found[:size]))
        return [one.session for one in kept], found[size - 1] if len(found) > size else ""

    async def count(self) -> Mapping[tuple[str, str], int]:
        return {
            (tenant, model): len(keys)
            for tenant, listed in self._listed.items()
            for (model, is_expired), keys in listed.items()
            if not is_expired
        }

    async def count_expired(self) -> int:
        return len(self._expired)

    async def probe(self) -> None:
        pass

    def disk_usage(self) -> DiskUsage | None:
        return None

    async def close(self) -> None:
        pass

    def _kept(self, key: SessionKey) -> _Kept | None:
        return self._sessions.get(key) or self._expired.get(key)

    def _add(self, kept: _Kept) -> None:
        record, is_expired = kept.session.record, kept.session.delete_at is not None
        (self._expired if is_expired else self._sessions)[record.key] = kept
        listed = self._listed.setdefault(record.tenant, {})
        insort(listed.setdefault((record.model_key, is_expired), []), record.key)

    def _remove(self, key: SessionKey) -> None:
        kept = self._sessions.pop(key, None)
        is_expired = kept is None
        if kept := kept or self._expired.pop(key, None):
            record = kept.session.record
            listed = self._listed[record.tenant]
            keys = listed[record.model_key, is_expired]
            del keys[bisect_left(keys, key)]
            if not keys:
                del listed[record.model_key, is_expired]
            if not listed:
                del self._listed[record.tenant]

    def _full(self, record: SessionRecord, limit: int | None) -> TenantFull | None:
        listed = self._listed.get(record.tenant, {})
        count = sum(len(keys) for (_, is_expired), keys in listed.items() if not is_expired)
        return TenantFull(count, limit) if limit is not None and count >= limit else None

    def _is_overdue(self, session: StoredSession) -> bool:
        return session.delete_at is not None or session.expires_at <= self._clock()

    def _next_epoch(self) -> int:
        self._epoch = next_epoch(self._epoch, self._clock())
        return self._epoch

    def _save(self, save: SaveRequest) -> SaveResult:
        kept = self._sessions.get(save.key)
        if kept is None:
            gone = save.key in self._tombstones or save.key in self._expired
            return SaveResult.FENCED if gone else SaveResult.MISSING
        if kept.session.epoch != save.epoch:
            return SaveResult.FENCED
        kept.session = replace(kept.session, owner=save.owner, t=save.t, expires_at=save.expires_at)
        if save.snapshot is not None:
            kept.snapshot = save.snapshot
        return SaveResult.DONE

    def _expire(self, save: SaveRequest, delete_at: float) -> SaveResult:
        kept = self._sessions.get(save.key)
        before = kept.session.expires_at if kept else 0.0
        result = self._save(replace(save, expires_at=before))
        if kept and result is SaveResult.DONE:
            self._remove(save.key)
            kept.session = replace(kept.session, epoch=self._next_epoch(), delete_at=delete_at)
            self._add(kept)
        return result

    def _delete_old_tombstones(self) -> None:
        now = self._clock()
        while self._tombstones:
            oldest = next(iter(self._tombstones))
            if len(self._tombstones) <= self._max_tombstones and self._tombstones[oldest][0] > now:
                return
            del self._tombstones[oldest]
