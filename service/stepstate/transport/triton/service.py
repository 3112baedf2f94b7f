"""The RPCs of `inference.GRPCInferenceService`, over the same sessions as `stepstate.v1`.

What is not here (repository control, shared memory, traces, log settings) is UNIMPLEMENTED.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from tritonclient.grpc import service_pb2 as pb

from stepstate.errors import ModelUnknown
from stepstate.models import Model
from stepstate.transport.bidi import Backend, StreamRegistry
from stepstate.transport.interceptor import MessageChannel
from stepstate.transport.triton import metadata
from stepstate.transport.triton.call import InferCall
from stepstate.transport.triton.sequences import SequenceService
from stepstate.transport.triton.stream import InferStream

if TYPE_CHECKING:
    from stepstate.transport.peers import Context


SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


class TritonService:
    """The RPCs; Triton's protocol documents them."""

    name: str = SERVICE.full_name

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._sessions = backend.sessions
        self.sequences = SequenceService(backend)
        self._streams = StreamRegistry()

    def methods(self) -> Iterator[MethodDescriptor]:
        """The RPCs that are offered."""
        return (method for method in SERVICE.methods if hasattr(self, method.name))

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the RPCs that are offered: gRPC itself answers UNIMPLEMENTED for the others."""
        handlers = {}
        for method in self.methods():
            streams = method.client_streaming
            make = (
                grpc.stream_stream_rpc_method_handler
                if streams
                else grpc.unary_unary_rpc_method_handler
            )
            handlers[method.name] = make(
                getattr(self, method.name),
                GetMessageClass(method.input_type).FromString,
                GetMessageClass(method.output_type).SerializeToString,
            )
        generic = grpc.method_handlers_generic_handler(self.name, handlers)
        server.add_generic_rpc_handlers((generic,))

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
        model = self._model(request.name, request.version)
        name = model.manifest.name
        versions = [m.manifest.version for m in self._sessions.catalog if m.manifest.name == name]
        return metadata.metadata(model, versions)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        model = self._model(request.name, request.version)
        return metadata.config(model, self._sessions.default_idle_timeout(model.manifest))

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        infer = InferCall.of(request)
        if infer.plain:
            return infer.reply(await self.sequences.step(infer))
        async with self._sessions.hold(infer.session_id) as hold:
            return infer.reply(await self.sequences.apply(infer, hold))

    async def ModelStreamInfer(self, messages: MessageChannel, context: Context) -> None:
        await self._streams.serve(InferStream(self._backend, messages, self.sequences))

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        if request.name:
            self._model(request.name, request.version)
        return pb.ModelStatisticsResponse(
            model_stats=[
                metadata.model_statistics(model, self._backend.metrics.model(name, version))
                for model in self._sessions.catalog
                for name, version in ((model.manifest.name, model.manifest.version),)
                if request.name in ("", name) and request.version in ("", version)
            ]
        )

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        response = pb.RepositoryIndexResponse()
        for model in self._sessions.catalog:
            response.models.add(
                name=model.manifest.name, version=model.manifest.version, state="READY"
            )
        return response

    async def drain(self) -> None:
        """See `StreamRegistry.drain`."""
        await self._streams.drain()

    def _model(self, name: str, version: str) -> Model:
        return self._sessions.catalog.find(name, version)
