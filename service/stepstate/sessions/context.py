"""What the parts of the sessions layer share: limits, settings, and the server's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from stepstate.budget import MemoryAccount
from stepstate.engine import EngineSettings
from stepstate.models import Catalog
from stepstate.sessions.monitored_store import MonitoredStore
from stepstate.sessions.table import Table
from stepstate.sessions.types import SessionObserver
from stepstate.stores import Durability
from stepstate.tenants import TenantTable


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
    tenants: TenantTable = field(default_factory=TenantTable)
    """What each tenant may have."""


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """How the steps of each model are scheduled."""

    engine: EngineSettings
    replay_rows: int
    """Most single rows in the replay window of a session."""
    replay_bytes: int
    """Bound for the cached long replies of all sessions of a model."""
    replay_memory: MemoryAccount
    """They are counted there, of all models together."""
    backlog_rows: int
    """Most rows of an async session that are applied and not saved."""


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What every part of the sessions layer uses."""

    catalog: Catalog
    """The loaded models."""
    store: MonitoredStore
    """Keeps sessions beyond the arena."""
    table: Table
    """The resident sessions."""
    owner: str
    """The name under which this process, and no other, holds leases."""
    clock: Callable[[], float]
    """Monotonic seconds."""
    unix_time: Callable[[], float]
    """Unix seconds."""
    observer: SessionObserver
    tenants: TenantTable
    """Whose sessions they are."""
