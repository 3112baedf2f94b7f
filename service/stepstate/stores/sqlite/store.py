"""The `SessionStore` on a file of SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from stepstate.identity import SessionKey
from stepstate.stores.base import SessionStore
from stepstate.stores.sqlite import reads, schema
from stepstate.stores.sqlite.file import SessionFile
from stepstate.stores.sqlite.writer_thread import WriterThread
from stepstate.stores.sqlite.writes import Acquire, Create, End, Expire, Restore, SaveOne, Write
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
from stepstate.uptime import UptimeClock

T = TypeVar("T")

READ_AT_ONCE = 128
"""Sessions of a page: a millisecond or two of the thread that every write waits for."""


class SqliteStore(SessionStore):
    """Keeps sessions in a file. Several servers of one machine may share it.

    What a call has returned survives kill -9 of the process; with `fsync` a loss of power too.
    It is made by `open`; the constructor needs a file that is open.

    Args:
        file: the open file.
        unix_time: seconds since 1970; called from a thread.
    """

    durable = True

    def __init__(self, file: SessionFile, *, unix_time: Callable[[], float]) -> None:
        self._clock = file.clock
        self._thread = WriterThread(file, unix_time)

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
            unix_time: seconds since 1970; called from a thread.
            fsync: whether every commit waits for the disk.

        Raises:
            StoreOpenError: it is not a file to keep sessions in.
        """
        file = SessionFile(path, fsync=fsync, clock=UptimeClock(clock, start=unix_time()))
        await asyncio.to_thread(file.open)
        return cls(file, unix_time=unix_time)

    def now(self) -> float:
        return self._clock()

    async def heartbeat(self) -> None:
        now, since, at = self._clock.read()
        file_time = await self._thread.call(lambda file: schema.heartbeat(file, now, since), rows=1)
        self._clock.set(file_time, at)

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
    ) -> int | StoredSession | UnreadableSession | TenantFull:
        return await self._write(
            Create(record.key, record, owner, t, expires_at, snapshot, replacing, max_open_sessions)
        )

    async def acquire(
        self, key: SessionKey, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[StoredSession, bytes] | StoredSession | UnreadableSession | Tombstone | None:
        return await self._write(Acquire(key, owner, fingerprints))

    async def find(self, key: SessionKey) -> StoredSession | UnreadableSession | Tombstone | None:
        now = self._clock()
        found = await self._thread.call(lambda file: reads.look_up(file, [key], now))
        return found.of(key)

    async def save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        return await self._thread.write([SaveOne(save.key, save) for save in saves])

    async def expire(self, saves: Sequence[SaveRequest], *, delete_at: float) -> list[SaveResult]:
        writes = [Expire(save.key, save, delete_at) for save in saves]
        return await self._thread.write(writes)

    async def restore(
        self,
        key: SessionKey,
        epoch: int,
        *,
        expires_at: float,
        max_open_sessions: int | None = None,
    ) -> bool | TenantFull:
        return await self._write(Restore(key, epoch, expires_at, max_open_sessions))

    async def end(self, key: SessionKey, epoch: int, tombstone: Tombstone) -> bool:
        return await self._write(End(key, epoch, tombstone))

    async def discard(self, key: SessionKey, tombstone: Tombstone) -> bool:
        return await self._write(End(key, None, tombstone))

    async def overdue(self, before: float, limit: int) -> list[StoredSession]:
        return await self._due(lambda file: reads.overdue(file, before, limit), before)

    async def expired(self, before: float, limit: int) -> list[StoredSession]:
        return await self._due(lambda file: reads.expired(file, before, limit), before)

    async def page(
        self,
        token: str,
        size: int,
        model: str = "",
        *,
        tenant: str | None = None,
        expired: bool = False,
    ) -> tuple[list[StoredSession | UnreadableSession], str]:
        found: list[StoredSession | UnreadableSession] = []
        read = partial(reads.page, model=model, tenant=tenant, expired=expired)
        while True:  # in parts: others have the thread in between
            most = min(size - len(found), READ_AT_ONCE)
            part, token = await self._thread.call(partial(read, token=token, size=most))
            found += part
            if not token or len(found) == size:
                return found, token

    async def count(self) -> Mapping[tuple[str, str], int]:
        return await self._thread.call(reads.count)

    async def count_expired(self) -> int:
        return await self._thread.call(reads.count_expired)

    async def probe(self) -> None:
        await self._thread.call(schema.probe, rows=1)

    def disk_usage(self) -> DiskUsage | None:
        return self._thread.file.disk_usage()

    async def close(self) -> None:
        await self._thread.close()

    async def _due(
        self, read: Callable[[sqlite3.Connection], reads.Due], before: float
    ) -> list[StoredSession]:
        due = await self._thread.call(read)
        if rows := len(due.used) + len(due.unreadable):
            await self._thread.call(lambda file: reads.postpone(file, due, before), rows=rows)
        return due.sessions

    async def _write(self, one: Write[T]) -> T:
        (result,) = await self._thread.write([one])
        return result
