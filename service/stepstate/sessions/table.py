"""Every resident session, by id and by handle, with its numbers in arrays.

Rule 1: t, durable_t, expiry and timeout live here and nowhere else.
Rule 2: a handle is a session's place in the arrays while it is open; it is used
        again after that.
Rule 3: whoever keeps a handle beside its session keeps its generation too. Another
        generation means: look at the session anew, it is gone or takes no steps now.

The arrays serve two readings: `t[handle]` on a memoryview gives a plain int at
once, and the NumPy array of the same memory takes a whole micro-batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stepstate.sessions.types import ResidentSession
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
        self.busy_array: NDArray[np.bool_] = np.zeros(limit, np.bool_)
        """Something of the session is in the engine, or on its way to the store."""
        self.awaited_array: NDArray[np.bool_] = np.zeros(limit, np.bool_)
        """Somebody waits until it is busy no more."""
        self.deferred_array: NDArray[np.bool_] = np.zeros(limit, np.bool_)
        """Packed rows of the session have arrived, and wait until it is busy no more."""
        self.generation_array: NDArray[np.int64] = np.ones(limit, np.int64)
        self.lane_array: NDArray[np.int64] = np.zeros(limit, np.int64)
        """The number of its lane."""
        self.slot_array: NDArray[np.int64] = np.zeros(limit, np.int64)
        self.phase_array: NDArray[np.int64] = np.zeros(limit, np.int64)
        """Step of row 0 in the model's timeline."""
        self.saved_behind_array: NDArray[np.bool_] = np.zeros(limit, np.bool_)
        self._placed_at: NDArray[np.float64] = np.zeros(limit)
        self._touch_at: NDArray[np.float64] = np.full(limit, NEVER)
        self.t: memoryview[int] = memoryview(self.t_array.data)
        self.durable_t: memoryview[int] = memoryview(self.durable_t_array.data)
        self.busy: memoryview[bool] = memoryview(self.busy_array.data)
        self.deferred: memoryview[bool] = memoryview(self.deferred_array.data)
        self.awaited: memoryview[bool] = memoryview(self.awaited_array.data)
        self.expires_at: memoryview[float] = memoryview(self.expires_at_array.data)
        self._by_id: dict[str, ResidentSession] = {}
        self._by_handle: list[ResidentSession | None] = [None] * limit
        self._free = list(range(limit - 1, -1, -1))
        self._first: NDArray[np.int64] = np.zeros(limit, np.int64)

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, session_id: str) -> ResidentSession | None:
        """The open session of this id."""
        return self._by_id.get(session_id)

    @property
    def free(self) -> int:
        """Sessions for which there is room."""
        return len(self._free)

    def add(
        self, session: ResidentSession, *, t: int, durable_t: int, now: float, expires_at: float
    ) -> None:
        """Adds a session; there is room, and its id is not resident."""
        handle = self._free.pop()
        session.handle = handle
        self.t[handle] = t
        self.durable_t[handle] = durable_t
        self.idle_timeout_array[handle] = session.record.idle_timeout_seconds
        self.expires_at[handle] = expires_at
        self._placed_at[handle] = now
        self.busy[handle] = self.awaited[handle] = self.deferred[handle] = False
        self.lane_array[handle] = session.scheduler.number
        self.slot_array[handle] = session.slot
        self.phase_array[handle] = session.phase
        self.saved_behind_array[handle] = session.record.durability is Durability.ASYNC
        self._by_id[session.session_id] = session
        self._by_handle[handle] = session

    def remove(self, session: ResidentSession) -> None:
        """Takes a session out; its handle may be used again."""
        self.revoke(session)
        self.expires_at[session.handle] = NEVER
        self._touch_at[session.handle] = NEVER
        self.saved_behind_array[session.handle] = False
        self._by_handle[session.handle] = None
        self._free.append(session.handle)
        del self._by_id[session.session_id]

    def first_of(self, handles: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some handles [N] come for the first time."""
        order = np.arange(len(handles))
        self._first[handles[::-1]] = order[::-1]  # of several the last is kept
        first: NDArray[np.bool_] = self._first[handles] == order
        return first

    def at(self, handle: int) -> ResidentSession | None:
        """The session at a handle."""
        return self._by_handle[handle]

    def bar(self, session: ResidentSession) -> None:
        """Lets a session take no new steps."""
        session.barred = True
        self.revoke(session)

    def revoke(self, session: ResidentSession) -> None:
        """Makes whoever keeps the session's handle look at it anew before its next step."""
        self.generation_array[session.handle] += 1

    def queued_requests(self, session: ResidentSession) -> int:
        """Steps of a session that are accepted and not yet answered."""
        return self.busy[session.handle] + (len(session.waiting) if session.waiting else 0)

    def when_idle(self, session: ResidentSession) -> asyncio.Future[None]:
        """Resolved when a barred session has finished its steps."""
        self.awaited[session.handle] = True
        if session.idle is None or session.idle.done():
            session.idle = asyncio.get_running_loop().create_future()
        return session.idle

    def overdue(self, now: float) -> list[ResidentSession]:
        """Sessions whose time is up."""
        return self._sessions(np.flatnonzero(self.expires_at_array <= now))

    def undurable(self) -> list[ResidentSession]:
        """Sessions that are saved in the background and have rows that are not saved."""
        behind = self.saved_behind_array & (self.t_array > self.durable_t_array)
        return self._sessions(np.flatnonzero(behind))

    def undurable_rows(self) -> int:
        """Rows of such sessions that are applied and not saved."""
        lag = (self.t_array - self.durable_t_array)[self.saved_behind_array]
        return int(lag.sum())

    def touch(self, session: ResidentSession, at: float) -> None:
        """Makes `untouched` name a session from a time on."""
        self._touch_at[session.handle] = at

    def untouched(self, now: float) -> list[ResidentSession]:
        """Sessions whose time to be touched has come."""
        return self._sessions(np.flatnonzero(self._touch_at <= now))

    def longest_idle(self, count: int) -> list[ResidentSession]:
        """`count` sessions that were neither stepped nor loaded for the longest time, in order."""
        used_at = np.maximum(self.expires_at_array - self.idle_timeout_array, self._placed_at)
        count = min(count, len(self))
        if not count:
            return []
        handles = np.argpartition(used_at, count - 1)[:count]
        return self._sessions(handles[np.argsort(used_at[handles])])

    def __iter__(self) -> Iterator[ResidentSession]:
        return iter(list(self._by_id.values()))

    def _sessions(self, handles: NDArray[np.int64]) -> list[ResidentSession]:
        found = (self._by_handle[handle] for handle in handles.tolist())
        return [session for session in found if session is not None]
