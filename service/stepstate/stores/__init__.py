"""Stores: where sessions are kept beyond the arena."""

from stepstate.stores.base import (
    Durability,
    Ending,
    EndReason,
    Entry,
    MissingPolicy,
    Save,
    Saved,
    SessionRecord,
    SessionStore,
)
from stepstate.stores.failures import CannotOpenStore
from stepstate.stores.memory import MemoryStore
from stepstate.stores.opening import open_store
from stepstate.stores.sqlite import SqliteStore

__all__ = [
    "CannotOpenStore",
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
    "open_store",
]
