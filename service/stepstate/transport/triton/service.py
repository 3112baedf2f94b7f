"""The RPCs of `inference.GRPCInferenceService`, over the same sessions as `stepstate.v1`.

What is not here (repository control, shared memory, traces, log settings) is UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2 as pb

from stepstate.budget import MemoryAccount
from stepstate.errors import InvalidField, ModelUnknown
from stepstate.models import Catalog, Model
from stepstate.transport.authentication import current_principal
from stepstate.transport.bidi import Backend, StreamRegistry
from stepstate.transport.convert import REPLY_BYTES
from stepstate.transport.interceptor import MessageChannel
from stepstate.transport.parts import parser
from stepstate.transport.registration import add_service, offered
from stepstate.transport.triton import metadata
from stepstate.transport.triton.call import InferCall, RequestHead
from stepstate.transport.triton.ended import EndedSequences
from stepstate.transport.triton.expected_infers import ExpectedInfers
from stepstate.transport.triton.lengths import VALUES, check_lengths
from stepstate.transport.triton.sequences import SequenceService
from stepstate.transport.triton.stream import InferStream

if TYPE_CHECKING:
    from stepstate.transport.peers import Context


SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
MODELS_AT_ONCE = 100
"""Whose statistics are read before others take turns: about a millisecond."""


class TritonService:
    """The RPCs; Triton's protocol documents them.

    Args:
        backend: serves them.
        memory: counts what ended sequences take.
    """

    name: str = SERVICE.full_name

    def __init__(self, backend: Backend, memory: MemoryAccount) -> None:
        self._backend = backend
        self._sessions = backend.sessions
        self.sequences = SequenceService(backend, EndedSequences(memory))
        self._streams = StreamRegistry()
        self.expected = ExpectedInfers(self._sessions.table.limit)
        self._descriptions = metadata.Descriptions(
            self._sessions.catalog, self._sessions.default_idle_timeout
        )

    def methods(self) -> Iterator[MethodDescriptor]:
        """The RPCs that are offered."""
        return offered(SERVICE, self)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the RPCs that are offered."""
        add_service(server, SERVICE, self, _parser)

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=not self._streams.draining)

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        try:
            self._model(request.name, request.version)
        except ModelUnknown:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._streams.draining)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        return metadata.server_metadata()

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        return self._descriptions.metadata[self._model(request.name, request.version).key]

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        return self._descriptions.configs[self._model(request.name, request.version).key]

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        tenant = current_principal.get().tenant
        infer = InferCall.of(request, RequestHead.of(request), tenant)
        if infer.plain:
            return infer.reply(await self.sequences.step(infer))
        async with self._sessions.hold(infer.key) as hold:
            return await self.sequences.apply(infer, hold)

    async def ModelStreamInfer(self, messages: MessageChannel, context: Context) -> None:
        stream = InferStream(self._backend, messages, self.sequences, self.expected)
        await self._streams.serve(stream)

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        if request.name:
            self._model(request.name, request.version)
        reply = pb.ModelStatisticsResponse()
        for place, model in enumerate(self._catalog(), 1):
            name, version = model.manifest.name, model.manifest.version
            if request.name in ("", name) and request.version in ("", version):
                counted = self._backend.metrics.model(name, version)
                reply.model_stats.append(metadata.model_statistics(model, counted))
            if place % MODELS_AT_ONCE == 0:
                await asyncio.sleep(0)
        if reply.ByteSize() > REPLY_BYTES:
            raise InvalidField("name", "is empty, and all models do not fit a reply: name one")
        return reply

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        return metadata.index(self._catalog())

    async def drain(self) -> None:
        """See `StreamRegistry.drain`."""
        await self._streams.drain()

    def _catalog(self) -> Catalog:
        """The models that the caller may use."""
        return self._sessions.catalog.of(current_principal.get().tenant)

    def _model(self, name: str, version: str) -> Model:
        return self._catalog().find(name, version)


def _parser(request: type[Message]) -> Callable[[bytes], Message]:
    """The deserializer of a request; see `InferCall.of` for the lengths in a ModelInferRequest."""
    parse = parser(request, VALUES)
    if request is pb.ModelInferRequest:
        return parse

    def parse_short(data: bytes) -> Message:
        message = parse(data)
        check_lengths(message)
        return message

    return parse_short
