"""Metadata at their limits, between grpcio and the lean transport, and of exact sizes by `h2`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from operator import itemgetter
from typing import Any

import grpc
import pytest
from grpc import StatusCode as Code

from stepstate.h2grpc import H2Server
from stepstate.v1 import stepstate_pb2 as pb
from tests.clients.http2 import GRPC, Headers, Http2Client, framed
from tests.integration.wire import raw_stub
from tests.processes import ServerProcess

ECHO = "/test.Echo/Echo"
LIST = "/stepstate.v1.StepstateService/ListModels"
BODY = framed(pb.ListModelsRequest())
LIMIT = 16_384
"""Of a header list, in bytes, as RFC 9113 counts them (section 6.5.2)."""
Entries = list[tuple[str, str | bytes]]


async def echo(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    """Sends the client's metadata back, before and after the reply."""
    given = [(key, value) for key, value in context.invocation_metadata() if key.startswith("x-")]
    await context.send_initial_metadata(given)
    context.set_trailing_metadata(given)
    return request


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """To a server that echoes."""
    server = H2Server()
    handler: Any = grpc.unary_unary_rpc_method_handler(echo)
    generic = grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler})
    server.add_generic_rpc_handlers((generic,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as connected:
        yield connected
    await server.stop(None)


@pytest.mark.parametrize(
    "entries",
    [
        [("x-text", "plain")],
        [("x-text", " ~!@#$%^&*()_+{}|:<>?,./;'[]\\ =\"".strip())],
        [("x-empty", ""), ("x-empty-bin", b"")],
        [("x-same", "1"), ("x-same", "2"), ("x-other", "3"), ("x-same", "1")],
        [("x-same-bin", b"\0"), ("x-same-bin", b"\1\2"), ("x-same-bin", b"\3\4\5")],
        [(f"x-{size}-bin", bytes(range(256))[:size]) for size in (1, 2, 3, 4, 255, 256)],
        [("x-comma-bin", b",,,"), ("x-comma", "a,b,,c")],
        [("x-" + "k" * 1_000, "long key"), ("x-long", "v" * 1_500)],
        [("x-_.0-9", "all that a key may have")],
        [(f"x-{number}", str(number)) for number in range(80)],
    ],
    ids=["text", "marks", "empty", "same", "same-bin", "padding", "commas", "long", "key", "many"],
)
async def test_metadata_come_and_go_unchanged(channel: grpc.aio.Channel, entries: Entries):
    """In order, those of one key: gRPC's C core moves keys."""
    call = channel.unary_unary(ECHO)(b"x", metadata=entries)
    assert await call == b"x"
    for found in (await call.initial_metadata(), await call.trailing_metadata()):
        got = [(key, value) for key, value in found if key.startswith("x-")]
        assert sorted(got, key=itemgetter(0)) == sorted(entries, key=itemgetter(0))


async def test_spaces_at_the_ends_of_a_value_harm_no_call(channel: grpc.aio.Channel):
    """HTTP/2 forbids them (RFC 9113, section 8.2.1), gRPC's C core sends them all the same."""
    call = channel.unary_unary(ECHO)(b"x", metadata=[("x-space", " "), ("x-spaces", " a b  ")])
    assert await call == b"x"
    found = dict(await call.trailing_metadata())
    assert (found["x-space"], found["x-spaces"]) == ("", "a b")


@pytest.mark.parametrize(
    ("value", "status"),
    [("AAECAw", 0), ("AAECAw==", 0), ("", 0), ("AAECAw,BAU=", 0), ("AA!", 13), ("A", 13)],
)
def test_binary_metadata_may_be_padded(served: ServerProcess, value: str, status: int):
    with Http2Client(served.address) as client:
        assert client.call(LIST, BODY, (*GRPC, ("x-bin", value))).grpc[0] == status
        assert client.call(LIST, BODY).grpc[0] == 0


@pytest.mark.parametrize(
    "name",
    [
        "grpc-previous-rpc-attempts",
        "grpc-trace-bin",
        "grpc-tags-bin",
        "grpc-anything",
        "grpc-status",
    ],
)
async def test_reserved_names_do_no_harm(served: ServerProcess, name: str):
    with Http2Client(served.address) as client:
        response = client.call(LIST, BODY, (*GRPC, (name, "MQ")))
        assert response.grpc == (0, "")


@pytest.mark.parametrize("name", ["connection", "transfer-encoding", "X-Upper", "x bad", "x:bad"])
def test_names_that_http2_forbids_are_malformed(served: ServerProcess, name: str):
    with Http2Client(served.address) as client:
        malformed = client.begin(LIST, (*GRPC, (name, "1")))
        assert client.response(malformed).reset == 1  # PROTOCOL_ERROR
        assert client.call(LIST, BODY).grpc[0] == 0


def of_size(size: int) -> Headers:
    """Headers whose list has so many bytes, with those that the client adds."""
    first = [(":method", "POST"), (":scheme", "http"), (":path", LIST), (":authority", "test")]
    used = sum(len(name) + len(value) + 32 for name, value in [*first, *GRPC])
    last = ("x-long", "x" * (size - used - 32 - len("x-long")))
    return (*GRPC, last)


def test_a_header_list_of_exactly_the_limit_is_taken(served: ServerProcess):
    with Http2Client(served.address) as client:
        assert client.call(LIST, BODY, of_size(LIMIT)).grpc == (0, "")


@pytest.mark.parametrize("size", [LIMIT + 1, 40_000])
def test_a_longer_one_is_refused_and_its_connection_goes_on(served: ServerProcess, size: int):
    with Http2Client(served.address) as client:
        stream = client.begin(LIST, of_size(size))
        status, text = client.response(stream).grpc
        assert status == Code.RESOURCE_EXHAUSTED.value[0]
        assert text.startswith("received metadata size exceeds")
        assert client.call(LIST, BODY).grpc[0] == 0


def test_much_longer_ones_are_refused_and_end_their_connection(served: ServerProcess):
    with Http2Client(served.address) as client:
        response = client.response(client.begin(LIST, of_size(70_000)))
        assert response.grpc[0] == Code.RESOURCE_EXHAUSTED.value[0]
        client.read_to_end()
    assert client.goaway == (11, b"headers are too long")  # ENHANCE_YOUR_CALM


async def test_grpcios_client_is_told_that_its_metadata_are_too_long(served: ServerProcess):
    async with raw_stub(served.address) as stub:
        for length in (17_000, 50_000, 300_000):
            call = stub.ListModels(pb.ListModelsRequest(), metadata=(("x-long", "x" * length),))
            assert await call.code() is Code.RESOURCE_EXHAUSTED
            assert (await stub.ListModels(pb.ListModelsRequest())).models
