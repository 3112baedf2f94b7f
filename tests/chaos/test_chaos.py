"""Through every fault others go on with the right numbers, and the server lives, no larger."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from stepstate.client import AsyncClient
from stepstate.v1 import stepstate_pb2 as pb
from tests.chaos import faults
from tests.chaos.steady import Steady, steady_sessions
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    draw,
    largest_difference,
    queued,
    raw_stub,
    refused,
    sample,
    scrape,
    until,
)
from tests.networks import Network
from tests.processes import ServerProcess, server_process

MAX_SESSIONS = 100
ROOM = 64 * 2**20
"""Bytes that a server may grow by over storms that it has seen already: allocators keep some."""

Storm = Callable[[str], Awaitable[None]]


@pytest.fixture(scope="module")
def process(model_root: Path) -> Iterator[ServerProcess]:
    """One server for all storms: what one leaves behind the others must bear."""
    options = ("--max-sessions", str(MAX_SESSIONS), "--log-level", "ERROR")
    with server_process("--models", str(model_root), *options) as server:
        yield server
        assert server.process.poll() is None


@pytest.fixture(scope="module")
def network(networks: dict[str, Network]) -> Network:
    return networks["lstm"]


async def a_clean_session_works(address: str, network: Network) -> None:
    x = draw(60, seed=12)
    async with AsyncClient(address) as client, await client.open("lstm") as session:
        got = [y async for y in session.stream(x[:50])]
        got += list(await session.step(x[50:]))
        assert largest_difference(np.array(got), network.offline(x)) <= TOLERANCE


async def nothing_is_left(process: ServerProcess) -> None:
    """No session and no queued row of a storm remains, and no slot is lost."""

    async def so() -> bool:
        text = await scrape(process.metrics_url.split("/")[2])
        left = ("stepstate_queue_rows", "stepstate_sessions{", "stepstate_slots_leaked")
        return all(sample(text, name) == 0 for name in left)

    await until(so)


def resident(process: ServerProcess) -> int:
    return psutil.Process(process.process.pid).memory_info().rss


LONG_STORMS = (
    faults.cancelled_calls,
    faults.broken_connections,
    faults.long_requests_given_up,
    faults.malformed_messages,
    faults.abandoned_streams,
    faults.sessions_opened_and_closed,
)


def marked(storm: Storm) -> object:
    marks = [pytest.mark.long] if storm in LONG_STORMS else []
    return pytest.param(storm, marks=marks, id=storm.__name__)


@pytest.mark.parametrize("storm", [marked(storm) for storm in faults.STORMS])
async def test_a_storm_passes(process: ServerProcess, network: Network, storm: Storm):
    async with steady_sessions(process.address, network):
        for _ in range(2):
            await storm(process.address)
        before = resident(process)
        for _ in range(3):
            await storm(process.address)
        assert process.process.poll() is None
        assert resident(process) - before < ROOM
    await nothing_is_left(process)
    await a_clean_session_works(process.address, network)


async def test_storms_at_once_pass(process: ServerProcess, network: Network):
    async with steady_sessions(process.address, network):
        quick = (
            faults.cancelled_calls,
            faults.garbage_on_the_port,
            faults.malformed_messages,
            faults.abandoned_streams,
        )
        await asyncio.gather(*(storm(process.address) for storm in quick))
    await nothing_is_left(process)
    await a_clean_session_works(process.address, network)


async def test_a_full_table_refuses_new_sessions_only(process: ServerProcess, network: Network):
    async with (
        steady_sessions(process.address, network) as steady,
        faults.full_table(process.address, MAX_SESSIONS + 1),
        raw_stub(process.address) as stub,
    ):
        for _ in range(20):
            refusal = await refused(stub.OpenSession(pb.OpenSessionRequest(model="lstm")))
            assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        await asyncio.gather(*(one.progress(30) for one in steady))
    await a_clean_session_works(process.address, network)


async def test_slow_readers_are_held_back_and_others_are_served(
    process: ServerProcess, network: Network
):
    async with (
        steady_sessions(process.address, network) as steady,
        faults.slow_readers(process.address, 3),
    ):
        await asyncio.gather(*(one.progress(100) for one in steady))
        before = resident(process)
        await asyncio.gather(*(one.progress(300) for one in steady))
        assert resident(process) - before < ROOM
    await nothing_is_left(process)


async def test_a_killed_clients_session_goes_on_where_its_output_ends(
    process: ServerProcess, network: Network
):
    """What it had in flight when it was killed is answered again, or applied: never twice."""
    x = draw(5_000, seed=8)
    async with steady_sessions(process.address, network):
        for round_ in range(3):
            session_id = f"killed-{round_}"
            with faults.client_process(process.address, session_id, x) as client:
                assert client.stdout is not None
                printed = []
                while len(printed) < 100 + 30 * round_:
                    line = await asyncio.to_thread(client.stdout.readline)
                    printed.append([float(value) for value in line.split()])
            async with raw_stub(process.address) as stub:
                await queued(stub, session_id, 0)
            t = len(printed)
            assert [line[0] for line in printed] == list(range(1, t + 1))
            async with AsyncClient(process.address) as client:
                session = await client.session(session_id)
                assert session.t >= t
                tail = await session.step(x[session.t : session.t + 50])
                want = network.offline(x[: session.t])
                assert largest_difference(tail, want[-50:]) <= TOLERANCE
                assert largest_difference(np.array(printed)[:, 1:], want[:t]) <= TOLERANCE
                await session.close()
    await nothing_is_left(process)


async def test_sigterm_in_a_storm_loses_no_answered_row(model_root: Path, network: Network):
    with server_process("--models", str(model_root), "--log-level", "ERROR") as server:
        async with AsyncClient(server.address, timeout=1.0) as client:
            steady = [Steady(await client.open("lstm"), network, seed) for seed in range(4)]
            running = [asyncio.create_task(one.run_until_unavailable()) for one in steady]
            await asyncio.gather(*(one.progress(50) for one in steady))
            storming = asyncio.create_task(faults.cancelled_calls(server.address))
            await asyncio.gather(*(one.progress(50) for one in steady))
            faults.terminate(server)
            assert await asyncio.to_thread(server.process.wait, HANG) == 0
            await asyncio.gather(*running)
            storming.cancel()
            await asyncio.gather(storming, return_exceptions=True)
            for one in steady:
                one.check(whole=False)
