"""Slots of the arena: reserved in turn; the longest idle sessions are spilled to make room.

Rule 1: a slot is reserved for the length of a block, which takes it up by `Table.add` or not.
        Whatever the block raises, the reservation ends.
Rule 2: a session is spilled only when the store has all of it, and its lease is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice

from stepstate.errors import QueueFull, SessionLimit
from stepstate.sessions.context import SessionContext
from stepstate.sessions.snapshots.writer import SnapshotWriter
from stepstate.sessions.types import ResidentSession, SessionState

SPILLED_AT_ONCE = 128
"""Enough for a burst of loads, few enough that they are the longest idle."""
ROOM_SECONDS = 5.0
"""If every resident session is busy for that long, the server has too few slots."""
ROOM_PAUSE_SECONDS = 0.01


class SlotAllocator:
    """Reserves slots.

    Args:
        context: the table, and the observer of sessions that are spilled.
        writer: saves those that are spilled, if the store is durable.
    """

    def __init__(self, context: SessionContext, writer: SnapshotWriter) -> None:
        self._table = context.table
        self._observer = context.observer
        self._writer = writer
        self._durable = context.store.backend.durable
        self._spilling: asyncio.Task[int] | None = None

    async def reserve(self) -> AbstractContextManager[None]:
        """Reserves a slot for a block, spilling others if there is none.

        Raises:
            SessionLimit: the store can't take any.
            QueueFull: all resident sessions are busy.
            StoreUnavailable.
        """
        await self._wait_for_place()
        return self._reserved()

    @contextmanager
    def _reserved(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._table.withdraw()  # a session that was added has its place now

    async def _wait_for_place(self) -> None:
        table = self._table
        if not self._durable and not table.has_place:
            raise SessionLimit(table.limit)
        place = table.promise()
        if place.done():
            return
        self._spill_soon()
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled() and place.exception() is None:
                table.withdraw()  # it was promised, and nobody takes it up
            if isinstance(error, TimeoutError):
                busy = "resident sessions, all of them busy,"
                raise QueueFull(busy, table.limit, 0.5) from None
            raise

    def _spill_soon(self) -> None:
        if self._table.promises and self._spilling is None:
            self._spilling = asyncio.ensure_future(self._spill())
            self._spilling.add_done_callback(self._spilled)

    def _spilled(self, task: asyncio.Task[int]) -> None:
        self._spilling = None
        promises = self._table.promises
        error = None if task.cancelled() else task.exception()
        if error is not None:
            for place in promises:
                if not place.done():
                    place.set_exception(error)
            promises.clear()
        elif promises:
            pause = 0.0 if task.result() else ROOM_PAUSE_SECONDS
            asyncio.get_running_loop().call_later(pause, self._spill_soon)

    async def _spill(self) -> int:
        """Sends the longest idle sessions to the store; returns how many were chosen."""
        table = self._table
        count = max(1, len(table.promises), min(SPILLED_AT_ONCE, table.limit // 4))
        chosen = list(islice(filter(self._can_leave, table.longest_idle(2 * count)), count))
        for session in chosen:
            table.begin_spill(session)
        try:
            await self._writer.save(chosen, release=True)
        except BaseException:
            for session in chosen:
                table.reopen(session)
                self._writer.renew(session)
            raise
        for session in chosen:
            if session.state is SessionState.SPILLING:
                table.remove(session)
                self._observer.spilled(session.record.model, session.record.version)
        return len(chosen)

    def _can_leave(self, session: ResidentSession) -> bool:
        requested = session.key in self._table.requested
        return session.open and not (self._table.busy[session.handle] or requested)
