"""The API `stepstate.v1.StepstateService`: decode, one call into the sessions, encode.

What `ExportSession` returns any client can read, and `ImportSession` takes; what `StreamExport`
returns `StreamImport` takes.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import TYPE_CHECKING

from stepstate.budget import MemoryUse, call_memory
from stepstate.errors import (
    InvalidField,
    SessionUnreadable,
    SnapshotModelMismatch,
    SnapshotTooLarge,
)
from stepstate.identity import SessionKey, is_tenant
from stepstate.sessions import Pause, ResidentSession
from stepstate.transport.authentication import current_principal
from stepstate.transport.bidi import Backend, StreamRegistry
from stepstate.transport.convert import (
    REPLY_BYTES,
    ReplyPage,
    decode_forecast,
    decode_fork,
    decode_import,
    decode_opening,
    encode_forecasts,
    encode_model,
    encode_page,
    encode_session,
    encode_tenant,
    forecast_reply_bytes,
)
from stepstate.transport.interceptor import SENT, MessageChannel
from stepstate.transport.packed import PackedStream
from stepstate.transport.peers import current_peer
from stepstate.transport.signatures import SnapshotKeys
from stepstate.transport.steps import StepStream, apply_step, decode_step, encode_step
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceServicer

if TYPE_CHECKING:
    from stepstate.transport.peers import Context

PAGE_SIZE, MAX_PAGE_SIZE = 100, 1000
TENANTS_AT_ONCE = 32
"""About a millisecond of work."""
MODEL_NAME_LENGTH = 64
"""As in manifests."""
PART_BYTES = 2**20
LISTED_BYTES = 4096
"""What a session takes while it is listed: its record, and its part of the reply."""
MAX_SNAPSHOT_BYTES = 256 * 2**20
"""As many bytes as the replay windows of all sessions have by default."""

_OfOneSession = (
    pb.GetSessionRequest
    | pb.RestoreSessionRequest
    | pb.CloseSessionRequest
    | pb.ResetAccuracyRequest
    | pb.ForkSessionRequest
    | pb.ExportSessionRequest
    | pb.StreamExportRequest
    | pb.StepRequest
)
_DIGITS = re.compile(r"[0-9]{1,9}")


class StepstateServicer(StepstateServiceServicer):  # type: ignore[misc]
    """The RPCs of the contract; the contract has their documentation.

    Args:
        backend: serves them.
        keys: sign what is exported; by default nothing is signed.
    """

    def __init__(self, backend: Backend, keys: SnapshotKeys | None = None) -> None:
        self._backend = backend
        self._keys = keys or SnapshotKeys()
        self._sessions = backend.sessions
        self._models = {model.key: encode_model(model) for model in backend.sessions.catalog}
        self._streams = StreamRegistry()

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Context
    ) -> pb.OpenSessionResponse:
        session = await self._sessions.open(decode_opening(request, _tenant()))
        return pb.OpenSessionResponse(session=self._encoded(session))

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        summary = await self._sessions.look(_key(request))
        return pb.GetSessionResponse(session=encode_session(summary))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        size = _page_size(request.page_size)
        if len(request.model) > MODEL_NAME_LENGTH:
            raise InvalidField(
                "model",
                f"has {len(request.model)} characters, expected at most {MODEL_NAME_LENGTH}",
            )
        call_memory.get().reserve(MemoryUse.REPLIES, size * LISTED_BYTES)
        pause = self._pause()
        while True:
            found, following = await self._sessions.page(
                request.page_token,
                size,
                request.model,
                tenant=_tenant(),
                expired=request.show_expired,
                pause=pause,
            )
            page = await encode_page(found, pause)
            if len(page) == len(found):
                return pb.ListSessionsResponse(sessions=page, next_page_token=following)
            size = len(page)  # asked again: only the store knows where the next page begins

    async def RestoreSession(
        self, request: pb.RestoreSessionRequest, context: Context
    ) -> pb.RestoreSessionResponse:
        session = await self._sessions.restore_expired(_key(request))
        return pb.RestoreSessionResponse(session=self._encoded(session))

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        key = _key(request)
        async with self._sessions.hold(key) as hold:
            try:
                session = await self._sessions.get(key, hold=hold)
            except (SnapshotModelMismatch, SessionUnreadable):  # it is closed without being loaded
                stored = await hold.finish(self._sessions.close_stored(key))
                return pb.CloseSessionResponse(session=encode_session(stored))
            before = self._encoded(session)
            before.t = await self._sessions.close(key, hold=hold)
        before.queued_requests = 0
        return pb.CloseSessionResponse(session=before)

    async def ResetAccuracy(
        self, request: pb.ResetAccuracyRequest, context: Context
    ) -> pb.ResetAccuracyResponse:
        summary = await self._sessions.reset_accuracy(_key(request))
        return pb.ResetAccuracyResponse(session=encode_session(summary))

    async def ForkSession(
        self, request: pb.ForkSessionRequest, context: Context
    ) -> pb.ForkSessionResponse:
        session = await self._sessions.fork(_key(request), decode_fork(request, _tenant()))
        return pb.ForkSessionResponse(session=self._encoded(session))

    async def ExportSession(
        self, request: pb.ExportSessionRequest, context: Context
    ) -> pb.ExportSessionResponse:
        memory = call_memory.get()

        def reserve(size: int) -> None:
            memory.reserve(MemoryUse.SNAPSHOTS, size)
            memory.reserve(MemoryUse.REPLIES, SENT * size)

        snapshot, summary = await self._sessions.export(_key(request), reserve=reserve)
        snapshot = self._keys.signed(snapshot)
        reply = pb.ExportSessionResponse(snapshot=snapshot, session=encode_session(summary))
        if reply.ByteSize() > REPLY_BYTES:
            raise SnapshotTooLarge(request.session_id, len(snapshot), REPLY_BYTES)
        return reply

    async def ImportSession(
        self, request: pb.ImportSessionRequest, context: Context
    ) -> pb.ImportSessionResponse:
        call_memory.get().reserve(MemoryUse.SNAPSHOTS, len(request.snapshot))
        snapshot = self._keys.verified(request.snapshot)
        session = await self._sessions.restore(snapshot, decode_import(request, _tenant()))
        return pb.ImportSessionResponse(session=self._encoded(session))

    async def StreamExport(
        self, request: pb.StreamExportRequest, context: Context
    ) -> pb.StreamExportResponse:
        memory = call_memory.get()
        memory.reserve(MemoryUse.REPLIES, SENT * PART_BYTES)
        async with self._backend.admission.turn():
            snapshot, summary = await self._sessions.export(
                _key(request), reserve=lambda size: memory.reserve(MemoryUse.SNAPSHOTS, 2 * size)
            )
            snapshot = await asyncio.to_thread(self._keys.signed, snapshot)
        size = len(snapshot)
        if size > MAX_SNAPSHOT_BYTES:
            raise SnapshotTooLarge(request.session_id, size, MAX_SNAPSHOT_BYTES)
        session = encode_session(summary)
        reply = pb.StreamExportResponse(session=session, size=size)
        for first in range(0, size, PART_BYTES):
            reply.data = snapshot[first : first + PART_BYTES]
            await context.write(reply)
            reply = pb.StreamExportResponse()
        return pb.StreamExportResponse(session=session)  # for the audit log

    async def StreamImport(
        self, requests: MessageChannel, context: Context
    ) -> pb.StreamImportResponse:
        first = await anext(requests, None)
        if first is None:
            raise InvalidField("data", "is missing: send the parts of a snapshot")
        size, data = first.size, bytearray()
        if not 0 < size <= MAX_SNAPSHOT_BYTES:
            raise InvalidField(
                "size",
                f"is {size}, expected the bytes of the snapshot, at most {MAX_SNAPSHOT_BYTES}",
            )
        options, part, memory = decode_import(first, _tenant()), first.data, call_memory.get()
        while len(data) <= size:
            memory.reserve(MemoryUse.SNAPSHOTS, 2 * len(part))  # what has come, and later a copy
            data += part
            del part
            following = await anext(requests, None)
            if following is None:
                break
            part = following.data
        if len(data) != size:
            raise InvalidField("data", f"has {len(data)} bytes in all, and size is {size}")
        async with self._backend.admission.turn():
            snapshot = bytes(data)
            data.clear()
            snapshot = await asyncio.to_thread(self._keys.verified, snapshot)
            session = await self._sessions.restore(snapshot, options)
        return pb.StreamImportResponse(session=self._encoded(session))

    async def Step(self, request: pb.StepRequest, context: Context) -> pb.StepResponse:
        make = partial(decode_step, request)
        step = await apply_step(self._backend, _key(request), make)
        if step.error is not None:
            raise step.error
        return encode_step(step)

    async def StreamSteps(self, messages: MessageChannel, context: Context) -> None:
        await self._streams.serve(StepStream(self._backend, messages))

    async def StreamPacked(self, messages: MessageChannel, context: Context) -> None:
        await self._streams.serve(PackedStream(self._backend, messages))

    async def Forecast(self, request: pb.ForecastRequest, context: Context) -> pb.ForecastResponse:
        reserve = partial(call_memory.get().reserve, MemoryUse.REPLIES)
        key = current_principal.get().key
        results = await self._sessions.forecast(
            [key(session_id) for session_id in request.session_id],
            decode_forecast(request),
            admit=current_peer.get().source.tenant.forecasts.take,
            reserve=reserve,
        )
        reserve(SENT * forecast_reply_bytes(results))
        return await encode_forecasts(request.session_id, results, self._pause())

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        models = [self._models[model.key] for model in self._sessions.catalog.of(_tenant())]
        token = request.page_token or "0"  # the number of models on the pages before
        if not _DIGITS.fullmatch(token) or int(token) > len(models):
            raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
        first = int(token)
        page = ReplyPage[pb.Model]()
        for model in models[first : first + (request.page_size or len(models))]:
            if not page.take(model):
                break
        call_memory.get().reserve(MemoryUse.REPLIES, SENT * page.size)
        after = first + len(page)
        following = str(after) if after < len(models) else ""
        return pb.ListModelsResponse(models=page, next_page_token=following)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        model = self._sessions.catalog.of(_tenant()).find(request.model, request.version)
        return pb.GetModelResponse(model=self._models[model.key])

    async def ListTenants(
        self, request: pb.ListTenantsRequest, context: Context
    ) -> pb.ListTenantsResponse:
        size, token = _page_size(request.page_size), request.page_token
        if token and not is_tenant(token):
            raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
        tenants, sessions = self._backend.admission.tenants, self._sessions.open_by_tenant
        known = {*tenants.limits.tenants, *sessions, *(tenant.name for tenant in tenants)}
        names = sorted(name for name in known if name > token)
        page, pause = [], self._pause()
        for name in names[:size]:
            page.append(encode_tenant(tenants.peek(name), sessions.get(name, 0)))
            if len(page) % TENANTS_AT_ONCE == 0:
                await pause()
        following = names[size - 1] if len(names) > size else ""
        return pb.ListTenantsResponse(tenants=page, next_page_token=following)

    def _pause(self) -> Pause:
        """Of the long work of a call."""
        return partial(self._backend.admission.shares.pause, current_peer.get())

    async def drain(self) -> None:
        """See `StreamRegistry.drain`."""
        await self._streams.drain()

    def _encoded(self, session: ResidentSession) -> pb.Session:
        return encode_session(self._sessions.summary(session))


def _page_size(asked: int) -> int:
    if asked > MAX_PAGE_SIZE:
        raise InvalidField("page_size", f"is {asked}, expected at most {MAX_PAGE_SIZE}")
    return asked or PAGE_SIZE


def _tenant() -> str:
    """Whose sessions the call acts on."""
    return current_principal.get().tenant


def _key(request: _OfOneSession) -> SessionKey:
    """Of the session that a request names."""
    return current_principal.get().key(request.session_id)
