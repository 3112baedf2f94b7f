"""One StreamSteps call: many sessions' steps in, replies out as they are ready.

Rule 1: replies of one session leave in the order of its requests, errors too.
Rule 2: a session that has to be loaded first holds up nobody else: its requests wait for it
        in their order, and the stream is read on.

What bounds the call is in `exchange`.
"""

from __future__ import annotations

from collections.abc import Callable

from stepstate.errors import StepstateError
from stepstate.sessions import ID_LENGTH, ResidentSession, SessionService, Step
from stepstate.transport.bidi import BidiStream, MessageChannel
from stepstate.transport.convert import decode_step, encode_step
from stepstate.transport.pending_loads import PendingLoads
from stepstate.transport.reply_budget import ReplyBudget
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb


class StepStream(BidiStream[pb.StepRequest, pb.StepResponse, Step]):
    """A `ReplyTo` for all steps of one call; see `BidiStream` for its arguments."""

    def __init__(
        self,
        sessions: SessionService,
        messages: MessageChannel,
        *,
        outgoing: ReplyBudget,
        refused: Callable[[str], None],
    ) -> None:
        super().__init__(sessions, messages, outgoing=outgoing, refused=refused)
        self._fetches: PendingLoads[pb.StepRequest] = PendingLoads(
            sessions, found=self._accept_late, failed=self._refuse_late
        )

    async def run(self) -> None:
        """See `BidiStream.run`."""
        try:
            await super().run()
        finally:
            self._fetches.drop()

    def _take(self, request: pb.StepRequest) -> None:
        session = self._sessions.find(request.session_id)
        if session is None:
            self._hold(_size(request))
            self._fetches.wait(request.session_id, request)
        else:
            self._accept(request, session)

    def _unreadable(self, error: StepstateError) -> pb.StepResponse:
        return self._error("", error)

    def _accept(self, request: pb.StepRequest, session: ResidentSession) -> None:
        try:
            self._submit(decode_step(request, session, self))
        except StepstateError as error:
            self._refuse(request, error)

    def _accept_late(self, request: pb.StepRequest, session: ResidentSession) -> None:
        self._submit(decode_step(request, session, self))
        self._hold(-_size(request))

    def _refuse_late(self, request: pb.StepRequest, error: StepstateError) -> None:
        self._hold(-_size(request))
        self._refuse(request, error)

    def _encoded(self, outcome: Step) -> pb.StepResponse:
        if outcome.error is not None:
            return self._error(outcome.session.session_id, outcome.error)
        return encode_step(outcome)

    def _size(self, outcome: Step) -> int:
        return outcome.reply_bytes

    def _refuse(self, request: pb.StepRequest, error: StepstateError) -> None:
        session_id = request.session_id
        if not self._sessions.refuse(session_id, error, self):
            self._reply(self._error(session_id[:ID_LENGTH], error))

    def _error(self, session_id: str, error: StepstateError) -> pb.StepResponse:
        self._refused(error.reason)
        return pb.StepResponse(session_id=session_id, error=status_of(error))


def _size(request: pb.StepRequest) -> int:
    return 4 * len(request.x)
