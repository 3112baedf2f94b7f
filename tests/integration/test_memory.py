"""What clients make a server hold is counted, bounded, and given back whatever becomes of calls."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from stepstate.budget import MemoryAccount, MemoryBudget, MemoryUse
from stepstate.server import Server
from stepstate.transport import receiving
from stepstate.transport.receiving import MAX_MESSAGE_BYTES, Receiver
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import draw, opened, raw_stub, refused, request, until

LONG_LIVED = (MemoryUse.REPLAY, MemoryUse.ENDED)
"""What is kept for retries, whoever is connected."""


def held(server: Server) -> dict[str, int]:
    """What clients make a server hold while they are connected, by use."""
    return {
        use: size for use, size in server.memory.by_use.items() if size and use not in LONG_LIVED
    }


async def all_given_back(server: Server) -> None:
    async def nothing() -> bool:
        return not held(server)

    await until(nothing)


def export(stub: StepstateServiceStub) -> grpc.aio.Call:
    return stub.ExportSession(pb.ExportSessionRequest(session_id="a"))


def exported_in_parts(stub: StepstateServiceStub) -> grpc.aio.Call:
    return stub.StreamExport(pb.StreamExportRequest(session_id="a"))


def imported_in_parts(stub: StepstateServiceStub) -> grpc.aio.Call:
    parts = [pb.StreamImportRequest(size=20_000, data=bytes(9_000)) for _ in range(2)]
    return stub.StreamImport(iter(parts))


def step(stub: StepstateServiceStub) -> grpc.aio.Call:
    return stub.Step(request("a", None, draw(2_000)))


def unknown(stub: StepstateServiceStub) -> grpc.aio.Call:
    return stub.Step(request("nobody", None, draw(1)))


def forecast(stub: StepstateServiceStub) -> grpc.aio.Call:
    return stub.Forecast(pb.ForecastRequest(session_id=["a"], horizon=3))


def listed(stub: StepstateServiceStub) -> grpc.aio.Call:
    return stub.ListSessions(pb.ListSessionsRequest())


def steps(stub: StepstateServiceStub) -> grpc.aio.Call:
    return stub.StreamSteps(iter([request(name, None, draw(500)) for name in "abz" * 5]))


def packed(stub: StepstateServiceStub) -> grpc.aio.Call:
    rows = np.arange(40, dtype="<u4")
    message = pb.StreamPackedRequest(handles=rows.tobytes(), x=draw(40).tobytes())
    for handle in rows.tolist():
        message.bindings.add(handle=handle, session_id="abz"[handle % 3])
    bad = pb.StreamPackedRequest(handles=b"odd")
    return stub.StreamPacked(iter([message, bad, message, message]))


CALLS: tuple[Callable[[StepstateServiceStub], grpc.aio.Call], ...] = (
    *(export, exported_in_parts, imported_in_parts, step, unknown, forecast, listed),
    *(steps, packed),
)


@pytest.mark.parametrize("seed", range(4))
async def test_all_memory_comes_back_whatever_becomes_of_calls(server: Server, seed: int):
    """Calls end in order, are refused, cancelled at any time, or lose their connection."""
    rng = random.Random(seed)
    async with raw_stub(server.address) as stub:
        for name in "ab":
            await opened(stub, name)
        await stub.Step(request("a", None, draw(3)))
    most = 0
    for _ in range(6):
        server.memory.shared = rng.choice((60_000, 300_000, server.memory.limit))
        async with raw_stub(server.address) as stub:
            calls = [rng.choice(CALLS)(stub) for _ in range(12)]
            for call in rng.sample(calls, 6):
                await asyncio.sleep(rng.choice((0, 0.002, 0.01)))
                most = max(most, sum(held(server).values()))
                call.cancel()
            if rng.random() < 0.5:  # else the connection is closed under them
                server.memory.shared = server.memory.limit
                await asyncio.gather(
                    *(call.code() for call in calls if isinstance(call, grpc.aio.UnaryUnaryCall))
                )
    assert most > 0
    await all_given_back(server)


async def test_a_stream_without_room_waits_and_then_goes_on(
    server: Server, stub: StepstateServiceStub, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is refused: what was sent is answered, in order, when there is room."""
    await opened(stub, "a")
    stream = stub.StreamSteps()
    await stream.write(request("a", 0, draw(1)))
    assert (await stream.read()).t == 1
    other = MemoryAccount(server.memory)
    size = server.memory.shared - server.memory.used
    monkeypatch.setattr(server.memory, "little", 0)
    other.reserve(MemoryUse.REPLIES, size)
    for t in range(1, 4):
        await stream.write(request("a", t, draw(1)))
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0.2)
    assert not reading.done()
    other.release(MemoryUse.REPLIES, size)
    assert (await reading).t == 2
    assert [(await stream.read()).t for _ in range(2)] == [3, 4]
    await stream.done_writing()
    assert await stream.code() == grpc.StatusCode.OK


