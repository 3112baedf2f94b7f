"""The `SessionStore` on a file of SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

from stepstate.stores.base import Ending, Entry, Save, Saved, SessionRecord, Unreadable
from stepstate.stores.sqlite import reads
from stepstate.stores.sqlite.file import SessionFile
from stepstate.stores.sqlite.worker import Job, Worker
from stepstate.stores.sqlite.writes import Acquire, Create, Discard, End, SaveOne

T = TypeVar("T")


class SqliteStore:
    """Keeps sessions in a file. Several servers of one machine may share it.

    What a call has returned survives kill -9 of the process; with `fsync` a loss of power too.
    Use `open`; the constructor wants a file that is open.

    Args:
        file: the open file.
        clock: Unix seconds; called from a thread.
    """

    durable = True

    def __init__(self, file: SessionFile, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._worker = Worker(file, clock)

    @classmethod
    async def open(cls, path: Path, *, clock: Callable[[], float], fsync: bool = False) -> Self:
        """Opens a file, and makes it if its folder is there.

        Args:
            path: the file.
            clock: Unix seconds; called from a thread.
            fsync: whether every commit waits for the disk.

        Raises:
            CannotOpenStore: it is not a file to keep sessions in.
        """
        file = SessionFile(path, fsync=fsync)
        await asyncio.to_thread(file.open)
        return cls(file, clock=clock)

    async def create(
        self, record: SessionRecord, *, owner: str, t: int, expires_at: float, snapshot: bytes
    ) -> int | Entry | Unreadable:
        """See `SessionStore.create`."""
        part = Create(record, owner, t, expires_at, snapshot)
        await self._worker.do(Job([part]))
        return part.answer

    async def acquire(
        self, session_id: str, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[Entry, bytes] | Entry | Unreadable | Ending | None:
        """See `SessionStore.acquire`."""
        part = Acquire(session_id, owner, fingerprints)
        await self._worker.do(Job([part]))
        return part.answer

    async def find(self, session_id: str) -> Entry | Unreadable | Ending | None:
        """See `SessionStore.find`."""
        return await self._read(lambda file: reads.find(file, session_id, self._clock()))

    async def save(self, saves: Sequence[Save]) -> list[Saved]:
        """See `SessionStore.save`."""
        parts = [SaveOne(save.session_id, save) for save in saves]
        if parts:
            await self._worker.do(Job(parts))
        return [part.answer for part in parts]

    async def end(self, session_id: str, epoch: int, ending: Ending) -> bool:
        """See `SessionStore.end`."""
        part = End(session_id, epoch, ending)
        await self._worker.do(Job([part]))
        return part.answer

    async def discard(self, session_id: str, ending: Ending) -> bool:
        """See `SessionStore.discard`."""
        part = Discard(session_id, ending)
        await self._worker.do(Job([part]))
        return part.answer

    async def overdue(self, before: float, limit: int) -> list[Entry]:
        """See `SessionStore.overdue`."""
        return await self._read(lambda file: reads.overdue(file, before, limit))

    async def page(
        self, token: str, size: int, model: str = ""
    ) -> tuple[list[Entry | Unreadable], str]:
        """See `SessionStore.page`; the token is the last id, and nearly any text is one."""
        return await self._read(lambda file: reads.page(file, token, size, model))

    async def count(self) -> Mapping[str, int]:
        """See `SessionStore.count`."""
        return await self._read(reads.count)

    async def probe(self) -> None:
        """See `SessionStore.probe`."""
        await self._worker.do(Job(probe=True))

    async def close(self) -> None:
        """See `SessionStore.close`."""
        await self._worker.close()

    async def _read(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        answers: list[T] = []
        await self._worker.do(Job(read=lambda file: answers.append(ask(file))))
        return answers[0]
