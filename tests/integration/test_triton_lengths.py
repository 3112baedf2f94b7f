"""Every field of every request of Triton's API that is served, longer than it may be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from stepstate.client import AsyncClient
from stepstate.server import Server
from stepstate.transport.parts import MAX_REST_BYTES
from stepstate.transport.triton.lengths import VALUES
from stepstate.transport.triton.service import SERVICE, TritonService
from tests.integration.triton import infer, tensor
from tests.integration.wire import HANG, draw

Path = tuple[FieldDescriptor, ...]

TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
SERVED = [method for method in SERVICE.methods if hasattr(TritonService, method.name)]
LONG = {"long": (5_000, 2_000), "very long": (2**20, 50_000)}
"""Bytes of a text, and items of a list: beyond the bound of a field, and beyond all bounds."""


def growing(message: Descriptor, before: Path = ()) -> Iterator[Path]:
    """The ways to all fields that can be long: texts, lists and maps."""
    for field in message.fields:
        path = (*before, field)
        if field.type in TEXTS or is_list(field):
            yield path
        if field.message_type is not None:
            yield from growing(field.message_type, path)


def is_list(field: FieldDescriptor) -> bool:
    return field.label == FieldDescriptor.LABEL_REPEATED


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def part(field: FieldDescriptor, content: bytes) -> bytes:
    """A part of a message on the wire."""
    return varint(field.number << 3 | 2) + varint(len(content)) + content


def grown(path: Path, size: int, items: int) -> bytes:
    """What makes the field of a message long that is appended to it."""
    field = path[-1]
    if field.type in TEXTS and not is_list(field):
        data = part(field, b"a" * size)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        key = field.message_type.fields_by_name["key"]
        data = b"".join(part(field, part(key, b"%06d" % item)) for item in range(items))
    elif field.type in TEXTS or field.message_type is not None:
        data = part(field, b"") * items
    else:  # numbers are packed
        data = part(field, bytes(8 * items))
    for outer in reversed(path[:-1]):
        data = part(outer, data)
    return data


def name_of(path: Path) -> str:
    return ".".join(field.name for field in path)


def problem_with(path: Path, text: str) -> str | None:
    """What is wrong with the answer to a request with a long field."""
    if any(field.full_name in VALUES for field in path):  # it does not match the shape
        return None if "input" in text else text
    return None if name_of(path) in text and len(text) < 1024 else text


def honest() -> bytes:
    return infer("lstm", "live", draw(1), request_id="7").SerializeToString()


@pytest.fixture
async def live(triton: GRPCInferenceServiceStub) -> None:
    """A sequence that each of the requests would step if it were accepted."""
    await triton.ModelInfer(infer("lstm", "live", draw(1), sequence_start=True))


@pytest.mark.parametrize("size", LONG)
@pytest.mark.parametrize("method", [one.name for one in SERVED if not one.client_streaming])
async def test_no_field_of_a_call_may_be_longer_than_its_bound(
    server: Server, client: AsyncClient, live: None, method: str, size: str
):
    message = SERVICE.methods_by_name[method].input_type
    wrong = {}
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary(f"/{SERVICE.full_name}/{method}")
        for path in growing(message):
            before = honest() if message is pb.ModelInferRequest.DESCRIPTOR else b""
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(before + grown(path, *LONG[size]), timeout=HANG)
            code, text = refused.value.code(), refused.value.details() or ""
            if code is not grpc.StatusCode.INVALID_ARGUMENT or problem_with(path, text):
                wrong[name_of(path)] = (code, text[:200])
    assert not wrong
    assert (await client.info("live")).t == 1
    assert not server.sessions.queued_rows


@pytest.mark.parametrize("size", LONG)
async def test_no_field_of_a_streamed_request_may_be_longer_than_its_bound(
    server: Server, client: AsyncClient, live: None, size: str
):
    """Its error is its own: the stream goes on."""
    paths = list(growing(pb.ModelInferRequest.DESCRIPTOR))
    assert len(paths) > 20
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream(
            f"/{SERVICE.full_name}/ModelStreamInfer",
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )()
        async with asyncio.timeout(HANG):
            for path in paths:
                await call.write(honest() + grown(path, *LONG[size]))
                text = (await call.read()).error_message
                assert text, name_of(path)
                assert not problem_with(path, text)
            await call.write(honest())
            reply = (await call.read()).infer_response
            assert (reply.id, tensor(reply).shape) == ("7", (1, 2))
    assert (await client.info("live")).t == 2


@pytest.mark.parametrize("method", [one.name for one in SERVED if not one.client_streaming])
async def test_fields_that_this_server_does_not_know_are_bounded_too(server: Server, method: str):
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary(f"/{SERVICE.full_name}/{method}")
        with pytest.raises(grpc.aio.AioRpcError, match="unknown") as refused:
            await call(varint(1000 << 3 | 2) + varint(MAX_REST_BYTES) + b"a" * MAX_REST_BYTES)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
