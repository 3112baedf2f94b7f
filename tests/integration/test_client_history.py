"""Both clients against real servers: histories of many rows."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stepstate import errors
from stepstate.client import AsyncClient
from stepstate.client._protocol.history import PIECE_ROWS
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from tests import offline
from tests.chaos.faults import relay
from tests.chaos.restartable import restartable_server
from tests.integration.clients import AnyClient, Connect
from tests.integration.forecasters import CLOSE, small
from tests.integration.wire import HANG, TOLERANCE, draw, largest_difference, sample, scrape
from tests.networks import Network
from tests.offline import rows


@pytest.fixture
def config(config: ServerConfig, forecasters: Path) -> ServerConfig:
    return replace(config, models=forecasters)


@pytest.fixture
async def client(connect: Connect, server: Server) -> AsyncIterator[AnyClient]:
    async with connect(server.address) as made:
        yield made


async def test_a_history_is_what_its_rows_one_by_one_are(client: AnyClient, sensor: Network):
    x = rows(PIECE_ROWS // 64)
    told: list[tuple[int, int | None]] = []
    session = await client.open(
        "sensor1", history=x, progress=lambda done, total: told.append((done, total))
    )
    want = offline.outputs(sensor, x)
    assert (session.t, session.fallback_rows, session.imputed_rows) == (len(x), 7, 0)
    assert told == [(len(x), len(x))]
    frame = pd.DataFrame(rows(40, seed=1), columns=["level", "heat"])
    y = await session.prime(frame[["heat", "level"]])
    want = offline.outputs(sensor, np.concatenate([x, frame.to_numpy()]))[-1]
    assert largest_difference(y, want) <= CLOSE
    assert session.fallback_rows == 0


@pytest.mark.parametrize("durability", ["async", "sync", "none"])
async def test_a_long_history_is_exactly_once(client: AnyClient, durability: str):
    x = draw(130_000)  # more than may wait for the store by default
    done: list[int] = []
    session = await client.open("small", durability=durability)
    y = await session.prime(x, progress=lambda rows, _: done.append(rows))
    assert session.t == (await client.info(session.session_id)).t == len(x)
    assert done == sorted(done)
    assert (done[-1], len(done)) == (len(x), -(-len(x) // PIECE_ROWS))
    assert largest_difference(y, small().offline(x)[-1]) <= TOLERANCE


async def test_a_history_waits_for_the_store(config: ServerConfig, connect: Connect):
    """A piece is refused, with a delay, while more rows than that wait to be saved."""
    x = draw(80_000)
    tight = replace(config, backlog_rows=2_000)
    async with running_server(tight) as server, connect(server.address) as client:
        session = await client.open("small", history=x)
        assert session.t == (await client.info(session.session_id)).t == len(x)
        y = await session.step(x[0])
        told = await scrape(server.metrics_address)
    refused = sample(told, 'stepstate_requests_refused_total{reason="STORE_UNAVAILABLE"')
    assert refused > 0
    want = small().offline(np.concatenate([x, x[:1]]))[-1]
    assert largest_difference(y, want) <= TOLERANCE


async def test_a_history_comes_in_chunks(client: AnyClient):
    x = draw(3 * PIECE_ROWS + 5)
    whole = await (await client.open("small")).prime(x)
    totals: set[int | None] = set()

    def chunks() -> Iterator[np.ndarray]:
        yield from (x[:1], x[1:1], x[1 : PIECE_ROWS * 2], x[PIECE_ROWS * 2 :])

    session = await client.open(
        "small", history=chunks(), progress=lambda _, total: totals.add(total)
    )
    assert (session.t, totals) == (len(x), {None})
    listed = await client.open("small")
    assert largest_difference(await listed.prime([x[:9], x[9:]]), whole) <= TOLERANCE
    as_lists = await client.open("small")
    await as_lists.prime(x[:3].tolist())
    assert as_lists.t == 3


async def test_a_history_comes_asynchronously(server: Server):
    x = draw(500)

    async def chunks() -> AsyncIterator[np.ndarray]:
        for part in np.split(x, 5):
            await asyncio.sleep(0)
            yield part

    async with AsyncClient(server.address) as client:
        session = await client.open("small", history=chunks())
        assert session.t == 500


async def test_a_bad_row_is_named_by_its_place_in_the_history(client: AnyClient):
    x = draw(PIECE_ROWS * 2)
    x[PIECE_ROWS + 77, 1] = math.inf
    with pytest.raises(errors.NonFiniteInput) as bad:
        await client.open("small", session_id="opened", history=x)
    assert (bad.value.row, bad.value.column) == (PIECE_ROWS + 77, "x1")
    with pytest.raises(errors.SessionClosed):
        await client.info("opened")

    session = await client.open("small", session_id="kept")
    await session.step(x[0])
    with pytest.raises(errors.NonFiniteInput) as bad:
        await session.prime(iter(np.split(x, 16)))
    assert bad.value.row == PIECE_ROWS + 77
    assert "no row of its request was applied" in str(bad.value)  # those before were
    assert session.t == (await client.info("kept")).t == 1 + PIECE_ROWS
    await session.prime(x[:5])
    with pytest.raises(errors.SessionExists):
        await client.open("small", session_id="kept", history=x)
    assert (await client.info("kept")).t == 6 + PIECE_ROWS


@pytest.mark.parametrize("history", [[], np.zeros((0, 3)), iter(()), [[1.0]], "many"])
async def test_a_history_without_rows_is_refused(client: AnyClient, history: object):
    with pytest.raises(errors.InvalidField, match=r"^history: "):
        await client.open("small", session_id="a", history=history)
    with pytest.raises(errors.SessionClosed):
        await client.info("a")


async def test_what_a_history_raises_comes_out(client: AnyClient):
    def chunks() -> Iterator[np.ndarray]:
        yield draw(10)
        raise LookupError("the file ended")

    session = await client.open("small")
    with pytest.raises(LookupError, match="the file ended"):
        await session.prime(chunks())
    await session.refresh()
    assert session.t in (0, 10)


async def test_a_history_over_a_connection_that_keeps_breaking_is_exactly_once(
    server: Server, connect: Connect
):
    x = draw(40_000)
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("small")
        breaks = iter(range(200_000, 2_000_000, 150_000))
        way.cut_after(150_000)
        y = await session.prime(
            iter(np.split(x, 40)), progress=lambda *_: way.cut_after(next(breaks, 10**9))
        )
        assert session.t == (await session.refresh()).t == len(x)
    want = small().offline(x)[-1]
    assert largest_difference(y, want) <= TOLERANCE


async def test_a_history_goes_on_after_a_kill(forecasters: Path, tmp_path: Path, connect: Connect):
    x = draw(200_000)
    store = f"sqlite:{tmp_path / 'restartable.db'}"
    options = ("--models", str(forecasters), "--store", store, "--snapshot-interval", "0.05")
    async with (
        restartable_server(tmp_path, *options) as server,
        connect(server.address, timeout=HANG) as client,
    ):
        session = await client.open("small")
        far = asyncio.Event()
        loop = asyncio.get_running_loop()

        def progress(done: int, _: int | None) -> None:
            if done > 60_000:
                loop.call_soon_threadsafe(far.set)

        priming = asyncio.ensure_future(session.prime(x, progress=progress))
        await far.wait()
        server.kill()
        await server.start()
        y = await priming
        assert session.t == (await client.info(session.session_id)).t == len(x)
    want = small().offline(x)[-1]
    assert largest_difference(y, want) <= TOLERANCE
