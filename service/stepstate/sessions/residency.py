"""Which sessions are in the arena: loads them on their next step, spills the longest idle.

Rule 1: a session is resident here, or it is in the store only. A start, a takeover
        and a return from the spill are one and the same: `load`.
Rule 2: a session leaves the arena when it has ended, when the store has all of it,
        or when its copy here is worth nothing any more.
Rule 3: room is reserved before a lease is taken, so that nothing is taken in vain.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Protocol

from stepstate.errors import (
    QueueFull,
    SessionClosed,
    SessionExpired,
    SessionLimit,
    SessionLost,
    SessionUnknown,
    SnapshotForeign,
    StepstateError,
    StoreUnavailable,
)
from stepstate.sessions.lane import Lane
from stepstate.sessions.link import StoreLink
from stepstate.sessions.saver import Saver, SaverObserver
from stepstate.sessions.session import Session
from stepstate.sessions.snapshot import Snapshot, decode, identity_of
from stepstate.sessions.standing import Standings
from stepstate.sessions.table import Table
from stepstate.stores import Durability, Ending, EndReason, Entry

log = logging.getLogger(__name__)

SPILLED_AT_ONCE = 128
"""Enough for a burst of loads, few enough that the longest idle are meant."""
ROOM_SECONDS = 5.0
"""If every resident session is busy for that long, the server has too few slots."""
ROOM_PAUSE_SECONDS = 0.01
WANTED_SECONDS = 1.0
"""A session that was just loaded stays at least until whoever wanted it has come."""


class ResidencyObserver(SaverObserver, Protocol):
    """Is told of sessions that come and go."""

    def opened(self, model: str, version: str) -> None:
        """A session was opened."""
        ...

    def closed(self, reason: str) -> None:
        """A session ended."""
        ...

    def restored(self, model: str, version: str, *, taken_over: bool) -> None:
        """A session came from the store; perhaps from another server."""
        ...

    def spilled(self, model: str, version: str) -> None:
        """A session left the arena for the store."""
        ...


class Residency:
    """The resident sessions of a server.

    Args:
        link: the store.
        table: the resident sessions.
        lanes: by model "name/version".
        standings: tell what the store's entries mean.
        owner: the name under which this process, and no other, holds leases.
        clock: monotonic seconds.
        wall: Unix seconds.
        observer: told of sessions that come and go.
    """

    def __init__(
        self,
        link: StoreLink,
        table: Table,
        lanes: Mapping[str, Lane],
        standings: Standings,
        *,
        owner: str,
        clock: Callable[[], float],
        wall: Callable[[], float],
        observer: ResidencyObserver,
    ) -> None:
        self.saver = Saver(
            link,
            table,
            owner=owner,
            clock=clock,
            wall=wall,
            observer=observer,
            forget=self.forget,
        )
        self._reserved = 0  # places in the table that are promised
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._link = link
        self._table = table
        self._lanes = lanes
        self._standings = standings
        self._owner = owner
        self._clock = clock
        self._wall = wall
        self._observer = observer
        self._spilling: asyncio.Task[int] | None = None

    async def reserve(self) -> None:
        """Promises a place in the table, spilling others if there is none; `place` takes it up.

        Raises:
            SessionLimit: the store can't take any.
            QueueFull: all resident sessions are busy.
            StoreUnavailable.
        """
        if not self._waiters and self._table.free > self._reserved:
            self._reserved += 1
            return
        if not self._link.store.durable:
            raise SessionLimit(self._table.limit)
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._make_room()
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
        self._grant()

    def place(self, snapshot: Snapshot, epoch: int, *, expires_at: float) -> Session:
        """Makes a session resident, in a place that was reserved; `expires_at` is Unix time."""
        record = snapshot.record
        lane = self._lanes[record.model_key]
        slot = lane.claim()
        lane.engine.write_state(slot, snapshot.state)
        lane.window.write(slot, snapshot.window)
        phase = 0 if record.start_time is None else lane.timeline.phase(record.start_time)
        session = Session(record, lane, slot, phase)
        session.epoch = epoch
        session.placed_at = self._clock()
        session.identity = identity_of(record, self._owner)
        self._table.add(
            session,
            t=snapshot.t,
            durable_t=0 if record.durability is Durability.NONE else snapshot.t,
            now=self._clock(),
            expires_at=self._clock() + expires_at - self._wall(),
        )
        if record.durability is Durability.NONE:
            self._table.touch(session, self._clock() + record.idle_timeout_seconds / 2)
        self._reserved -= 1
        return session

    async def load(self, session_id: str) -> Session:
        """Takes a session's lease and makes it resident.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost, SnapshotForeign,
            SnapshotCorrupt, QueueFull, StoreUnavailable.
        """
        if not self._link.store.durable:  # what is not here already is not there either
            raise await self.untaken(await self._link.store.find(session_id), session_id)
        await self.reserve()
        try:
            entry, snapshot = await self._take(session_id)
        except BaseException:
            self.release()
            raise
        session = self.place(snapshot, entry.epoch, expires_at=entry.expires_at)
        left_behind = entry.owner not in ("", self._owner)
        session.wanted = True
        session.unplaced = left_behind and session.bounded
        record = entry.record
        self._observer.restored(record.model, record.version, taken_over=left_behind)
        return session

    def remove(self, session: Session) -> None:
        """Takes a session without steps out of the arena."""
        self._table.remove(session)
        session.lane.release(session.slot)
        _resolve(session.leaving)
        self._grant()

    def forget(self, session: Session, error: StepstateError) -> None:
        """Drops a session whose copy is worth nothing; what it still has is answered so."""
        if session.lost is not None or self._table.get(session.session_id) is not session:
            return
        session.lost = error
        session.barred = True
        session.leaving = session.leaving or asyncio.get_running_loop().create_future()
        if session.queued_requests:
            when_idle(session).add_done_callback(lambda _: self._drop(session))
        else:
            self._drop(session)

    async def untaken(self, found: Entry | Ending | None, session_id: str) -> StepstateError:
        """Why what the store knows of an id is no session to step; ends it if its time is past."""
        if found is None:
            return SessionUnknown(session_id)
        if isinstance(found, Ending):
            return told(session_id, found)
        record = found.record
        if self._standings.past(found):
            return await self._end_in_store(found, EndReason.EXPIRED)
        return SnapshotForeign(
            session_id, record.model_key, record.fingerprint, self.loaded(record.model_key)
        )

    def loaded(self, model_key: str) -> str:
        """The fingerprint under which a model is loaded here; empty: it is not."""
        lane = self._lanes.get(model_key)
        return lane.model.manifest.fingerprint if lane is not None else ""

    async def _take(self, session_id: str) -> tuple[Entry, Snapshot]:
        fingerprints = [lane.model.manifest.fingerprint for lane in self._lanes.values()]
        found = await self._link.ask(
            self._link.store.acquire(session_id, owner=self._owner, fingerprints=fingerprints)
        )
        if not isinstance(found, tuple):
            raise await self.untaken(found, session_id)
        entry, data = found
        if self._standings.lost(entry):
            raise await self._end_in_store(entry, EndReason.LOST)
        snapshot = decode(data)
        self.check_fit(snapshot)
        return entry, snapshot

    def check_fit(self, snapshot: Snapshot) -> None:
        """Refuses a snapshot whose state means nothing to the models here.

        Raises:
            SnapshotForeign.
        """
        record = snapshot.record
        loaded = self.loaded(record.model_key)
        if loaded == record.fingerprint:
            lane = self._lanes[record.model_key]
            if (len(snapshot.state), snapshot.window.ring.shape[1]) == lane.widths:
                return
        raise SnapshotForeign(record.session_id, record.model_key, record.fingerprint, loaded)

    async def _end_in_store(self, entry: Entry, reason: EndReason) -> StepstateError:
        record = entry.record
        ending = Ending(reason, entry.t, record.idle_timeout_seconds)
        if await self._link.ask(self._link.store.end(record.session_id, entry.epoch, ending)):
            self._observer.closed(reason.value)
        return told(record.session_id, ending)

    def _drop(self, session: Session) -> None:
        if self._table.get(session.session_id) is session:
            self.remove(session)

    def _grant(self) -> None:
        """Promises the places that are free to those who have waited the longest."""
        while self._waiters and self._table.free > self._reserved:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._reserved += 1
                waiter.set_result(None)

    def _make_room(self) -> None:
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
            asyncio.get_running_loop().call_later(pause, self._make_room)

    async def _spill(self) -> int:
        """Sends the longest idle sessions to the store; returns how many went."""
        count = max(1, len(self._waiters), min(SPILLED_AT_ONCE, self._table.limit // 4))
        chosen = list(islice(filter(self._can_leave, self._table.longest_idle(2 * count)), count))
        loop = asyncio.get_running_loop()
        for session in chosen:
            session.barred = True
            session.leaving = loop.create_future()
        try:
            await self.saver.save(chosen, release=True)
        except StoreUnavailable:
            for session in chosen:
                _stay(session)
            raise
        for session in chosen:
            if session.lost is None:
                self.remove(session)
                self._observer.spilled(session.record.model, session.record.version)
        return len(chosen)

    def _can_leave(self, session: Session) -> bool:
        fresh = session.wanted and self._clock() < session.placed_at + WANTED_SECONDS
        return session.current is None and not session.barred and not fresh


def told(session_id: str, ending: Ending) -> StepstateError:
    """How a session ended, as an error."""
    if ending.reason is EndReason.EXPIRED:
        return SessionExpired(session_id, ending.t, ending.idle_timeout_seconds)
    if ending.reason is EndReason.LOST:
        return SessionLost(session_id)
    return SessionClosed(session_id, ending.t)


def when_idle(session: Session) -> asyncio.Future[None]:
    """Resolved when a barred session has finished its steps."""
    if session.idle is None or session.idle.done():
        session.idle = asyncio.get_running_loop().create_future()
    return session.idle


def _stay(session: Session) -> None:
    if session.lost is None:
        session.barred = False
        _resolve(session.leaving)
        session.leaving = None


def _resolve(leaving: asyncio.Future[None] | None) -> None:
    if leaving is not None and not leaving.done():
        leaving.set_result(None)
