"""What a server asks of gRPC's transport: compression, streams, PINGs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest
from hyperframe.frame import Frame, GoAwayFrame, PingFrame, SettingsFrame
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from stepstate.config import ServerConfig
from stepstate.server import running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import draw, opened, raw_stub, request

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame().serialize()
DISABLED = "Compression algorithm '{}' is disabled"


@asynccontextmanager
async def _compressing(address: str, how: grpc.Compression) -> AsyncIterator[StepstateServiceStub]:
    async with grpc.aio.insecure_channel(address, compression=how) as channel:
        yield StepstateServiceStub(channel)


@pytest.mark.parametrize("name", ["gzip", "deflate"])
async def test_compressed_requests_are_refused_with_a_clear_error(config: ServerConfig, name: str):
    """Before they are inflated, in every kind of call, and others are served as before."""
    how = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}[name]
    async with (
        running_server(config) as server,
        raw_stub(server.address) as stub,
        _compressing(server.address, how) as compressing,
    ):
        await opened(stub, "a")
        calls = (compressing.Step(request("a", 0, draw(500))), compressing.StreamSteps())
        for call in calls:
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
            assert DISABLED.format(name) in await call.details()
        assert (await stub.Step(request("a", 0, draw(1)))).t == 1


async def test_compressed_requests_are_taken_on_request(config: ServerConfig):
    config = replace(config, allow_compressed_requests=True)
    async with (
        running_server(config) as server,
        _compressing(server.address, grpc.Compression.Gzip) as stub,
    ):
        await opened(stub, "a")
        assert (await stub.Step(request("a", 0, draw(500)))).t == 500


async def test_tritons_client_is_told_that_it_must_not_compress(config: ServerConfig):
    def infer(address: str) -> None:
        with InferenceServerClient(address) as client:
            x = InferInput("x", [1, 3], "FP32")
            x.set_data_from_numpy(np.zeros((1, 3), np.float32))
            client.infer(
                "lstm", [x], sequence_id=1, sequence_start=True, compression_algorithm="gzip"
            )

    async with running_server(config) as server:
        with pytest.raises(InferenceServerException) as refused:
            await asyncio.to_thread(infer, server.address)
    assert "UNIMPLEMENTED" in str(refused.value.status())
    assert DISABLED.format("gzip") in refused.value.message()


async def test_a_stream_beyond_the_maximum_waits_until_another_ends(config: ServerConfig):
    async with (
        running_server(replace(config, max_concurrent_streams=2)) as server,
        raw_stub(server.address) as stub,
        raw_stub(server.address) as other,
    ):
        await opened(stub, "a")
        streams = [stub.StreamSteps() for _ in range(3)]
        for t in (0, 1):
            await streams[t].write(request("a", t, draw(1)))
            assert (await streams[t].read()).t == t + 1
        waiting = asyncio.create_task(streams[2].write(request("a", 2, draw(1))))
        assert (await other.Step(request("a", None, draw(1)))).t == 3
        assert not waiting.done()
        streams[0].cancel()
        await waiting
        assert (await streams[2].read()).replayed


@pytest.mark.parametrize("length", [20_000, 1_000_000])
async def test_metadata_has_a_limit(config: ServerConfig, length: int):
    async with running_server(config) as server, raw_stub(server.address) as stub:
        long = stub.ListModels(pb.ListModelsRequest(), metadata=(("x-long", "x" * length),))
        assert await long.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "metadata size exceeds" in await long.details()
        assert (await stub.ListModels(pb.ListModelsRequest())).models


@asynccontextmanager
async def _pinged(
    config: ServerConfig, count: int
) -> AsyncIterator[tuple[asyncio.StreamReader, list[PingFrame]]]:
    """A server that was sent pings in one go, and they."""
    async with running_server(config) as server:
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        pings = [PingFrame(opaque_data=place.to_bytes(8, "big")) for place in range(count)]
        writer.write(PREFACE + b"".join(ping.serialize() for ping in pings))
        try:
            yield reader, pings
        finally:
            writer.close()


async def _read_frame(reader: asyncio.StreamReader) -> Frame:
    frame, length = Frame.parse_frame_header(memoryview(await reader.readexactly(9)))
    frame.parse_body(memoryview(await reader.readexactly(length)))
    return frame


async def test_grpcio_answers_pings_however_many(config: ServerConfig):
    """A limit ends connections of honest clients behind a proxy, and makes a flood expensive."""
    async with _pinged(replace(config, transport="grpcio"), 1_000) as (reader, pings):
        answered = []
        while len(answered) < len(pings):
            frame = await _read_frame(reader)
            assert not isinstance(frame, GoAwayFrame)
            if isinstance(frame, PingFrame):
                answered.append(frame.opaque_data)
        assert answered == [ping.opaque_data for ping in pings]


async def test_pings_without_calls_that_come_too_fast_end_their_connection(config: ServerConfig):
    """With the words that gRPC's clients slow down for; then the server closes it."""
    async with _pinged(config, 1_000) as (reader, _pings):
        answered, frame = 0, await _read_frame(reader)
        while not isinstance(frame, GoAwayFrame):
            answered += isinstance(frame, PingFrame)
            frame = await _read_frame(reader)
        assert answered == 3  # the first, and two that came too soon
        assert (frame.error_code, frame.additional_data) == (11, b"too_many_pings")
        assert await reader.read() == b""
