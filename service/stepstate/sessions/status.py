"""The status of sessions, wherever their state is."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from stepstate.engine import ForecastQuality
from stepstate.sessions.context import SessionContext
from stepstate.sessions.types import ResidentSession
from stepstate.stores import Durability, SessionRecord, StoredSession


class SessionStatus(enum.Enum):
    """What can be done with a session."""

    OPEN = "open"
    """It takes steps."""
    EXPIRED = "expired"
    """It was idle for too long, and is kept for a while: it can be restored."""
    MODEL_MISSING = "model_missing"
    """Its model is not loaded here, or is another one by now: it can be closed."""


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """The status of one session."""

    record: SessionRecord
    t: int
    durable_t: int
    seconds_left: float
    """Until it expires if no step comes."""
    queued_requests: int
    resident: bool
    owner: str
    """The server that holds its lease; empty: none."""
    epoch: int
    delete_seconds: float | None = None
    """Until it is deleted, if it is marked as expired."""
    quality: ForecastQuality | None = None
    """Of its forecasts, where it is resident and its model tracks them."""
    status: SessionStatus = SessionStatus.OPEN


class SessionSummaries:
    """Makes summaries of sessions, resident and stored."""

    def __init__(self, context: SessionContext) -> None:
        self._table = context.table
        self._owner = context.owner
        self._clock = context.clock
        self._now = context.store.backend.now
        self._catalog = context.catalog
        self._fingerprints = {model.key: model.fingerprints for model in context.catalog}

    def resident(self, session: ResidentSession) -> SessionSummary:
        """Of a resident session; a step of a sync session counts when it is saved."""
        handle = session.handle
        durable_t = self._table.durable_t[handle]
        return SessionSummary(
            session.record,
            t=durable_t if session.sync else self._table.t[handle],
            durable_t=durable_t,
            seconds_left=self._table.expires_at[handle] - self._clock(),
            queued_requests=self._table.queued_requests(session),
            resident=True,
            owner=self._owner,
            epoch=session.epoch,
            quality=session.scheduler.engine.quality(session.slot, self._table.t[handle]),
        )

    def stored(self, entry: StoredSession) -> SessionSummary:
        """Of a session in the store."""
        kept = entry.record.durability is not Durability.NONE
        now, delete_at = self._now(), entry.delete_at
        return SessionSummary(
            entry.record,
            t=entry.t,
            durable_t=entry.t if kept else 0,
            seconds_left=entry.expires_at - now,
            queued_requests=0,
            resident=False,
            owner=entry.owner,
            epoch=entry.epoch,
            delete_seconds=None if delete_at is None else delete_at - now,
            status=self._status_of(entry),
        )

    def _status_of(self, entry: StoredSession) -> SessionStatus:
        if entry.delete_at is not None:
            return SessionStatus.EXPIRED
        return SessionStatus.MODEL_MISSING if self.orphaned(entry) else SessionStatus.OPEN

    def orphaned(self, entry: StoredSession) -> bool:
        """Whether its model is not loaded here for its tenant, or is another one by now."""
        record = entry.record
        if not self._catalog.access.allows(record.tenant, record.model):
            return True
        return record.fingerprint not in self._fingerprints.get(record.model_key, ())

    def lost(self, entry: StoredSession) -> bool:
        """Whether only the memory of another server, or of an earlier one, had it."""
        kept = entry.record.durability is not Durability.NONE
        return not kept and entry.owner not in ("", self._owner)
