"""Keeps sessions in this process only: a restart forgets them all."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from stepstate.stores.base import (
    ENDING_SECONDS,
    Ending,
    Entry,
    Save,
    Saved,
    SessionRecord,
    Unreadable,
)

MOST_ENDINGS = 100_000
"""About 20 MB; the oldest are forgotten first."""


@dataclass(slots=True)
class _Kept:
    entry: Entry
    snapshot: bytes


class MemoryStore:
    """The `SessionStore` without durability.

    Args:
        clock: Unix seconds.
        most_endings: how many endings are remembered.
    """

    durable = False

    def __init__(self, clock: Callable[[], float], *, most_endings: int = MOST_ENDINGS) -> None:
        self._clock = clock
        self._most_endings = most_endings
        self._sessions: dict[str, _Kept] = {}
        self._endings: dict[str, tuple[float, Ending]] = {}  # the oldest first
        self._epoch = 0

    async def create(
        self, record: SessionRecord, *, owner: str, t: int, expires_at: float, snapshot: bytes
    ) -> int | Entry:
        """See `SessionStore.create`."""
        kept = self._sessions.get(record.session_id)
        if kept is not None and kept.entry.expires_at > self._clock():
            return kept.entry
        self._endings.pop(record.session_id, None)
        self._epoch = max(self._epoch + 1, int(self._clock() * 1e6))
        entry = Entry(record, t, expires_at, self._epoch, owner)
        self._sessions[record.session_id] = _Kept(entry, snapshot)
        return self._epoch

    async def acquire(
        self, session_id: str, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[Entry, bytes] | Entry | Ending | None:
        """See `SessionStore.acquire`."""
        kept = self._sessions.get(session_id)
        if kept is None:
            return await self.find(session_id)
        before = kept.entry
        if before.record.fingerprint not in fingerprints or before.expires_at <= self._clock():
            return before
        self._epoch += 1
        kept.entry = replace(before, epoch=self._epoch, owner=owner)
        return replace(kept.entry, owner=before.owner), kept.snapshot

    async def find(self, session_id: str) -> Entry | Ending | None:
        """See `SessionStore.find`."""
        self._forget()
        kept = self._sessions.get(session_id)
        if kept is not None:
            return kept.entry
        ended = self._endings.get(session_id)
        return None if ended is None else ended[1]

    async def save(self, saves: Sequence[Save]) -> list[Saved]:
        """See `SessionStore.save`."""
        return [self._save(save) for save in saves]

    async def end(self, session_id: str, epoch: int, ending: Ending) -> bool:
        """See `SessionStore.end`."""
        kept = self._sessions.get(session_id)
        if kept is None or kept.entry.epoch != epoch:
            return False
        del self._sessions[session_id]
        self._endings[session_id] = (self._clock() + ENDING_SECONDS, ending)
        self._forget()
        return True

    async def discard(self, session_id: str, ending: Ending) -> bool:
        """See `SessionStore.discard`: what is in memory can be read."""
        del session_id, ending
        return False

    async def overdue(self, before: float, limit: int) -> list[Entry]:
        """See `SessionStore.overdue`."""
        due = (kept.entry for kept in self._sessions.values() if kept.entry.expires_at < before)
        return [entry for entry, _ in zip(due, range(limit), strict=False)]

    async def page(
        self, token: str, size: int, model: str = ""
    ) -> tuple[list[Entry | Unreadable], str]:
        """See `SessionStore.page`; the token is the last id."""
        later = (
            (session_id, kept.entry)
            for session_id, kept in self._sessions.items()
            if session_id > token and model in ("", kept.entry.record.model)
        )
        found = heapq.nsmallest(size + 1, later, key=lambda pair: pair[0])
        entries: list[Entry | Unreadable] = [entry for _, entry in found[:size]]
        return entries, found[size - 1][0] if len(found) > size else ""

    async def count(self) -> Mapping[str, int]:
        """See `SessionStore.count`."""
        return Counter(kept.entry.record.model_key for kept in self._sessions.values())

    async def probe(self) -> None:
        """See `SessionStore.probe`; memory can always be written."""

    async def close(self) -> None:
        """See `SessionStore.close`; nothing to let go of."""

    def _save(self, save: Save) -> Saved:
        kept = self._sessions.get(save.session_id)
        if kept is None:
            return Saved.FENCED if save.session_id in self._endings else Saved.MISSING
        if kept.entry.epoch != save.epoch:
            return Saved.FENCED
        kept.entry = replace(kept.entry, owner=save.owner, t=save.t, expires_at=save.expires_at)
        if save.snapshot is not None:
            kept.snapshot = save.snapshot
        return Saved.DONE

    def _forget(self) -> None:
        now = self._clock()
        while self._endings:
            oldest = next(iter(self._endings))
            if len(self._endings) <= self._most_endings and self._endings[oldest][0] > now:
                return
            del self._endings[oldest]
