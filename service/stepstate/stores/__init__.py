"""Stores: where sessions are remembered beyond the arena."""

from stepstate.stores.base import Ending, EndReason, SessionRecord, SessionStore
from stepstate.stores.memory import MemoryStore

__all__ = ["EndReason", "Ending", "MemoryStore", "SessionRecord", "SessionStore"]
