"""Stores: where sessions are kept beyond the arena."""

from stepstate.stores.base import (
    DiskUsage,
    Durability,
    Ending,
    EndReason,
    Entry,
    MissingPolicy,
    Save,
    Saved,
    SessionRecord,
    SessionStore,
    Unreadable,
)
from stepstate.stores.failures import CannotOpenStore
from stepstate.stores.memory import MemoryStore
from stepstate.stores.opening import open_store
from stepstate.stores.sqlite import SqliteStore

__all__ = [
    "CannotOpenStore",
    "DiskUsage",
    "Durability",
    "EndReason",
    "Ending",
    "Entry",
    "MemoryStore",
    "MissingPolicy",
    "Save",
    "Saved",
    "SessionRecord",
    "SessionStore",
    "SqliteStore",
    "Unreadable",
    "open_store",
]
