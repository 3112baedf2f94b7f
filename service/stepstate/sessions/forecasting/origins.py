"""Copies the states that forecasts start from, each between two steps of its session."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stepstate.engine import Floats
from stepstate.errors import ForecastImpossible, StepstateError
from stepstate.sessions.forecasting.limits import Reserve
from stepstate.sessions.queues import RequestQueues, WaitingCall
from stepstate.sessions.table import Table
from stepstate.sessions.types import ResidentSession, SessionBarrier, unexpected

COPIES_PER_TURN = 500
"""Copies in one turn of the event loop."""
MAX_LOADS = 64
"""Sessions that one call loads at a time."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a session's forecast starts: a copy of its state [R]."""

    session: ResidentSession
    t: int
    state: Floats

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.session.session_id


_Call = WaitingCall[SessionBarrier[Origin | StepstateError]]


class OriginCopier:
    """Copies the states of sessions, and loads those that are not resident.

    Args:
        queues: where a copy waits for its turn.
        table: their numbers.
    """

    def __init__(self, queues: RequestQueues, table: Table) -> None:
        self._queues = queues
        self._table = table

    async def copy(
        self, session_ids: Iterable[str], reserve: Reserve
    ) -> dict[str, Origin | StepstateError]:
        """The origin of each session, or why there is none.

        Every session has its place in its queue before anything is waited for.

        Raises:
            InvalidField, MemoryLimit: there is no memory for the copies.
        """
        loading = asyncio.Semaphore(MAX_LOADS)
        found: dict[str, Origin | StepstateError] = {}
        calls: dict[str, _Call] = {}
        tasks: dict[str, asyncio.Task[Origin | StepstateError]] = {}
        try:
            for session_id in session_ids:
                if not self._copied_at_once(session_id, found):
                    calls[session_id] = self._enqueue(session_id)
            for origin in found.values():
                _reserve(origin, reserve)
            for index, (session_id, call) in enumerate(calls.items()):
                fetching = self._fetch(session_id, call, loading, reserve)
                tasks[session_id] = asyncio.create_task(fetching)
                if index % COPIES_PER_TURN == COPIES_PER_TURN - 1:
                    await asyncio.sleep(0)
            found.update(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        finally:
            for session_id, call in calls.items():
                self._queues.drop(session_id, call)
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return found

    def _copied_at_once(self, session_id: str, found: dict[str, Origin | StepstateError]) -> bool:
        """Copies a session that has nothing to finish, unless many have been copied."""
        session = self._queues.find(session_id) if len(found) < COPIES_PER_TURN else None
        if session is None or self._table.busy[session.handle]:
            return False
        found[session_id] = self._copied(session)
        return True

    def _enqueue(self, session_id: str) -> _Call:
        """Takes a place in a session's queue, and then one among its steps."""
        call = WaitingCall(
            lambda session: self._queues.turn(session, lambda: self._copied(session))
        )
        session = self._queues.find(session_id)
        if session is not None and self._table.busy[session.handle]:
            call.found(session)
        else:
            self._queues.wait(session_id, call, start=False)
        return call

    async def _fetch(
        self, session_id: str, call: _Call, loading: asyncio.Semaphore, reserve: Reserve
    ) -> Origin | StepstateError:
        """Copies a session that has to be loaded, or has steps to finish."""
        async with loading:
            try:
                self._queues.load(session_id)
                origin = await (await call.result).result()
            except StepstateError as error:
                return error.with_traceback(None)  # or it would keep this frame, in a circle
            return _reserve(origin, reserve)

    def _copied(self, session: ResidentSession) -> Origin | StepstateError:
        try:
            return self._copy(session)
        except Exception as error:  # noqa: BLE001 - it is this session's, not the call's
            return unexpected("a forecast failed", error, session.session_id)

    def _copy(self, session: ResidentSession) -> Origin | StepstateError:
        t = self._table.t[session.handle]
        if not t:
            return ForecastImpossible(
                f"session {session.session_id!r}", "it has no rows yet: step it, or prime it, first"
            )
        state = session.scheduler.engine.read_states(np.array([session.slot]))[0]
        return Origin(session, t, state)


def _reserve(origin: Origin | StepstateError, reserve: Reserve) -> Origin | StepstateError:
    """The origin, once there is memory for its copy."""
    if isinstance(origin, Origin):
        reserve(origin.state.nbytes)
    return origin
