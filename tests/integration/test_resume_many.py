"""Many sessions on one stream, while servers are killed and connections break."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from stepstate import errors
from stepstate.client import AsyncClient, AsyncSession
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.chaos.faults import relay
from tests.chaos.restartable import RestartableServer, restartable_redis
from tests.integration.clients import AnyClient, AnySession, Connect
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
    blocker,
    draw,
    largest_difference,
    queued,
    sample,
    scrape,
)
from tests.networks import Network


async def results_of(
    client: AnyClient, sessions: list[AnySession], items: Iterator
) -> dict[str, list]:
    """What each session was given, outputs and errors, in order."""
    got: dict[str, list] = {session.session_id: [] for session in sessions}
    async with asyncio.timeout(HANG):
        async for result in client.stream(items):
            assert result.session.t == sum(
                not isinstance(each, Exception) for each in got[result.session.session_id]
            ) + (result.error is None)
            got[result.session.session_id].append(
                result.y if result.error is None else result.error
            )
    return got


async def test_many_sessions_share_a_stream(
    server: Server, connect: Connect, networks: dict[str, Network]
):
    names = ["lstm", "gru", "tanh"] * 5
    xs = [draw(30, seed=seed) for seed in range(len(names))]
    async with connect(server.address) as client:
        sessions = [await client.open(name) for name in names]
        items = (
            (session, x[place])
            for place in range(30)
            for session, x in zip(sessions, xs, strict=True)
        )
        got = await results_of(client, sessions, items)
    for session, name, x in zip(sessions, names, xs, strict=True):
        assert difference(got[session.session_id], networks[name], x) <= TOLERANCE


@pytest.mark.parametrize("interval", [SELDOM, pytest.param(OFTEN, marks=pytest.mark.long)])
async def test_many_sessions_go_on_after_kills(
    restartable: StartRestartable, networks: dict[str, Network], interval: str
):
    """Each output once and in order, whatever the server had saved of which session."""
    count, rows = 40, 150
    xs = [draw(rows, seed=seed) for seed in range(count)]
    server, chance = await restartable(interval), random.Random(5)
    async with AsyncClient(server.address, timeout=HANG) as client:
        sessions = [
            await client.open("lstm", durability="sync" if seed % 4 == 0 else "async")
            for seed in range(count)
        ]

        async def items() -> AsyncIterator[tuple[AsyncSession, np.ndarray]]:
            places = [0] * count
            while left := [which for which in range(count) if places[which] < rows]:
                which = chance.choice(left)
                yield sessions[which], xs[which][places[which]]
                places[which] += 1
                if chance.random() < 0.02:
                    await asyncio.sleep(0.005)

        killing = asyncio.create_task(kill_some(server, 2))
        got: dict[str, list] = {session.session_id: [] for session in sessions}
        async for result in client.stream(items()):
            got[result.session.session_id].append(result.y)
            assert len(got[result.session.session_id]) == result.session.t
            if result.session.t > rows * 0.9 and not killing.done():
                await killing
    for session, x in zip(sessions, xs, strict=True):
        assert difference(got[session.session_id], networks["lstm"], x) <= TOLERANCE


async def kill_some(server: RestartableServer, times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0.3)
        await kill_and_restart(server)


async def test_an_error_of_one_session_ends_no_other(
    server: Server, connect: Connect, networks: dict[str, Network]
):
    """Every item has a result: after its error, a session's items are not applied."""
    bad: list[object] = [[0.0, float("nan"), 0.0], [1.0, 2.0], None]
    xs = [draw(20, seed=seed) for seed in range(5)]
    async with connect(server.address) as client:
        sessions = [await client.open("lstm", session_id=f"s{place}") for place in range(5)]

        def items() -> Iterator[tuple[AnySession, object]]:
            for place in range(20):
                for session, x, wrong in zip(sessions, xs, [*bad, None, None], strict=True):
                    spoilt = place == 7 and session.session_id in {"s0", "s1"}
                    yield session, wrong if spoilt else x[place]

        await client.close("s2")
        got = await results_of(client, sessions, items())
        for place, kind in enumerate((errors.NonFiniteInput, errors.InvalidField)):
            answers = got[f"s{place}"]
            assert difference(answers[:7], networks["lstm"], xs[place][:7]) <= TOLERANCE
            assert [type(each) for each in answers[7:]] == [kind] * 13
            assert sessions[place].t == (await client.info(f"s{place}")).t == 7
        assert [type(each) for each in got["s2"]] == [errors.SessionClosed] * 20
        for place in (3, 4):
            assert difference(got[f"s{place}"], networks["lstm"], xs[place]) <= TOLERANCE
        rest = await collect(sessions[0], xs[0][7:])
        assert largest_difference(np.array(rest), networks["lstm"].offline(xs[0])[7:]) <= TOLERANCE


