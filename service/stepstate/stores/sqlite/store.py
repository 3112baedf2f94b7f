"""The `SessionStore` on a file of SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

from stepstate.stores.base import (
    DiskUsage,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    Tombstone,
    UnreadableSession,
)
from stepstate.stores.sqlite import reads, schema
from stepstate.stores.sqlite.file import SessionFile
from stepstate.stores.sqlite.writer_thread import StoreOp, WriterThread
from stepstate.stores.sqlite.writes import (
    Acquire,
    Create,
    Discard,
    End,
    Expire,
    Restore,
    SaveOne,
)
from stepstate.uptime import UptimeClock

T = TypeVar("T")


class SqliteStore:
    """Keeps sessions in a file. Several servers of one machine may share it.

    What a call has returned survives kill -9 of the process; with `fsync` a loss of power too.
    Use `open`; the constructor wants a file that is open.

    Args:
        file: the open file.
        wall: Unix seconds; called from a thread.
    """

    durable = True

    def __init__(self, file: SessionFile, *, unix_time: Callable[[], float]) -> None:
        self._clock = file.clock
        self._worker = WriterThread(file, unix_time)

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        clock: Callable[[], float],
        unix_time: Callable[[], float] = time.time,
        fsync: bool = False,
    ) -> Self:
        """Opens a file, and makes it if its folder is there.

        Args:
            path: the file.
            clock: monotonic seconds; called from a thread.
            wall: Unix seconds; called from a thread.
            fsync: whether every commit waits for the disk.

        Raises:
            StoreOpenError: it is not a file to keep sessions in.
        """
        file = SessionFile(path, fsync=fsync, clock=UptimeClock(clock, start=unix_time()))
        await asyncio.to_thread(file.open)
        return cls(file, unix_time=unix_time)

    def now(self) -> float:
        """See `SessionStore.now`."""
        return self._clock()

    async def beat(self) -> None:
        """See `SessionStore.beat`."""
        now, since, at = self._clock.read()
        shown = await self._call(lambda file: schema.beat(file, now, since), rows=1)
        self._clock.set(shown, at)

    async def create(
        self,
        record: SessionRecord,
        *,
        owner: str,
        t: int,
        expires_at: float,
        snapshot: bytes,
        replacing: int = 0,
    ) -> int | StoredSession | UnreadableSession:
        """See `SessionStore.create`."""
        part = Create(record, owner, t, expires_at, snapshot, replacing)
        await self._worker.do(StoreOp([part]))
        return part.answer

    async def acquire(
        self, session_id: str, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[StoredSession, bytes] | StoredSession | UnreadableSession | Tombstone | None:
        """See `SessionStore.acquire`."""
        part = Acquire(session_id, owner, fingerprints)
        await self._worker.do(StoreOp([part]))
        return part.answer

    async def find(self, session_id: str) -> StoredSession | UnreadableSession | Tombstone | None:
        """See `SessionStore.find`."""
        return await self._call(lambda file: reads.find(file, session_id, self._clock()))

    async def save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        """See `SessionStore.save`."""
        parts = [SaveOne(save.session_id, save) for save in saves]
        if parts:
            await self._worker.do(StoreOp(parts))
        return [part.answer for part in parts]

    async def expire(self, saves: Sequence[SaveRequest], *, delete_at: float) -> list[SaveResult]:
        """See `SessionStore.expire`."""
        parts = [Expire(save.session_id, save, delete_at) for save in saves]
        if parts:
            await self._worker.do(StoreOp(parts))
        return [part.answer for part in parts]

    async def restore(self, session_id: str, epoch: int, *, expires_at: float) -> bool:
        """See `SessionStore.restore`."""
        part = Restore(session_id, epoch, expires_at)
        await self._worker.do(StoreOp([part]))
        return part.answer

    async def end(self, session_id: str, epoch: int, ending: Tombstone) -> bool:
        """See `SessionStore.end`."""
        part = End(session_id, epoch, ending)
        await self._worker.do(StoreOp([part]))
        return part.answer

    async def discard(self, session_id: str, ending: Tombstone) -> bool:
        """See `SessionStore.discard`."""
        part = Discard(session_id, ending)
        await self._worker.do(StoreOp([part]))
        return part.answer

    async def overdue(self, before: float, limit: int) -> list[StoredSession]:
        """See `SessionStore.overdue`."""
        return await self._due(lambda file: reads.overdue(file, before, limit), before)

    async def expired(self, before: float, limit: int) -> list[StoredSession]:
        """See `SessionStore.expired`."""
        return await self._due(lambda file: reads.expired(file, before, limit), before)

    async def page(
        self, token: str, size: int, model: str = "", *, expired: bool = False
    ) -> tuple[list[StoredSession | UnreadableSession], str]:
        """See `SessionStore.page`; the token is the last id, and nearly any text is one."""
        return await self._call(lambda file: reads.page(file, token, size, model, expired=expired))

    async def count(self) -> Mapping[str, int]:
        """See `SessionStore.count`."""
        return await self._call(reads.count)

    async def count_expired(self) -> int:
        """See `SessionStore.count_expired`."""
        return await self._call(reads.count_expired)

    async def probe(self) -> None:
        """See `SessionStore.probe`."""
        await self._call(schema.probe, rows=1)

    def disk_usage(self) -> DiskUsage | None:
        """See `SessionStore.disk_usage`."""
        return self._worker.file.disk_usage()

    async def close(self) -> None:
        """See `SessionStore.close`."""
        await self._worker.close()

    async def _due(
        self, look: Callable[[sqlite3.Connection], reads.Due], before: float
    ) -> list[StoredSession]:
        due = await self._call(look)
        if due.postponed:
            rows = len(due.postponed)
            await self._call(lambda file: reads.postpone(file, due, before), rows=rows)
        return due.entries

    async def _call(self, ask: Callable[[sqlite3.Connection], T], *, rows: int = 0) -> T:
        """What a call of the connection returns; `rows`: how many it writes."""
        answers: list[T] = []
        await self._worker.do(StoreOp(call=lambda file: answers.append(ask(file)), rows=rows))
        return answers[0]
