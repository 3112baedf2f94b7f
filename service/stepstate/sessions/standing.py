"""Where sessions stand, wherever their state is."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from stepstate.engine import Quality
from stepstate.sessions.session import Session
from stepstate.sessions.table import Table
from stepstate.stores import Durability, Entry, SessionRecord


class SessionStatus(enum.Enum):
    """What can be done with a session."""

    OPEN = "open"
    """It takes steps."""
    MODEL_MISSING = "model_missing"
    """Its model is not loaded here, or is another one by now: it can be closed."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is told of an open session."""

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
    quality: Quality | None = None
    """Of its forecasts, where it is resident and its model tracks them."""
    status: SessionStatus = SessionStatus.OPEN


class Standings:
    """Tells where sessions stand.

    Args:
        table: the resident sessions.
        loaded: the fingerprint under which a model "name/version" is loaded here; empty: it is not.
        owner: the name under which this server holds leases.
        clock: monotonic seconds.
        wall: Unix seconds.
    """

    def __init__(
        self,
        table: Table,
        *,
        loaded: Callable[[str], str],
        owner: str,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._table = table
        self.loaded = loaded
        self._owner = owner
        self._clock = clock
        self._wall = wall

    def resident(self, session: Session) -> Standing:
        """Of a resident session; a sync step counts when it is committed."""
        handle = session.handle
        durable_t = self._table.durable_t[handle]
        return Standing(
            session.record,
            t=durable_t if session.sync else self._table.t[handle],
            durable_t=durable_t,
            seconds_left=self._table.expires_at[handle] - self._clock(),
            queued_requests=self._table.queued_requests(session),
            resident=True,
            owner=self._owner,
            epoch=session.epoch,
            quality=session.lane.engine.quality(session.slot, self._table.t[handle]),
        )

    def stored(self, entry: Entry) -> Standing:
        """Of one that is in the store."""
        kept = entry.record.durability is not Durability.NONE
        return Standing(
            entry.record,
            t=entry.t,
            durable_t=entry.t if kept else 0,
            seconds_left=entry.expires_at - self._wall(),
            queued_requests=0,
            resident=False,
            owner=entry.owner,
            epoch=entry.epoch,
            status=SessionStatus.MODEL_MISSING if self.orphaned(entry) else SessionStatus.OPEN,
        )

    def orphaned(self, entry: Entry) -> bool:
        """Whether its very model is not loaded here."""
        return self.loaded(entry.record.model_key) != entry.record.fingerprint

    def past(self, entry: Entry) -> bool:
        """Whether the time of one in the store is up."""
        return entry.expires_at <= self._wall()

    def lost(self, entry: Entry) -> bool:
        """Whether it was in the memory of another server, or of an earlier one, only."""
        kept = entry.record.durability is not Durability.NONE
        return not kept and entry.owner not in ("", self._owner)
