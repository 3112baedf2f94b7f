"""StreamSteps: many sessions on one stream, their order, and what a stream survives."""

from __future__ import annotations

import asyncio
import gc
import math
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest

from stepstate.budget import MemoryUse
from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.sessions import Step
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.chaos.faults import relay
from tests.integration.wire import (
    GARBAGE,
    STREAM,
    TOLERANCE,
    ask,
    blocker,
    draw,
    largest_difference,
    open_calls,
    opened,
    queued,
    raw_stub,
    refusal_in,
    request,
    until,
    where,
)
from tests.networks import Network

pytestmark = pytest.mark.transports

Stub = StepstateServiceStub


def by_session(replies: Iterable[pb.StepResponse]) -> dict[str, list[pb.StepResponse]]:
    found = defaultdict(list)
    for reply in replies:
        found[reply.session_id].append(reply)
    return found


def outputs(replies: Iterable[pb.StepResponse]) -> np.ndarray:
    return np.concatenate([reply.y for reply in replies])


async def test_one_stream_carries_many_sessions_of_every_model(
    stub: Stub, networks: dict[str, Network]
):
    kinds = list(networks.values())
    owner = {f"s-{place}": kinds[place % len(kinds)] for place in range(60)}
    inputs = {
        name: draw(30, network.module.input_size, seed=place)
        for place, (name, network) in enumerate(owner.items())
    }
    for name, network in owner.items():
        await opened(stub, name, network.name)

    def shuffled() -> Iterable[pb.StepRequest]:
        left = dict.fromkeys(owner, 0)
        order = random.Random(5)
        while left:
            name = order.choice(list(left))
            t = left[name]
            rows = order.choice((1, 1, 1, 4))
            yield request(name, t, inputs[name][t : t + rows])
            left[name] = min(30, t + rows)
            if left[name] == 30:
                del left[name]

    replies = by_session(await ask(stub, shuffled()))
    assert set(replies) == set(owner)
    for name, mine in replies.items():
        assert [reply.t for reply in mine] == sorted({reply.t for reply in mine})
        want = owner[name].offline(inputs[name]).ravel()
        assert largest_difference(outputs(mine), want) <= TOLERANCE


REFUSED = {
    "NON_FINITE_INPUT": lambda t: request("a", t, np.array([math.nan] * 3)),
    "INVALID_FIELD": lambda t: pb.StepRequest(session_id="a", t=t, x=[1.0]),
    "STEP_AHEAD": lambda t: request("a", t + 1000, draw(1)),
    "STEP_MISMATCH": lambda t: request("a", t - 1, draw(1, seed=77)),
    "NON_FINITE_INPUT of many": lambda t: request(
        "a", t, np.array([[1.0] * 3] * 4 + [[math.inf] * 3])
    ),
}


async def test_refusals_keep_their_place_in_the_order_of_their_session(
    stub: Stub, networks: dict[str, Network]
):
    x = draw(60)
    await opened(stub, "a")
    sent, expected = [], []
    for t, row in enumerate(x):
        if t:
            reason = list(REFUSED)[t % len(REFUSED)]
            sent.append(REFUSED[reason](t))
            expected.append(reason.split()[0])
        sent.append(request("a", t, row))
        expected.append(t + 1)

    replies = await ask(stub, sent)
    got = [refusal_in(reply).reason if reply.HasField("error") else reply.t for reply in replies]
    assert got == expected
    want = networks["lstm"].offline(x).ravel()
    assert largest_difference(outputs(r for r in replies if r.y), want) <= TOLERANCE


async def test_refusals_wait_for_a_long_request_of_their_session_and_others_do_not(stub: Stub):
    await opened(stub, "a")
    await opened(stub, "b")
    replies = await ask(
        stub,
        [
            blocker("a", rows=1_500),
            pb.StepRequest(session_id="a", x=[1.0]),
            request("a", 1_500, draw(1)),
            request("b", 0, draw(1)),
            pb.StepRequest(session_id="b", x=[1.0]),
            request("nope", 0, draw(1)),
        ],
    )
    names = [reply.session_id for reply in replies]
    assert names[:3].count("a") == 0
    assert names[3:] == ["a", "a", "a"]
    mine = by_session(replies)
    assert [reply.t for reply in mine["a"]] == [1_500, 0, 1_501]
    assert [reply.t for reply in mine["b"]] == [1, 0]


async def test_a_stream_goes_on_after_each_kind_of_error(stub: Stub):
    await opened(stub, "a")
    stream = stub.StreamSteps()
    makers = (
        *REFUSED.values(),
        lambda _: request("nope", 0, draw(1)),
        lambda _: pb.StepRequest(),
    )
    for t, make in enumerate(makers):
        await stream.write(request("a", t, draw(1)))
        assert (await stream.read()).t == t + 1
        await stream.write(make(t + 1))
        refusal_in(await stream.read())
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() == grpc.StatusCode.OK


