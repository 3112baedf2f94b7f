"""What scripts reply, as values of `base`."""

from __future__ import annotations

from stepstate.stores.base import StoredSession, Tombstone, UnreadableSession
from stepstate.stores.decoding import ending_of, entry_of
from stepstate.stores.redis.connection import Reply


def read_entry(session_id: str, reply: Reply) -> StoredSession | UnreadableSession:
    """A session, from [record, t, expiry, epoch, owner, when to delete it, model]."""
    record, t, expires, epoch, owner, delete, model = reply
    return entry_of(
        session_id,
        text_of(model),
        record=record,
        t=t,
        expires=expires,
        epoch=epoch,
        owner=owner,
        delete=delete or None,
    )


def read_ending(reply: Reply, now: float) -> Tombstone | None:
    """How a session ended, from [reason, t, idle timeout, when to forget it]; None: unknown."""
    reason, t, idle, forget = reply
    if not forget.isdigit() or int(forget) / 1e6 <= now:
        return None
    return ending_of(reason, t, idle)


def text_of(reply: bytes) -> str:
    """A text that may be damaged; then it is told what it holds."""
    return reply.decode(errors="backslashreplace")


def micros(seconds: float) -> int:
    """A time as Redis has it."""
    return round(seconds * 1e6)
