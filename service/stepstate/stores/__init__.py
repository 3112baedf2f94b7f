"""Stores: where sessions are kept beyond the arena."""

from stepstate.stores.base import SessionStore
from stepstate.stores.factory import open_store, read_password
from stepstate.stores.memory import MemoryStore
from stepstate.stores.sqlite import SqliteStore
from stepstate.stores.types import (
    MAX_T,
    DiskUsage,
    Durability,
    EndReason,
    MissingPolicy,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    TenantFull,
    Tombstone,
    UnreadableSession,
    to_utc,
)

__all__ = [
    "MAX_T",
    "DiskUsage",
    "Durability",
    "EndReason",
    "MemoryStore",
    "MissingPolicy",
    "SaveRequest",
    "SaveResult",
    "SessionRecord",
    "SessionStore",
    "SqliteStore",
    "StoredSession",
    "TenantFull",
    "Tombstone",
    "UnreadableSession",
    "open_store",
    "read_password",
    "to_utc",
]
