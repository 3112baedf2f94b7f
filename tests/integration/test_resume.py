"""Sessions go on when their server is killed and started again, for both clients.

The checker keeps every row and every output it was given, and compares them with
the network run over the whole sequence: nothing missing, nothing twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import numpy as np
import pytest

from stepstate import errors
from stepstate.client import AsyncClient
from tests.integration.clients import Connect
from tests.integration.restarts import (
    OFTEN,
    SELDOM,
    StartRestartable,
    collect,
    difference,
    kill_and_restart,
)
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    draw,
    largest_difference,
    raw_stub,
    where,
)
from tests.networks import Network


async def saved(address: str, session_id: str, t: int) -> None:
    """Waits until so many rows of a session are durable."""
    async with raw_stub(address) as stub, asyncio.timeout(HANG):
        while (await where(stub, session_id)).durable_t < t:
            await asyncio.sleep(0.02)


# One session.


async def test_step_and_inspect_go_on_after_a_kill(
    restartable: StartRestartable, connect: Connect, networks: dict[str, Network]
):
    x, network = draw(200), networks["lstm"]
    server = await restartable(SELDOM)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm", session_id="a")
        got = [await session.step(row) for row in x[:60]]
        got += list(await session.step(x[60:100]))
        assert session.durable_t < 100
        await kill_and_restart(server)
        got.append(await session.step(x[100]))
        assert session.t == 101
        got += [await session.step(row) for row in x[101:150]]
        await kill_and_restart(server)
        found = await session.inspect(x[150:160])
        assert len(found.layers) == 2
        got += list(found.y)
        last = await session.step(x[160:], last_only=True)
        assert session.t == (await client.info("a")).t == 200
        await session.close()
    assert difference(got, network, x[:160]) <= TOLERANCE
    assert largest_difference(last, network.offline(x)[-1]) <= TOLERANCE


@pytest.mark.parametrize("interval", [SELDOM, OFTEN])
async def test_a_stream_goes_on_after_a_kill(
    restartable: StartRestartable, connect: Connect, networks: dict[str, Network], interval: str
):
    x, moments = draw(400), random.Random(1)
    server = await restartable(interval)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm")
        got, kills = [], 0
        async for y in session.stream(slowly(x) if isinstance(client, AsyncClient) else iter(x)):
            got.append(y)
            if len(got) == 150:
                await asyncio.sleep(moments.uniform(0.0, 0.02))
                await kill_and_restart(server)
                kills += 1
        assert kills == 1
        assert session.t == (await client.info(session.session_id)).t == 400
    assert difference(got, networks["lstm"], x) <= TOLERANCE


async def slowly(x: np.ndarray) -> AsyncIterator[np.ndarray]:
    for place, row in enumerate(x):
        if place % 50 == 0:
            await asyncio.sleep(0.01)
        yield row


async def test_a_long_history_is_sent_again_in_parts(
    restartable: StartRestartable, networks: dict[str, Network]
):
    x = draw(14_000)
    server = await restartable(SELDOM)
    async with AsyncClient(server.address, timeout=HANG) as client:
        session = await client.open("lstm")
        got = [await session.step(part, last_only=True) for part in np.split(x[:10_000], 2)]
        got += [y async for y in session.stream(np.split(x[10_000:13_900], 39))]
        await kill_and_restart(server)
        got.append(await session.step(x[13_900:], last_only=True))
    ends = [5_000, 10_000, *range(10_100, 14_000, 100), 14_000]
    want = networks["lstm"].offline(x)[np.array(ends) - 1]
    assert largest_difference(np.array(got), want) <= TOLERANCE


async def test_a_drain_is_gone_through(
    restartable: StartRestartable, connect: Connect, networks: dict[str, Network]
):
    """SIGTERM saves all, so that nothing is sent again, of sessions with durability none too."""
    x = draw(300)
    server = await restartable(SELDOM)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm", durability="none")
        got = []
        async for y in session.stream(iter(x)):
            got.append(y)
            if len(got) == 100:
                await server.drained()
                await server.start()
        assert session.t == 300
    assert difference(got, networks["lstm"], x) <= TOLERANCE


async def test_what_is_saved_is_told_and_not_kept(
    restartable: StartRestartable, connect: Connect, networks: dict[str, Network]
):
    x = draw(40)
    server = await restartable(OFTEN)
    async with connect(server.address, timeout=HANG) as client:
        late = await client.open("lstm", session_id="late")
        sync = await client.open("lstm", session_id="sync", durability="sync")
        none = await client.open("lstm", session_id="none", durability="none")
        assert (late.info.durability, sync.info.durability) == ("async", "sync")
        for row in x[:20]:
            for session in (late, sync, none):
                await session.step(row)
        assert (sync.durable_t, none.durable_t) == (20, 0)
        await saved(server.address, "late", 20)
        assert (await late.refresh()).durable_t == late.durable_t == 20
        assert [len(getattr(s, "real", s).replay_buffer) for s in (late, sync, none)] == [0, 0, 0]
        info = await client.info("late")
        assert (info.residency, bool(info.owner), info.epoch > 0) == ("resident", True, True)
        await kill_and_restart(server)
        assert (await client.info("sync")).residency == "spilled"
        for session in (late, sync):
            rest = await session.step(x[20:])
            want = networks["lstm"].offline(x)[20:]
            assert largest_difference(rest, want) <= TOLERANCE
        with pytest.raises(errors.SessionLost):
            await none.step(x[20])


async def test_cancelled_steps_are_repeated_across_kills(
    restartable: StartRestartable, networks: dict[str, Network]
):
    x, moments = draw(120), random.Random(3)
    server = await restartable(OFTEN)
    async with AsyncClient(server.address, timeout=HANG) as client:
        session = await client.open("lstm")
        got = []
        for place, row in enumerate(x):
            restart: asyncio.Future[None] | None = None
            for _ in range(3):
                stepping = asyncio.create_task(session.step(row))
                await asyncio.sleep(moments.uniform(0.0, 0.003))
                if place % 50 == 30 and restart is None:
                    restart = asyncio.ensure_future(kill_and_restart(server))
                stepping.cancel()
                await asyncio.gather(stepping, return_exceptions=True)
                if not stepping.cancelled():
                    break
            got.append(stepping.result() if not stepping.cancelled() else await session.step(row))
            if restart is not None:
                await restart
        assert session.t == 120
    assert difference(got, networks["lstm"], x) <= TOLERANCE


async def test_leaving_a_stream_early_lets_the_same_rows_go_on_across_kills(
    restartable: StartRestartable, networks: dict[str, Network]
):
    x = draw(200)
    server = await restartable(SELDOM)
    async with AsyncClient(server.address, timeout=HANG) as client:
        session = await client.open("lstm")
        got: list[np.ndarray] = []
        while session.t < len(x):
            stream = session.stream(iter(x[session.t :]))
            async for y in stream:
                got.append(y)
                if len(got) % 70 == 0:
                    break
            await stream.aclose()
            if len(got) % 70 == 0:
                await kill_and_restart(server)
    assert difference(got, networks["lstm"], x) <= TOLERANCE


# A client that is gone.


async def test_a_client_goes_on_from_its_own_t(
    restartable: StartRestartable, connect: Connect, networks: dict[str, Network]
):
    """It has recorded fewer outputs than the server gave; both were killed meanwhile."""
    x, network = draw(120), networks["lstm"]
    server = await restartable(OFTEN)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm", session_id="a")
        got = [await session.step(row) for row in x[:60]]
        await kill_and_restart(server)
        got += [await session.step(row) for row in x[60:80]]
    await saved(server.address, "a", 80)
    await kill_and_restart(server)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.session("a", t=65)
        assert session.t == 65
        again = [await session.step(row) for row in x[65:70]]
        again += [y async for y in session.stream(iter(x[70:]))]
        assert np.array_equal(np.array(again[:15]), np.array(got[65:]))
        assert session.t == 120
    assert difference(got[:65] + again, network, x) <= TOLERANCE


async def test_a_server_behind_the_clients_own_t_names_the_rows(
    restartable: StartRestartable, connect: Connect, networks: dict[str, Network]
):
    x = draw(60)
    server = await restartable(SELDOM)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm", session_id="a")
        got = [await session.step(row) for row in x[:40]]
        await kill_and_restart(server)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.session("a", t=40)
        first = (await client.info("a")).t
        for step in (session.step(x[40]), collect(session, x[40:])):
            with pytest.raises(errors.RowsMissing) as missing:
                await step
            assert (missing.value.first, missing.value.last) == (first, 39)
        assert session.t == 40
        session.t = first
        got = got[:first] + [await session.step(row) for row in x[first:]]
    assert difference(got, networks["lstm"], x) <= TOLERANCE


async def test_rows_beyond_the_buffer_are_missing_by_name(
    restartable: StartRestartable, connect: Connect, networks: dict[str, Network]
):
    x = draw(80)
    server = await restartable(SELDOM)
    async with connect(server.address, timeout=HANG, resume_rows=25) as client:
        session = await client.open("lstm")
        got = [await session.step(row) for row in x[:60]]
        await kill_and_restart(server)
        first = (await client.info(session.session_id)).t
        with pytest.raises(errors.RowsMissing) as missing:
            await session.step(x[60])
        assert (missing.value.first, missing.value.last) == (first, 35)
        await session.refresh()
        assert session.t == first
        got = got[:first] + [await session.step(row) for row in x[first:]]
    assert difference(got, networks["lstm"], x) <= TOLERANCE
