"""The interface of all stores: they keep sessions outside the arena.

Rule 1: whoever creates or acquires a session gets a higher epoch than anyone had before; `save`
        and `end` with an older epoch change nothing. So of two servers at most one can commit
        a session's steps.
Rule 2: every operation is atomic for one session, and durable when it returns.
Rule 3: a store that can't do an operation raises `StoreUnavailable`. The operation may still
        have been done; only the store can tell.
Rule 4: times are read from the store's own clock, `now`: seconds in which at least one of its
        servers was up. It stands still while no server is up and is independent of wall clocks,
        so neither an outage nor a change of a wall clock expires a session.
Rule 5: an expired session is kept, marked as expired, until it is restored, replaced or deleted.
        Until then no other operation changes it.
Rule 6: a session is named by its key, the tenant and the id: the same id of two tenants is two
        sessions, with tombstones of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from stepstate.identity import SessionKey
from stepstate.stores.types import (
    DiskUsage,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    TenantFull,
    Tombstone,
    UnreadableSession,
)

TOMBSTONE_SECONDS = 3600.0
"""How long a tombstone is kept: longer than any client goes on retrying."""
UNREADABLE_SECONDS = 3600.0
"""How long the sweep skips a session whose record can't be read."""


def next_epoch(previous: int, unix_time: float) -> int:
    """A higher epoch than the previous one, and than any earlier one that the store has lost.

    It is microseconds since 1970, or the previous epoch plus one if that is more. So a server
    that outlives its store's data can't hold an epoch that is given out again.

    Args:
        previous: of the session, or of its tombstone; 0: neither is there.
        unix_time: in seconds.
    """
    return max(previous + 1, int(unix_time * 1e6))


class SessionStore(Protocol):
    """Keeps sessions and tombstones.

    Every method raises `StoreUnavailable` when the store can't be reached or can't write.
    What is stored may be damaged: a record that can't be read is an `UnreadableSession`, a
    tombstone that can't be read counts as missing, and neither affects another session.
    """

    durable: bool
    """Whether it outlives the process."""

    def now(self) -> float:
        """The time by the store's clock, in seconds.

        Raises:
            StoreUnavailable: the store was never reached, so its clock is unknown.
        """
        ...

    async def heartbeat(self) -> None:
        """Advances the store's clock, and deletes tombstones that are too old.

        Every server calls it every `HEARTBEAT_SECONDS`. Several servers that are up together
        advance the clock once. Of the time since a server's last heartbeat at most
        `MAX_HEARTBEAT_SECONDS` count: in a longer time it was paused, or the store was away.
        """
        ...

    async def create(
        self,
        record: SessionRecord,
        *,
        owner: str,
        t: int,
        expires_at: float,
        snapshot: bytes,
        replacing: int = 0,
        max_open_sessions: int | None = None,
    ) -> int | StoredSession | UnreadableSession | TenantFull:
        """Adds a new session, and deletes the tombstone of its key.

        Args:
            record: what is fixed about it.
            owner: the server that holds its lease.
            t: rows in the snapshot.
            expires_at: by the store's clock.
            snapshot: its state.
            replacing: the epoch of an overdue or expired session of this key, which is deleted.
            max_open_sessions: how many open sessions its tenant may have; None: any number. It
                holds however many servers open sessions at once. Overdue ones are open, expired
                ones are not.

        Returns:
            Its epoch; or, with nothing changed, the session that has its key, open or expired,
            or that the tenant has no room.
        """
        ...

    async def acquire(
        self, key: SessionKey, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[StoredSession, bytes] | StoredSession | UnreadableSession | Tombstone | None:
        """Takes a session's lease, whoever held it, and raises its epoch.

        Args:
            key: its key.
            owner: the server that takes it.
            fingerprints: the models that this server has; sessions of others are not taken.

        Returns:
            The session, with the new epoch and the *previous* owner, and its snapshot; or only
            the session, unchanged, if it is of another model or overdue or expired; or its
            tombstone; or None.
        """
        ...

    async def find(self, key: SessionKey) -> StoredSession | UnreadableSession | Tombstone | None:
        """The session of a key, or its tombstone. It takes no lease."""
        ...

    async def save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        """Saves sessions together, each only if its epoch is the newest.

        Returns:
            One result for each request, in order.
        """
        ...

    async def expire(self, saves: Sequence[SaveRequest], *, delete_at: float) -> list[SaveResult]:
        """Saves sessions for the last time, and marks them as expired.

        Their epochs rise, so that their previous owners can't save them any more.

        Args:
            saves: the sessions; `expires_at` is not used.
            delete_at: how long they are kept, by the store's clock.

        Returns:
            One result for each request, in order.
        """
        ...

    async def restore(
        self,
        key: SessionKey,
        epoch: int,
        *,
        expires_at: float,
        max_open_sessions: int | None = None,
    ) -> bool | TenantFull:
        """Reopens an expired session if `epoch` is the newest, and raises the epoch.

        Args:
            key: its key.
            epoch: the one that is expected.
            expires_at: by the store's clock.
            max_open_sessions: as of `create`.

        Returns:
            Whether it was reopened; or that its tenant has no room.
        """
        ...

    async def end(self, key: SessionKey, epoch: int, tombstone: Tombstone) -> bool:
        """Replaces a session by a tombstone if `epoch` is the newest.

        Returns:
            Whether it was replaced.
        """
        ...

    async def discard(self, key: SessionKey, tombstone: Tombstone) -> bool:
        """Replaces an `UnreadableSession` by a tombstone.

        Returns:
            Whether it was replaced; False: it is not there, or can be read.
        """
        ...

    async def overdue(self, before: float, limit: int) -> list[StoredSession]:
        """Up to `limit` readable open sessions with `expires_at` before a time."""
        ...

    async def expired(self, before: float, limit: int) -> list[StoredSession]:
        """Up to `limit` readable expired sessions with `delete_at` before a time.

        They are roughly the oldest.
        """
        ...

    async def page(
        self,
        token: str,
        size: int,
        model: str = "",
        *,
        tenant: str | None = None,
        expired: bool = False,
    ) -> tuple[list[StoredSession | UnreadableSession], str]:
        """One page of a listing of sessions.

        A session that is open during the whole listing is in exactly one page. The listing of a
        tenant takes as long as its sessions do, however many others have. A token has ids of the
        listing that it is of; in another tenant's listing it is only a place in the order.

        Args:
            token: empty for the first page, then the token that the previous page returned.
            size: the maximum number of sessions.
            model: only sessions of the model of this name; empty: all.
            tenant: only its sessions; None: those of all tenants.
            expired: whether to include expired sessions.

        Returns:
            The sessions, and the token of the next page; empty: this is the last one.

        Raises:
            InvalidField: page_token is not a token of this store.
        """
        ...

    async def count(self) -> Mapping[tuple[str, str], int]:
        """Open sessions by tenant and model "name/version"; overdue ones are open."""
        ...

    async def count_expired(self) -> int:
        """How many sessions are marked as expired."""
        ...

    async def probe(self) -> None:
        """Writes something small wherever sessions are written.

        It raises for a store that can be read but not written (a replica, a full disk).
        """
        ...

    def disk_usage(self) -> DiskUsage | None:
        """What it takes of a local disk; None: it uses none. May be called from any thread."""
        ...

    async def close(self) -> None:
        """Closes files and connections; calling it again does nothing."""
        ...
