"""Results equal the offline run, whoever shares the batch."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest

from stepstate.client import AsyncClient, AsyncSession
from stepstate.config import ENGINES, ServerConfig
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests import reference
from tests.integration.wire import (
    STEEP,
    TOLERANCE,
    ask,
    draw,
    largest_difference,
    opened,
    outputs,
    raw_stub,
    refusal_in,
    refused,
    request,
    sample,
    scrape,
)
from tests.networks import Network

# Same numbers as offline, by both engines.


@pytest.fixture(params=ENGINES)
def config(request, config: ServerConfig) -> ServerConfig:
    return replace(config, engine=request.param)


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


# Isolation.


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
