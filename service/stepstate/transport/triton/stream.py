"""One ModelStreamInfer call.

Rule 1: replies of one sequence leave in the order of its requests, errors too.
Rule 2: a request that opens, loads or ends a session holds up its own sequence only.
Rule 3: an error is the `error_message` of its request, and never ends the stream.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable

from stepstate.errors import Internal, QueueFull, StepstateError
from stepstate.sessions import Session, Sessions, Step
from stepstate.transport.exchange import Exchange, Messages
from stepstate.transport.outgoing import Outgoing
from stepstate.transport.triton.infer import ASKS_FOR_FINAL, FINAL, Infer
from stepstate.transport.triton.messages import pb
from stepstate.transport.triton.sequences import Sequences

log = logging.getLogger(__name__)

MOST_TEXT = 1024
"""Characters of an error, and of what it echoes."""


class InferStream(Exchange[pb.ModelInferRequest, pb.ModelStreamInferResponse, Step]):
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
        sessions: Sessions,
        messages: Messages,
        *,
        outgoing: Outgoing,
        sequences: Sequences,
        refused: Callable[[str], None],
    ) -> None:
        super().__init__(sessions, messages, outgoing=outgoing, refused=refused)
        self._sequences = sequences
        self._lines: dict[str, deque[Infer]] = {}

    def _take(self, request: pb.ModelInferRequest) -> None:
        try:
            infer = Infer.of(request)
        except StepstateError as error:
            self._reply(self._error(request, error))
            return
        if infer.plain and infer.session_id not in self._lines and self._accept(infer):
            return
        self._wait(infer)

    def _accept(self, infer: Infer) -> bool:
        """Answers for a request at once if its session is here; False: it has to wait."""
        session = self._sessions.find(infer.session_id)
        if session is None:
            return False
        try:
            self._accepted(infer, session)
        except QueueFull:
            return False
        except StepstateError as error:
            self._refuse(infer, error)
        return True

    def _accepted(self, infer: Infer, session: Session) -> Step:
        """Submits the step that a request asks for."""
        step = infer.step(session, _Way(self, infer))
        self._submit(step)
        return step

    def _wait(self, infer: Infer) -> None:
        self._hold(infer.request.ByteSize())
        line = self._lines.get(infer.session_id)
        if line is None:
            line = self._lines[infer.session_id] = deque()
            self._start(self._work_off(infer.session_id, line))
        line.append(infer)

    async def _work_off(self, session_id: str, line: deque[Infer]) -> None:
        """Carries out a sequence's requests one after the other, until none waits."""
        while line:
            infer = line[0]
            try:
                await self._carry_out(infer)
            except StepstateError as error:
                # Its traceback would lead back here, in a circle that keeps the request.
                self._refuse(infer, error.with_traceback(None))
            except Exception:
                surprise = Internal(secrets.token_hex(8))
                log.exception("a request failed", extra={"error_id": surprise.error_id})
                self._refuse(infer, surprise)
            line.popleft()
            self._hold(-infer.request.ByteSize())
        del self._lines[session_id]

    async def _carry_out(self, infer: Infer) -> None:
        if infer.plain:
            session = await self._sequences.session_of(infer)
            await self._sequences.submit(infer, session, lambda it: self._accepted(infer, it))
        else:
            step = await self._sequences.apply(infer)
            self._reply(self._applied(infer, step))

    def _unreadable(self, error: StepstateError) -> pb.ModelStreamInferResponse:
        return self._error(pb.ModelInferRequest(), error)

    def _encoded(self, outcome: Step) -> pb.ModelStreamInferResponse:
        assert isinstance(outcome.reply_to, _Way)
        infer = outcome.reply_to.infer
        if outcome.error is not None:
            return self._error(infer.request, outcome.error)
        return self._applied(infer, outcome)

    def _size(self, outcome: Step) -> int:
        return outcome.reply_bytes

    @staticmethod
    def _applied(infer: Infer, step: Step) -> pb.ModelStreamInferResponse:
        response = pb.ModelStreamInferResponse()
        infer.put_reply(response.infer_response, step)
        return response

    def _refuse(self, infer: Infer, error: StepstateError) -> None:
        if not self._sessions.refuse(infer.session_id, error, _Way(self, infer)):
            self._reply(self._error(infer.request, error))

    def _error(
        self, request: pb.ModelInferRequest, error: StepstateError
    ) -> pb.ModelStreamInferResponse:
        self._refused(error.reason)
        response = pb.ModelStreamInferResponse(error_message=str(error)[:MOST_TEXT])
        response.infer_response.id = request.id[:MOST_TEXT]
        response.infer_response.model_name = request.model_name[:MOST_TEXT]
        if ASKS_FOR_FINAL in request.parameters:
            response.infer_response.parameters[FINAL].bool_param = True
        return response


class _Way:
    """A `ReplyTo` that knows the request."""

    __slots__ = ("_stream", "infer")

    def __init__(self, stream: InferStream, infer: Infer) -> None:
        self._stream = stream
        self.infer = infer

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more."""
        return self._stream.cancelled

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        self._stream.deliver(step)
