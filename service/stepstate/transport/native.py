"""The front door `stepstate.v1.StepstateService`: decode, one call into the sessions, encode."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING

from stepstate.errors import Draining, InvalidField
from stepstate.metrics import Metrics
from stepstate.sessions import Session, Sessions, Step
from stepstate.transport.codec import (
    decode_opening,
    decode_step,
    encode_model,
    encode_session,
    encode_step,
)
from stepstate.transport.outgoing import Outgoing
from stepstate.transport.stream import StepStream
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceServicer

if TYPE_CHECKING:
    from stepstate.transport.guard import Context, CountingContext

log = logging.getLogger(__name__)

PAGE_SIZE, MOST_PAGE_SIZE = 100, 1000


class WaitingCall:
    """A `ReplyTo` for one unary call."""

    def __init__(self) -> None:
        self.cancelled = False
        self._outcome: asyncio.Future[Step] = asyncio.get_running_loop().create_future()

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        if not self._outcome.done():
            self._outcome.set_result(step)

    async def outcome(self) -> Step:
        """The step with its outcome; a caller that gives up marks it cancelled."""
        try:
            return await self._outcome
        except asyncio.CancelledError:
            self.cancelled = True
            raise


class NativeService(StepstateServiceServicer):  # type: ignore[misc]
    """The RPCs of the contract; the contract has their documentation."""

    def __init__(self, sessions: Sessions, metrics: Metrics) -> None:
        self._sessions = sessions
        self._metrics = metrics
        self._streams: set[StepStream] = set()
        self._outgoing = Outgoing()
        self._draining = False
        self._all_ended = asyncio.Event()

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Context
    ) -> pb.OpenSessionResponse:
        session = await self._sessions.open(decode_opening(request))
        return pb.OpenSessionResponse(session=self._encoded(session))

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        session = await self._sessions.get(request.session_id)
        return pb.GetSessionResponse(session=self._encoded(session))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        size = request.page_size or PAGE_SIZE
        if size > MOST_PAGE_SIZE:
            raise InvalidField("page_size", f"is {size}, expected at most {MOST_PAGE_SIZE}")
        found, following = self._sessions.page(_page_start(request), size, request.model)
        return pb.ListSessionsResponse(
            sessions=map(self._encoded, found),
            next_page_token="" if following is None else str(following),
        )

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        before = self._encoded(await self._sessions.get(request.session_id))
        before.t = await self._sessions.close(request.session_id)
        before.queued_requests = 0
        return pb.CloseSessionResponse(session=before)

    async def Step(self, request: pb.StepRequest, context: Context) -> pb.StepResponse:
        call = WaitingCall()
        session = await self._sessions.get(request.session_id)
        step = decode_step(request, session, call)
        self._outgoing.reserve(step.reply_bytes)
        try:
            self._sessions.submit(step)
            await call.outcome()
            if step.error is not None:
                raise step.error
            return encode_step(step)
        finally:
            self._outgoing.release(step.reply_bytes)

    async def StreamSteps(self, _requests: object, context: CountingContext) -> None:
        refusals: Counter[str] = Counter()

        def refused(reason: str) -> None:
            refusals[reason] += 1
            self._metrics.refused(reason)

        if self._draining:
            raise Draining
        stream = StepStream(self._sessions, context, outgoing=self._outgoing, refused=refused)
        self._streams.add(stream)
        try:
            await stream.run()
        finally:
            self._streams.discard(stream)
            if not self._streams:
                self._all_ended.set()
            if refusals:
                log.info("a stream had refused steps", extra={"refused": dict(refusals)})

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=map(encode_model, self._sessions.catalog))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        model = self._sessions.catalog.find(request.model, request.version)
        return pb.GetModelResponse(model=encode_model(model))

    async def drain(self) -> None:
        """Ends every stream as soon as what it had accepted is answered, and waits for that."""
        self._draining = True
        self._all_ended.clear()
        for stream in self._streams:
            stream.drain()
        if self._streams:
            await self._all_ended.wait()

    def _encoded(self, session: Session) -> pb.Session:
        return encode_session(self._sessions, session)


def _page_start(request: pb.ListSessionsRequest) -> int:
    token = request.page_token or "0"
    if not token.isdecimal() or len(token) > 9:
        raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
    return int(token)
