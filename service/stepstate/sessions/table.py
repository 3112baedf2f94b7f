"""Every open session, by id and by handle, with its numbers in arrays.

Rule 1: t, expiry and timeout live here and nowhere else.
Rule 2: a handle is a session's place in the arrays while it is open; it is used
        again after that.

The arrays serve two readings: `t[handle]` on a memoryview gives a plain int at
once, and the NumPy array of the same memory takes a whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stepstate.sessions.session import Session

NEVER = float("inf")


class Table:
    """Open sessions, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.t_array: NDArray[np.int64] = np.zeros(limit, np.int64)
        self.expires_at_array: NDArray[np.float64] = np.full(limit, NEVER)
        self.idle_timeout_array: NDArray[np.float64] = np.zeros(limit)
        self.t: memoryview[int] = memoryview(self.t_array.data)
        self.expires_at: memoryview[float] = memoryview(self.expires_at_array.data)
        self._by_id: dict[str, Session] = {}
        self._by_handle: list[Session | None] = [None] * limit
        self._free = list(range(limit - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, session_id: str) -> Session | None:
        """The open session of this id."""
        return self._by_id.get(session_id)

    def add(self, session: Session, now: float) -> None:
        """Adds a session at t = 0; there is room, and its id is free."""
        handle = self._free.pop()
        session.handle = handle
        self.t[handle] = 0
        self.idle_timeout_array[handle] = session.record.idle_timeout_seconds
        self.expires_at[handle] = now + session.record.idle_timeout_seconds
        self._by_id[session.session_id] = session
        self._by_handle[handle] = session

    def remove(self, session: Session) -> None:
        """Takes a session out; its handle may be used again."""
        self.expires_at[session.handle] = NEVER
        self._by_handle[session.handle] = None
        self._free.append(session.handle)
        del self._by_id[session.session_id]

    def page(self, first: int) -> Iterator[Session]:
        """The open sessions from a handle on, in the order of their handles."""
        for handle in range(first, self.limit):
            session = self._by_handle[handle]
            if session is not None:
                yield session

    def overdue(self, now: float) -> list[Session]:
        """Sessions whose time is up."""
        handles = np.flatnonzero(self.expires_at_array <= now)
        found = (self._by_handle[handle] for handle in handles.tolist())
        return [session for session in found if session is not None]
