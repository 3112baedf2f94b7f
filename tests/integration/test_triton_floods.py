"""Starts, steps and ends of the same sequences by several clients, cancelled at any point."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from stepstate.budget import MemoryUse
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from tests.integration.triton import exchange, infer, tensor, triton_stub
from tests.integration.wire import HANG, TOLERANCE, draw, largest_difference, until
from tests.networks import Network

pytestmark = pytest.mark.transports(long=True)

IDS = ("a", "b", "c")
SLOTS = 4
FLAGS = (
    {"sequence_start": True},
    {"sequence_start": True, "step_t": 0},
    {"sequence_start": True, "sequence_end": True},
    {"sequence_end": True},
    {"sequence_end": True, "step_t": 1},
    {"step_t": 1},
    {},
)
STREAMS = 10
REQUEST_MODULES = (
    "stepstate.sessions.queues",
    "stepstate.sessions.types",
    "stepstate.transport.bidi",
    "stepstate.transport.steps",
    "stepstate.transport.triton.call",
    "stepstate.transport.triton.stream",
    "stepstate.transport.triton.tensors",
)
KEPT = (MemoryUse.ENDED, MemoryUse.REPLAY)
"""What a server keeps for retries, whoever has gone."""


@pytest.fixture(params=["memory:", "sqlite"])
def few_slots(config: ServerConfig, request: pytest.FixtureRequest, tmp_path: Path) -> ServerConfig:
    store = request.param if request.param == "memory:" else f"sqlite:{tmp_path / 'flood.db'}"
    return replace(config, slots=SLOTS, store=store)


def some_request(chosen: random.Random) -> pb.ModelInferRequest:
    rows = draw(chosen.choice((1, 1, 40)), seed=chosen.randrange(3))
    return infer("lstm", chosen.choice(IDS), rows, **chosen.choice(FLAGS))


async def turns(count: int) -> None:
    """Lets the server, which is on this event loop too, come so far."""
    for _ in range(count):
        await asyncio.sleep(0)


async def call_and_give_up(stub: GRPCInferenceServiceStub, chosen: random.Random) -> None:
    for _ in range(40):
        call = stub.ModelInfer(some_request(chosen))
        await turns(chosen.randrange(60))
        call.cancel()
        await asyncio.wait([asyncio.ensure_future(call.code())])


async def stream_and_give_up(stub: GRPCInferenceServiceStub, chosen: random.Random) -> None:
    for _ in range(10):
        call = stub.ModelStreamInfer()
        for _ in range(chosen.randrange(12)):
            await call.write(some_request(chosen))
        await turns(chosen.randrange(120))
        call.cancel()
        await asyncio.wait([asyncio.ensure_future(call.code())])


async def idle(server: Server) -> None:
    """Waits until the server holds nothing for any client."""

    async def so() -> bool:
        by_use = server.memory.by_use
        held = sum(size for use, size in by_use.items() if use not in KEPT)
        return not held and not server.sessions.queued_rows

    await until(so)


@pytest.mark.parametrize("seed", range(2))
async def test_requests_that_are_given_up_leave_no_slot_queue_or_byte(
    few_slots: ServerConfig, networks: dict[str, Network], seed: int
):
    async with running_server(few_slots) as server:
        async with (
            triton_stub(server.address) as one,
            triton_stub(server.address) as other,
            asyncio.TaskGroup() as group,
        ):
            for place, stub in enumerate((one, one, other)):
                chosen = random.Random(10 * seed + place)
                group.create_task(call_and_give_up(stub, chosen))
                group.create_task(stream_and_give_up(stub, chosen))
        await idle(server)
        x = draw(3)
        want = networks["lstm"].offline(x)
        async with triton_stub(server.address) as stub:
            for name in (*IDS, *(f"new-{place}" for place in range(SLOTS))):  # each slot is used
                flags = [{"sequence_start": True}, {}, {"sequence_end": name in IDS}]
                requests = [
                    infer("lstm", name, row, **one) for row, one in zip(x, flags, strict=True)
                ]
                replies = await exchange(stub, requests)
                assert not [reply.error_message for reply in replies if reply.error_message]
                got = np.stack([tensor(reply.infer_response) for reply in replies])
                assert largest_difference(got, want) <= TOLERANCE
        await idle(server)
        assert len(server.sessions) == SLOTS


async def test_a_storm_of_ends_ends_a_sequence_once(triton: GRPCInferenceServiceStub):
    await triton.ModelInfer(infer("lstm", "a", draw(1), sequence_start=True))
    calls = [triton.ModelInfer(infer("lstm", "a", draw(1), sequence_end=True)) for _ in range(50)]
    async with asyncio.timeout(HANG):
        codes = [await call.code() for call in calls]
    assert codes.count(grpc.StatusCode.OK) == 1
    assert codes.count(grpc.StatusCode.INVALID_ARGUMENT) == 49


async def test_a_start_by_one_client_restarts_what_another_steps(
    triton: GRPCInferenceServiceStub, server: Server, network: Network
):
    """Each request is applied to the sequence that is open in its turn, or refused."""
    x = draw(1)
    want = network.offline(np.concatenate([x] * 20))
    async with triton_stub(server.address) as other:
        steps = exchange(triton, [infer("lstm", "a", x, sequence_start=t == 0) for t in range(20)])
        starts = exchange(other, [infer("lstm", "a", x, sequence_start=True) for _ in range(20)])
        replies = [reply for found in await asyncio.gather(steps, starts) for reply in found]
    assert not [reply.error_message for reply in replies if reply.error_message]
    for reply in replies:
        y = tensor(reply.infer_response)
        assert min(largest_difference(y, row[None]) for row in want) <= TOLERANCE
    await idle(server)


async def leave_streams(address: str) -> None:
    """Opens streams with sequences that are open, ended and waiting, and breaks the connection."""
    async with triton_stub(address) as stub:
        for place in range(STREAMS):
            call = stub.ModelStreamInfer()
            for flags in ({"sequence_start": True}, {}, {"sequence_end": True, "step_t": 1}):
                await call.write(infer("lstm", f"ended-{place}", draw(1), **flags))
            await call.write(infer("lstm", f"open-{place}", draw(1), sequence_start=True))
            for _ in range(4):
                assert not (await call.read()).error_message
            for _ in range(4):  # in the queue of a session that is busy, and of one that restarts
                await call.write(infer("lstm", "busy", draw(300)))
                await call.write(infer("lstm", f"open-{place}", draw(1), sequence_start=True))


def own_objects() -> Counter[str]:
    """Objects of requests and streams that Python's collector would have to find."""
    found = (type(one) for one in gc.get_objects())
    return Counter(one.__qualname__ for one in found if one.__module__ in REQUEST_MODULES)


async def test_streams_left_by_their_client_leave_nothing_to_the_garbage_collector(
    triton: GRPCInferenceServiceStub, server: Server
):
    await triton.ModelInfer(infer("lstm", "busy", draw(1), sequence_start=True))
    await leave_streams(server.address)  # caches are filled
    await idle(server)
    gc.collect()
    before, open_before = own_objects(), len(server.sessions)

    async def nothing_is_left() -> bool:
        # A sequence whose end was cancelled is open still: its session is nobody's leftover.
        opened = Counter(ResidentSession=max(0, len(server.sessions) - open_before))
        return not own_objects() - before - opened

    gc.disable()
    try:
        await leave_streams(server.address)
        await until(nothing_is_left)  # what is under way ends by itself; garbage would stay
    finally:
        gc.enable()
