"""One ModelStreamInfer call.

Rule 1: replies of one sequence leave in the order of its requests, errors too.
Rule 2: a request that opens, loads or ends a session holds up its own sequence only.
Rule 3: an error is the `error_message` of its request, and never ends the stream.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from stepstate.errors import Internal, NotFound, QueueFull, StepstateError
from stepstate.sessions import Hold, ResidentSession, SessionService, Step
from stepstate.transport.bidi import BidiStream, MessageChannel
from stepstate.transport.pending_loads import PendingLoads
from stepstate.transport.reply_budget import ReplyBudget
from stepstate.transport.triton.call import ASKS_FOR_FINAL, FINAL, InferCall
from stepstate.transport.triton.messages import pb
from stepstate.transport.triton.sequences import LONGEST_WAIT_SECONDS, SequenceService, unstarted

log = logging.getLogger(__name__)

MAX_TEXT = 1024
"""Characters of an error, and of what it echoes."""


class InferStream(BidiStream[pb.ModelInferRequest, pb.ModelStreamInferResponse, Step]):
    """A call that may carry any number of sequences.

    Args:
        sessions: take the steps.
        messages: the two sides of the call.
        outgoing: the bytes of replies that are on their way, of all calls.
        sequences: what starts and ends them.
        refused: told the reason of each refusal.
    """

    def __init__(
        self,
        sessions: SessionService,
        messages: MessageChannel,
        *,
        outgoing: ReplyBudget,
        sequences: SequenceService,
        refused: Callable[[str], None],
    ) -> None:
        super().__init__(sessions, messages, outgoing=outgoing, refused=refused)
        self._sequences = sequences
        self._fetches: PendingLoads[InferCall] = PendingLoads(
            sessions,
            found=self._accept_late,
            failed=self._refuse_late,
            patience_seconds=LONGEST_WAIT_SECONDS,
        )

    async def run(self) -> None:
        """See `BidiStream.run`."""
        try:
            await super().run()
        finally:
            self._fetches.drop()

    def _take(self, request: pb.ModelInferRequest) -> None:
        try:
            infer = InferCall.of(request)
        except StepstateError as error:
            self._reply(self._error(request, error))
            return
        if not infer.plain:
            self._begin(infer)
        elif not self._accept(infer):
            self._hold(infer.request.ByteSize())
            self._fetches.wait(infer.session_id, infer)

    def _accept(self, infer: InferCall) -> bool:
        """Answers for a request at once if its session is here; False: it has to wait."""
        session = self._sessions.find(infer.session_id)
        if session is None:
            return False
        try:
            self._submit(infer.step(session, _StreamReply(self, infer)))
        except QueueFull:
            return False
        except StepstateError as error:
            self._refuse(infer, error)
        return True

    def _accept_late(self, infer: InferCall, session: ResidentSession) -> None:
        self._submit(infer.step(session, _StreamReply(self, infer)))
        self._hold(-infer.request.ByteSize())

    def _refuse_late(self, infer: InferCall, error: StepstateError) -> None:
        self._hold(-infer.request.ByteSize())
        self._refuse(infer, unstarted(infer, error) if isinstance(error, NotFound) else error)

    def _begin(self, infer: InferCall) -> None:
        """Lets a request that starts or ends its sequence take its place in the line."""
        try:
            hold = self._sessions.hold(infer.session_id)
        except StepstateError as error:
            self._refuse(infer, error)
            return
        size = infer.request.ByteSize()
        self._hold(size)

        def left(_: object) -> None:  # though it may never have begun
            hold.release()
            self._hold(-size)

        self._start(self._carry_out(infer, hold)).add_done_callback(left)

    async def _carry_out(self, infer: InferCall, hold: Hold) -> None:
        async with hold:
            try:
                self._reply(self._applied(infer, await self._sequences.apply(infer, hold)))
            except StepstateError as error:
                # Its traceback would lead back here, in a circle that keeps the request.
                self._refuse(infer, error.with_traceback(None))
            except Exception:
                surprise = Internal(secrets.token_hex(8))
                log.exception("a request failed", extra={"error_id": surprise.error_id})
                self._refuse(infer, surprise)

    def _unreadable(self, error: StepstateError) -> pb.ModelStreamInferResponse:
        return self._error(pb.ModelInferRequest(), error)

    def _encoded(self, outcome: Step) -> pb.ModelStreamInferResponse:
        assert isinstance(outcome.reply_to, _StreamReply)
        infer = outcome.reply_to.infer
        if outcome.error is not None:
            return self._error(infer.request, outcome.error)
        return self._applied(infer, outcome)

    def _size(self, outcome: Step) -> int:
        return outcome.reply_bytes

    @staticmethod
    def _applied(infer: InferCall, step: Step) -> pb.ModelStreamInferResponse:
        response = pb.ModelStreamInferResponse()
        infer.put_reply(response.infer_response, step)
        return response

    def _refuse(self, infer: InferCall, error: StepstateError) -> None:
        if not self._sessions.refuse(infer.session_id, error, _StreamReply(self, infer)):
            self._reply(self._error(infer.request, error))

    def _error(
        self, request: pb.ModelInferRequest, error: StepstateError
    ) -> pb.ModelStreamInferResponse:
        self._refused(error.reason)
        response = pb.ModelStreamInferResponse(error_message=str(error)[:MAX_TEXT])
        response.infer_response.id = request.id[:MAX_TEXT]
        response.infer_response.model_name = request.model_name[:MAX_TEXT]
        if ASKS_FOR_FINAL in request.parameters:
            response.infer_response.parameters[FINAL].bool_param = True
        return response


class _StreamReply:
    """A `ReplyTo` that knows the request."""

    __slots__ = ("_stream", "infer")

    def __init__(self, stream: InferStream, infer: InferCall) -> None:
        self._stream = stream
        self.infer = infer

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more."""
        return self._stream.cancelled

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        self._stream.deliver(step)
