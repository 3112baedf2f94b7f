"""Copies the states that forecasts start from, each between two steps of its session."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stepstate.engine import Floats
from stepstate.errors import ForecastImpossible, StepstateError, without_frames
from stepstate.identity import SessionKey
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
    def key(self) -> SessionKey:
        """The session's."""
        return self.session.key


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
        self, keys: Iterable[SessionKey], reserve: Reserve
    ) -> dict[SessionKey, Origin | StepstateError]:
        """The origin of each session, or why there is none.

        Every session has its place in its queue before anything is waited for.

        Raises:
            InvalidField, MemoryLimit: there is no memory for the copies.
        """
        loading = asyncio.Semaphore(MAX_LOADS)
        found: dict[SessionKey, Origin | StepstateError] = {}
        calls: dict[SessionKey, _Call] = {}
        tasks: dict[SessionKey, asyncio.Task[Origin | StepstateError]] = {}
        try:
            for key in keys:
                if not self._copied_at_once(key, found):
                    calls[key] = self._enqueue(key)
            for origin in found.values():
                _reserve(origin, reserve)
            for index, (key, call) in enumerate(calls.items()):
                fetching = self._fetch(key, call, loading, reserve)
                tasks[key] = asyncio.create_task(fetching)
                if index % COPIES_PER_TURN == COPIES_PER_TURN - 1:
                    await asyncio.sleep(0)
            found.update(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        finally:
            for key, call in calls.items():
                self._queues.drop(key, call)
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return found

    def _copied_at_once(
        self, key: SessionKey, found: dict[SessionKey, Origin | StepstateError]
    ) -> bool:
        """Copies a session that has nothing to finish, unless many have been copied."""
        session = self._queues.find(key) if len(found) < COPIES_PER_TURN else None
        if session is None or self._table.busy[session.handle]:
            return False
        found[key] = self._copied(session)
        return True

    def _enqueue(self, key: SessionKey) -> _Call:
        """Takes a place in a session's queue, and then one among its steps."""
        call = WaitingCall(
            lambda session: self._queues.turn(session, lambda: self._copied(session))
        )
        session = self._queues.find(key)
        if session is not None and self._table.busy[session.handle]:
            call.found(session)
        else:
            self._queues.wait(key, call, start=False)
        return call

    async def _fetch(
        self, key: SessionKey, call: _Call, loading: asyncio.Semaphore, reserve: Reserve
    ) -> Origin | StepstateError:
        """Copies a session that has to be loaded, or has steps to finish."""
        async with loading:
            try:
                self._queues.load(key)
                origin = await (await call.result).result()
            except StepstateError as error:
                return without_frames(error)
            return _reserve(origin, reserve)

    def _copied(self, session: ResidentSession) -> Origin | StepstateError:
        try:
            return self._copy(session)
        except Exception as error:  # noqa: BLE001 - it is this session's, not the call's
            return unexpected("a forecast failed", error, session.key)

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
