"""What no client of Triton's would send, full queues and drains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as native_pb
from tests.integration.triton import (
    exchange,
    infer,
    refusal,
    tensor,
    triton_stub,
)
from tests.integration.wire import (
    TOLERANCE,
    blocker,
    draw,
    largest_difference,
    opened,
    queued,
    raw_stub,
)
from tests.networks import Network


def _malformed() -> dict[str, tuple[pb.ModelInferRequest, str]]:
    """Requests that no server could answer, and a word of the error."""
    x = draw(1)
    made: dict[str, tuple[pb.ModelInferRequest, str]] = {}

    def bad(name: str, word: str, **parameters: object) -> pb.ModelInferRequest:
        request = infer("lstm", parameters.pop("sequence_id", "live"), x, **parameters)
        made[name] = (request, word)
        return request

    bad("dtype", "data-type").inputs[0].datatype = "INT32"
    bad("length", "byte size").raw_input_contents[0] = b"1234567"
    bad("no contents", "number of values").ClearField("raw_input_contents")
    bad("two buffers", "byte size").raw_input_contents.append(b"")
    bad("both", "contents field").inputs[0].contents.fp32_contents.extend([1, 2, 3])
    bad("unknown input", "'z'").inputs[0].name = "z"
    bad("two inputs", "2 inputs").inputs.add(name="x")
    bad("no input", "0 inputs").ClearField("inputs")
    bad("shape", "[-1,3]").inputs[0].shape[:] = [3, 1]
    bad("negative shape", "[-1,3]").inputs[0].shape[:] = [-1, 3]
    bad("huge shape", "byte size").inputs[0].shape[:] = [2**62, 3]
    bad("output", "'nothing'").outputs.add(name="nothing")
    shared = bad("shared memory", "shared memory")
    shared.inputs[0].parameters["shared_memory_region"].string_param = "r"
    bad("nan", "nan").raw_input_contents[0] = np.full(3, np.nan, "<f4").tobytes()
    bad("model", "START", sequence_id="gone").model_name = "nothing"
    bad("other model", "id of a session of model").model_name = "gru"
    bad("no id", "correlation ID", sequence_id=0)
    bad("empty id", "correlation ID", sequence_id="")
    bad("bool id", "neither", sequence_id=True)
    bad("largest id", "START", sequence_id=2**64 - 1)
    bad("long id", "1 to 128", sequence_id="a" * 4_000)
    bad("id", "sequence_id", sequence_id="no spaces, please")
    bad("flag", "bool", sequence_end="yes")
    bad("final flag", "bool", triton_enable_empty_final_response="yes")
    bad("step_t", "step_t", step_t=-1)
    bad("end on unknown", "START", sequence_id="gone", sequence_end=True)
    bad("bad start", "data-type", sequence_start=True).inputs[0].datatype = "BYTES"
    start = bad("start with nan", "nan", sequence_start=True)
    start.raw_input_contents[0] = np.full(3, np.nan, "<f4").tobytes()
    held = bad("start with infinity", "inf", sequence_start=True, missing="hold")
    held.raw_input_contents[0] = np.array([np.inf, np.nan, 0], "<f4").tobytes()
    bad("start with a policy", "reject, impute, hold", sequence_start=True, missing="zero")
    bad("start of another model's", "id of a session", sequence_start=True).model_name = "gru"
    bad("start ahead", "starts at 0", sequence_start=True, step_t=4)
    bad("start of no model", "not loaded", sequence_start=True).model_name = "nothing"
    bad("start time", "ISO 8601", sequence_start=True, start_time="tomorrow")
    for name, time in (
        ("start before all time", "0001-01-01T00:00:00+14:00"),
        ("start after all time", "9999-12-31T23:59:59-14:00"),
    ):
        bad(name, "years 1 to 9999", sequence_start=True, start_time=time)
    return made


@pytest.mark.parametrize("name", _malformed())
async def test_a_malformed_request_gets_an_error_and_harms_nobody(
    triton: GRPCInferenceServiceStub, client: AsyncClient, network: Network, name: str
):
    x = draw(3)
    request, word = _malformed()[name]
    await triton.ModelInfer(infer("lstm", "live", x[0], sequence_start=True))
    code, text = await refusal(triton.ModelInfer(request))
    assert code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert word in text
    request.id = "7"
    bad, good = await exchange(triton, [request, infer("lstm", "live", x[1], request_id="8")])
    if good.error_message:  # another session's reply may come first
        bad, good = good, bad
    assert word in bad.error_message
    assert bad.infer_response.id == "7"
    got = tensor(good.infer_response)
    assert largest_difference(got[None], network.offline(x[:2])[1:]) <= TOLERANCE
    assert (await client.info("live")).t == 2


async def test_a_full_queue_makes_requests_wait(
    model_root: Path, networks: dict[str, Network], tmp_path: Path
):
    small = ServerConfig(
        models=model_root,
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        store=f"sqlite:{tmp_path / 'sessions.db'}",
        queue_requests=2,
    )
    x = draw(20)
    async with running_server(small) as server, triton_stub(server.address) as triton:
        requests = [
            infer("lstm", one, x[t], sequence_start=t == 0, request_id=str(one))
            for t in range(20)
            for one in range(1, 9)
        ]
        replies = await exchange(triton, requests)
    assert not [r.error_message for r in replies if r.error_message]
    want = networks["lstm"].offline(x)
    for one in range(1, 9):
        got = [tensor(r.infer_response) for r in replies if r.infer_response.id == str(one)]
        assert largest_difference(got, want) <= TOLERANCE


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_close_that_comes_while_a_request_waits_for_room_goes_after_it(
    config: ServerConfig, networks: dict[str, Network], *, streamed: bool
):
    few = replace(config, queue_requests=1)
    x = draw(2)
    async with (
        running_server(few) as server,
        triton_stub(server.address) as triton,
        raw_stub(server.address) as stub,
    ):
        await opened(stub, "busy")
        await opened(stub, "a")
        long = asyncio.ensure_future(_plain(stub.Step(blocker("busy", rows=1_000))))
        await queued(stub, "busy", 1)
        request = infer("lstm", "a", x[0])
        if streamed:
            waiting = asyncio.create_task(exchange(triton, [request]))
        else:
            waiting = asyncio.create_task(_plain(triton.ModelInfer(request)))
        await asyncio.sleep(0.1)
        closed = await stub.CloseSession(native_pb.CloseSessionRequest(session_id="a"))
        assert closed.session.t == 1
        told = await waiting
        y = tensor(told[0].infer_response if streamed else told)
        assert largest_difference(y, networks["lstm"].offline(x[:1])[0]) <= TOLERANCE
        await long


async def _plain(call: Awaitable[object]) -> object:
    return await call


async def test_bytes_that_are_no_message_are_an_error_in_band(server: Server):
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )()
        await call.write(b"\xff\xff\xff")
        await call.write(
            infer("lstm", 1, draw(1), sequence_start=True, request_id="1").SerializeToString()
        )
        await call.done_writing()
        bad, good = [reply async for reply in call]
        assert "can't be parsed" in bad.error_message
        assert good.infer_response.id == "1"


async def test_a_drain_answers_what_was_accepted(config: ServerConfig):
    async with running_server(config) as server, triton_stub(server.address) as triton:
        call = triton.ModelStreamInfer()
        await call.write(infer("lstm", 1, draw(1), sequence_start=True))
        assert not (await call.read()).error_message
        await server.drain()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
            raise await _status_error(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def _status_error(call: grpc.aio.StreamStreamCall) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(await call.code(), metadata, metadata, await call.details())


async def test_outputs_that_no_reply_can_hold_are_refused(
    triton: GRPCInferenceServiceStub, client: AsyncClient
):
    """However often an output is named, the reply stays within 4,000,000 bytes."""
    request = infer("lstm", "many", draw(1_000), sequence_start=True)
    for _ in range(501):
        request.outputs.add(name="y")
    code, message = await refusal(triton.ModelInfer(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "would take 4008000 bytes" in message
    del request.outputs[500:]
    reply = await triton.ModelInfer(request)
    assert reply.ByteSize() < 4 * 2**20


async def test_the_names_of_outputs_count_while_a_request_waits(
    triton: GRPCInferenceServiceStub, server: Server
):
    """A name of 9 bytes takes 13 on the wire, and 70 here."""
    await triton.ModelInfer(infer("lstm", "a", draw(1), sequence_start=True))
    many = infer("lstm", "a", draw(1))
    for _ in range(1_000):
        many.outputs.add(name="quantiles")
    call = triton.ModelStreamInfer()
    before = server.memory.used
    await call.write(infer("lstm", "a", draw(2_000), sequence_start=True))
    for _ in range(10):
        await call.write(many)
    async with asyncio.timeout(10):
        while server.memory.used < before + 10 * 1_000 * 70:
            await asyncio.sleep(0)
    call.cancel()
