"""Requests that wait until their session is resident, or known not to exist: in their order.

A session that has to be loaded first holds up nobody else.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from stepstate.errors import Internal, StepstateError
from stepstate.sessions import Session, Sessions

log = logging.getLogger(__name__)

R = TypeVar("R")


class Fetches(Generic[R]):
    """What a call has waiting for sessions.

    Args:
        sessions: the table.
        start: runs something beside the call, at most as long as it.
        found: called with each request, in order, once its session is resident.
        failed: called with each if there is no such session.
    """

    def __init__(
        self,
        sessions: Sessions,
        start: Callable[[Coroutine[Any, Any, None]], None],
        *,
        found: Callable[[R, Session], None],
        failed: Callable[[R, StepstateError], None],
    ) -> None:
        self._sessions = sessions
        self._start = start
        self._found = found
        self._failed = failed
        self._away: dict[str, deque[R]] = {}

    def find(self, session_id: str) -> Session | None:
        """The resident session of this id, if no request waits for it."""
        return None if session_id in self._away else self._sessions.find(session_id)

    def wait(self, session_id: str, request: R) -> None:
        """Lets a request wait for its session."""
        if session_id in self._away:
            self._away[session_id].append(request)
            return
        self._away[session_id] = deque((request,))
        self._start(self._fetch(session_id))

    def drop(self) -> int:
        """Forgets what waits, as the call has ended; returns how many requests."""
        count = sum(map(len, self._away.values()))
        self._away.clear()
        return count

    async def _fetch(self, session_id: str) -> None:
        session: Session | StepstateError
        try:
            session = await self._sessions.get(session_id)
        except StepstateError as error:
            # Its traceback would lead back here, in a circle that keeps the requests.
            session = error.with_traceback(None)
        except Exception:
            session = Internal(secrets.token_hex(8))
            log.exception("a load failed", extra={"error_id": session.error_id})
        for request in self._away.pop(session_id):
            if isinstance(session, StepstateError):
                self._failed(request, session)
            else:
                self._found(request, session)