async def test_rows_missing_of_one_session_end_no_other(
    restartable: StartRestartable, networks: dict[str, Network]
):
    x = draw(40)
    server = await restartable(SELDOM)
    async with AsyncClient(server.address, timeout=HANG) as client:
        kept = await client.open("lstm", session_id="kept")
        await client.open("lstm", session_id="own")
        other = await client.session("own", t=30)
        await kept.step(x[:30])
        await kill_and_restart(server)
        items = ((session, row) for row in x[30:] for session in (kept, other))
        got = await results_of_late(client, items)
    want = networks["lstm"].offline(x)[30:]
    assert largest_difference(np.array([r.y for r in got["kept"]]), want) <= TOLERANCE
    for result in got["own"]:
        with pytest.raises(errors.RowsMissing, match="0 to 29"):
            _ = result.y


async def results_of_late(client: AnyClient, items: Iterator) -> dict[str, list]:
    got: dict[str, list] = {}
    async with asyncio.timeout(HANG):
        async for result in client.stream(items):
            got.setdefault(result.session.session_id, []).append(result)
    return got


async def test_a_session_that_is_held_up_holds_up_no_other(
    server: Server, client: AsyncClient, stub: StepstateServiceStub, networks: dict[str, Network]
):
    """Its items queue here, beyond what may be in flight of it."""
    x = draw(300)
    held = await client.open("lstm", session_id="held")
    free = await client.open("lstm", session_id="free")
    long = asyncio.ensure_future(stub.Step(blocker("held", rows=60_000)))
    await queued(stub, "held", 1)
    held.t = 60_000
    answered = []

    async def items() -> AsyncIterator[tuple[AsyncSession, np.ndarray]]:
        for row in x:
            yield held, row
            yield free, row
        while len(answered) < 300:
            await asyncio.sleep(0.005)
        assert not long.done()
        long.cancel()  # it was not applied
        given_up.set()

    given_up = asyncio.Event()
    refused = 0
    async with asyncio.timeout(HANG):
        async for result in client.stream(items()):
            if result.session is free:
                answered.append(result.y)
            else:
                assert given_up.is_set()
                refused += isinstance(result.error, errors.RowsMissing)
    assert difference(answered, networks["lstm"], x) <= TOLERANCE
    assert refused == 300


async def test_the_source_is_read_no_further_than_the_bound(client: AsyncClient):
    taken = 0

    def items() -> Iterator[tuple[AsyncSession, np.ndarray]]:
        nonlocal taken
        for row in draw(400):
            taken += 1
            yield sessions[taken % 3], row

    sessions = [await client.open("lstm") for _ in range(3)]
    stream = client.stream(items(), max_items=60)
    for place in range(100):
        await anext(stream)
        await asyncio.sleep(0.001)
        assert taken <= place + 1 + 60
    await stream.aclose()
    assert 60 < taken <= 160


async def test_an_error_of_the_source_comes_after_all_results(client: AsyncClient):
    sessions = [await client.open("lstm") for _ in range(3)]

    def items() -> Iterator[tuple[AsyncSession, np.ndarray]]:
        yield from ((session, row) for row in draw(20) for session in sessions)
        raise LookupError("the meters are gone")

    count = 0
    with pytest.raises(LookupError, match="the meters are gone"):
        async for _ in client.stream(items()):
            count += 1
    assert count == 60


