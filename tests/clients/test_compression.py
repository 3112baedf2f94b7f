"""Compressed messages, from grpcio's clients and to them."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import grpc
import pytest
from grpc import StatusCode as Code

from stepstate.h2grpc import H2Server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.clients.http2 import GRPC, Http2Client, framed
from tests.integration.wire import TOLERANCE, draw, largest_difference, opening, request
from tests.networks import Network
from tests.processes import ServerProcess

HOWS = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
ROWS = draw(500)
SERVICE = "/stepstate.v1.StepstateService"
PACKERS = {"gzip": gzip.compress, "deflate": zlib.compress}


def packed(data: bytes, packer: str) -> bytes:
    """A compressed message as gRPC sends it."""
    small = PACKERS[packer](data)
    return b"\1" + len(small).to_bytes(4, "big") + small


@pytest.mark.parametrize("name", HOWS)
async def test_requests_are_inflated_in_every_kind_of_call(
    inflating: ServerProcess, networks: dict[str, Network], name: str
):
    session = uuid4().hex
    async with grpc.aio.insecure_channel(inflating.address, compression=HOWS[name]) as channel:
        stub = StepstateServiceStub(channel)
        await stub.OpenSession(opening(session_id=session))
        first = await stub.Step(request(session, 0, ROWS[:300]))
        rest = [reply async for reply in stub.StreamSteps([request(session, 300, ROWS[300:])])]
        parts = [
            pb.StreamImportRequest(session_id=session + "-copy", size=part.size, data=part.data)
            async for part in stub.StreamExport(pb.StreamExportRequest(session_id=session))
        ]
        assert (await stub.StreamImport(parts)).session.t == 500
    got = [*first.y, *rest[0].y]
    assert largest_difference(got, networks["lstm"].offline(ROWS)) < TOLERANCE


@pytest.mark.parametrize("name", HOWS)
def test_a_sync_client_may_compress_some_calls(inflating: ServerProcess, name: str):
    session = uuid4().hex
    with grpc.insecure_channel(inflating.address) as channel:
        stub = StepstateServiceStub(channel)
        stub.OpenSession(opening(session_id=session))
        assert stub.Step(request(session, 0, ROWS), compression=HOWS[name]).t == 500
        assert stub.Step(request(session, 500, ROWS)).t == 1000


@pytest.mark.parametrize("how", ["gzip", "deflate", "br", "snappy"])
def test_a_refusal_says_which_codings_are_taken(served: ServerProcess, how: str):
    """gRPC: doc/compression.md. The request may be whole or not."""
    headers = (*GRPC, ("grpc-encoding", how))
    with Http2Client(served.address) as client:
        whole = client.call(f"{SERVICE}/ListModels", framed(pb.ListModelsRequest()), headers)
        begun = client.response(client.begin(f"{SERVICE}/StreamSteps", headers))
        for response in (whole, begun):
            status, text = response.grpc
            assert status == Code.UNIMPLEMENTED.value[0]
            assert how in text
            assert response.headers["grpc-accept-encoding"] == "identity"


def test_an_unknown_coding_is_refused_with_those_that_are_known(inflating: ServerProcess):
    with Http2Client(inflating.address) as client:
        headers = (*GRPC, ("grpc-encoding", "br"))
        response = client.call(f"{SERVICE}/ListModels", framed(pb.ListModelsRequest()), headers)
        assert response.grpc[0] == Code.UNIMPLEMENTED.value[0]
        assert response.headers["grpc-accept-encoding"] == "identity,gzip,deflate"


@pytest.mark.parametrize("coding", ["", "identity"])
def test_a_compressed_message_without_a_coding_is_an_error(inflating: ServerProcess, coding: str):
    with Http2Client(inflating.address) as client:
        headers = (*GRPC, ("grpc-encoding", coding)) if coding else GRPC
        body = packed(b"", "gzip")
        assert client.call(f"{SERVICE}/ListModels", body, headers).grpc[0] == 13  # INTERNAL


@pytest.mark.parametrize("packer", PACKERS)
def test_what_inflates_to_too_much_is_refused_and_the_connection_goes_on(
    inflating: ServerProcess, packer: str
):
    """17 MB of zeros in 17 KB."""
    headers = (*GRPC, ("grpc-encoding", packer))
    with Http2Client(inflating.address) as client:
        bomb = client.call(f"{SERVICE}/Step", packed(bytes(17 * 2**20), packer), headers)
        assert bomb.grpc[0] in {8, 13}  # RESOURCE_EXHAUSTED, INTERNAL
        good = client.call(f"{SERVICE}/ListModels", packed(b"", packer), headers)
        assert good.grpc[0] == 0


@pytest.fixture
async def compressing_server() -> AsyncIterator[str]:
    """The address of a server that compresses its replies."""

    async def echo(message: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        context.set_compression(grpc.Compression.Gzip)
        return message

    async def thrice(messages: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> Any:
        context.set_compression(grpc.Compression.Gzip)
        async for message in messages:
            yield message
            context.disable_next_message_compression()
            yield message
            yield message

    server = H2Server()
    handlers: dict[str, Any] = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Thrice": grpc.stream_stream_rpc_method_handler(thrice),
    }
    generic = grpc.method_handlers_generic_handler("test.Echo", handlers)
    server.add_generic_rpc_handlers((generic,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.mark.parametrize("size", [0, 1, 1_000, 1_000_000])
@pytest.mark.parametrize("how", [None, *HOWS.values()])
async def test_replies_are_compressed_and_read(
    compressing_server: str, size: int, how: grpc.Compression | None
):
    message = bytes(size)
    async with grpc.aio.insecure_channel(compressing_server, compression=how) as channel:
        assert await channel.unary_unary("/test.Echo/Echo")(message) == message
        stream = channel.stream_stream("/test.Echo/Thrice")([message, message])
        assert [reply async for reply in stream] == [message] * 6


async def test_replies_are_compressed_only_for_clients_that_say_so(compressing_server: str):
    def ask() -> list[bytes]:
        accepting = (*GRPC, ("grpc-accept-encoding", "identity, gzip"))
        body = b"\0\0\0\x03\xe8" + bytes(1_000)
        with Http2Client(compressing_server) as client:
            return [client.call("/test.Echo/Echo", body, how).data for how in (accepting, GRPC)]

    small, plain = await asyncio.to_thread(ask)
    assert small[:1] == b"\1"
    assert len(small) < 100
    assert gzip.decompress(small[5:]) == bytes(1_000)
    assert plain == b"\0\0\0\x03\xe8" + bytes(1_000)
