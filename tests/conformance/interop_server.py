"""The server of gRPC's interoperability tests, on the lean transport.

Usage: tests/conformance/interop_server.py --port N [--tls]

It prints its port when it serves, and with `--tls` the file of the authority that signed its
certificate, which is made anew for the name "localhost".

What each call does is in
https://github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md, section "Server".
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop

sys.path.insert(0, str(Path(__file__).parents[2]))  # it is run as a program

from stepstate.h2grpc import H2Server
from tests.certificates import Authority

ECHO_INITIAL = "x-grpc-test-echo-initial"
ECHO_TRAILING = "x-grpc-test-echo-trailing-bin"
CODES = {code.value[0]: code for code in grpc.StatusCode}

pb, services = grpc.protos_and_services("tests/conformance/interop.proto")
"""The messages and the service, compiled here: they have no types."""


class TestService(services.TestServiceServicer):  # type: ignore[misc, name-defined]
    """`grpc.testing.TestService`."""

    __test__ = False

    async def EmptyCall(self, request: Any, context: Any) -> Any:
        return pb.Empty()

    async def UnaryCall(self, request: Any, context: Any) -> Any:
        if request.response_compressed.value:
            context.set_compression(grpc.Compression.Gzip)
        await echo_metadata(context)
        await end_as_asked(request, context)
        return pb.SimpleResponse(payload=zeros(request.response_size))

    async def StreamingOutputCall(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await echo_metadata(context)
        await end_as_asked(request, context)
        async for response in responses(request):
            yield response

    async def StreamingInputCall(self, requests: Any, context: Any) -> Any:
        size = 0
        async for request in requests:
            size += len(request.payload.body)
        return pb.StreamingInputCallResponse(aggregated_payload_size=size)

    async def FullDuplexCall(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        await echo_metadata(context)
        async for request in requests:
            await end_as_asked(request, context)
            async for response in responses(request):
                yield response

    async def HalfDuplexCall(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        for request in [request async for request in requests]:
            async for response in responses(request):
                yield response


async def echo_metadata(context: Any) -> None:
    """Sends back what a client wants to see again in its metadata."""
    metadata = dict(context.invocation_metadata())
    if ECHO_INITIAL in metadata:
        await context.send_initial_metadata(((ECHO_INITIAL, metadata[ECHO_INITIAL]),))
    if ECHO_TRAILING in metadata:
        context.set_trailing_metadata(((ECHO_TRAILING, metadata[ECHO_TRAILING]),))


async def end_as_asked(request: Any, context: Any) -> None:
    """Ends the call if the request has a status for it."""
    status = request.response_status
    if status.code:
        await context.abort(CODES[status.code], status.message)


async def responses(request: Any) -> AsyncIterator[Any]:
    """The responses that a request of a stream asks for."""
    for wanted in request.response_parameters:
        if wanted.interval_us:
            await asyncio.sleep(wanted.interval_us / 1e6)
        yield pb.StreamingOutputCallResponse(payload=zeros(wanted.size))


def zeros(size: int) -> Any:
    return pb.Payload(body=bytes(size))


async def serve(port: int, folder: Path | None) -> None:
    """Serves until the process ends; with a folder for its certificate: on TLS."""
    server = H2Server()
    services.add_TestServiceServicer_to_server(TestService(), server)
    address = f"127.0.0.1:{port}"
    if folder is None:
        print(server.add_insecure_port(address))
    else:
        authority = Authority(folder)
        made = authority.issue("localhost", "DNS:localhost")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.file, made.key)
        print(server.add_secure_port(address, lambda: context), authority.file)
    await server.start()
    sys.stdout.flush()
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--tls", action="store_true")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="interop-") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(serve(options.port, Path(folder) if options.tls else None))


if __name__ == "__main__":
    main()
