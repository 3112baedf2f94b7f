"""Time-outs, cancellation, and how far a source is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from stepstate import errors
from stepstate.client import AsyncClient
from stepstate.server import Server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.chaos.faults import relay
from tests.integration.clients import Connect, collect
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    blocker,
    draw,
    largest_difference,
    queued,
    request,
)
from tests.networks import Network


async def test_a_step_that_got_no_answer_in_time_can_be_repeated(
    server: Server, connect: Connect, networks: dict[str, Network]
):
    x = draw(6)
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm")
        first = await session.step(x[:3])
        way.hold_replies()
        with pytest.raises(errors.ServerUnreachable):
            await session.step(x[3:], timeout=0.3)
        way.release()
        assert session.t == 3
        second = await session.step(x[3:])
        assert session.t == 6
    want = networks["lstm"].offline(x)
    assert largest_difference(np.concatenate((first, second)), want) <= TOLERANCE


async def test_a_request_that_waits_too_long_was_not_applied(
    server: Server, client: AsyncClient, networks: dict[str, Network], stub: StepstateServiceStub
):
    session = await client.open("lstm", session_id="a")
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=100_000)))
    await queued(stub, "a", 1)
    session.t = 100_000
    with pytest.raises(errors.Unavailable):
        await session.step(draw(1), timeout=0.2)
    long.cancel()
    await queued(stub, "a", 0)
    assert (await session.refresh()).t == 0


async def test_a_cancelled_step_is_repeated_with_the_same_rows(
    client: AsyncClient, stub: StepstateServiceStub, networks: dict[str, Network]
):
    x = draw(20)
    session = await client.open("lstm", session_id="a")
    got = []
    for place, row in enumerate(x):
        stepping = asyncio.create_task(session.step(row))
        for _ in range(place):  # at another moment each time
            await asyncio.sleep(0)
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)
        if not stepping.cancelled():
            got.append(stepping.result())
            continue
        assert session.t == place
        got.append(await session.step(row))
    assert largest_difference(np.array(got), networks["lstm"].offline(x)) <= TOLERANCE


async def test_a_cancelled_stream_leaves_a_session_that_goes_on(
    client: AsyncClient, networks: dict[str, Network]
):
    x = draw(80)
    session = await client.open("lstm")
    got: list[np.ndarray] = []

    async def run(stop_at: int) -> None:
        async for y in session.stream(x[session.t :]):
            got.append(y)
            if len(got) == stop_at:
                enough.set()

    for stop_at in (10, 30, 55):
        enough = asyncio.Event()
        running = asyncio.create_task(run(stop_at))
        await enough.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    got += [y async for y in session.stream(x[session.t :])]
    assert largest_difference(np.array(got), networks["lstm"].offline(x)) <= TOLERANCE


async def test_each_output_comes_before_a_slow_source_gives_the_next_row(
    client: AsyncClient, networks: dict[str, Network]
):
    x, answered = draw(20), asyncio.Semaphore(0)

    async def source() -> AsyncIterator[np.ndarray]:
        for row in x:
            yield row
            await answered.acquire()

    session = await client.open("lstm")
    got = []
    async with asyncio.timeout(HANG):
        async for y in session.stream(source()):
            got.append(y)
            answered.release()
    assert largest_difference(np.array(got), networks["lstm"].offline(x)) <= TOLERANCE


async def test_a_source_is_read_no_further_than_the_window(client: AsyncClient):
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        for row in draw(200):
            taken += 1
            yield row

    session = await client.open("lstm")
    stream = session.stream(source())
    for place in range(50):
        await anext(stream)
        await asyncio.sleep(0.001)
        assert taken <= place + 1 + 20
    await stream.aclose()


async def test_an_async_source_that_fails_is_heard_of(client: AsyncClient):
    async def source() -> AsyncIterator[list[float]]:
        yield [0.0] * 3
        await asyncio.sleep(0)
        raise LookupError("no more")

    session = await client.open("lstm")
    with pytest.raises(LookupError, match="no more"):
        await collect(session, source())
    assert session.t == 1


async def test_steps_of_a_client_carry_t_on_the_wire(
    server: Server, connect: Connect, stub: StepstateServiceStub
):
    """A second writer is noticed: the client does not step from wherever the session stands."""
    async with connect(server.address) as client:
        session = await client.open("lstm", session_id="a")
        await session.step(draw(1))
        await stub.Step(request("a", None, draw(1, seed=9)))
        with pytest.raises(errors.StepMismatch):
            await session.step(draw(1, seed=8))
        with pytest.raises(errors.StepMismatch):
            await collect(session, draw(3, seed=8))
        await stub.CloseSession(pb.CloseSessionRequest(session_id="a"))
