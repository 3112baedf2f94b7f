"""The promises of DESIGN over real gRPC: each test fails without what it promises."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.duration_pb2 import Duration

from stepstate.client import AsyncClient, AsyncSession
from stepstate.config import ServerConfig
from stepstate.engine.network import Network as EngineNetwork
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests import reference
from tests.integration.wire import (
    GARBAGE,
    HANG,
    STEP,
    STREAM,
    TOLERANCE,
    Refusal,
    ask,
    blocker,
    draw,
    largest_difference,
    opened,
    queued,
    raw_stub,
    refusal_in,
    refused,
    request,
    sample,
    scrape,
    until,
    where,
)
from tests.networks import Network, make_network

BLOCKER_ROWS = 1_500
STEEP = 1e3
"""What the steep networks multiply x with: rows of 3e38 overflow their float32 inside."""


@pytest.fixture(scope="module")
def steep() -> dict[str, Network]:
    """Networks of every cell that overflow on large finite rows; good rows are below 0.01."""
    kinds = {"lstm": "lstm", "gru": "gru", "tanh": "rnn_tanh", "relu": "rnn_relu"}
    made = [make_network(f"steep-{name}", kind, seed=9) for name, kind in kinds.items()]
    made.append(make_network("steep-projected", hidden=12, projection=5, seed=9))
    for network in made:
        with torch.no_grad():
            network.module.weight_ih_l0.mul_(STEEP)
    return {network.name: network for network in made}


@pytest.fixture
def steep_config(config: ServerConfig, steep: dict[str, Network], tmp_path: Path) -> ServerConfig:
    for network in steep.values():
        network.write(tmp_path)
    return dataclasses.replace(config, models=tmp_path)


# 1. Same numbers as offline.


async def step_in_pieces(session: AsyncSession, x: np.ndarray, seed: int) -> np.ndarray:
    """All outputs of x [T, D], sent as single rows, requests of many rows and a stream."""
    pieces = random.Random(seed)
    y = []
    while session.t < len(x):
        rest = x[session.t :]
        rows = min(pieces.choice((1, 1, 1, 2, 7, 40)), len(rest))
        if pieces.random() < 0.1:
            y += [row async for row in session.stream(rest[:20])]
        else:
            y += list(np.atleast_2d(await session.step(rest[0] if rows == 1 else rest[:rows])))
    return np.array(y)


async def test_interleaved_sessions_of_every_cell_equal_the_offline_run(
    client: AsyncClient, networks: dict[str, Network]
):
    kinds = list(networks.values())
    random_lengths = random.Random(7)

    async def run(place: int) -> float:
        network = kinds[place % len(kinds)]
        x = draw(random_lengths.randint(20, 200), network.module.input_size, seed=place)
        session = await client.open(network.name)
        got = await step_in_pieces(session, x, seed=place)
        return largest_difference(got, network.offline(x))

    differences = await asyncio.gather(*map(run, range(64)))
    print(f"64 sessions: max |Δ| = {max(differences):.2e}")
    assert max(differences) <= TOLERANCE


async def test_a_thousand_steps_equal_the_equations_in_float64(
    client: AsyncClient, networks: dict[str, Network]
):
    network, x = networks["lstm"], draw(1_000)
    session = await client.open("lstm")
    got = np.array([y async for y in session.stream(x)])
    difference = largest_difference(got, reference.lstm(network.tensors(), x, layers=2))
    print(f"1,000 steps: max |Δ| = {difference:.2e}")
    assert difference <= TOLERANCE


# 2. Isolation.


HOSTILE = (
    [math.nan] * 3,
    [0.5, math.inf, 0.5],
    [-math.inf] * 3,
    [0.1, 0.2],
    [],
    [3e38, -3e38, 3e38],
    [3.4e38, 3.4e38, 3.4e38],
    [1e-45, -1e-45, 0.0],
)
"""Rows that are non-finite, malformed, or at the ends of float32."""


@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh", "relu", "projected"])
async def test_hostile_batch_mates_change_nothing_in_a_session(
    steep_config: ServerConfig, steep: dict[str, Network], cell: str
):
    model = f"steep-{cell}"
    network, x, good = steep[model], draw(60, seed=3) / STEEP, draw(60, seed=4) / STEEP
    async with running_server(steep_config) as server, raw_stub(server.address) as stub:
        await opened(stub, "alone", model)
        alone = await ask(stub, [request("alone", t, row) for t, row in enumerate(x)])
        mates = [await opened(stub, f"mate-{place}", model) for place in range(24)]
        await opened(stub, "beside", model)

        def rows_of(place: int) -> Iterator[pb.StepRequest]:
            for t, row in enumerate(good):
                hostile = place % 3 and (t + place) % 4 == 0
                sent = HOSTILE[(t // 4 + place) % len(HOSTILE)] if hostile else row
                yield pb.StepRequest(session_id=mates[place], x=sent)

        beside, *others = await asyncio.gather(
            ask(stub, [request("beside", t, row) for t, row in enumerate(x)]),
            *(ask(stub, rows_of(place)) for place in range(24)),
        )
        assert await rows_per_forward(server, model) > 4, "the mates shared no forward"

    replies = [reply for mine in others for reply in mine]
    assert len(replies) == 60 * 24
    refusals = [refusal_in(reply) for reply in replies if reply.HasField("error")]
    assert {refusal.code for refusal in refusals} == {grpc.StatusCode.INVALID_ARGUMENT}
    assert {refusal.reason for refusal in refusals} >= {"NON_FINITE_INPUT", "INVALID_FIELD"}
    assert [reply.t for reply in beside] == list(range(1, 61))
    assert largest_difference(outputs(beside), np.array(outputs(alone))) <= TOLERANCE
    assert largest_difference(outputs(beside), network.offline(x).ravel()) <= TOLERANCE
    for mine in others[::3]:  # those that sent nothing hostile
        assert largest_difference(outputs(mine), network.offline(good).ravel()) <= TOLERANCE


@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh", "relu", "projected"])
async def test_a_row_that_overflows_is_refused_alone_among_mates_and_in_a_request(
    steep_config: ServerConfig, steep: dict[str, Network], cell: str
):
    model = f"steep-{cell}"
    network, x = steep[model], draw(20, seed=3) / STEEP
    over = np.array([3e38, -3e38, 3e38], np.float32)

    async def told(stub: StepstateServiceStub, name: str) -> list[str]:
        """Reasons of refusals of a row that overflows, before each of some good ones."""
        await opened(stub, name, model)
        reasons, y = [], []
        for t, row in enumerate(x):
            for sent in (over, np.stack((row, over))):
                refusal = await refused(stub.Step(request(name, t, sent)))
                reasons.append(refusal.reason)
            y += (await stub.Step(request(name, t, row))).y
        assert largest_difference(y, network.offline(x).ravel()) <= TOLERANCE
        return reasons

    async with running_server(steep_config) as server, raw_stub(server.address) as stub:
        everyone = await asyncio.gather(*(told(stub, f"mate-{place}") for place in range(8)))
        alone = await told(stub, "alone")
    for reasons in (alone, *everyone):
        assert reasons == ["NON_FINITE_RESULT"] * 40


async def rows_per_forward(server: Server, model: str) -> float:
    text = await scrape(server.metrics_address)
    labels = f'{{model="{model}",version="1"}}'
    rows, forwards = (f"stepstate_microbatch_rows_{part}{labels}" for part in ("sum", "count"))
    return sample(text, rows) / sample(text, forwards)


def outputs(replies) -> list[float]:
    return [value for reply in replies for value in reply.y]


async def test_a_session_that_sent_non_finite_rows_goes_on_as_if_it_had_not(
    stub: StepstateServiceStub, networks: dict[str, Network]
):
    x = draw(30)
    await opened(stub, "a")

    def spoiled():
        for t, row in enumerate(x):
            bad = row.copy()
            bad[t % 3] = (math.nan, math.inf, -math.inf)[t % 3]
            yield request("a", t, bad)
            yield request("a", t, np.concatenate((row[None], bad[None])))
            yield request("a", t, row)

    replies = await ask(stub, spoiled())
    for kind in (replies[0::3], replies[1::3]):
        assert {refusal_in(reply).reason for reply in kind} == {"NON_FINITE_INPUT"}
    assert largest_difference(outputs(replies[2::3]), networks["lstm"].offline(x).ravel()) <= (
        TOLERANCE
    )


# 3. Exactly once.


PAYLOADS = {
    "one-row": (1, {}),
    "one-row:inspect": (1, {"inspect": True}),
    "one-row:last_only": (1, {"last_only": True}),
    "many-rows": (9, {}),
    "many-rows:last_only": (9, {"last_only": True}),
    "many-rows:inspect": (9, {"inspect": True}),
    "many-rows:inspect:last_only": (9, {"inspect": True, "last_only": True}),
    "more-rows-than-a-chunk": (700, {}),
}


async def unary(stub: StepstateServiceStub, sent: pb.StepRequest) -> pb.StepResponse:
    return await stub.Step(sent)


async def streamed(stub: StepstateServiceStub, sent: pb.StepRequest) -> pb.StepResponse:
    (reply,) = await ask(stub, [sent])
    return reply


def assert_repeats(again: pb.StepResponse, first: pb.StepResponse) -> None:
    """A retry has the reply of the first time, bit for bit; only durable_t may have moved on."""
    assert (first.replayed, again.replayed) == (False, True)
    assert first.durable_t <= again.durable_t
    assert answered(again) == answered(first)


def answered(reply: pb.StepResponse) -> bytes:
    """The bytes of all that is the same in a reply and its repetition."""
    kept = pb.StepResponse()
    kept.CopyFrom(reply)
    kept.ClearField("replayed")
    kept.ClearField("durable_t")
    return kept.SerializeToString(deterministic=True)


@pytest.mark.parametrize("send", [unary, streamed])
@pytest.mark.parametrize("again", [unary, streamed])
async def test_a_retry_gets_the_same_t_and_outputs_and_is_applied_once(
    stub: StepstateServiceStub,
    other_stub: StepstateServiceStub,
    networks: dict[str, Network],
    send,
    again,
):
    for name, (rows, options) in PAYLOADS.items():
        x = draw(2 + rows + 2)
        await opened(stub, name)
        await stub.Step(request(name, 0, x[:2]))
        sent = request(name, 2, x[2 : 2 + rows], **options)

        first = await send(stub, sent)
        for retrying in (stub, other_stub):
            assert_repeats(await again(retrying, sent), first)
        assert first.t == (await where(stub, name)).t == 2 + rows

        # The state did not move by the retries, and a later step does not spoil the window.
        after = [await stub.Step(request(name, 2 + rows + k, x[2 + rows + k])) for k in range(2)]
        assert_repeats(await again(stub, sent), first)
        offline = networks["lstm"].offline(x)[-2:].ravel()
        assert largest_difference(outputs(after), offline) <= TOLERANCE


@pytest.mark.parametrize("again", [unary, streamed])
async def test_a_retry_is_the_same_and_tells_what_became_durable_since(
    stub: StepstateServiceStub, server: Server, again
):
    """A snapshot between the two replies moves durable_t, and nothing else."""
    await opened(stub, "a")
    sent = request("a", 0, draw(3))
    first = await stub.Step(sent)
    await server.sessions.saver.save_round()
    second = await again(stub, sent)
    assert_repeats(second, first)
    assert second.durable_t == 3


@pytest.mark.parametrize("again", [unary, streamed])
async def test_a_retry_on_another_connection_while_the_first_is_queued_is_applied_once(
    stub: StepstateServiceStub, other_stub: StepstateServiceStub, networks, again
):
    await opened(stub, "a")
    x = np.concatenate((draw(BLOCKER_ROWS, seed=99), draw(1)))
    sent = request("a", BLOCKER_ROWS, x[-1])
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=BLOCKER_ROWS)))
    await queued(stub, "a", 1)
    first = asyncio.ensure_future(stub.Step(sent))
    await queued(stub, "a", 2)
    second = asyncio.ensure_future(again(other_stub, sent))
    long_again = asyncio.ensure_future(again(other_stub, blocker("a", rows=BLOCKER_ROWS)))
    await queued(stub, "a", 4)

    assert_repeats(await second, await first)
    assert_repeats(await long_again, await long)
    assert (await where(stub, "a")).t == BLOCKER_ROWS + 1
    offline = networks["lstm"].offline(x)[-1]
    assert largest_difference((await first).y, offline) <= TOLERANCE


async def test_a_stream_sent_twice_whole_is_applied_once(
    stub: StepstateServiceStub, other_stub: StepstateServiceStub, networks: dict[str, Network]
):
    x = draw(32)  # what a server remembers by default
    await opened(stub, "a")
    items = [request("a", t, row) for t, row in enumerate(x)]
    first, second = await asyncio.gather(ask(stub, items), ask(other_stub, items))

    applied = {reply.t: reply for reply in (*first, *second) if not reply.replayed}
    repeated = [reply for reply in (*first, *second) if reply.replayed]
    assert sorted(applied) == list(range(1, 33))
    assert len(repeated) == 32
    for reply in repeated:
        assert reply.y == applied[reply.t].y
    got = outputs(applied[t] for t in sorted(applied))
    assert largest_difference(got, networks["lstm"].offline(x).ravel()) <= TOLERANCE


# 4. All or nothing.


def refused_requests() -> list[tuple[str, pb.StepRequest]]:
    """Reasons, and requests that a session at t = 5 must refuse for them."""
    good = draw(10) / STEEP
    spoiled, overflowing = good.copy(), good.copy()
    spoiled[-1, -1] = math.nan
    overflowing[-1] = (3e38, -3e38, 3e38)
    return [
        ("INVALID_FIELD", pb.StepRequest(session_id="a", t=5, x=[0.001] * 4)),
        ("INVALID_FIELD", pb.StepRequest(session_id="a", t=5)),
        ("INVALID_FIELD", request("a", 5, np.zeros((5_000, 3)), inspect=True)),
        ("NON_FINITE_INPUT", request("a", 5, spoiled)),
        ("NON_FINITE_INPUT", request("a", 5, spoiled, inspect=True)),
        ("STEP_AHEAD", request("a", 6, good)),
        ("STEP_AHEAD", request("a", 2**64 - 1, good)),
        ("STEP_MISMATCH", request("a", 4, good[:1])),
        ("NON_FINITE_RESULT", request("a", 5, overflowing)),
        ("NON_FINITE_RESULT", request("a", 5, overflowing, inspect=True)),
        ("NON_FINITE_RESULT", request("a", 5, overflowing[-1:])),
    ]


async def test_a_refused_request_leaves_state_and_t(
    steep_config: ServerConfig, steep: dict[str, Network]
):
    network, x = steep["steep-relu"], draw(40) / STEEP  # its state has no bound
    got = []
    async with running_server(steep_config) as server, raw_stub(server.address) as stub:
        await opened(stub, "a", network.name)
        got.append(await stub.Step(request("a", 0, x[:5])))
        for reason, sent in refused_requests():
            for send in (unary, streamed):
                refusal = await send_refused(send, stub, sent)
                assert refusal.reason == reason
                assert (await where(stub, "a")).t == 5
        got.append(await stub.Step(request("a", 5, x[5:])))
    assert largest_difference(outputs(got), network.offline(x).ravel()) <= TOLERANCE


async def send_refused(send, stub: StepstateServiceStub, sent: pb.StepRequest) -> Refusal:
    if send is unary:
        return await refused(stub.Step(sent))
    return refusal_in(await streamed(stub, sent))


@pytest.mark.parametrize("rows", [1, 20])
async def test_a_forward_that_fails_leaves_state_and_t(
    stub: StepstateServiceStub,
    networks: dict[str, Network],
    caplog: pytest.LogCaptureFixture,
    rows: int,
):
    x = draw(5 + rows)
    await opened(stub, "a")
    first = await stub.Step(request("a", 0, x[:5]))
    with pytest.MonkeyPatch.context() as patch:
        for kernel in ("step", "sequence"):
            patch.delattr(EngineNetwork, kernel)
        refusals = [await refused(stub.Step(request("a", 5, x[5:])))]
        refusals += map(refusal_in, await ask(stub, [request("a", 5, x[5:])]))

    for refusal in refusals:
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert any(
            getattr(record, "error_id", "") == refusal.metadata["error_id"] and record.exc_info
            for record in caplog.records
        )
    assert (await where(stub, "a")).t == 5
    got = outputs((first, await stub.Step(request("a", 5, x[5:]))))
    assert largest_difference(got, networks["lstm"].offline(x).ravel()) <= TOLERANCE


async def test_a_cancelled_request_that_waits_leaves_state_and_t(
    stub: StepstateServiceStub, networks: dict[str, Network]
):
    await opened(stub, "a")
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=BLOCKER_ROWS)))
    await queued(stub, "a", 1)
    waiting = stub.Step(request("a", None, draw(1)))
    waiting_long = stub.Step(request("a", None, draw(50)))
    stream = stub.StreamSteps()
    await stream.write(request("a", None, draw(1)))
    await queued(stub, "a", 4)
    for call in (waiting, waiting_long, stream):
        call.cancel()
    await long

    x = np.concatenate((draw(BLOCKER_ROWS, seed=99), draw(1, seed=5)))
    last = await stub.Step(request("a", BLOCKER_ROWS, x[-1]))
    assert largest_difference(last.y, networks["lstm"].offline(x)[-1]) <= TOLERANCE


@pytest.mark.parametrize("transport", ["unary", "stream"])
async def test_a_long_request_cancelled_in_the_middle_leaves_state_and_t(
    stub: StepstateServiceStub, networks: dict[str, Network], transport: str
):
    x = draw(6)
    await opened(stub, "a")
    await stub.Step(request("a", 0, x[:5]))
    sent = blocker("a", 5, rows=100_000)
    if transport == "unary":
        call = stub.Step(sent)
    else:
        call = stub.StreamSteps()
        await call.write(sent)
    await queued(stub, "a", 1)
    call.cancel()
    await queued(stub, "a", 0)

    assert (await where(stub, "a")).t == 5
    last = await stub.Step(request("a", 5, x[5]))
    assert largest_difference(last.y, networks["lstm"].offline(x)[-1]) <= TOLERANCE


# 5. Never a silent restart from zero.


async def expire(stub: StepstateServiceStub, session_id: str) -> None:
    """Opens a session, steps it, and lets it expire."""
    await opened(stub, session_id, idle_timeout=Duration(nanos=200_000_000))
    await stub.Step(request(session_id, 0, draw(3)))

    async def gone() -> bool:
        try:
            await where(stub, session_id)
        except grpc.aio.AioRpcError:
            return True
        return False

    await until(gone)


async def close(stub: StepstateServiceStub, session_id: str) -> None:
    await opened(stub, session_id)
    await stub.Step(request(session_id, 0, draw(3)))
    await stub.CloseSession(pb.CloseSessionRequest(session_id=session_id))


async def never(stub: StepstateServiceStub, session_id: str) -> None:
    """Nothing happened to this id."""


@pytest.mark.parametrize(
    ("end", "reason", "told"),
    [
        (expire, "SESSION_EXPIRED", {"t": "3", "idle_timeout_seconds": "0.2"}),
        (close, "SESSION_CLOSED", {"t": "3"}),
        (never, "SESSION_UNKNOWN", {}),
    ],
)
async def test_a_session_that_is_gone_says_why_and_is_not_made_anew(
    stub: StepstateServiceStub, end, reason: str, told: dict[str, str]
):
    await end(stub, "a")

    async def everywhere() -> list[Refusal]:
        return [
            await refused(stub.Step(request("a", 0, draw(1)))),
            await refused(stub.Step(request("a", 3, draw(1)))),
            await refused(stub.Step(request("a", None, draw(1)))),
            await refused(stub.GetSession(pb.GetSessionRequest(session_id="a"))),
            await refused(stub.CloseSession(pb.CloseSessionRequest(session_id="a"))),
            *map(refusal_in, await ask(stub, [request("a", 0, draw(1)), request("a", 3, draw(1))])),
        ]

    for refusal in await everywhere() + await everywhere():
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, reason)
        until_when = refusal.metadata.pop("restore_until", "")
        assert bool(until_when) is (reason == "SESSION_EXPIRED")
        assert refusal.metadata == {"session_id": "a", **told}
        assert "open it" in refusal.message
    assert not (await stub.ListSessions(pb.ListSessionsRequest())).sessions

    # Only a client that opens it begins anew, from zero.
    await opened(stub, "a")
    assert (await stub.Step(request("a", 0, draw(1)))).t == 1


async def test_a_step_keeps_its_session_from_expiring(stub: StepstateServiceStub):
    await opened(stub, "a", idle_timeout=Duration(seconds=600))
    opening = (await where(stub, "a")).expire_time.ToNanoseconds()
    assert (await where(stub, "a")).expire_time.ToNanoseconds() == pytest.approx(opening, abs=1e7)
    for t, rows in ((0, 1), (1, 5)):
        before = (await where(stub, "a")).expire_time.ToNanoseconds()
        await asyncio.sleep(0.02)
        await stub.Step(request("a", t, draw(rows)))
        assert (await where(stub, "a")).expire_time.ToNanoseconds() > before + 15_000_000


async def test_a_session_outlives_its_server(config: ServerConfig, networks: dict[str, Network]):
    x = draw(4)
    async with running_server(config) as first, raw_stub(first.address) as stub:
        await opened(stub, "a")
        await stub.Step(request("a", 0, x[:3]))
    async with running_server(config) as second, raw_stub(second.address) as stub:
        reply = await stub.Step(request("a", None, x[3:]))
        assert (reply.t, reply.durable_t) == (4, 3)
        assert largest_difference(reply.y, networks["lstm"].offline(x)[-1]) <= TOLERANCE


async def test_without_a_durable_store_a_session_ends_with_its_server(config: ServerConfig):
    forgetful = dataclasses.replace(config, store="memory:")
    async with running_server(forgetful) as first, raw_stub(first.address) as stub:
        await opened(stub, "a")
        await stub.Step(request("a", 0, draw(3)))
    async with running_server(forgetful) as second, raw_stub(second.address) as stub:
        assert (await refused(stub.Step(request("a", 3, draw(1))))).reason == "SESSION_UNKNOWN"


async def test_closing_finishes_accepted_steps_and_takes_no_more(stub: StepstateServiceStub):
    await opened(stub, "a")
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=BLOCKER_ROWS)))
    await queued(stub, "a", 1)
    waiting = asyncio.ensure_future(stub.Step(request("a", BLOCKER_ROWS, draw(1))))
    await queued(stub, "a", 2)
    closing = asyncio.ensure_future(stub.CloseSession(pb.CloseSessionRequest(session_id="a")))

    async def ending() -> bool:
        return not (await stub.ListSessions(pb.ListSessionsRequest())).sessions

    await until(ending)
    late = asyncio.ensure_future(refused(stub.Step(request("a", BLOCKER_ROWS + 1, draw(1)))))
    assert not long.done()
    assert ((await long).t, (await waiting).t) == (BLOCKER_ROWS, BLOCKER_ROWS + 1)
    assert (await closing).session.t == BLOCKER_ROWS + 1
    assert (await late).reason == "SESSION_CLOSED"


# 8. Bounded.


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
        ({"queue_requests": 3}, {"limit": "3"}),
        ({"queue_rows": BLOCKER_ROWS + 2}, {"limit": str(BLOCKER_ROWS + 2)}),
    ],
)
async def test_a_full_queue_refuses_and_serves_again_when_it_is_not(
    config: ServerConfig, networks: dict[str, Network], limits, told
):
    async with (
        running_server(limited(config, **limits)) as server,
        raw_stub(server.address) as stub,
    ):
        await opened(stub, "a")
        await opened(stub, "b")
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
        assert not long.done()
        await asyncio.gather(long, *waiting)
        reply = await stub.Step(request("b", 0, draw(2)))
        offline = networks["lstm"].offline(draw(2)).ravel()
        assert largest_difference(reply.y, offline) <= TOLERANCE


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
