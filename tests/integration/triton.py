"""Triton's clients and messages, for tests of its API."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from tritonclient import grpc as sync_client
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from tests.integration.wire import HANG


def infer(
    model: str, sequence_id: int | str, x: np.ndarray, *, request_id: str = "", **parameters: object
) -> pb.ModelInferRequest:
    """A request as Triton's clients make it; parameters by their Python type."""
    request = pb.ModelInferRequest(model_name=model, id=request_id)
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    request.raw_input_contents.append(np.ascontiguousarray(x, "<f4").tobytes())
    for name, value in {"sequence_id": sequence_id, **parameters}.items():
        put(request, name, value)
    return request


def put(request: pb.ModelInferRequest, name: str, value: object) -> None:
    """Sets a parameter."""
    given = request.parameters[name]
    if isinstance(value, bool):
        given.bool_param = value
    elif isinstance(value, int):
        if value < 2**63:
            given.int64_param = value
        else:
            given.uint64_param = value
    else:
        given.string_param = str(value)


def tensor(response: pb.ModelInferResponse, name: str = "y") -> np.ndarray:
    """An output of a reply."""
    place = [output.name for output in response.outputs].index(name)
    output = response.outputs[place]
    assert output.datatype == "FP32"
    return np.frombuffer(response.raw_output_contents[place], "<f4").reshape(output.shape)


@asynccontextmanager
async def triton_stub(address: str) -> AsyncIterator[GRPCInferenceServiceStub]:
    """A raw stub on a connection of its own, for what no client would send."""
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", 64 * 2**20)]
    async with grpc.aio.insecure_channel(address, options=own) as channel:
        yield GRPCInferenceServiceStub(channel)


async def exchange(
    stub: GRPCInferenceServiceStub, requests: Iterable[pb.ModelInferRequest]
) -> list[pb.ModelStreamInferResponse]:
    """All replies of one stream, to requests that are sent at once."""
    call = stub.ModelStreamInfer()
    async with asyncio.timeout(HANG):
        for request in requests:
            await call.write(request)
        await call.done_writing()
        return [reply async for reply in call]


def stream_with_callbacks(
    address: str, model: str, sequences: dict[int | str, np.ndarray]
) -> dict[int | str, np.ndarray]:
    """Steps sequences in turn over one stream of Triton's own client; blocks."""
    answers: queue.Queue[tuple[sync_client.InferResult | None, Exception | None]] = queue.Queue()
    got: dict[int | str, list[np.ndarray]] = {one: [] for one in sequences}
    names = {str(one): one for one in sequences}
    with sync_client.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for place in range(max(map(len, sequences.values()))):
            for one, rows in sequences.items():
                if place < len(rows):
                    client.async_stream_infer(
                        model,
                        inputs(rows[place]),
                        request_id=f"{one}/{place}",
                        sequence_id=one,
                        sequence_start=place == 0,
                        sequence_end=place == len(rows) - 1,
                    )
        for _ in range(sum(map(len, sequences.values()))):
            result, error = answers.get(timeout=HANG)
            if error is not None or result is None:
                raise AssertionError(error)
            name, place = result.get_response().id.split("/")
            rows_before = got[names[name]]
            assert int(place) == len(rows_before)
            rows_before.append(result.as_numpy("y"))
        client.stop_stream()
    return {one: np.stack(rows) for one, rows in got.items()}


def inputs(row: np.ndarray, dtype: str = "FP32") -> list[sync_client.InferInput]:
    """x of one request."""
    values = np.asarray(row)
    one = sync_client.InferInput("x", list(values.shape), dtype)
    one.set_data_from_numpy(values)
    return [one]


async def refusal(call: grpc.aio.UnaryUnaryCall) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), str(caught.value.details())
