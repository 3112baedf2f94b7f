"""Every resident session, by id and by handle, with its numbers in arrays.

Rule 1: t, durable_t, expiry and timeout live here and nowhere else.
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
from stepstate.stores import Durability

NEVER = float("inf")


class Table:
    """Resident sessions, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.t_array: NDArray[np.int64] = np.zeros(limit, np.int64)
        self.expires_at_array: NDArray[np.float64] = np.full(limit, NEVER)
        self.idle_timeout_array: NDArray[np.float64] = np.zeros(limit)
        self.durable_t_array: NDArray[np.int64] = np.zeros(limit, np.int64)
        self._saved_behind: NDArray[np.bool_] = np.zeros(limit, np.bool_)
        self._placed_at: NDArray[np.float64] = np.zeros(limit)
        self._touch_at: NDArray[np.float64] = np.full(limit, NEVER)
        self.t: memoryview[int] = memoryview(self.t_array.data)
        self.durable_t: memoryview[int] = memoryview(self.durable_t_array.data)
        self.expires_at: memoryview[float] = memoryview(self.expires_at_array.data)
        self._by_id: dict[str, Session] = {}
        self._by_handle: list[Session | None] = [None] * limit
        self._free = list(range(limit - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, session_id: str) -> Session | None:
        """The open session of this id."""
        return self._by_id.get(session_id)

    @property
    def free(self) -> int:
        """Sessions for which there is room."""
        return len(self._free)

    def add(
        self, session: Session, *, t: int, durable_t: int, now: float, expires_at: float
    ) -> None:
        """Adds a session; there is room, and its id is not resident."""
        handle = self._free.pop()
        session.handle = handle
        self.t[handle] = t
        self.durable_t[handle] = durable_t
        self.idle_timeout_array[handle] = session.record.idle_timeout_seconds
        self.expires_at[handle] = expires_at
        self._placed_at[handle] = now
        self._saved_behind[handle] = session.record.durability is Durability.ASYNC
        self._by_id[session.session_id] = session
        self._by_handle[handle] = session

    def remove(self, session: Session) -> None:
        """Takes a session out; its handle may be used again."""
        self.expires_at[session.handle] = NEVER
        self._touch_at[session.handle] = NEVER
        self._saved_behind[session.handle] = False
        self._by_handle[session.handle] = None
        self._free.append(session.handle)
        del self._by_id[session.session_id]

    def overdue(self, now: float) -> list[Session]:
        """Sessions whose time is up."""
        return self._sessions(np.flatnonzero(self.expires_at_array <= now))

    def undurable(self) -> list[Session]:
        """Sessions that are saved in the background and have rows that are not saved."""
        behind = self._saved_behind & (self.t_array > self.durable_t_array)
        return self._sessions(np.flatnonzero(behind))

    def undurable_rows(self) -> int:
        """Rows of such sessions that are applied and not saved."""
        lag = (self.t_array - self.durable_t_array)[self._saved_behind]
        return int(lag.sum())

    def touch(self, session: Session, at: float) -> None:
        """Makes `untouched` name a session from a time on."""
        self._touch_at[session.handle] = at

    def untouched(self, now: float) -> list[Session]:
        """Sessions whose time to be touched has come."""
        return self._sessions(np.flatnonzero(self._touch_at <= now))

    def longest_idle(self, count: int) -> list[Session]:
        """`count` sessions that were neither stepped nor loaded for the longest time, in order."""
        used_at = np.maximum(self.expires_at_array - self.idle_timeout_array, self._placed_at)
        count = min(count, len(self))
        if not count:
            return []
        handles = np.argpartition(used_at, count - 1)[:count]
        return self._sessions(handles[np.argsort(used_at[handles])])

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_id.values()))

    def _sessions(self, handles: NDArray[np.int64]) -> list[Session]:
        found = (self._by_handle[handle] for handle in handles.tolist())
        return [session for session in found if session is not None]
