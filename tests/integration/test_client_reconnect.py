"""Both clients over connections that break and servers that restart."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from stepstate import errors
from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from tests.chaos.faults import relay
from tests.integration.clients import AnySession, Connect, collect
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    blocker,
    draw,
    largest_difference,
    queued,
    raw_stub,
    sample,
    scrape,
    until,
    where,
)
from tests.networks import Network


async def test_a_lost_reply_is_asked_for_again(
    server: Server, connect: Connect, networks: dict[str, Network]
):
    x = draw(12)
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm")
        got = []
        for place, step in enumerate((session.step, session.step, session.step)):
            rows = x[session.t : session.t + 4] if place else x[:4]
            way.hold_replies()
            stepping = asyncio.ensure_future(step(rows))
            await asyncio.wait_for(way.withheld.wait(), HANG)
            await applied(server, session, 4 * place + 4)
            way.lose()
            got.append(await stepping)
            assert session.t == 4 * place + 4
    assert largest_difference(np.concatenate(got), networks["lstm"].offline(x)) <= TOLERANCE


async def applied(server: Server, session: AnySession, t: int) -> None:
    """Waits until so many rows were applied, by the server's word on another connection."""
    async with raw_stub(server.address) as stub, asyncio.timeout(HANG):
        while (await where(stub, session.session_id)).t < t:
            await asyncio.sleep(0.005)


async def test_a_lost_request_is_sent_again(
    server: Server, connect: Connect, networks: dict[str, Network]
):
    x = draw(8)
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm")
        first = await session.step(x[:4])
        way.hold_requests()
        stepping = asyncio.ensure_future(session.step(x[4:]))
        await asyncio.wait_for(way.withheld.wait(), HANG)
        way.lose()
        second = await stepping
    want = networks["lstm"].offline(x)
    assert largest_difference(np.concatenate((first, second)), want) <= TOLERANCE


async def test_a_lost_reply_of_inspect_is_asked_for_again(
    server: Server, connect: Connect, networks: dict[str, Network]
):
    x = draw(4)
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm")
        way.hold_replies()
        inspecting = asyncio.ensure_future(session.inspect(x))
        await asyncio.wait_for(way.withheld.wait(), HANG)
        await applied(server, session, 4)
        way.lose()
        found = await inspecting
        assert (session.t, len(found.layers)) == (4, 2)
    assert largest_difference(found.y, networks["lstm"].offline(x)) <= TOLERANCE


async def test_a_lost_reply_of_opening_does_not_open_twice(server: Server, connect: Connect):
    async with relay(server.address) as way, connect(way.address) as client:
        await client.models()
        way.hold_replies()
        opening = asyncio.ensure_future(client.open("lstm"))
        await asyncio.wait_for(way.withheld.wait(), HANG)
        while not len(server.sessions):
            await asyncio.sleep(0.005)
        way.lose()
        session = await opening
        await session.step(draw(1))
        assert [info.t async for info in client.sessions()] == [1]


async def test_a_lost_reply_of_closing_is_no_error(server: Server, connect: Connect):
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm")
        await session.step(draw(5))
        way.hold_replies()
        closing = asyncio.ensure_future(session.close())
        await asyncio.wait_for(way.withheld.wait(), HANG)
        while len(server.sessions):
            await asyncio.sleep(0.005)
        way.lose()
        info = await closing
        assert (info.session_id, info.t) == (session.session_id, 5)


@pytest.mark.parametrize("seed", range(3))
async def test_a_stream_over_a_connection_that_keeps_breaking_is_exactly_once(
    server: Server, connect: Connect, networks: dict[str, Network], seed: int
):
    x, moments = draw(300, seed=seed), random.Random(seed)
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm")
        got = []
        async with asyncio.timeout(HANG):
            async for y in session.stream(iter(x)):
                got.append(y)
                if len(got) % 40 == 0:
                    way.cut_after(moments.randrange(1, 3_000))
        assert way.connections > 3
        assert session.t == (await session.refresh()).t == 300
    assert largest_difference(np.array(got), networks["lstm"].offline(x)) <= TOLERANCE


