"""Every resident session, by key and by handle, with its numbers in arrays.

Rule 1: t, durable_t, expiry and timeout live here and nowhere else.
Rule 2: a handle is a session's place in the arrays while it is resident; then it is reused.
Rule 3: whoever keeps a handle keeps its generation too. Another generation means that the session
        is gone or takes no steps now: look it up again.
Rule 4: every transition of a session's state is made here.
Rule 5: a place is promised before a session is loaded, and the promise is withdrawn when the
        session has it, or won't come.

The arrays are read in two ways: `t[handle]` on a memoryview is a plain int at once, and the NumPy
array on the same memory takes a whole micro-batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stepstate.errors import StepstateError
from stepstate.identity import SessionKey
from stepstate.sessions.types import (
    OPEN,
    TRANSITIONS,
    ResidentSession,
    RowBatch,
    SessionRef,
    SessionState,
)
from stepstate.stores import Durability

log = logging.getLogger(__name__)

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
        """A step of the session is in the engine, or on its way to the store."""
        self.awaited_array: NDArray[np.bool_] = np.zeros(limit, np.bool_)
        """Something waits until it is no longer busy."""
        self.deferred_array: NDArray[np.bool_] = np.zeros(limit, np.bool_)
        """Packed rows of the session wait until it is no longer busy."""
        self.generation_array: NDArray[np.int64] = np.ones(limit, np.int64)
        self.scheduler_array: NDArray[np.int64] = np.zeros(limit, np.int64)
        """The number of its scheduler."""
        self.slot_array: NDArray[np.int64] = np.zeros(limit, np.int64)
        self.phase_array: NDArray[np.int64] = np.zeros(limit, np.int64)
        """Step of row 0 in the model's timeline."""
        self.saved_behind_array: NDArray[np.bool_] = np.zeros(limit, np.bool_)
        """It is saved in the background."""
        self._placed_at: NDArray[np.float64] = np.zeros(limit)
        self.touch_at: NDArray[np.float64] = np.full(limit, NEVER)
        """When `untouched` returns a session, to be saved for its expiry."""
        self.t: memoryview[int] = memoryview(self.t_array.data)
        self.durable_t: memoryview[int] = memoryview(self.durable_t_array.data)
        self.busy: memoryview[bool] = memoryview(self.busy_array.data)
        self.deferred: memoryview[bool] = memoryview(self.deferred_array.data)
        self.awaited: memoryview[bool] = memoryview(self.awaited_array.data)
        self.expires_at: memoryview[float] = memoryview(self.expires_at_array.data)
        self.generation: memoryview[int] = memoryview(self.generation_array.data)
        self.saved_behind: memoryview[bool] = memoryview(self.saved_behind_array.data)
        self.requested: set[SessionKey] = set()
        """Keys of sessions, resident or not, that somebody waits for."""
        self.promised = 0
        self.promises: deque[asyncio.Future[None]] = deque()
        """Promises that wait for a free place."""
        self.by_key: dict[SessionKey, ResidentSession] = {}
        """Read-only: the hot path saves the call of `get`."""
        self._by_handle: list[ResidentSession | None] = [None] * limit
        self._free = list(range(limit - 1, -1, -1))
        self._first: NDArray[np.int64] = np.zeros(limit, np.int64)

    def __len__(self) -> int:
        return len(self.by_key)

    def __iter__(self) -> Iterator[ResidentSession]:
        return iter(list(self.by_key.values()))

    def get(self, key: SessionKey) -> ResidentSession | None:
        """The resident session of this key, in whatever state."""
        return self.by_key.get(key)

    def at(self, handle: int) -> ResidentSession | None:
        """The session at a handle."""
        return self._by_handle[handle]

    def usable(self, key: SessionKey, now: float) -> ResidentSession | None:
        """The resident session of this key if it takes steps now."""
        session = self.by_key.get(key)
        if session is None or session.state is not OPEN or self.is_overdue(session, now):
            return None
        return session

    def is_overdue(self, session: ResidentSession, now: float) -> bool:
        """Whether a session was idle for too long."""
        return self.expires_at[session.handle] <= now and not self.busy[session.handle]

    # Places

    @property
    def free(self) -> int:
        """Places without a session."""
        return len(self._free)

    def leaked(self, claimed: int) -> int:
        """How many places, and of `claimed` slots of the engines, are neither free nor a session's.

        Anything but 0 is a fault.
        """
        return abs(self.limit - self.free - len(self)) + abs(claimed - len(self))

    @property
    def has_place(self) -> bool:
        """Whether `promise` gives a place at once."""
        return not self.promises and self.free > self.promised

    def promise(self) -> asyncio.Future[None]:
        """Promises a place; resolved when there is one, in the order of the calls."""
        place = asyncio.get_running_loop().create_future()
        self.promises.append(place)
        self._grant()
        return place

    def withdraw(self) -> None:
        """Takes a promise back: its session has the place by now, or does not come."""
        self.promised -= 1
        self._grant()

    def _grant(self) -> None:
        while self.promises and self.free > self.promised:
            place = self.promises.popleft()
            if not place.done():
                self.promised += 1
                place.set_result(None)

    def add(
        self, session: ResidentSession, *, t: int, durable_t: int, now: float, expires_at: float
    ) -> None:
        """Adds a session whose key is not resident; there is a place."""
        session.handle = handle = self._free[-1]
        self.t[handle] = t
        self.durable_t[handle] = durable_t
        self.idle_timeout_array[handle] = session.record.idle_timeout_seconds
        self.expires_at[handle] = expires_at
        self._placed_at[handle] = now
        self.busy[handle] = self.awaited[handle] = self.deferred[handle] = False
        self.scheduler_array[handle] = session.scheduler.number
        self.slot_array[handle] = session.slot
        self.phase_array[handle] = session.phase
        self.saved_behind_array[handle] = session.record.durability is Durability.ASYNC
        self.by_key[session.key] = session
        self._by_handle[handle] = session
        self._free.pop()  # last: what raises before takes nothing

    # The life of a session

    def begin_end(self, session: ResidentSession) -> None:
        """A session is being closed, or expires: it takes no more steps."""
        if session.state is OPEN:
            self._change(session, SessionState.ENDING)

    def begin_spill(self, session: ResidentSession) -> None:
        """A session is being saved to make room: it takes no more steps."""
        self._change(session, SessionState.SPILLING)
        session.left = asyncio.get_running_loop().create_future()

    def reopen(self, session: ResidentSession) -> None:
        """A session that was to end or to spill stays, unless it was lost meanwhile."""
        if session.state in {SessionState.ENDING, SessionState.SPILLING}:
            self._change(session, OPEN)
            _resolve(session)
            session.left = None

    def lose(self, session: ResidentSession, error: StepstateError) -> None:
        """Removes a session whose copy here is not valid, when its steps are answered so."""
        if session.state in {SessionState.LOST, SessionState.GONE}:
            return
        self._change(session, SessionState.LOST)
        extra = {"tenant": session.record.tenant, "session_id": session.session_id}
        log.info("a session is gone from memory: %s", error, extra=extra | {"reason": error.reason})
        session.lost = error
        session.left = session.left or asyncio.get_running_loop().create_future()
        if self.queued_requests(session):
            self.when_idle(session).add_done_callback(lambda _: self.remove(session))
        else:
            self.remove(session)

    def remove(self, session: ResidentSession) -> None:
        """Takes a session without steps out, if it is in; its handle and its slot are free."""
        if session.state is SessionState.GONE:
            return
        self._change(session, SessionState.GONE)
        self.expires_at[session.handle] = NEVER
        self.touch_at[session.handle] = NEVER
        self.saved_behind_array[session.handle] = False
        self._by_handle[session.handle] = None
        self._free.append(session.handle)
        del self.by_key[session.key]
        session.scheduler.release(session.slot)
        _resolve(session)
        self._grant()

    def _change(self, session: ResidentSession, state: SessionState) -> None:
        if state not in TRANSITIONS[session.state]:
            raise RuntimeError(f"a session that is {session.state.value} can't be {state.value}")
        session.state = state
        self.revoke(session)

    def revoke(self, session: ResidentSession) -> None:
        """Makes every `SessionRef` to the session invalid."""
        self.generation_array[session.handle] += 1

    # References and packed rows

    def ref_of(self, session: ResidentSession) -> SessionRef | None:
        """A reference for the fast path; None: the session's rows can't take it for now."""
        if (
            session.sync
            or session.state is not OPEN
            or session.position_unknown
            or session.lease_in_doubt
        ):
            return None
        return SessionRef(session.handle, int(self.generation_array[session.handle]))

    def valid_refs(
        self, handles: NDArray[np.int64], generations: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which references [N] are valid."""
        valid: NDArray[np.bool_] = self.generation_array[handles] == generations
        return valid

    def first_valid(self, rows: RowBatch) -> ResidentSession | None:
        """The session of the first row whose reference is valid."""
        valid = self.valid_refs(rows.handles, rows.generations)
        first = int(valid.argmax())
        return self._by_handle[int(rows.handles[first])] if valid[first] else None

    def fast_path_mask(
        self, rows: RowBatch, *, scheduler: int, now: float, backlog_rows: int
    ) -> NDArray[np.bool_]:
        """Which rows [N] can go to the engine as they are; of one session only the first may.

        The session is open, idle and of the scheduler's model, t fits, and nothing is missing.
        Every other row becomes a `Step`: it loads, replays, refuses, and commits sync sessions.
        """
        handles = rows.handles
        at = self.t_array[handles]
        mask = self.valid_refs(handles, rows.generations)
        mask &= self.scheduler_array[handles] == scheduler
        mask &= ~self.busy_array[handles]
        mask &= self.expires_at_array[handles] > now
        behind = at - self.durable_t_array[handles]
        mask &= (behind < backlog_rows) | ~self.saved_behind_array[handles]
        if rows.t is not None:
            mask &= rows.t == at
        mask &= np.isfinite(rows.x).all(axis=1)
        order = np.arange(len(handles))
        self._first[handles[::-1]] = order[::-1]  # of several writes to a place the last is kept
        mask &= self._first[handles] == order
        return mask

    # Steps, expiry and saves

    def queued_requests(self, session: ResidentSession) -> int:
        """Steps of a session that are accepted and not yet answered."""
        return self.busy[session.handle] + (len(session.waiting) if session.waiting else 0)

    def when_idle(self, session: ResidentSession) -> asyncio.Future[None]:
        """Resolved when a session that takes no more steps has finished those it has."""
        self.awaited[session.handle] = True
        if session.idle is None or session.idle.done():
            session.idle = asyncio.get_running_loop().create_future()
        return session.idle

    def overdue(self, now: float) -> list[ResidentSession]:
        """Sessions that may have been idle for too long."""
        return self._sessions(np.flatnonzero(self.expires_at_array <= now))

    def undurable(self) -> list[ResidentSession]:
        """Sessions that are saved in the background and have rows that are not saved."""
        behind = self.saved_behind_array & (self.t_array > self.durable_t_array)
        return self._sessions(np.flatnonzero(behind))

    def undurable_rows(self) -> int:
        """Rows of such sessions that are applied and not saved."""
        lag = (self.t_array - self.durable_t_array)[self.saved_behind_array]
        return int(lag.sum())

    def untouched(self, now: float) -> list[ResidentSession]:
        """Sessions that are due to be saved for their expiry."""
        return self._sessions(np.flatnonzero(self.touch_at <= now))

    def longest_idle(self, count: int) -> list[ResidentSession]:
        """`count` sessions that were neither stepped nor loaded for the longest time, in order."""
        used_at = np.maximum(self.expires_at_array - self.idle_timeout_array, self._placed_at)
        count = min(count, len(self))
        if not count:
            return []
        handles = np.argpartition(used_at, count - 1)[:count]
        return self._sessions(handles[np.argsort(used_at[handles])])

    def _sessions(self, handles: NDArray[np.int64]) -> list[ResidentSession]:
        found = (self._by_handle[handle] for handle in handles.tolist())
        return [session for session in found if session is not None]


def _resolve(session: ResidentSession) -> None:
    if session.left is not None and not session.left.done():
        session.left.set_result(None)
