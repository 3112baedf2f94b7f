"""Keeps sessions in this process only: a restart loses them all."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

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
        self._tenants: dict[str, dict[SessionKey, _Kept]] = {}  # open and expired
        self._open: dict[str, Counter[str]] = {}  # by tenant and model
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
        tenants = self._tenants.values() if tenant is None else [self._tenants.get(tenant, {})]
        later = (
            (key, kept.session)
            for key, kept in chain.from_iterable(sessions.items() for sessions in tenants)
            if key > token
            and model in ("", kept.session.record.model)
            and (expired or kept.session.delete_at is None)
        )
        found = heapq.nsmallest(size + 1, later, key=lambda pair: pair[0])
        next_token = found[size - 1][0] if len(found) > size else ""
        return [session for _, session in found[:size]], next_token

    async def count(self) -> Mapping[tuple[str, str], int]:
        return {
            (tenant, model): sessions
            for tenant, models in self._open.items()
            for model, sessions in models.items()
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
        record = kept.session.record
        self._tenants.setdefault(record.tenant, {})[record.key] = kept
        if kept.session.delete_at is None:
            self._sessions[record.key] = kept
            self._open.setdefault(record.tenant, Counter())[record.model_key] += 1
        else:
            self._expired[record.key] = kept

    def _remove(self, key: SessionKey) -> None:
        if kept := self._sessions.pop(key, None):
            record = kept.session.record
            self._open[record.tenant][record.model_key] -= 1
            self._open[record.tenant] += Counter()  # drops those at 0
            _drop_empty(self._open, record.tenant)
        if kept := kept or self._expired.pop(key, None):
            tenant = kept.session.record.tenant
            del self._tenants[tenant][key]
            _drop_empty(self._tenants, tenant)

    def _full(self, record: SessionRecord, limit: int | None) -> TenantFull | None:
        count = self._open.get(record.tenant, Counter[str]()).total()
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


def _drop_empty(sessions: dict[str, Any], tenant: str) -> None:
    if not sessions[tenant]:
        del sessions[tenant]
