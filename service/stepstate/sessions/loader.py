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
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from stepstate.errors import (
    SessionClosed,
    SessionExpired,
    SessionLost,
    SessionUnknown,
    SessionUnreadable,
    SnapshotCorrupt,
    SnapshotModelMismatch,
    StepstateError,
)
from stepstate.sessions.counts import EndObserver
from stepstate.sessions.monitored_store import MonitoredStore
from stepstate.sessions.scheduler import StepScheduler
from stepstate.sessions.slots import SlotAllocator, SpillObserver, resolve
from stepstate.sessions.snapshots.format import Snapshot, decode, identity_of
from stepstate.sessions.snapshots.writer import SnapshotWriter, WriterObserver
from stepstate.sessions.status import SessionSummaries
from stepstate.sessions.survey import Survey
from stepstate.sessions.sweeper import DeletionObserver, expired_error
from stepstate.sessions.table import Table
from stepstate.sessions.types import ResidentSession
from stepstate.stores import (
    Durability,
    EndReason,
    SessionRecord,
    StoredSession,
    Tombstone,
    UnreadableSession,
)

log = logging.getLogger(__name__)


class LoaderObserver(WriterObserver, SpillObserver, EndObserver, DeletionObserver, Protocol):
    """Is told of sessions that come and go."""

    def opened(self, model: str, version: str) -> None:
        """A session was opened."""
        ...

    def restored(self, model: str, version: str, *, taken_over: bool) -> None:
        """A session came from the store; perhaps from another server."""
        ...


