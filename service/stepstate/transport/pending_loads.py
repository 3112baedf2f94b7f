"""Requests of a streaming call that wait in the lines of their sessions.

A session that has to be loaded first holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from stepstate.errors import StepstateError
from stepstate.sessions import ResidentSession, SessionService

R = TypeVar("R")


class PendingLoads(Generic[R]):
    """What a call has waiting for sessions.

    Args:
        sessions: the table.
        found: called with each request in its turn.
        failed: called with each if there is no such session, and for what `found` raises.
        patience_seconds: how long a request waits for room in the queue, in its place in the line.
    """

    def __init__(
        self,
        sessions: SessionService,
        *,
        found: Callable[[R, ResidentSession], None],
        failed: Callable[[R, StepstateError], None],
        patience_seconds: float = 0.0,
    ) -> None:
        self._sessions = sessions
        self._found = found
        self._failed = failed
        self._patience_seconds = patience_seconds
        self._waiting: set[_PendingLoad[R]] = set()

    def wait(self, session_id: str, request: R) -> None:
        """Lets a request wait for its session, which `SessionService.find` did not give."""
        deadline = asyncio.get_running_loop().time() + self._patience_seconds
        fetch = _PendingLoad(self, session_id, request, deadline)
        self._waiting.add(fetch)
        self._sessions.wait(session_id, fetch)

    def drop(self) -> int:
        """Forgets what waits, as the call has ended; returns how many requests."""
        dropped, self._waiting = self._waiting, set()
        for fetch in dropped:
            self._sessions.drop(fetch.session_id, fetch)
        return len(dropped)

    def serve(self, fetch: _PendingLoad[R], session: ResidentSession) -> None:
        """Its turn has come."""
        if fetch in self._waiting:
            self._found(fetch.request, session)
            self._waiting.discard(fetch)

    def fail(self, fetch: _PendingLoad[R], error: StepstateError) -> None:
        """It can't be served."""
        if fetch in self._waiting:
            self._waiting.discard(fetch)
            self._failed(fetch.request, error)


class _PendingLoad(Generic[R]):
    """One request; a `Waiter`."""

    __slots__ = ("_fetches", "deadline", "request", "session_id")

    def __init__(
        self, fetches: PendingLoads[R], session_id: str, request: R, deadline: float
    ) -> None:
        self._fetches = fetches
        self.session_id = session_id
        self.request = request
        self.deadline = deadline

    def found(self, session: ResidentSession) -> None:
        """See `Waiter`."""
        self._fetches.serve(self, session)

    def failed(self, error: StepstateError) -> None:
        """See `Waiter`."""
        self._fetches.fail(self, error)
