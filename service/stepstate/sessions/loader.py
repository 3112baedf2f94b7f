"""Makes sessions resident: when they are opened, and on their next step after that.

Rule 1: a session is resident here, or it is in the store only. A start, a takeover and the return
        of a spilled session are the same: `load`.
Rule 2: a session leaves the arena when it has ended, when the store has all of it, or when its
        copy here is no longer valid.
Rule 3: a slot is reserved before a lease is taken, so that no lease is taken in vain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np

from stepstate.errors import (
    SessionClosed,
    SessionLost,
    SessionUnknown,
    SessionUnreadable,
    SnapshotCorrupt,
    SnapshotModelMismatch,
    StepstateError,
)
from stepstate.identity import SessionKey, id_of, split_key
from stepstate.sessions.admission import Admission
from stepstate.sessions.context import SessionContext
from stepstate.sessions.counts import StoreSurvey
from stepstate.sessions.replay import ReplayState
from stepstate.sessions.scheduler import StepScheduler
from stepstate.sessions.slots import SlotAllocator
from stepstate.sessions.snapshots.checks import adapt
from stepstate.sessions.snapshots.format import Snapshot, decode, identity_of
from stepstate.sessions.sweeper import ExpirySweeper, expired_error
from stepstate.sessions.types import ResidentSession
from stepstate.stores import (
    Durability,
    EndReason,
    SessionRecord,
    StoredSession,
    Tombstone,
    UnreadableSession,
)


class SessionLoader:
    """Makes sessions resident.

    Args:
        context: the store and the table.
        schedulers: by model "name/version".
        slots: reserves room.
        sweeper: expires sessions whose time is up.
        survey: notes sessions that can't be read.
        admission: says whether the server drains.
    """

    def __init__(
        self,
        context: SessionContext,
        schedulers: Mapping[str, StepScheduler],
        *,
        slots: SlotAllocator,
        sweeper: ExpirySweeper,
        survey: StoreSurvey,
        admission: Admission,
    ) -> None:
        self.schedulers = schedulers
        self._catalog = context.catalog
        self.slots = slots
        self.survey = survey
        self._store = context.store
        self._table = context.table
        self._admission = admission
        self._owner = context.owner
        self._clock = context.clock
        self._observer = context.observer
        self._sweeper = sweeper

    async def make_ready(self, key: SessionKey) -> None:
        """Makes a session usable.

        Raises:
            as `load`; Draining.
        """
        while self._table.usable(key, self._clock()) is None:
            self._admission.check_open()
            await self.settle_resident(key)
            if self._table.get(key) is None:
                await self.load(key)

    async def settle_resident(self, key: SessionKey) -> None:
        """Waits until a resident session that takes no steps is gone, or takes them again."""
        session = self._table.get(key)
        if session is None:
            return
        if session.left is not None:
            await asyncio.shield(session.left)
        elif session.open:
            await self._sweeper.expire_resident([session])  # if it is overdue

    async def load(self, key: SessionKey) -> None:
        """Takes a session's lease and makes it resident.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost, SnapshotModelMismatch,
            SessionUnreadable, QueueFull, StoreUnavailable.
        """
        backend = self._store.backend
        if not backend.durable:  # only one that was restored is there and not here
            found = await backend.find(key)
            if not isinstance(found, StoredSession) or self._sweeper.is_past(found):
                raise await self.missing_reason(found, key)
        with await self.slots.reserve():
            entry, snapshot = await self._take(key)
            session = self.place(snapshot, entry.epoch, expires_at=entry.expires_at)
        session.position_unknown = entry.owner != "" and session.bounded
        record = entry.record
        taken_over = entry.owner not in ("", self._owner)
        self._observer.restored(record.model, record.version, taken_over=taken_over)

    def place(self, snapshot: Snapshot, epoch: int, *, expires_at: float) -> ResidentSession:
        """Makes a session resident in a reserved slot; `expires_at` by the store's clock."""
        record = snapshot.record
        scheduler = self.schedulers[record.model_key]
        phase = 0 if record.start_time is None else scheduler.timeline.phase(record.start_time)
        with scheduler.claimed() as slot:
            scheduler.engine.write_state(slot, snapshot.state)
            scheduler.window.write(slot, snapshot.window, tenant=snapshot.record.tenant)
            session = ResidentSession(record, scheduler, slot, phase)
            session.epoch = epoch
            session.identity = identity_of(record, self._owner)
            self._table.add(
                session,
                t=snapshot.t,
                durable_t=0 if record.durability is Durability.NONE else snapshot.t,
                now=self._clock(),
                expires_at=self._clock() + expires_at - self._store.backend.now(),
            )
        if record.durability is Durability.NONE:
            self._table.touch_at[session.handle] = self._clock() + record.idle_timeout_seconds / 2
        self.survey.loaded(session.key)
        return session

    async def _take(self, key: SessionKey) -> tuple[StoredSession, Snapshot]:
        """Takes a session's lease, and reads its snapshot."""
        models = self._catalog.of(split_key(key)[0])
        fingerprints = [one for model in models for one in model.fingerprints]
        found = await self._store.ask(
            self._store.backend.acquire(key, owner=self._owner, fingerprints=fingerprints)
        )
        if not isinstance(found, tuple):
            raise await self.missing_reason(found, key)
        entry, data = found
        if entry.owner and entry.record.durability is Durability.NONE:
            # Its lease was not given up: what is stored may be old. A lease in this process' own
            # name is no better, it may come from an acquire whose answer was lost.
            raise await self._end_as_lost(entry)
        try:
            snapshot = decode(data)
            if snapshot.record.key != key:
                raise self._unreadable(key, "it has the snapshot of another session")
            return entry, self.adapt(snapshot, snapshot.record.tenant)
        except SnapshotCorrupt as error:
            raise self._unreadable(key, error.problem) from error

    def adapt(self, snapshot: Snapshot, tenant: str) -> Snapshot:
        """A snapshot whose state has the layout of its model here, for a session of a tenant.

        Raises:
            SnapshotModelMismatch: its state means nothing to the models that the tenant may use.
            SnapshotCorrupt: it is no state.
        """
        scheduler = self.scheduler_of(snapshot.record, tenant)
        adapted = None if scheduler is None else adapt(snapshot, scheduler)
        if adapted is None:
            raise self.model_mismatch(snapshot.record, tenant)
        return adapted

    def scheduler_of(self, record: SessionRecord, tenant: str) -> StepScheduler | None:
        """Steps a session's model, if the very same is loaded here and a tenant may use it."""
        scheduler = self._loaded(record, tenant)
        if scheduler is None or record.fingerprint not in scheduler.model.fingerprints:
            return None
        return scheduler

    def _loaded(self, record: SessionRecord, tenant: str) -> StepScheduler | None:
        """Steps the model of a session's model's name and version, for a tenant that may use it."""
        if not self._catalog.access.allows(tenant, record.model):
            return None
        return self.schedulers.get(record.model_key)

    async def missing_reason(
        self, found: StoredSession | UnreadableSession | Tombstone | None, key: SessionKey
    ) -> StepstateError:
        """Why what the store has of a key is no session to step; expires it if it is overdue."""
        if found is None:
            return SessionUnknown(id_of(key))
        if isinstance(found, Tombstone):
            return error_for_ending(id_of(key), found)
        if isinstance(found, UnreadableSession):
            return self._unreadable(key, found.problem)
        if self._sweeper.is_past(found):
            return await self._sweeper.settle(found)
        return self.model_mismatch(found.record, found.record.tenant)

    def model_mismatch(self, record: SessionRecord, tenant: str) -> SnapshotModelMismatch:
        """The error for a session of another model than is loaded here for a tenant."""
        key = record.model_key
        scheduler = self._loaded(record, tenant)
        loaded = "" if scheduler is None else scheduler.model.manifest.fingerprint
        return SnapshotModelMismatch(record.session_id, key, record.fingerprint, loaded)

    def _unreadable(self, key: SessionKey, problem: str) -> SessionUnreadable:
        self.survey.met(UnreadableSession(key, problem))
        return SessionUnreadable(id_of(key), problem)

    async def _end_as_lost(self, entry: StoredSession) -> StepstateError:
        record = entry.record
        ending = Tombstone(EndReason.LOST, entry.t, record.idle_timeout_seconds)
        end = self._store.backend.end(record.key, entry.epoch, ending)
        if await self._store.ask(end):
            self._observer.closed(ending.reason.value)
        return error_for_ending(record.session_id, ending)


def blank_snapshot(record: SessionRecord, scheduler: StepScheduler, unix_time: float) -> Snapshot:
    """A new session: zero state, an empty replay window."""
    manifest = scheduler.model.manifest
    ring = np.zeros((0, manifest.input_width + manifest.output_width), np.float32)
    window = ReplayState(np.zeros(0, np.int64), ring, ())
    return Snapshot(record, 0, unix_time, scheduler.engine.blank(record.interval_level), window)


def error_for_ending(session_id: str, ending: Tombstone) -> StepstateError:
    """How a session ended, as an error."""
    if ending.reason is EndReason.EXPIRED:
        return expired_error(session_id, ending.t, ending.idle_timeout_seconds, 0.0)
    if ending.reason is EndReason.LOST:
        return SessionLost(session_id)
    return SessionClosed(session_id, ending.t)