async def test_a_call_without_room_is_refused_with_a_retry_delay(
    server: Server, stub: StepstateServiceStub, monkeypatch: pytest.MonkeyPatch
):
    await opened(stub, "a")
    monkeypatch.setattr(server.memory, "shared", 40_000)
    monkeypatch.setattr(server.memory, "little", 0)
    refusal = await refused(stub.Step(request("a", 0, draw(2_000))))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEMORY_LIMIT")
    assert refusal.retry_seconds == 0.5
    monkeypatch.undo()
    assert (await stub.Step(request("a", 0, draw(2_000)))).t == 2_000


async def test_exports_that_are_not_read_stay_within_the_limit(
    server: Server, stub: StepstateServiceStub, monkeypatch: pytest.MonkeyPatch
):
    await opened(stub, "large")
    await stub.Step(request("large", 0, draw(4_000), inspect=True))
    monkeypatch.setattr(server.memory, "shared", server.memory.used + 20_000_000)
    ask = pb.ExportSessionRequest(session_id="large")
    async with raw_stub(server.address) as impatient:
        calls = [impatient.ExportSession(ask) for _ in range(40)]
        most = 0
        while not all(call.done() for call in calls):
            most = max(most, server.memory.used)
            await asyncio.sleep(0)
        assert {await call.code() for call in calls} <= {
            grpc.StatusCode.OK,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        }
    assert most <= server.memory.shared
    await all_given_back(server)


async def test_handles_are_one_table_that_is_counted(server: Server, stub: StepstateServiceStub):
    stream = stub.StreamPacked()
    for number in range(300):
        message = pb.StreamPackedRequest(id=number)
        message.bindings.add(handle=200_000 + number % 7, session_id=f"s-{number}")
        await stream.write(message)
        assert (await stream.read()).id == number
    bindings = server.memory.by_use[MemoryUse.BINDINGS]
    assert 200_000 < bindings < 12_000_000
    server.memory.shared, server.memory.little = bindings + 100_000, 0
    message = pb.StreamPackedRequest(id=301)
    for handle in range(3_000):
        message.bindings.add(handle=handle, session_id="x" * 100)
    await stream.write(message)
    reply = await stream.read()
    assert reply.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert server.memory.by_use[MemoryUse.BINDINGS] == bindings
    stream.cancel()
    await all_given_back(server)


async def test_requests_are_received_a_few_at_a_time_and_one_that_stalls_makes_room(monkeypatch):
    monkeypatch.setattr(receiving, "STALLED_SECONDS", 0.05)
    receiver = Receiver(0)
    under_way = most = 0

    async def receive(seconds: float) -> str:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await asyncio.sleep(seconds)
        finally:
            under_way -= 1
        return "received"

    stalled = MemoryAccount(receiver.budget)
    stalling = asyncio.create_task(receiver.read(stalled, lambda: receive(60)))
    await asyncio.sleep(0.1)
    assert not stalling.done()  # nobody waits
    others = [MemoryAccount(receiver.budget) for _ in range(20)]
    reads = [receiver.read(account, lambda: receive(0.001)) for account in others]
    assert await asyncio.gather(*reads) == ["received"] * 20
    with pytest.raises(Exception, match="bytes more do not fit"):
        await stalling
    assert most * MAX_MESSAGE_BYTES <= receiver.budget.limit
    assert receiver.budget.used == 0


async def test_whoever_waits_for_room_can_be_cancelled():
    budget = MemoryBudget(1000)
    account = MemoryAccount(budget)
    account.charge(MemoryUse.REPLIES, 900)
    waiting = [asyncio.create_task(account.wait_for(100)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    account.release(MemoryUse.REPLIES, 900)
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) for one in done] == [True, False, False]
    assert not budget.waiting