class SessionLoader:
    """The resident sessions of a server.

    Args:
        link: the store.
        table: the resident sessions.
        lanes: by model "name/version".
        survey: told of sessions that can't be read.
        standings: tell what the store's entries mean.
        owner: the name under which this process, and no other, holds leases.
        clock: monotonic seconds.
        wall: Unix seconds.
        observer: told of sessions that come and go.
        awaited: whether somebody stands in a session's line.
        expired: marks a session of the store whose time is up, and gives what to tell.
    """

    def __init__(
        self,
        link: MonitoredStore,
        table: Table,
        schedulers: Mapping[str, StepScheduler],
        survey: Survey,
        standings: SessionSummaries,
        *,
        owner: str,
        clock: Callable[[], float],
        unix_time: Callable[[], float],
        observer: LoaderObserver,
        awaited: Callable[[ResidentSession], bool],
        expired: Callable[[StoredSession], Awaitable[SessionExpired]],
    ) -> None:
        self.saver = SnapshotWriter(
            link,
            table,
            owner=owner,
            clock=clock,
            unix_time=unix_time,
            observer=observer,
            forget=self.forget,
        )
        self.room = SlotAllocator(
            table,
            self.saver if link.store.durable else None,
            observer=observer,
            remove=self.remove,
            awaited=awaited,
        )
        self._link = link
        self._table = table
        self._schedulers = schedulers
        self._survey = survey
        self._standings = standings
        self._owner = owner
        self._clock = clock
        self._observer = observer
        self._expired = expired

    def place(self, snapshot: Snapshot, epoch: int, *, expires_at: float) -> ResidentSession:
        """Makes a session resident, in a place that was reserved; `expires_at` by the store."""
        record = snapshot.record
        scheduler = self._schedulers[record.model_key]
        slot = scheduler.claim()
        scheduler.engine.write_state(slot, snapshot.state)
        scheduler.window.write(slot, snapshot.window)
        phase = 0 if record.start_time is None else scheduler.timeline.phase(record.start_time)
        session = ResidentSession(record, scheduler, slot, phase)
        session.epoch = epoch
        session.identity = identity_of(record, self._owner)
        self._table.add(
            session,
            t=snapshot.t,
            durable_t=0 if record.durability is Durability.NONE else snapshot.t,
            now=self._clock(),
            expires_at=self._clock() + expires_at - self._link.store.now(),
        )
        if record.durability is Durability.NONE:
            self._table.touch(session, self._clock() + record.idle_timeout_seconds / 2)
        self.room.take_up()
        self._survey.loaded(record.session_id)
        return session

    async def load(self, session_id: str) -> ResidentSession:
        """Takes a session's lease and makes it resident.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost, SnapshotModelMismatch,
            SessionUnreadable, QueueFull, StoreUnavailable.
        """
        if not self._link.store.durable:  # only one that was restored is there and not here
            found = await self._link.store.find(session_id)
            if not isinstance(found, StoredSession) or self._standings.past(found):
                raise await self.missing_reason(found, session_id)
        await self.room.reserve()
        try:
            entry, snapshot = await self._take(session_id)
        except BaseException:
            self.room.release()
            raise
        session = self.place(snapshot, entry.epoch, expires_at=entry.expires_at)
        session.position_unknown = entry.owner != "" and session.bounded
        record = entry.record
        taken_over = entry.owner not in ("", self._owner)
        self._observer.restored(record.model, record.version, taken_over=taken_over)
        return session

    def remove(self, session: ResidentSession) -> None:
        """Takes a session without steps out of the arena."""
        self._table.remove(session)
        session.scheduler.release(session.slot)
        resolve(session.leaving)
        self.room.grant()

    def forget(self, session: ResidentSession, error: StepstateError) -> None:
        """Drops a session whose copy is worth nothing; what it still has is answered so."""
        if session.lost is not None or self._table.get(session.session_id) is not session:
            return
        session.lost = error
        self._table.bar(session)
        session.leaving = session.leaving or asyncio.get_running_loop().create_future()
        if self._table.queued_requests(session):
            self._table.when_idle(session).add_done_callback(lambda _: self._drop(session))
        else:
            self._drop(session)

    async def missing_reason(
        self, found: StoredSession | UnreadableSession | Tombstone | None, session_id: str
    ) -> StepstateError:
        """Why what the store knows of an id is no session to step; ends it if its time is past."""
        if found is None:
            return SessionUnknown(session_id)
        if isinstance(found, Tombstone):
            return told(session_id, found)
        if isinstance(found, UnreadableSession):
            self._survey.met(found)
            return SessionUnreadable(session_id, found.problem)
        if self._standings.past(found):
            return await self._expired(found)
        return self.foreign(found.record)

    def foreign(self, record: SessionRecord) -> SnapshotModelMismatch:
        """That a session is of another model than is loaded here."""
        key = record.model_key
        return SnapshotModelMismatch(record.session_id, key, record.fingerprint, self.loaded(key))

    def loaded(self, model_key: str) -> str:
        """The fingerprint under which a model is loaded here; empty: it is not."""
        scheduler = self._schedulers.get(model_key)
        return scheduler.model.manifest.fingerprint if scheduler is not None else ""

    async def _take(self, session_id: str) -> tuple[StoredSession, Snapshot]:
        fingerprints = [
            one for scheduler in self._schedulers.values() for one in scheduler.model.fingerprints
        ]
        found = await self._link.ask(
            self._link.store.acquire(session_id, owner=self._owner, fingerprints=fingerprints)
        )
        if not isinstance(found, tuple):
            raise await self.missing_reason(found, session_id)
        entry, data = found
        if entry.owner and entry.record.durability is Durability.NONE:
            # Its lease was not given up: what is stored may be old. A lease in this process' own
            # name is no better, it may come from an acquire whose answer was lost.
            raise await self._end_in_store(entry, EndReason.LOST)
        try:
            snapshot = self.adapt(decode(data))
        except SnapshotCorrupt as error:
            raise await self.missing_reason(
                UnreadableSession(session_id, error.problem), session_id
            ) from error
        if snapshot.record.session_id != session_id:
            problem = f"it has the snapshot of {snapshot.record.session_id!r}"
            raise await self.missing_reason(UnreadableSession(session_id, problem), session_id)
        return entry, snapshot

    def adapt(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot as the states of its model are here.

        Raises:
            SnapshotModelMismatch: its state means nothing to the models here.
            SnapshotCorrupt: it is no state.
        """
        record = snapshot.record
        scheduler = self._schedulers.get(record.model_key)
        if scheduler is not None and record.fingerprint in scheduler.model.fingerprints:
            adapt = scheduler.adapt(snapshot)
            if adapt is not None:
                return adapt
        raise self.foreign(record)

    async def _end_in_store(self, entry: StoredSession, reason: EndReason) -> StepstateError:
        record = entry.record
        ending = Tombstone(reason, entry.t, record.idle_timeout_seconds)
        if await self._link.ask(self._link.store.end(record.session_id, entry.epoch, ending)):
            self._observer.closed(reason.value)
        return told(record.session_id, ending)

    def _drop(self, session: ResidentSession) -> None:
        if self._table.get(session.session_id) is session:
            self.remove(session)


def told(session_id: str, ending: Tombstone) -> StepstateError:
    """How a session ended, as an error."""
    if ending.reason is EndReason.EXPIRED:
        return expired_error(session_id, ending.t, ending.idle_timeout_seconds, 0.0)
    if ending.reason is EndReason.LOST:
        return SessionLost(session_id)
    return SessionClosed(session_id, ending.t)
