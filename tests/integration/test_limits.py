"""Sessions, queues, messages and replay memory have limits, and say when one is reached."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import grpc
import numpy as np
import pytest

from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    BLOCKER_ROWS,
    GARBAGE,
    HANG,
    STEP,
    STREAM,
    TOLERANCE,
    ask,
    blocker,
    draw,
    largest_difference,
    opened,
    outputs,
    queued,
    raw_stub,
    refusal_in,
    refused,
    request,
    sample,
    scrape,
    until,
)
from tests.networks import Network


def limited(config: ServerConfig, **limits: int) -> ServerConfig:
    return dataclasses.replace(config, **limits)


async def test_sessions_are_limited_and_a_closed_one_makes_room(config: ServerConfig):
    limit = limited(config, max_sessions=3)
    async with running_server(limit) as server, raw_stub(server.address) as stub:
        for name in "abc":
            await opened(stub, name, "lstm" if name == "a" else "gru")
        refusal = await refused(stub.OpenSession(pb.OpenSessionRequest(model="lstm")))
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refusal.reason, refusal.metadata) == ("SESSION_LIMIT", {"limit": "3"})
        assert refusal.quota == "server:sessions"

        await stub.Step(request("b", 0, draw(1)))
        await stub.CloseSession(pb.CloseSessionRequest(session_id="b"))
        await opened(stub, "d", "gru")
        (anew,) = await ask(stub, [request("d", 0, draw(1))])
        assert anew.t == 1


async def test_a_slot_used_again_begins_from_zero_state(
    config: ServerConfig, networks: dict[str, Network]
):
    limit = limited(config, max_sessions=1)
    async with running_server(limit) as server, raw_stub(server.address) as stub:
        for seed in range(3):
            x = draw(10, seed=seed)
            await opened(stub, "a")
            first = await stub.Step(request("a", 0, x))
            assert not first.replayed
            assert largest_difference(first.y, networks["lstm"].offline(x).ravel()) <= TOLERANCE
            await stub.CloseSession(pb.CloseSessionRequest(session_id="a"))


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"queue_requests": 5}, {"limit": "5"}),
        ({"queue_rows": 2 * BLOCKER_ROWS + 4}, {"limit": str(2 * BLOCKER_ROWS + 4)}),
    ],
)
async def test_a_client_that_filled_its_half_of_the_queue_is_refused_until_it_is_not_full(
    config: ServerConfig, networks: dict[str, Network], limits, told
):
    async with (
        running_server(limited(config, **limits)) as server,
        raw_stub(server.address) as stub,
        raw_stub(server.address) as other_stub,
    ):
        for name in "abc":
            await opened(stub, name)
        long = asyncio.ensure_future(stub.Step(blocker("a", rows=BLOCKER_ROWS)))
        await queued(stub, "a", 1)
        waiting = [asyncio.ensure_future(stub.Step(request("a", None, draw(1)))) for _ in range(2)]
        await queued(stub, "a", 3)
        refusals = [await refused(stub.Step(request("b", 0, draw(2))))]
        refusals += map(refusal_in, await ask(stub, [request("b", 0, draw(2))]))
        for refusal in refusals:
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")
            assert refusal.metadata.items() >= told.items()
            assert refusal.retry_seconds is not None
            assert refusal.retry_seconds > 0
        assert (await other_stub.Step(request("c", 0, draw(1)))).t == 1  # of another client
        assert not long.done()
        await asyncio.gather(long, *waiting)
        reply = await stub.Step(request("b", 0, draw(2)))
        offline = networks["lstm"].offline(draw(2)).ravel()
        assert largest_difference(reply.y, offline) <= TOLERANCE


async def test_single_rows_that_wait_count_as_other_requests(
    config: ServerConfig, networks: dict[str, Network]
):
    """Those that need no parsing too: half of the queue is full with the long one and four rows."""
    x = np.concatenate((draw(BLOCKER_ROWS, seed=99), draw(10)))
    async with (
        running_server(limited(config, queue_requests=10)) as server,
        raw_stub(server.address) as stub,
    ):
        await opened(stub, "a")
        long = asyncio.ensure_future(stub.Step(blocker("a", rows=BLOCKER_ROWS)))
        await queued(stub, "a", 1)
        rows = [request("a", t, x[t]) for t in range(BLOCKER_ROWS, BLOCKER_ROWS + 10)]
        asking = asyncio.create_task(ask(stub, rows))
        await queued(stub, "a", 11)  # a refusal has its turn too
        assert server.sessions.queued_rows == BLOCKER_ROWS + 4
        waiting = sample(await scrape(server.metrics_address), "stepstate_queue_rows")
        assert waiting == BLOCKER_ROWS + 4
        await long
        replies = await asking
    assert [reply.t for reply in replies[:4]] == [BLOCKER_ROWS + t for t in range(1, 5)]
    assert {refusal_in(reply).reason for reply in replies[4:]} == {"QUEUE_FULL"}
    want = networks["lstm"].offline(x)[BLOCKER_ROWS:][:4].ravel()
    assert largest_difference(outputs(replies[:4]), want) <= TOLERANCE


async def test_requests_that_a_full_queue_refused_hold_no_room(config: ServerConfig):
    """Their replies, 4 MB each, would have taken a quarter of a GiB and more."""
    async with (
        running_server(limited(config, queue_requests=1)) as server,
        raw_stub(server.address) as stub,
    ):
        for name in "abc":
            await opened(stub, name)
        long = stub.Step(blocker("a", rows=100_000))
        await queued(stub, "a", 1)
        stream, large = stub.StreamSteps(), draw(4_400)
        async with asyncio.timeout(HANG):
            for _ in range(100):
                await stream.write(request("b", 0, large, inspect=True))
                assert refusal_in(await stream.read()).reason == "QUEUE_FULL"
            long.cancel()
            await queued(stub, "a", 0)
            assert (await stub.Step(request("c", 0, large, inspect=True))).t == len(large)
            await stream.write(request("b", 0, draw(1)))
            assert (await stream.read()).t == 1
        stream.cancel()


async def test_a_request_longer_than_the_queue_is_taken_when_nothing_waits(config: ServerConfig):
    limit = limited(config, queue_rows=5)
    async with running_server(limit) as server, raw_stub(server.address) as stub:
        await opened(stub, "a")
        assert (await stub.Step(request("a", 0, draw(20)))).t == 20


async def test_a_message_over_the_limit_is_refused_and_the_connection_goes_on(
    server: Server, stub: StepstateServiceStub
):
    await opened(stub, "a")
    huge = pb.StepRequest(session_id="a", t=0, x=np.zeros(16 * 2**18 + 3, np.float32))
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Step(huge)
    assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stub.Step(request("a", 0, draw(1)))).t == 1


async def test_every_reply_fits_a_client_with_default_limits(stub: StepstateServiceStub):
    await opened(stub, "a")
    refusal = await refused(stub.Step(request("a", 0, np.zeros((5_000, 3)), inspect=True)))
    assert refusal.field == "x"
    most = int(refusal.message.split("at most ")[1].split(" rows")[0])
    reply = await stub.Step(request("a", 0, draw(most), inspect=True))
    assert reply.t == most
    assert reply.ByteSize() < 4 * 2**20
    over = await refused(stub.Step(request("a", most, draw(most + 1), inspect=True)))
    assert over.reason == "INVALID_FIELD"


async def test_rows_of_a_request_are_limited(stub: StepstateServiceStub):
    await opened(stub, "a")
    refusal = await refused(stub.Step(request("a", 0, np.zeros((100_001, 3)), last_only=True)))
    assert (refusal.reason, refusal.field) == ("INVALID_FIELD", "x")
    assert "at most 100000:" in refusal.message


async def test_replay_memory_is_bounded_and_what_fell_out_says_so(config: ServerConfig):
    bound = 40_000  # five replies of a thousand rows with two outputs
    limit = limited(config, replay_bytes=bound)
    async with running_server(limit) as server, raw_stub(server.address) as stub:
        for name in ("a", "b"):
            await opened(stub, name)
        for t in range(0, 20_000, 1_000):
            for name in ("a", "b"):
                await stub.Step(request(name, t, draw(1_000, seed=t)))
        text = await scrape(server.metrics_address)
        held = sample(text, 'stepstate_replay_bytes{model="lstm"')
        assert 0 < held <= bound

        forgotten = await refused(stub.Step(request("a", 0, draw(1_000, seed=0))))
        assert (forgotten.code, forgotten.reason) == (
            grpc.StatusCode.OUT_OF_RANGE,
            "STEP_TOO_OLD",
        )
        kept = await stub.Step(request("a", 19_000, draw(1_000, seed=19_000)))
        assert (kept.replayed, kept.t) == (True, 20_000)
        for name in ("a", "b"):
            await stub.CloseSession(pb.CloseSessionRequest(session_id=name))
        text = await scrape(server.metrics_address)
        assert sample(text, 'stepstate_replay_bytes{model="lstm"') == 0


async def test_single_rows_are_remembered_as_far_as_promised(config: ServerConfig):
    limit = limited(config, replay_rows=8)
    async with running_server(limit) as server, raw_stub(server.address) as stub:
        await opened(stub, "a")
        x = draw(50)
        replies = await ask(stub, [request("a", t, row) for t, row in enumerate(x)])
        for t in range(42, 50):
            again = await stub.Step(request("a", t, x[t]))
            assert (again.replayed, again.y) == (True, replies[t].y)
        assert (await refused(stub.Step(request("a", 41, x[41])))).reason == "STEP_TOO_OLD"


@pytest.mark.long
async def test_unanswered_requests_of_a_stream_are_held_back_by_flow_control(
    server: Server, stub: StepstateServiceStub, networks: dict[str, Network]
):
    most, rows = 1024, 200
    names = [await opened(stub, f"s-{place}") for place in range(2)]
    x = draw(2_500 * rows).reshape(2_500, rows, 3)
    written = 0

    async def unanswered() -> int:
        text, labels = await scrape(server.metrics_address), '{grpc_method="StreamSteps"'
        read = sample(text, f"grpc_server_msg_received_total{labels}")
        return int(read - sample(text, f"grpc_server_msg_sent_total{labels}"))

    async def full() -> bool:
        return await unanswered() >= most - 1

    # A client that takes in no more than it is asked for, and is asked for nothing.
    async with raw_stub(server.address, ("grpc.http2.bdp_probe", 0)) as slow:
        stream = slow.StreamSteps()

        async def write() -> None:
            nonlocal written
            for place, piece in enumerate(x):
                await stream.write(request(names[place % 2], place // 2 * rows, piece))
                written += 1
            await stream.done_writing()

        writing = asyncio.create_task(write())
        await until(full)
        await opened(stub, "other")
        for t in range(50):  # others are served meanwhile
            assert (await stub.Step(request("other", t, draw(1)))).t == t + 1
        assert await unanswered() <= most
        assert written < len(x)
        assert not writing.done()

        print(f"held back after {written} requests")
        replies = [reply async for reply in stream]
        await writing
    assert len(replies) == len(x)
    for place, name in enumerate(names):
        got = np.concatenate([reply.y for reply in replies if reply.session_id == name])
        want = networks["lstm"].offline(x[place::2].reshape(-1, 3)).ravel()
        assert largest_difference(got, want) <= TOLERANCE


async def test_malformed_bytes_are_an_invalid_argument_of_their_own_call(
    server: Server, stub: StepstateServiceStub
):
    await opened(stub, "a")
    async with grpc.aio.insecure_channel(server.address) as channel:
        refusal = await refused(channel.unary_unary(STEP)(GARBAGE))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "message")
        stream = channel.stream_stream(STREAM, response_deserializer=pb.StepResponse.FromString)()
        good = request("a", 0, draw(1)).SerializeToString()
        for data in (GARBAGE, good):
            await stream.write(data)
        await stream.done_writing()
        first, second = [reply async for reply in stream]
        assert refusal_in(first).field == "message"
        assert second.t == 1


async def test_what_holds_the_event_loop_is_measured(server: Server):
    def late(text: str) -> float:
        """How often it was more than a quarter of a second late."""
        name = "stepstate_event_loop_lag_seconds"
        return sample(text, f"{name}_count") - sample(text, f'{name}_bucket{{le="0.25"}}')

    before = late(await scrape(server.metrics_address))
    time.sleep(0.5)  # noqa: ASYNC251 - on purpose: the server is in this loop
    assert late(await scrape(server.metrics_address)) == before + 1