@asynccontextmanager
async def raw_stream(server: Server) -> AsyncIterator[grpc.aio.StreamStreamCall]:
    """A stream that sends bytes."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel.stream_stream(STREAM, response_deserializer=pb.StepResponse.FromString)()


async def test_malformed_bytes_are_answered_in_band(
    server: Server, stub: Stub, networks: dict[str, Network]
):
    x = draw(20)
    await opened(stub, "a")
    async with raw_stream(server) as stream:
        replies = []
        for t, row in enumerate(x):
            good = request("a", t, row).SerializeToString()
            for data in (GARBAGE, good, good[:-1], b""):
                await stream.write(data)
                replies.append(await stream.read())
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
    for garbage, cut in zip(replies[0::4], replies[2::4], strict=True):
        for reply in (garbage, cut):
            assert (refusal_in(reply).reason, reply.session_id) == ("INVALID_FIELD", "")
            assert refusal_in(reply).field == "message"
    assert {refusal_in(reply).field for reply in replies[3::4]} == {"session_id"}
    want = networks["lstm"].offline(x).ravel()
    assert largest_difference(outputs(replies[1::4]), want) <= TOLERANCE


async def test_fields_of_a_newer_contract_are_ignored(server: Server, stub: Stub):
    await opened(stub, "a")
    newer = request("a", 0, draw(1)).SerializeToString() + bytes(
        [(14 << 3) | 0, 1, (200 << 3 & 0x7F) | 0x80 | 2, 12, 1, 0]
    )
    async with raw_stream(server) as stream:
        await stream.write(newer)
        assert (await stream.read()).t == 1
        stream.cancel()


async def test_a_long_id_comes_back_cut(stub: Stub):
    (reply,) = await ask(stub, [request("x" * 100_000, 0, draw(1))])
    assert reply.session_id == "x" * 128
    assert refusal_in(reply).field == "session_id"
    assert reply.ByteSize() < 2_000


async def test_half_closing_at_once_answers_everything(stub: Stub, networks: dict[str, Network]):
    await opened(stub, "a")
    x = np.concatenate((draw(1_500, seed=99), draw(500)))
    items = [blocker("a", rows=1_500)]
    items += [request("a", 1_500 + t, row) for t, row in enumerate(x[1_500:])]
    replies = await ask(stub, items)
    assert [reply.t for reply in replies] == list(range(1_500, 2_001))
    want = networks["lstm"].offline(x)[1_499:].ravel()
    assert largest_difference(outputs(replies), want) <= TOLERANCE


async def test_an_empty_stream_ends_well(stub: Stub):
    assert await ask(stub, []) == []


async def test_thousands_of_pipelined_requests_are_all_answered(
    stub: Stub, networks: dict[str, Network]
):
    names = [await opened(stub, f"s-{place}") for place in range(5)]
    x = draw(5_000)
    items = (request(names[p % 5], p // 5, row) for p, row in enumerate(x))
    replies = by_session(await ask(stub, items))
    for place, name in enumerate(names):
        assert [reply.t for reply in replies[name]] == list(range(1, 1001))
        want = networks["lstm"].offline(x[place::5]).ravel()
        assert largest_difference(outputs(replies[name]), want) <= TOLERANCE


async def test_several_streams_may_step_one_session(stub: Stub, other_stub: Stub):
    await opened(stub, "a")
    first, second = stub.StreamSteps(), other_stub.StreamSteps()
    for t in range(0, 40, 2):
        for place, stream in enumerate((first, second)):
            await stream.write(request("a", t + place, draw(1)))
            assert (await stream.read()).t == t + place + 1
    for stream in (first, second):
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
async def test_what_a_cut_stream_had_waiting_did_not_happen(
    server: Server, stub: Stub, networks: dict[str, Network], how: str
):
    """Each row was applied whole or not, in order, and the session can go on from there."""
    rows = 1_500
    x = np.concatenate((draw(rows, seed=99), draw(400)))
    await opened(stub, "a")
    async with relay(server.address) as way, raw_stub(way.address) as cut:
        stream = cut.StreamSteps()
        await stream.write(blocker("a", rows=rows))
        for t in range(100):
            await stream.write(request("a", rows + t, x[rows + t]))
        await queued(stub, "a", 101)
        if how == "cancel":
            stream.cancel()
        else:
            way.cut()
        await queued(stub, "a", 0)

    t = (await where(stub, "a")).t
    assert t in {0, rows}  # the one that ran may have been done just then
    replies = await ask(
        stub,
        [
            *([blocker("a", rows=rows)] if t == 0 else []),
            *(request("a", at, x[at]) for at in range(rows, len(x))),
        ],
    )
    want = networks["lstm"].offline(x)[-400:].ravel()
    assert largest_difference(outputs(replies[-400:]), want) <= TOLERANCE


async def test_streams_that_are_cut_hold_nothing_back(server: Server, stub: Stub):
    await opened(stub, "a")
    async with relay(server.address) as way:
        for _ in range(20):
            async with raw_stub(way.address) as cut:
                stream = cut.StreamSteps()
                for _ in range(20):
                    await stream.write(request("a", None, draw(1)))
                await stream.read()
                way.cut()
    await queued(stub, "a", 0)

    async def ended() -> bool:
        return await open_calls(server.metrics_address, "StreamSteps") == 0

    await until(ended)
    assert server.sessions.queued_rows == 0


async def test_a_session_closed_in_the_middle_of_a_stream_says_so_in_order(stub: Stub):
    await opened(stub, "a")
    stream = stub.StreamSteps()
    await stream.write(request("a", 0, draw(1)))
    assert (await stream.read()).t == 1
    await stub.CloseSession(pb.CloseSessionRequest(session_id="a"))
    await stream.write(request("a", 1, draw(1)))
    assert refusal_in(await stream.read()).reason == "SESSION_CLOSED"
    await opened(stub, "a", "gru")
    await stream.write(request("a", 0, draw(1)))
    assert (await stream.read()).t == 1
    stream.cancel()


async def test_a_stream_goes_on_after_in_band_refusals_of_a_full_queue(config, networks):
    """A cancelled write must not end the feeding of rows."""
    x = draw(300)
    async with (
        running_server(replace(config, queue_requests=20)) as server,
        AsyncClient(server.address, timeout=60) as client,
    ):

        async def run() -> float:
            session = await client.open("lstm")
            got = np.array([y async for y in session.stream(x)])
            return largest_difference(got, networks["lstm"].offline(x))

        async with asyncio.timeout(90):
            differences = await asyncio.gather(*(run() for _ in range(4)))
    assert max(differences) <= TOLERANCE


LARGE = draw(4_000)
"""Rows whose reply is long."""


async def test_an_abandoned_stream_leaves_nothing_to_the_garbage_collector(
    server: Server, stub: Stub
):
    await opened(stub, "a")
    gc.collect()
    async with raw_stub(server.address) as abandoning:
        call = abandoning.StreamSteps()
        for _ in range(50):
            await call.write(request("a", None, LARGE))
        await asyncio.sleep(0.2)
        call.cancel()
        await asyncio.sleep(0.2)
    assert not [o for o in gc.get_objects() if type(o) is Step]
    assert server.memory.used == server.memory.by_use[MemoryUse.REPLAY]


async def test_unread_replies_of_a_stream_are_bounded_in_bytes(server: Server, stub: Stub):
    await opened(stub, "a")
    call = stub.StreamSteps()

    async def flood() -> None:
        for _ in range(2_000):
            await call.write(request("a", None, LARGE))

    flooding = asyncio.create_task(flood())
    while server.memory.used <= 4 * 2**20:
        await asyncio.sleep(0.05)
    for _ in range(20):
        assert server.memory.used <= 10 * 2**20
        await asyncio.sleep(0.1)
    flooding.cancel()
    call.cancel()


async def test_a_stream_that_comes_while_streams_end_is_refused(server: Server, stub: Stub):
    """Replies that nobody reads keep another stream from ending."""
    await opened(stub, "a")
    async with raw_stub(server.address, ("grpc.http2.bdp_probe", 0)) as slow:
        unread = slow.StreamSteps()
        for _ in range(60):
            await unread.write(request("a", None, draw(100), inspect=True))
        await asyncio.sleep(0.5)
        await queued(stub, "a", 0)
        draining = asyncio.create_task(server.drain())
        await asyncio.sleep(0.3)
        assert not draining.done()
        late = stub.StreamSteps()
        async with asyncio.timeout(1):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await late.read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        unread.cancel()
        await draining


async def test_requests_that_come_while_a_stream_ends_do_not_hold_it_up(config: ServerConfig):
    """Neither are they applied: the client sees that the stream has ended before their replies."""
    async with (
        running_server(replace(config, drain_seconds=600)) as server,
        raw_stub(server.address) as stub,
        raw_stub(server.address, ("grpc.http2.bdp_probe", 0)) as slow,
    ):
        await opened(stub, "a")
        unread = slow.StreamSteps()
        for _ in range(60):
            await unread.write(request("a", None, draw(100), inspect=True))
        await asyncio.sleep(0.5)
        await queued(stub, "a", 0)
        t = (await where(stub, "a")).t
        draining = asyncio.create_task(server.drain())
        await asyncio.sleep(0.3)
        await unread.write(request("a", None, draw(1)))
        await asyncio.sleep(0.1)
        assert not draining.done()
        async with asyncio.timeout(10):
            replies: list[int] = []
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                async for reply in unread:
                    replies.append(reply.t)  # noqa: PERF401 - it ends with an error
            await draining
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert replies == list(range(100, t + 1, 100))
