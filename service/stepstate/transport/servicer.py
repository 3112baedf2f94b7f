"""The front door `stepstate.v1.StepstateService`: decode, one call into the sessions, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from stepstate.errors import SessionUnreadable, SnapshotModelMismatch
from stepstate.sessions import ResidentSession, SessionService
from stepstate.transport.bidi import StreamRegistry
from stepstate.transport.convert import (
    decode_fork,
    decode_import,
    decode_opening,
    decode_step,
    encode_model,
    encode_session,
    encode_step,
)
from stepstate.transport.forecasts import decode_wish, encode_forecasts, reply_bytes
from stepstate.transport.malformed import well_formed
from stepstate.transport.packed import PackedStream
from stepstate.transport.pages import list_models, list_sessions
from stepstate.transport.reply_budget import ReplyBudget
from stepstate.transport.snapshots import export_parts, export_whole, import_parts
from stepstate.transport.steps import StepStream
from stepstate.transport.unary import apply_step
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceServicer

if TYPE_CHECKING:
    from stepstate.transport.interceptor import Context


class StepstateServicer(StepstateServiceServicer):  # type: ignore[misc]
    """The RPCs of the contract; the contract has their documentation.

    Args:
        sessions: the table.
        outgoing: the bytes of replies that are on their way, of every door.
        refused: told the reason of each refusal within a stream.
    """

    def __init__(
        self, sessions: SessionService, *, outgoing: ReplyBudget, refused: Callable[[str], None]
    ) -> None:
        self._sessions = sessions
        self._outgoing = outgoing
        # Of its own: however slowly they move, steps are answered.
        self._moving = ReplyBudget("bytes of snapshots that are being sent or received here")
        self._streams = StreamRegistry(refused)

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Context
    ) -> pb.OpenSessionResponse:
        session = await self._sessions.open(decode_opening(request))
        return pb.OpenSessionResponse(session=self._resident(session))

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        summary = await self._sessions.look(request.session_id)
        return pb.GetSessionResponse(session=encode_session(summary))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        return await list_sessions(self._sessions, request)

    async def RestoreSession(
        self, request: pb.RestoreSessionRequest, context: Context
    ) -> pb.RestoreSessionResponse:
        session = await self._sessions.restore_expired(request.session_id)
        return pb.RestoreSessionResponse(session=self._resident(session))

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        async with self._sessions.hold(request.session_id) as hold:
            try:
                session = await self._sessions.get(request.session_id, hold=hold)
            except (
                SnapshotModelMismatch,
                SessionUnreadable,
            ):  # it can't be loaded, and is closed so
                stored = await hold.finish(self._sessions.close_stored(request.session_id))
                return pb.CloseSessionResponse(session=encode_session(stored))
            before = self._resident(session)
            before.t = await self._sessions.close(request.session_id, hold=hold)
        before.queued_requests = 0
        return pb.CloseSessionResponse(session=before)

    async def ResetAccuracy(
        self, request: pb.ResetAccuracyRequest, context: Context
    ) -> pb.ResetAccuracyResponse:
        summary = await self._sessions.reset_accuracy(request.session_id)
        return pb.ResetAccuracyResponse(session=encode_session(summary))

    async def ForkSession(
        self, request: pb.ForkSessionRequest, context: Context
    ) -> pb.ForkSessionResponse:
        session = await self._sessions.fork(request.session_id, decode_fork(request))
        return pb.ForkSessionResponse(session=self._resident(session))

    async def ExportSession(
        self, request: pb.ExportSessionRequest, context: Context
    ) -> pb.ExportSessionResponse:
        return await export_whole(self._sessions, request)

    async def ImportSession(
        self, request: pb.ImportSessionRequest, context: Context
    ) -> pb.ImportSessionResponse:
        session = await self._sessions.restore(request.snapshot, decode_import(request))
        return pb.ImportSessionResponse(session=self._resident(session))

    async def StreamExport(self, request: pb.StreamExportRequest, context: Context) -> None:
        await export_parts(self._sessions, self._moving, well_formed(request), context)

    async def StreamImport(
        self, requests: AsyncIterator[pb.StreamImportRequest], context: Context
    ) -> pb.StreamImportResponse:
        session = await import_parts(self._sessions, self._moving, requests)
        return pb.StreamImportResponse(session=self._resident(session))

    async def Step(self, request: pb.StepRequest, context: Context) -> pb.StepResponse:
        step = await apply_step(
            self._sessions,
            self._outgoing,
            request.session_id,
            lambda session, call: decode_step(request, session, call),
        )
        if step.error is not None:
            raise step.error
        return encode_step(step)

    async def StreamSteps(self, _requests: object, context: Context) -> None:
        await self._streams.serve(
            lambda refused: StepStream(
                self._sessions, context, outgoing=self._outgoing, refused=refused
            )
        )

    async def StreamPacked(self, _requests: object, context: Context) -> None:
        await self._streams.serve(
            lambda refused: PackedStream(
                self._sessions, context, outgoing=self._outgoing, refused=refused
            )
        )

    async def Forecast(self, request: pb.ForecastRequest, context: Context) -> pb.ForecastResponse:
        told = await self._sessions.forecast(request.session_id, decode_wish(request))
        size = reply_bytes(told)
        self._outgoing.reserve(size)
        try:
            return await encode_forecasts(request.session_id, told)
        finally:
            self._outgoing.release(size)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        return list_models(list(self._sessions.catalog), request)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        model = self._sessions.catalog.find(request.model, request.version)
        return pb.GetModelResponse(model=encode_model(model))

    async def drain(self) -> None:
        """See `StreamRegistry.drain`."""
        await self._streams.drain()

    def _resident(self, session: ResidentSession) -> pb.Session:
        return encode_session(self._sessions.summary(session))
