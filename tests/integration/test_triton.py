"""Triton's own clients, unmodified, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import aio, model_config_pb2
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from stepstate.budget import MemoryUse
from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.errors import SessionClosed
from stepstate.server import Server, running_server
from stepstate.transport.triton.ended import MAX_ENDED, MAX_ENDED_BYTES
from tests.integration.triton import (
    exchange,
    infer,
    inputs,
    refusal,
    stream_with_callbacks,
    tensor,
    triton_stub,
)
from tests.integration.wire import (
    TOLERANCE,
    draw,
    largest_difference,
    sample,
    scrape,
)
from tests.networks import Network

pytestmark = pytest.mark.transports

CLOSE = 1e-6


async def test_the_callback_client_streams_sequences(server: Server, network: Network):
    sequences: dict[int | str, np.ndarray] = {
        1: draw(30, seed=1),
        2**62: draw(20, seed=2),
        "meter-7": draw(25, seed=3),
    }
    got = await asyncio.to_thread(stream_with_callbacks, server.address, "lstm", sequences)
    for one, rows in sequences.items():
        assert largest_difference(got[one], network.offline(rows)) <= TOLERANCE
    assert len(server.sessions) == 0  # every one was ended


async def test_the_asyncio_client_streams_and_calls(server: Server, network: Network):
    x = draw(12, seed=4)
    async with aio.InferenceServerClient(server.address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("lstm")
        assert not await client.is_model_ready("lstm", "9")

        async def requests() -> AsyncIterator[dict[str, object]]:
            for place, row in enumerate(x[:6]):
                yield {
                    "model_name": "lstm",
                    "inputs": inputs(row[None]),
                    "sequence_id": "a",
                    "sequence_start": place == 0,
                    "request_id": str(place),
                }

        got = []
        results = client.stream_infer(requests())
        for place in range(6):
            result, error = await anext(results)
            assert error is None
            assert result.get_response().id == str(place)
            assert result.as_numpy("y").shape == (1, 2)
            got.append(result.as_numpy("y")[0])
        results.cancel()
        calls = [await client.infer("lstm", inputs(row), sequence_id="a") for row in x[6:]]
        got += [call.as_numpy("y") for call in calls]
    assert largest_difference(got, network.offline(x)) <= TOLERANCE


async def test_a_session_alone_gets_the_native_doors_bits(
    triton: GRPCInferenceServiceStub, client: AsyncClient
):
    x = draw(40, seed=5)
    session = await client.open("lstm")
    native = np.stack([await session.step(row) for row in x]).reshape(40, -1)
    here = []
    for place, row in enumerate(x):
        reply = await triton.ModelInfer(infer("lstm", 5, row, sequence_start=place == 0))
        here.append(tensor(reply))
    assert np.array_equal(np.stack(here), native)


async def test_among_others_a_session_gets_the_native_doors_numbers(
    triton: GRPCInferenceServiceStub, client: AsyncClient
):
    x = {one: draw(20, seed=one) for one in range(1, 17)}
    requests = [
        infer("lstm", one, x[one][place], sequence_start=place == 0, request_id=str(one))
        for place in range(20)
        for one in x
    ]
    replies = await exchange(triton, requests)
    session = await client.open("lstm")
    for one in (1, 7, 16):
        native = await session.step(x[one])
        mine = [tensor(r.infer_response) for r in replies if r.infer_response.id == str(one)]
        assert np.allclose(mine, native, rtol=CLOSE, atol=CLOSE / 10)
        session = await client.open("lstm")


async def test_sessions_are_shared_by_both_doors(
    triton: GRPCInferenceServiceStub, client: AsyncClient, network: Network
):
    x = draw(9)
    session = await client.open("lstm", session_id="shared")
    got = [*(await session.step(x[:3]))]
    got.append(tensor(await triton.ModelInfer(infer("lstm", "shared", x[3]))))
    await triton.ModelInfer(infer("lstm", 77, x[0], sequence_start=True))
    assert (await client.info("77")).t == 1
    assert (await client.info("shared")).t == 4
    got += [*tensor(await triton.ModelInfer(infer("lstm", "shared", x[4:], sequence_end=True)))]
    assert largest_difference(got, network.offline(x)) <= TOLERANCE
    with pytest.raises(SessionClosed):
        await client.info("shared")
    assert await client.close("77")


async def test_a_start_on_a_live_id_begins_anew_and_is_counted(
    triton: GRPCInferenceServiceStub, server: Server, network: Network
):
    x = draw(5)
    first = [
        infer("lstm", 3, row, sequence_start=place == 0, request_id=str(place))
        for place, row in enumerate(x)
    ]
    replies = await exchange(triton, first + first)
    assert not [r.error_message for r in replies if r.error_message]
    got = [tensor(r.infer_response) for r in replies]
    want = network.offline(x)
    assert largest_difference(got[:5], want) <= TOLERANCE
    assert largest_difference(got[5:], want) <= TOLERANCE
    told = await scrape(server.metrics_address)
    series = 'stepstate_sequences_restarted_total{model="lstm",version="1"}'
    assert sample(told, series) == 1


async def test_a_sequence_of_one_request_starts_and_ends_with_it(
    triton: GRPCInferenceServiceStub, server: Server, network: Network
):
    x = draw(1)
    for _ in range(3):
        reply = await triton.ModelInfer(infer("lstm", 4, x, sequence_start=True, sequence_end=True))
        assert largest_difference(tensor(reply), network.offline(x)) <= TOLERANCE
    assert len(server.sessions) == 0


async def test_step_t_applies_a_repeated_request_once(
    triton: GRPCInferenceServiceStub, client: AsyncClient, network: Network
):
    x = draw(4)
    got = []
    for t, row in enumerate(x):
        request = infer("lstm", "once", row, step_t=t, sequence_start=t == 0, sequence_end=t == 3)
        first, again = await triton.ModelInfer(request), await triton.ModelInfer(request)
        assert again.raw_output_contents == first.raw_output_contents
        told = [reply.parameters["step_t"].int64_param for reply in (first, again)]
        assert told == [t + 1, t + 1]
        replayed = [reply.parameters["replayed"].bool_param for reply in (first, again)]
        assert replayed == [False, True]
        got.append(tensor(first))
    assert largest_difference(got, network.offline(x)) <= TOLERANCE
    ahead = infer("lstm", "new", x[0], sequence_start=True)
    await triton.ModelInfer(ahead)
    code, _ = await refusal(triton.ModelInfer(infer("lstm", "new", x[1], step_t=7)))
    assert code is grpc.StatusCode.ABORTED
    assert (await client.info("new")).t == 1


async def test_with_step_t_a_start_with_other_rows_is_a_new_sequence(
    triton: GRPCInferenceServiceStub, client: AsyncClient, network: Network
):
    x = draw(3)
    for place in (0, 1):
        await triton.ModelInfer(infer("lstm", 9, x[place], step_t=place, sequence_start=not place))
    reply = await triton.ModelInfer(infer("lstm", 9, x[2], step_t=0, sequence_start=True))
    assert largest_difference(tensor(reply)[None], network.offline(x[2:])) <= TOLERANCE
    assert (await client.info("9")).t == 1


@pytest.mark.parametrize("dtype", ["FP32", "FP64", "FP16"])
async def test_floating_types_are_converted(
    triton: GRPCInferenceServiceStub, network: Network, dtype: str
):
    x = draw(1).astype({"FP32": "<f4", "FP64": "<f8", "FP16": "<f2"}[dtype])
    request = infer("lstm", 1, x, sequence_start=True)
    request.inputs[0].datatype = dtype
    request.raw_input_contents[0] = x.tobytes()
    want = network.offline(x.astype(np.float32))
    assert largest_difference(tensor(await triton.ModelInfer(request)), want) <= TOLERANCE
    if dtype == "FP16":
        return
    del request.raw_input_contents[:]
    contents = request.inputs[0].contents
    getattr(contents, f"{dtype.lower()}_contents").extend(x.flatten().tolist())
    assert largest_difference(tensor(await triton.ModelInfer(request)), want) <= TOLERANCE


async def test_shapes_with_and_without_rows(triton: GRPCInferenceServiceStub, network: Network):
    x = draw(7)
    want = network.offline(x)
    row = tensor(await triton.ModelInfer(infer("lstm", 1, x[0], sequence_start=True)))
    one = tensor(await triton.ModelInfer(infer("lstm", 1, x[1:2])))
    many = tensor(await triton.ModelInfer(infer("lstm", 1, x[2:])))
    assert (row.shape, one.shape, many.shape) == ((2,), (1, 2), (5, 2))
    assert largest_difference(np.concatenate((row[None], one, many)), want) <= TOLERANCE


async def test_outputs_by_name(triton: GRPCInferenceServiceStub, client: AsyncClient):
    x = draw(3)
    session = await client.open("lstm")
    want = await session.inspect(x)
    request = infer("lstm", 1, x, sequence_start=True)
    names = ["c", "y1", "h", "i", "f", "g", "o", "m"]
    for name in names:
        request.outputs.add(name=name)
    reply = await triton.ModelInfer(request)
    assert [output.name for output in reply.outputs] == names
    for layer in range(2):
        for name in ("h", "c", "i", "f", "g", "o", "m"):
            assert np.array_equal(tensor(reply, name)[:, layer], want.layers[layer][name])
    assert np.array_equal(tensor(reply, "y1")[:, 0], want.y[:, 1])


async def test_quantiles_by_name(electricity_root: Path):
    electricity = ServerConfig(
        models=electricity_root, listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", store="memory:"
    )
    async with running_server(electricity) as server, triton_stub(server.address) as triton:
        request = infer(
            "electricity",
            1,
            np.array([22262.0]),
            sequence_start=True,
            start_time="2000-06-05T00:00:00",
        )
        for name in ("y", "demand", "quantiles"):
            request.outputs.add(name=name)
        reply = await triton.ModelInfer(request)
        async with AsyncClient(server.address) as client:
            start = (await client.info("1")).start_time
            assert start is not None
            assert start.isoformat() == "2000-06-05T00:00:00+00:00"
        y, demand, quantiles = (tensor(reply, name) for name in ("y", "demand", "quantiles"))
        assert (y.shape, demand.shape, quantiles.shape) == ((144,), (48,), (48, 3))
        assert np.array_equal(quantiles.flatten(), y)
        assert np.array_equal(quantiles[:, 1], demand)
        # A client of Triton knows of no start time: the sequence begins now.
        await triton.ModelInfer(infer("electricity", 2, np.array([[22262.0]]), sequence_start=True))


async def test_missing_values_are_stood_in_for_where_a_start_says_how(
    triton: GRPCInferenceServiceStub, network: Network
):
    x = draw(3)
    x[0, 1] = x[2, 0] = np.nan
    want = np.array([[x[0, 0], 0.0, x[0, 2]], x[1], [x[1, 0], *x[2, 1:]]])  # a level of 0, held
    replies = [
        await triton.ModelInfer(
            infer("lstm", 5, x[0], sequence_start=True, missing="hold", step_t=0)
        ),
        await triton.ModelInfer(infer("lstm", 5, x[1])),
        await triton.ModelInfer(infer("lstm", 5, x[2])),
    ]
    y = np.array([tensor(reply) for reply in replies])
    assert np.abs(y - network.offline(want)).max() <= TOLERANCE
    imputed = [reply.parameters["imputed_rows"].int64_param for reply in replies]
    assert imputed == [1, 0, 1]


async def test_the_final_response_is_marked_where_a_client_asks(triton: GRPCInferenceServiceStub):
    x = draw(2)
    requests = [
        infer("lstm", 1, x[0], sequence_start=True, triton_enable_empty_final_response=True),
        infer("lstm", 1, x[1]),
        infer("lstm", 8, x[1], triton_enable_empty_final_response=True),
    ]
    told = [
        dict(reply.infer_response.parameters.items()) for reply in await exchange(triton, requests)
    ]
    assert [("triton_final_response" in one) for one in told].count(True) == 2
    assert all(one["triton_final_response"].bool_param for one in told if one)


async def test_describes_server_and_models(triton: GRPCInferenceServiceStub, server: Server):
    told = await triton.ServerMetadata(pb.ServerMetadataRequest())
    assert {"sequence", "sequence(string_id)", "statistics"} <= set(told.extensions)
    metadata = await triton.ModelMetadata(pb.ModelMetadataRequest(name="lstm"))
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [
        ("x", "FP32", [-1, 3])
    ]
    assert [(o.name, o.datatype, list(o.shape)) for o in metadata.outputs] == [
        ("y", "FP32", [-1, 2])
    ]
    config = (await triton.ModelConfig(pb.ModelConfigRequest(name="lstm"))).config
    assert config.HasField("sequence_batching")
    assert config.sequence_batching.max_sequence_idle_microseconds == 86_400_000_000
    assert (config.max_batch_size, list(config.input[0].dims)) == (1, [3])
    assert config.input[0].data_type == model_config_pb2.TYPE_FP32
    index = await triton.RepositoryIndex(pb.RepositoryIndexRequest())
    assert {(m.name, m.version, m.state) for m in index.models} >= {("lstm", "1", "READY")}
    code, text = await refusal(triton.ModelMetadata(pb.ModelMetadataRequest(name="nothing")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "nothing" in text
    code, _ = await refusal(triton.LogSettings(pb.LogSettingsRequest()))
    assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_statistics_count_what_was_stepped(triton: GRPCInferenceServiceStub):
    async def statistics() -> pb.ModelStatistics:
        reply = await triton.ModelStatistics(pb.ModelStatisticsRequest(name="lstm"))
        (found,) = reply.model_stats
        return found

    before = await statistics()
    assert (before.version, before.inference_count, before.last_inference) == ("1", 0, 0)
    x = draw(10)
    await exchange(triton, [infer("lstm", 1, x[t], sequence_start=t == 0) for t in range(10)])
    after = await statistics()
    assert after.inference_count == 10
    assert 0 < after.execution_count <= 10
    stats = after.inference_stats
    parts = (stats.success, stats.queue, stats.compute_input, stats.compute_infer)
    assert [part.count for part in (*parts, stats.compute_output)] == [10] * 5
    assert stats.success.ns >= stats.compute_infer.ns > 0
    assert after.last_inference > 1e12


async def test_the_end_of_a_sequence_is_remembered_whatever_others_end(
    triton: GRPCInferenceServiceStub, server: Server
):
    x = draw(1)
    last = infer("lstm", "mine", x, step_t=0, sequence_start=True, sequence_end=True)
    first = await triton.ModelInfer(last)
    async with triton_stub(server.address) as other:
        await exchange(
            other,
            [
                infer("lstm", one, x, step_t=0, sequence_start=True, sequence_end=True)
                for one in range(1, MAX_ENDED + 10)
            ],
        )
    last.id = "again"
    again = await triton.ModelInfer(last)
    assert (again.id, again.parameters["replayed"].bool_param) == ("again", True)
    assert again.raw_output_contents == first.raw_output_contents
    assert server.memory.by_use[MemoryUse.ENDED] <= MAX_ENDED_BYTES


async def test_a_new_sequence_of_another_model_is_no_retry_of_an_ended_one(
    triton: GRPCInferenceServiceStub,
):
    flags = {"step_t": 0, "sequence_start": True, "sequence_end": True}
    await triton.ModelInfer(infer("lstm", "a", draw(1), **flags))
    for model in ("gru", "lstm"):
        reply = await triton.ModelInfer(infer(model, "a", draw(1, seed=1), **flags))
        assert reply.model_name == model
        assert not reply.parameters["replayed"].bool_param
