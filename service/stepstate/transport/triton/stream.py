"""One ModelStreamInfer call.

Rule 1: replies of one sequence leave in the order of its requests, errors too.
Rule 2: a request that opens, loads or ends a session holds up its own sequence only.
Rule 3: an error is the `error_message` of its request, and never ends the stream.
"""

from __future__ import annotations

import logging
import secrets
from functools import partial

from tritonclient.grpc import service_pb2 as pb

from stepstate.budget import MemoryUse
from stepstate.errors import (
    Internal,
    MemoryLimit,
    NotFound,
    QueueFull,
    StepstateError,
    TenantLimitReached,
    without_frames,
)
from stepstate.sessions import Hold, ResidentSession, SingleRow, Source, Step
from stepstate.transport.authentication import current_principal
from stepstate.transport.bidi import Backend
from stepstate.transport.interceptor import SENT, MessageChannel
from stepstate.transport.row_stream import RowStream
from stepstate.transport.triton.call import FINAL, InferCall, RequestHead
from stepstate.transport.triton.expected_infers import ExpectedInfers
from stepstate.transport.triton.sequences import MAX_WAIT_SECONDS, SequenceService, not_started

log = logging.getLogger(__name__)

MAX_TEXT = 1024
"""Characters of an error."""
_NO_HEAD = RequestHead("", "", "", final=False)


class InferStream(RowStream[pb.ModelInferRequest, pb.ModelStreamInferResponse, InferCall]):
    """A call that may carry any number of sequences.

    Args:
        backend: serves the requests.
        messages: the two directions of the call.
        sequences: starts and ends them.
        expected: the requests that may come again.
    """

    def __init__(
        self,
        backend: Backend,
        messages: MessageChannel,
        sequences: SequenceService,
        expected: ExpectedInfers,
    ) -> None:
        self._tenant = tenant = current_principal.get().tenant
        take = partial(expected.take, tenant)
        super().__init__(backend, messages, take, patience_seconds=MAX_WAIT_SECONDS)
        self._expected = expected
        self._sequences = sequences
        self._bytes = b""  # of the request that is being taken

    def _make_step(self, request: pb.ModelInferRequest, session: ResidentSession) -> Step:
        infer = InferCall.of(request, RequestHead.of(request), self._tenant)
        return infer.step(session, _StreamReply(self, infer))

    def _encode_refusal(
        self, request: pb.ModelInferRequest, error: StepstateError
    ) -> pb.ModelStreamInferResponse:
        return self._error(RequestHead.of(request), error)

    def _encode_row(self, row: SingleRow, y: bytes, durable_t: int) -> bytes:  # noqa: ARG002
        return row.reply_head + y

    def _take_bytes(self, data: bytes) -> None:
        self._bytes = data
        super()._take_bytes(data)
        self._bytes = b""

    def _take(self, request: pb.ModelInferRequest) -> None:
        head = RequestHead.of(request)
        try:
            infer = InferCall.of(request, head, self._tenant)
        except StepstateError as error:
            self._reply(self._error(head, error))
            return
        if not infer.plain:
            self._begin(infer)
        elif not self._accept_now(infer):
            self._wait(infer.key, infer, infer.held_bytes)

    def _accept_now(self, infer: InferCall) -> bool:
        """Accepts or refuses a request if its session takes steps now; False: it has to wait."""
        session = self._sessions.find(infer.key)
        if session is None:
            return False
        try:
            self._accept(infer, session)
        except QueueFull:
            return False
        except MemoryLimit:
            raise
        except StepstateError as error:
            self._reject(infer, error)
        else:
            if self._bytes:
                self._expected.expect(self._bytes, infer, session, self._sessions.ref_of(session))
        return True

    def _accept(self, waiting: InferCall, session: ResidentSession) -> None:
        self._submit(waiting.step(session, _StreamReply(self, waiting)))

    def _refuse(self, waiting: InferCall, error: StepstateError) -> None:
        if isinstance(error, NotFound):
            error = not_started(waiting, error)
        self._reject(waiting, error)

    def _begin(self, infer: InferCall) -> None:
        """Queues a request that starts or ends its sequence.

        Raises:
            MemoryLimit.
        """
        size = infer.held_bytes
        try:
            self._reserve(MemoryUse.REQUESTS, size)
        except TenantLimitReached as error:
            self._reject(infer, error)
            return
        try:
            hold = self._sessions.hold(infer.key)
        except StepstateError as error:
            self._release(MemoryUse.REQUESTS, size)
            self._reject(infer, error)
            return

        def left(_: object) -> None:  # also if it never started
            hold.release()
            self._release(MemoryUse.REQUESTS, size)

        self._start(self._apply(infer, hold)).add_done_callback(left)

    async def _apply(self, infer: InferCall, hold: Hold) -> None:
        async with hold:
            try:
                response = await self._sequences.apply(infer, hold)
                reply = pb.ModelStreamInferResponse(infer_response=response)
                self._reply(reply, SENT * reply.ByteSize())
            except StepstateError as error:
                self._reject(infer, without_frames(error))
            except Exception:
                internal = Internal(secrets.token_hex(8))
                log.exception("a request failed", extra={"error_id": internal.error_id})
                self._reject(infer, internal)

    def _encode_failure(self, error: StepstateError) -> pb.ModelStreamInferResponse:
        return self._error(_NO_HEAD, error)

    def _encode(self, outcome: Step) -> pb.ModelStreamInferResponse:
        assert isinstance(outcome.reply_to, _StreamReply)
        infer = outcome.reply_to.infer
        if outcome.error is not None:
            return self._error(infer.head, outcome.error)
        response = pb.ModelStreamInferResponse()
        infer.put_reply(response.infer_response, outcome)
        return response

    def _reject(self, infer: InferCall, error: StepstateError) -> None:
        if not self._refuse_in_order(infer.key, error, _StreamReply(self, infer)):
            self._reply(self._error(infer.head, error))

    def _error(self, head: RequestHead, error: StepstateError) -> pb.ModelStreamInferResponse:
        self._count_refusal(error)
        response = pb.ModelStreamInferResponse(error_message=str(error)[:MAX_TEXT])
        response.infer_response.id = head.request_id
        response.infer_response.model_name = head.model
        if head.final:
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
        """See `ReplyTo`."""
        return self._stream.cancelled

    @property
    def source(self) -> Source:
        """See `ReplyTo`."""
        return self._stream.source

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        self._stream.deliver(step)
