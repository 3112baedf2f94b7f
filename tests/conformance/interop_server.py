"""gRPC's interoperability server on the lean transport.

Usage: interop_server.py --port N [--tls CERT KEY]

What each call does is in
https://github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md, section "Server".
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop

from stepstate.h2grpc import H2Server

PROTO = "interop.proto"
ECHO_INITIAL = "x-grpc-test-echo-initial"
ECHO_TRAILING = "x-grpc-test-echo-trailing-bin"


def stubs() -> tuple[Any, Any]:
    """The messages and the service, compiled when they are needed."""
    sys.path.insert(0, str(Path(__file__).parent))
    return grpc.protos_and_services(PROTO)


pb, services = stubs()


def payload(size: int) -> Any:
    return pb.Payload(body=bytes(size))


async def begin(request: Any, context: Any) -> None:
    """Echoes metadata, and ends the call if the request says so."""
    metadata = dict(context.invocation_metadata())
    if ECHO_INITIAL in metadata:
        await context.send_initial_metadata(((ECHO_INITIAL, metadata[ECHO_INITIAL]),))
    if ECHO_TRAILING in metadata:
        context.set_trailing_metadata(((ECHO_TRAILING, metadata[ECHO_TRAILING]),))
    status = getattr(request, "response_status", None)
    if status is not None and status.code:
        codes = {code.value[0]: code for code in grpc.StatusCode}
        await context.abort(codes[status.code], status.message)


class TestService(services.TestServiceServicer):  # type: ignore[misc, name-defined]
    __test__ = False

    async def EmptyCall(self, request: Any, context: Any) -> Any:
        return pb.Empty()

    async def UnaryCall(self, request: Any, context: Any) -> Any:
        if request.response_compressed.value:
            context.set_compression(grpc.Compression.Gzip)
        await begin(request, context)
        return pb.SimpleResponse(payload=payload(request.response_size))

    async def StreamingOutputCall(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await begin(request, context)
        async for response in self._responses(request):
            yield response

    async def StreamingInputCall(self, requests: Any, context: Any) -> Any:
        size = 0
        async for request in requests:
            size += len(request.payload.body)
        return pb.StreamingInputCallResponse(aggregated_payload_size=size)

    async def FullDuplexCall(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        begun = False
        async for request in requests:
            if not begun or request.response_status.code:
                await begin(request, context)
                begun = True
            async for response in self._responses(request):
                yield response

    async def HalfDuplexCall(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        for request in [request async for request in requests]:
            async for response in self._responses(request):
                yield response

    async def _responses(self, request: Any) -> AsyncIterator[Any]:
        for wanted in request.response_parameters:
            if wanted.interval_us:
                await asyncio.sleep(wanted.interval_us / 1e6)
            yield pb.StreamingOutputCallResponse(payload=payload(wanted.size))


async def serve(port: int, tls: list[str] | None) -> None:
    server = H2Server()
    services.add_TestServiceServicer_to_server(TestService(), server)
    address = f"127.0.0.1:{port}"
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        port = server.add_secure_port(address, context)
    else:
        port = server.add_insecure_port(address)
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"))
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.port, options.tls))


if __name__ == "__main__":
    main()
