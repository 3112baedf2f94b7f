"""The facts of HTTP/2 in a gRPC call, and what requests that are no gRPC calls are answered."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from stepstate.v1 import stepstate_pb2 as pb
from tests.clients.http2 import GRPC, Http2Client, framed
from tests.processes import ServerProcess

PATH = "/stepstate.v1.StepstateService/ListModels"
BODY = framed(pb.ListModelsRequest())
TE = ("te", "trailers")


@pytest.fixture
def client(served: ServerProcess) -> Iterator[Http2Client]:
    with Http2Client(served.address) as connected:
        yield connected


@pytest.mark.parametrize(
    "kind",
    [
        "application/grpc",
        "application/grpc+proto",
        "application/grpc;charset=utf-8",
        "application/grpc; charset=utf-8",
    ],
)
def test_content_types_of_grpc_are_served(client: Http2Client, kind: str):
    response = client.call(PATH, BODY, (("content-type", kind), TE))
    assert response.headers[":status"] == "200"
    assert response.headers["content-type"] == "application/grpc"
    assert response.grpc == (0, "")
    assert pb.ListModelsResponse.FromString(response.data[5:]).models


@pytest.mark.parametrize(
    "kind", ["application/json", "application/grpc-web", "application/grpcx", "text/plain", ""]
)
def test_other_content_types_are_not_served(client: Http2Client, kind: str):
    response = client.call(PATH, BODY, (("content-type", kind), TE) if kind else (TE,))
    assert response.headers[":status"] == "415"
    assert "grpc-status" not in response.headers
    assert client.call(PATH, BODY).grpc[0] == 0


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "OPTIONS"])
def test_other_methods_are_not_allowed(client: Http2Client, method: str):
    assert client.call(PATH, b"", GRPC, method=method).headers[":status"] == "405"
    assert client.call(PATH, BODY).grpc[0] == 0


@pytest.mark.parametrize(
    "path",
    [
        "/stepstate.v1.StepstateService/Nothing",
        "/stepstate.v1.Nothing/ListModels",
        "/stepstate.v1.StepstateService/ListModels/",
        "/stepstate.v1.StepstateService/listmodels",
        "/ListModels",
        "/",
        "//",
        "*",
        "/%73tepstate.v1.StepstateService/ListModels",
        "/stepstate.v1.StepstateService/ListModels?x=1",
    ],
)
def test_an_unknown_method_is_unimplemented(client: Http2Client, path: str):
    assert client.call(path, BODY).grpc[0] == 12
    assert client.call(PATH, BODY).grpc[0] == 0


@pytest.mark.parametrize("authority", ["example.com:443", "[::1]:50051", "unix%3Apath", ""])
def test_any_authority_is_served(client: Http2Client, authority: str):
    assert client.call(PATH, BODY, authority=authority).grpc[0] == 0


def test_host_instead_of_authority_is_served(client: Http2Client):
    assert client.call(PATH, BODY, (*GRPC, ("host", "example.com")), authority="").grpc[0] == 0


def test_te_is_trailers_or_is_not_there(client: Http2Client):
    """A proxy may drop it. Anything else is malformed (RFC 9113, section 8.2.2)."""
    kind = GRPC[0]
    assert client.call(PATH, BODY, (kind,)).grpc[0] == 0
    malformed = client.begin(PATH, (kind, ("te", "gzip")))
    assert client.response(malformed).reset == 1  # PROTOCOL_ERROR
    assert client.call(PATH, BODY).grpc[0] == 0


@pytest.mark.parametrize(
    ("timeout", "status"),
    [("1H", 0), ("99999999u", 0), ("5S", 0), ("0n", 4), ("1", 13), ("-1S", 13), ("123456789S", 13)],
)
def test_timeouts_are_read_as_grpc_writes_them(client: Http2Client, timeout: str, status: int):
    response = client.call(PATH, BODY, (*GRPC, ("grpc-timeout", timeout)))
    assert response.headers[":status"] == "200"
    assert response.grpc[0] == status
    assert client.call(PATH, BODY).grpc[0] == 0


def test_trailers_that_end_a_request_end_it(client: Http2Client):
    stream = client.begin(PATH)
    client.send(stream, BODY, end=False)
    client.http.send_headers(stream, [("x-checksum", "1")], end_stream=True)
    client.send(client.begin(PATH), BODY)  # writes
    assert client.response(stream).grpc[0] == 0


def test_a_call_without_a_request_is_refused(client: Http2Client):
    status, _ = client.call(PATH, b"").grpc
    assert status != 0
    assert client.call(PATH, BODY).grpc[0] == 0


@pytest.mark.parametrize("line", ["GET / HTTP/1.1", "POST /x HTTP/1.0"])
def test_a_client_of_http_1_is_told_so(served: ServerProcess, line: str):
    host, _, port = served.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{line}\r\nhost: x\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            head, _, text = answer.read().decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 505 ")
    assert f"content-length: {len(text)}" in head
    assert "gRPC" in text