async def test_one_session_is_one_object(client: AsyncClient):
    one = await client.open("lstm", session_id="a")
    two = await client.session("a")
    with pytest.raises(errors.InvalidField, match="two objects"):
        async for _ in client.stream([(one, draw(1)[0]), (two, draw(1)[0])]):
            pass


async def test_an_idle_stream_needs_no_server(
    restartable: StartRestartable, networks: dict[str, Network]
):
    """While nothing is unanswered, a server may be away for longer than the timeout."""
    x = draw(20)
    server = await restartable(SELDOM)
    async with AsyncClient(server.address, timeout=1.5) as client:
        session = await client.open("lstm")

        async def items() -> AsyncIterator[tuple[AsyncSession, np.ndarray]]:
            for row in x[:10]:
                yield session, row
            while len(got) < 10:
                await asyncio.sleep(0.01)
            server.kill()
            await asyncio.sleep(2.0)
            await server.start()
            for row in x[10:]:
                yield session, row

        got: list[np.ndarray] = []
        async for result in client.stream(items()):
            got.append(result.y)  # noqa: PERF401 - the source looks at it
    assert difference(got, networks["lstm"], x) <= TOLERANCE


async def test_a_server_that_stays_away_ends_the_stream(restartable: StartRestartable):
    server = await restartable(SELDOM)
    async with AsyncClient(server.address, timeout=1.0) as client:
        sessions = [await client.open("lstm") for _ in range(2)]
        server.kill()
        with pytest.raises(errors.ServerUnreachable):
            async for _ in client.stream((session, draw(1)[0]) for session in sessions):
                pass


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]
)
async def test_many_sessions_over_a_connection_that_keeps_breaking_are_exactly_once(
    server: Server, connect: Connect, networks: dict[str, Network], seed: int
):
    moments = random.Random(seed)
    xs = [draw(40, seed=10 * seed + place) for place in range(8)]
    async with relay(server.address) as way, connect(way.address) as client:
        sessions = [await client.open("lstm") for _ in xs]
        got: dict[str, list] = {session.session_id: [] for session in sessions}
        count = 0
        async with asyncio.timeout(HANG):
            async for result in client.stream(
                (session, x[place])
                for place in range(40)
                for session, x in zip(sessions, xs, strict=True)
            ):
                got[result.session.session_id].append(result.y)
                count += 1
                if count % 40 == 0:
                    way.cut_after(moments.randrange(1, 6_000))
        assert way.connections > 2
    for session, x in zip(sessions, xs, strict=True):
        assert difference(got[session.session_id], networks["lstm"], x) <= TOLERANCE


async def test_sessions_go_to_and_fro_between_two_servers(
    config: ServerConfig,
    connect: Connect,
    networks: dict[str, Network],
    tmp_path: Path,
    program: Callable[[str], str],
):
    """Both live and share a Redis; a proxy sends the client now to the one, now to the other."""
    program("redis-server")
    xs = [draw(60, seed=seed) for seed in range(8)]
    async with restartable_redis(tmp_path) as redis, AsyncExitStack() as stack:
        shared = dataclasses.replace(config, store=redis.url, snapshot_interval=0.3)
        servers = [await stack.enter_async_context(running_server(shared)) for _ in range(2)]
        way = await stack.enter_async_context(relay(servers[0].address))
        client = await stack.enter_async_context(connect(way.address, timeout=HANG))
        sessions = [await client.open("lstm") for _ in xs]
        got: dict[str, list] = {session.session_id: [] for session in sessions}
        count = 0
        async for result in client.stream(
            (session, x[place])
            for place in range(60)
            for session, x in zip(sessions, xs, strict=True)
        ):
            got[result.session.session_id].append(result.y)
            count += 1
            if count % 70 == 0:
                way.redirect(servers[count // 70 % 2].address)
                way.cut()
        pages = [await scrape(each.metrics_address) for each in servers]
    for session, x in zip(sessions, xs, strict=True):
        assert difference(got[session.session_id], networks["lstm"], x) <= TOLERANCE
    # The owner before is refused by the store, or finds out before a step comes: both may be.
    taken_over = [sample(text, "stepstate_session_takeovers_total") for text in pages]
    assert min(taken_over) > 0
