"""Room in the arena: places are promised in turn, and the longest idle sessions make way.

Rule 1: a place that is promised is taken up or given back, whatever happens to who waited.
Rule 2: a session makes way only when the store has all of it, and its lease is given up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Protocol

from stepstate.errors import QueueFull, SessionLimit
from stepstate.sessions.snapshots.writer import SnapshotWriter
from stepstate.sessions.table import Table
from stepstate.sessions.types import ResidentSession

SPILLED_AT_ONCE = 128
"""Enough for a burst of loads, few enough that the longest idle are meant."""
ROOM_SECONDS = 5.0
"""If every resident session is busy for that long, the server has too few slots."""
ROOM_PAUSE_SECONDS = 0.01


class SpillObserver(Protocol):
    """Is told of sessions that make way."""

    def spilled(self, model: str, version: str) -> None:
        """A session left the arena for the store."""
        ...


class SlotAllocator:
    """Promises places in the table.

    Args:
        table: the resident sessions.
        saver: saves those that make way; None: there is no store that keeps them.
        observer: told of sessions that make way.
        remove: called with each, to take it out of the arena.
        awaited: whether somebody waits for a session, which then stays.
    """

    def __init__(
        self,
        table: Table,
        saver: SnapshotWriter | None,
        *,
        observer: SpillObserver,
        remove: Callable[[ResidentSession], None],
        awaited: Callable[[ResidentSession], bool],
    ) -> None:
        self._table = table
        self._saver = saver
        self._observer = observer
        self._remove = remove
        self._awaited = awaited
        self._reserved = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._spilling: asyncio.Task[int] | None = None

    async def reserve(self) -> None:
        """Promises a place, spilling others if there is none, until `take_up` or `release`.

        Raises:
            SessionLimit: the store can't take any.
            QueueFull: all resident sessions are busy.
            StoreUnavailable.
        """
        if not self._waiters and self._table.free > self._reserved:
            self._reserved += 1
            return
        if self._saver is None:
            raise SessionLimit(self._table.limit)
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self.grant()
        self._spill_soon()
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release()  # it was promised, and nobody takes it up
            if isinstance(error, TimeoutError):
                limit = self._table.limit
                raise QueueFull("resident sessions, all of them busy,", limit, 0.5) from None
            raise

    def release(self) -> None:
        """Takes a promised place back."""
        self._reserved -= 1
        self.grant()

    def take_up(self) -> None:
        """A promised place was taken up."""
        self._reserved -= 1

    def grant(self) -> None:
        """Promises the places that are free to those who have waited the longest."""
        while self._waiters and self._table.free > self._reserved:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._reserved += 1
                waiter.set_result(None)

    def _spill_soon(self) -> None:
        if self._waiters and self._spilling is None:
            self._spilling = asyncio.ensure_future(self._spill())
            self._spilling.add_done_callback(self._spilled)

    def _spilled(self, task: asyncio.Task[int]) -> None:
        self._spilling = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_exception(error)
            self._waiters.clear()
        elif self._waiters:
            pause = 0.0 if task.result() else ROOM_PAUSE_SECONDS
            asyncio.get_running_loop().call_later(pause, self._spill_soon)

    async def _spill(self) -> int:
        """Sends the longest idle sessions to the store; returns how many went."""
        saver = self._saver
        assert saver is not None
        count = max(1, len(self._waiters), min(SPILLED_AT_ONCE, self._table.limit // 4))
        chosen = list(islice(filter(self._can_leave, self._table.longest_idle(2 * count)), count))
        loop = asyncio.get_running_loop()
        for session in chosen:
            self._table.bar(session)
            session.leaving = loop.create_future()
        try:
            await saver.save(chosen, release=True)
        except BaseException:
            for session in chosen:
                _stay(session)
                saver.renew(session)
            raise
        for session in chosen:
            if session.lost is None:
                self._remove(session)
                self._observer.spilled(session.record.model, session.record.version)
        return len(chosen)

    def _can_leave(self, session: ResidentSession) -> bool:
        return not (self._table.busy[session.handle] or session.barred or self._awaited(session))


def _stay(session: ResidentSession) -> None:
    if session.lost is None:
        session.barred = False
        resolve(session.leaving)
        session.leaving = None


def resolve(leaving: asyncio.Future[None] | None) -> None:
    """Lets those go on who waited for a session to leave, or to stay after all."""
    if leaving is not None and not leaving.done():
        leaving.set_result(None)
