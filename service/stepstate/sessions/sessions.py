"""The session table as the front doors see it: open, find, step, close, expire, drain.

Rule 1: an id is free, open, or ending, and only `open` and `_end` change that.
Rule 2: a session that is gone is an error that says why; nothing restarts one silently.
Rule 3: every accepted step is counted until it is settled, so a drain knows when it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn, Protocol

from stepstate.errors import (
    Draining,
    QueueFull,
    SessionClosed,
    SessionExists,
    SessionExpired,
    SessionLimit,
    SessionUnknown,
    StepstateError,
)
from stepstate.models import Catalog
from stepstate.sessions.lane import Lane
from stepstate.sessions.opening import Limits, Opening, check_id, make_record
from stepstate.sessions.session import ReplyTo, Session, Step
from stepstate.sessions.table import Table
from stepstate.stores import Ending, EndReason, SessionRecord, SessionStore

_SWEEP_AT_ONCE = 500  # about a millisecond of work between two turns of the loop


class SessionObserver(Protocol):
    """Is told of sessions that come and go."""

    def opened(self, model: str, version: str) -> None:
        """A session was opened."""
        ...

    def closed(self, reason: str) -> None:
        """A session ended."""
        ...


class Sessions:
    """All sessions of a server.

    Args:
        catalog: the loaded models.
        table: shared with the lanes.
        store: remembers sessions beyond the arena.
        limits: the bounds.
        clock: monotonic seconds.
        observer: told of sessions that come and go.
    """

    def __init__(
        self,
        catalog: Catalog,
        table: Table,
        store: SessionStore,
        *,
        limits: Limits,
        clock: Callable[[], float],
        observer: SessionObserver,
    ) -> None:
        self.catalog = catalog
        self.lanes: dict[str, Lane] = {}
        self._table = table
        self._store = store
        self._limits = limits
        self._clock = clock
        self._observer = observer
        self._draining = False
        self._queued_requests = 0
        self._queued_rows = 0
        self._opening: set[str] = set()
        self._settled_all = asyncio.Event()
        self._closings: set[asyncio.Future[int]] = set()

    def __len__(self) -> int:
        return len(self._table)

    @property
    def queued_rows(self) -> int:
        """Rows accepted and not yet answered."""
        return self._queued_rows

    async def open(self, opening: Opening) -> Session:
        """Opens a session with zero state at t = 0.

        Raises:
            SessionExists, ModelUnknown, InvalidField, SessionLimit, Draining.
        """
        if self._draining:
            raise Draining
        model = self.catalog.find(opening.model, opening.version)
        record = make_record(opening, model.manifest, self._limits)
        await self._free_id(record.session_id)
        if len(self._table) + len(self._opening) >= self._table.limit:
            raise SessionLimit(self._table.limit)
        self._opening.add(record.session_id)
        try:
            await self._store.create(record)
        finally:
            self._opening.discard(record.session_id)
        if self._draining:  # began meanwhile
            ending = Ending(EndReason.CLOSED, 0, record.idle_timeout_seconds)
            await self._store.end(record.session_id, ending)
            raise Draining
        session = self._add(record)
        self._observer.opened(record.model, record.version)
        return session

    def find(self, session_id: str) -> Session | None:
        """The session of this id if it takes steps now; `explain` tells why it does not."""
        session = self._table.get(session_id)
        if session is None or session.ending is not None or self._overdue(session):
            return None
        return session

    async def explain(self, session_id: str) -> NoReturn:
        """Raises why `find` found no session.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, InvalidField.
        """
        check_id(session_id)
        session = self._table.get(session_id)
        ending = session.ending if session else await self._store.find(session_id)
        if session is not None and ending is None:
            ending = self._ending(session, EndReason.EXPIRED)
            await self._end(session, ending)
        if isinstance(ending, Ending):
            raise _told(session_id, ending)
        raise SessionUnknown(session_id)

    async def get(self, session_id: str) -> Session:
        """The open session of this id.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, InvalidField.
        """
        session = self.find(session_id)
        return session if session is not None else await self.explain(session_id)

    def submit(self, step: Step) -> None:
        """Accepts a step; its outcome is delivered to its `reply_to`, now or later.

        Raises:
            Draining, QueueFull: nothing was accepted.
        """
        if self._draining:
            raise Draining
        limits = self._limits
        if self._queued_requests >= limits.queued_requests:
            raise QueueFull("requests waiting on this server", limits.queued_requests)
        if self._queued_rows and self._queued_rows + step.rows > limits.queued_rows:
            raise QueueFull("rows waiting on this server", limits.queued_rows)
        self._queued_requests += 1
        self._queued_rows += step.rows
        step.session.lane.submit(step)

    def refuse(self, session_id: str, error: StepstateError, reply_to: ReplyTo) -> bool:
        """Lets a refusal wait for the session's steps before it, so that replies keep their order.

        Returns:
            False if no step is before it: the caller delivers it at once.
        """
        session = self._table.get(session_id)
        if session is None or session.current is None:
            return False
        step = Step((), 0, False, False, session, None, reply_to, 0)  # noqa: FBT003 - a hot constructor
        step.error = error
        self._queued_requests += 1
        session.lane.submit(step)
        return True

    def settled(self, step: Step) -> None:
        """A step has its outcome: lanes call this."""
        self._queued_requests -= 1
        self._queued_rows -= step.rows
        if self._draining and not self._queued_requests:
            self._settled_all.set()

    async def close(self, session_id: str) -> int:
        """Finishes a session's accepted steps and closes it; returns its last t.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, InvalidField.
        """
        session = await self.get(session_id)
        session.ending = self._ending(session, EndReason.CLOSED)
        closing = asyncio.ensure_future(self._close(session))
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        # A caller that gives up does not leave a session half closed.
        return await asyncio.shield(closing)

    async def _close(self, session: Session) -> int:
        if session.queued_requests:
            session.idle = asyncio.get_running_loop().create_future()
            await session.idle
        ending = self._ending(session, EndReason.CLOSED)
        await self._end(session, ending)
        return ending.t

    def page(self, first: int, size: int, model: str) -> tuple[list[Session], int | None]:
        """Up to `size` open sessions from a handle on, and the handle to go on from."""
        found: list[Session] = []
        for session in self._table.page(first):
            if session.ending is not None or model not in ("", session.record.model):
                continue
            if len(found) == size:
                return found, session.handle
            found.append(session)
        return found, None

    def t(self, session: Session) -> int:
        """Rows applied to a session."""
        return self._table.t[session.handle]

    def seconds_left(self, session: Session) -> float:
        """Until a session expires if no step comes."""
        return self._table.expires_at[session.handle] - self._clock()

    async def sweep(self) -> int:
        """Ends every session whose time is up, a few at a time; returns how many."""
        ended = 0
        for session in self._table.overdue(self._clock()):
            if session.ending is None and self._overdue(session):
                await self._end(session, self._ending(session, EndReason.EXPIRED))
                ended += 1
                if ended % _SWEEP_AT_ONCE == 0:
                    await asyncio.sleep(0)
        return ended

    async def drain(self) -> None:
        """Takes no new sessions and steps from now on, and waits for the accepted ones."""
        self._draining = True
        if self._queued_requests:
            await self._settled_all.wait()

    async def _free_id(self, session_id: str) -> None:
        session = self._table.get(session_id)
        if session_id in self._opening:
            raise SessionExists(session_id, 0)
        if session is None:
            return
        if session.ending is None and self._overdue(session):
            await self._end(session, self._ending(session, EndReason.EXPIRED))
        else:
            raise SessionExists(session_id, self.t(session))

    def _add(self, record: SessionRecord) -> Session:
        lane = self.lanes[f"{record.model}/{record.version}"]
        phase = 0 if record.start_time is None else lane.timeline.phase(record.start_time)
        session = Session(record, lane, lane.claim(), phase)
        self._table.add(session, self._clock())
        return session

    def _remove(self, session: Session) -> None:
        self._table.remove(session)
        session.lane.release(session.slot)

    async def _end(self, session: Session, ending: Ending) -> None:
        session.ending = ending
        try:
            await self._store.end(session.session_id, ending)
        except BaseException:
            session.ending = None  # not ended: it can be used, and ended, again
            raise
        if self._table.get(session.session_id) is session:
            self._remove(session)
            self._observer.closed(ending.reason.value)

    def _ending(self, session: Session, reason: EndReason) -> Ending:
        return Ending(reason, self.t(session), session.record.idle_timeout_seconds)

    def _overdue(self, session: Session) -> bool:
        return self._table.expires_at[session.handle] <= self._clock() and session.current is None


def _told(session_id: str, ending: Ending) -> StepstateError:
    if ending.reason is EndReason.EXPIRED:
        return SessionExpired(session_id, ending.t, ending.idle_timeout_seconds)
    return SessionClosed(session_id, ending.t)
