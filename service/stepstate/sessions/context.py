"""What the parts of the sessions layer share: limits, settings, admission, and the server's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from stepstate.engine import EngineSettings
from stepstate.errors import Draining, QueueFull
from stepstate.models import Catalog
from stepstate.sessions.monitored_store import MonitoredStore
from stepstate.sessions.table import Table
from stepstate.sessions.types import SessionObserver
from stepstate.stores import Durability


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds that sessions keep."""

    queued_requests: int
    queued_rows: int
    default_idle_seconds: float
    max_idle_seconds: float
    expired_grace_seconds: float
    """How long expired sessions can be restored."""
    sessions: int
    """Open sessions, resident and spilled."""
    durability: Durability
    """Of sessions that ask for none in particular."""
    durable: bool
    """Whether there is a store that outlives the server."""


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """How the steps of each model are scheduled."""

    engine: EngineSettings
    replay_rows: int
    """Most single rows whose replies a session remembers."""
    replay_bytes: int
    """Bound for the remembered long replies of all sessions of a model."""
    backlog_rows: int
    """Most rows of an async session that are applied and not saved."""


class Admission:
    """Counts accepted requests until they have their outcome, and refuses more than the limits."""

    def __init__(self, limits: Limits) -> None:
        self.draining = False
        self.queued_requests = 0
        self.queued_rows = 0
        self._max_requests = limits.queued_requests
        self._max_rows = limits.queued_rows
        self._all_settled = asyncio.Event()

    def check_open(self) -> None:
        """Refuses new work once the server drains.

        Raises:
            Draining.
        """
        if self.draining:
            raise Draining

    def accept(self, requests: int, rows: int) -> None:
        """Accepts requests; `settled` is called for each.

        Raises:
            Draining, QueueFull: nothing was accepted.
        """
        if self.draining:
            raise Draining
        if self.queued_requests >= self._max_requests:
            raise QueueFull("requests waiting on this server", self._max_requests)
        if self.queued_rows and self.queued_rows + rows > self._max_rows:
            raise QueueFull("rows waiting on this server", self._max_rows)
        self.queued_requests += requests
        self.queued_rows += rows

    def count(self, requests: int) -> None:
        """Counts requests without rows that only wait for their turn; they are never refused."""
        self.queued_requests += requests

    def settled(self, requests: int, rows: int) -> None:
        """Accepted requests have their outcome; called before it is delivered."""
        self.queued_requests -= requests
        self.queued_rows -= rows
        if self.draining and not self.queued_requests:
            self._all_settled.set()

    async def drain(self) -> None:
        """Accepts nothing more, and waits until all that was accepted has its outcome."""
        self.draining = True
        if self.queued_requests:
            await self._all_settled.wait()


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What every part of the sessions layer uses."""

    catalog: Catalog
    """The loaded models."""
    store: MonitoredStore
    """Keeps sessions beyond the arena."""
    table: Table
    """The resident sessions."""
    admission: Admission
    owner: str
    """The name under which this process, and no other, holds leases."""
    clock: Callable[[], float]
    """Monotonic seconds."""
    unix_time: Callable[[], float]
    """Unix seconds."""
    observer: SessionObserver
