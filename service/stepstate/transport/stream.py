"""One StreamSteps call: many sessions' steps in, replies out as they are ready.

Rule 1: replies of one session leave in the order of its requests, errors too.
Rule 2: a session that has to be loaded first holds up nobody else: its requests wait for it
        in their order, and the stream is read on.

What bounds the call is in `exchange`.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable

from stepstate.errors import Internal, StepstateError
from stepstate.sessions import ID_LENGTH, Session, Sessions, Step
from stepstate.transport.codec import decode_step, encode_step
from stepstate.transport.exchange import Exchange, Messages
from stepstate.transport.outgoing import Outgoing
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb

log = logging.getLogger(__name__)


class StepStream(Exchange[pb.StepRequest, pb.StepResponse]):
    """A `ReplyTo` for all steps of one call; see `Exchange` for its arguments."""

    def __init__(
        self,
        sessions: Sessions,
        messages: Messages,
        *,
        outgoing: Outgoing,
        refused: Callable[[str], None],
    ) -> None:
        super().__init__(sessions, messages, outgoing=outgoing, refused=refused)
        self._away: dict[str, deque[pb.StepRequest]] = {}

    def _take(self, request: pb.StepRequest) -> None:
        session_id = request.session_id
        session = None if session_id in self._away else self._sessions.find(session_id)
        if session is None:
            self._wait(request)
        else:
            self._accept(request, session)

    def _unreadable(self, error: StepstateError) -> pb.StepResponse:
        return self._error("", error)

    def _accept(self, request: pb.StepRequest, session: Session) -> None:
        try:
            self._submit(decode_step(request, session, self))
        except StepstateError as error:
            self._refuse(request.session_id, error)

    def _wait(self, request: pb.StepRequest) -> None:
        """Lets a request wait until its session is resident, or known not to exist."""
        session_id = request.session_id
        self._hold(_size(request))
        if session_id in self._away:
            self._away[session_id].append(request)
            return
        self._away[session_id] = deque((request,))
        self._start(self._fetch(session_id))

    async def _fetch(self, session_id: str) -> None:
        """Makes a session resident, and takes up the requests that waited for it."""
        found: Session | StepstateError
        try:
            found = await self._sessions.get(session_id)
        except StepstateError as error:
            # Its traceback would lead back here, in a circle that keeps the requests.
            found = error.with_traceback(None)
        except Exception:
            found = Internal(secrets.token_hex(8))
            log.exception("a load failed", extra={"error_id": found.error_id})
        for request in self._away.pop(session_id):
            self._hold(-_size(request))
            if isinstance(found, StepstateError):
                self._refuse(session_id, found)
            else:
                self._accept(request, found)

    def _encoded(self, step: Step) -> pb.StepResponse:
        if step.error is not None:
            return self._error(step.session.session_id, step.error)
        return encode_step(step)

    def _refuse(self, session_id: str, error: StepstateError) -> None:
        if not self._sessions.refuse(session_id, error, self):
            self._reply(self._error(session_id[:ID_LENGTH], error))

    def _error(self, session_id: str, error: StepstateError) -> pb.StepResponse:
        self._refused(error.reason)
        return pb.StepResponse(session_id=session_id, error=status_of(error))


def _size(request: pb.StepRequest) -> int:
    return 4 * len(request.x)
