"""How the RPCs of a service are registered with a server: each request has its own parser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from stepstate.transport.parts import parser

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
VALUES = frozenset(
    f"stepstate.v1.{field}"
    for field in (
        "StepRequest.x",
        "StreamPackedRequest.handles",
        "StreamPackedRequest.t",
        "StreamPackedRequest.x",
        "Scenario.x",
        "ImportSessionRequest.snapshot",
        "StreamImportRequest.data",
    )
)
"""The fields of `stepstate.v1` that may be as long as a message."""
REST_BYTES = 2 * 2**20
"""Of its other fields: the ids of 10,000 sessions, or 16,384 bindings."""

Parser = Callable[[bytes], Message]


def parse_stepstate(request: type[Message]) -> Parser:
    """The parser of a request of `stepstate.v1`."""
    return parser(request, VALUES, REST_BYTES)


def offered(service: ServiceDescriptor, servicer: object) -> Iterator[MethodDescriptor]:
    """The RPCs of a service that a servicer has."""
    return (method for method in service.methods if hasattr(servicer, method.name))


def add_service(
    server: grpc.aio.Server,
    service: ServiceDescriptor,
    servicer: object,
    parse: Callable[[type[Message]], Parser],
) -> None:
    """Registers the RPCs that a servicer has: gRPC answers UNIMPLEMENTED for the others.

    Args:
        server: the server.
        service: of the contract.
        servicer: has a method for each RPC.
        parse: the parser of a type of requests.
    """
    handlers = {
        method.name: _MAKERS[method.client_streaming, method.server_streaming](
            getattr(servicer, method.name),
            parse(GetMessageClass(method.input_type)),
            GetMessageClass(method.output_type).SerializeToString,
        )
        for method in offered(service, servicer)
    }
    generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
    server.add_generic_rpc_handlers((generic,))


_MAKERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def add_reflection(server: grpc.aio.Server, *services: str) -> None:
    """Adds server reflection, v1 and v1alpha, so that grpcurl and its like need no proto file.

    grpcio-reflection has v1alpha only. The messages of v1 are the same on the
    wire, so one servicer answers for both names.
    """
    names = (*services, health.SERVICE_NAME, REFLECTION_V1, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (REFLECTION_V1, reflection.SERVICE_NAME):
        handler = grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
        server.add_generic_rpc_handlers((handler,))
