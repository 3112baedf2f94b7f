"""What scripts reply, as values of `base`."""

from __future__ import annotations

from stepstate.stores.base import Ending, EndReason, Entry, SessionRecord
from stepstate.stores.redis.link import Reply


def entry_of(reply: Reply) -> Entry:
    """A session, from [record, t, expiry, epoch, owner, when to delete it]."""
    record, t, expires, epoch, owner, delete = reply
    return Entry(
        SessionRecord.from_json(record),
        int(t),
        int(expires) / 1e6,
        int(epoch),
        owner.decode(),
        None if delete is None else int(delete) / 1e6,
    )


def ending_of(reply: Reply, now: float) -> Ending | None:
    """How a session ended, from [reason, t, idle timeout, when to forget it]; None: unknown."""
    reason, t, idle, forget = reply
    if reason is None or int(forget) / 1e6 <= now:
        return None
    return Ending(EndReason(reason.decode()), int(t), float(idle))


def micros(seconds: float) -> int:
    """A time as Redis has it."""
    return round(seconds * 1e6)