async def test_a_stream_whose_replies_are_lost_is_exactly_once(
    server: Server, connect: Connect, networks: dict[str, Network]
):
    x = draw(100)
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm")

        async def lose_some() -> None:
            for _ in range(4):
                way.hold_replies()
                await way.withheld.wait()
                before = way.connections
                way.lose()
                while way.connections == before:
                    await asyncio.sleep(0.005)

        losing = asyncio.create_task(lose_some())
        got = await collect(session, slowly(x, losing) if isinstance(client, AsyncClient) else x)
        losing.cancel()
    assert largest_difference(got, networks["lstm"].offline(x)) <= TOLERANCE


async def slowly(x: np.ndarray, until: asyncio.Task[None]) -> AsyncIterator[np.ndarray]:
    """The rows, the last of them only after a task is done."""
    for row in x[:-1]:
        yield row
        await asyncio.sleep(0.001)
    await until
    yield x[-1]


async def test_a_restarted_server_does_not_know_the_session(config: ServerConfig, connect: Connect):
    """Where sessions live in memory, going on silently from zero would be wrong numbers."""
    x = draw(40)
    config = dataclasses.replace(config, store="memory:")
    async with running_server(config) as first, connect(first.address) as client:
        stepped = await client.open("lstm", session_id="stepped")
        streamed = await client.open("lstm", session_id="streamed")
        await stepped.step(x[:5])
        stream = streamed.stream(endless(x))
        for _ in range(20):
            await anext(stream)
        await first.stop()
        again = dataclasses.replace(config, listen=first.address)
        async with running_server(again) as second:
            with pytest.raises(errors.SessionUnknown):
                async with asyncio.timeout(HANG):
                    async for _ in stream:
                        pass
            with pytest.raises(errors.SessionUnknown):
                await stepped.step(x[5])
            assert len(second.sessions) == 0
            anew = await client.open("lstm", session_id="stepped")
            assert anew.t == 0
            await anew.step(x[0])


def endless(x: np.ndarray) -> Iterator[np.ndarray]:
    while True:
        yield from x


async def test_a_full_queue_is_waited_for(
    config: ServerConfig, connect: Connect, networks: dict[str, Network]
):
    tight = dataclasses.replace(config, queue_requests=2)
    async with running_server(tight) as server, connect(server.address, timeout=30.0) as client:
        x = draw(60)

        async def run() -> float:
            session = await client.open("lstm")
            got = await collect(session, x[:40])
            tail = [await session.step(row) for row in x[40:]]
            return largest_difference(np.concatenate((got, tail)), networks["lstm"].offline(x))

        assert max(await asyncio.gather(*(run() for _ in range(6)))) <= TOLERANCE


async def test_a_refusal_while_large_rows_are_being_sent_is_waited_for(
    config: ServerConfig, networks: dict[str, Network]
):
    """The stream is given up while its feeder is held back by flow control."""
    tight = dataclasses.replace(config, queue_requests=1)
    async with (
        running_server(tight) as server,
        raw_stub(server.address) as stub,
        AsyncClient(server.address, timeout=30.0) as client,
    ):
        x = draw(200_000)
        session = await client.open("lstm", session_id="a")
        await client.open("lstm", session_id="b")
        long = stub.Step(blocker("b", rows=100_000))
        await queued(stub, "b", 1)
        streaming = asyncio.create_task(collect(session, np.split(x, 10)))
        await refusals(server, "QUEUE_FULL")
        long.cancel()
        got = await streaming
    want = networks["lstm"].offline(x)[19_999::20_000]
    assert largest_difference(got, want) <= TOLERANCE


async def refusals(server: Server, reason: str) -> None:
    """Waits until a request was refused so."""

    async def told() -> bool:
        text = await scrape(server.metrics_address)
        return sample(text, f'stepstate_requests_refused_total{{reason="{reason}"') >= 1

    await until(told)
