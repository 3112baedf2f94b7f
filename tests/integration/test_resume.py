"""Sessions go on when their server is killed and started again, for both clients.

The checker keeps every row and every output it was given, and compares them with
the network run over the whole sequence: nothing missing, nothing twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from stepstate import errors
from stepstate.cli import main
from stepstate.client import AsyncClient, AsyncSession
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.chaos.faults import relay
from tests.chaos.restartable import RestartableServer, restartable_redis
from tests.integration.clients import AnyClient, AnySession, Connect
from tests.integration.conftest import Mortal, reborn
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
    where,
)
from tests.networks import Network

SELDOM, OFTEN = "600", "0.1"
"""Seconds between snapshots: nothing but what is urged is saved, or nearly everything."""


def difference(got: list[np.ndarray], network: Network, x: np.ndarray) -> float:
    return largest_difference(np.array(got), network.offline(x))


async def saved(address: str, session_id: str, t: int) -> None:
    """Waits until so many rows of a session are durable."""
    async with raw_stub(address) as stub, asyncio.timeout(HANG):
        while (await where(stub, session_id)).durable_t < t:
            await asyncio.sleep(0.02)


# One session.


async def test_step_and_inspect_go_on_after_a_kill(
    mortal: Mortal, connect: Connect, networks: dict[str, Network]
):
    x, network = draw(200), networks["lstm"]
    server = await mortal(SELDOM)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm", session_id="a")
        got = [await session.step(row) for row in x[:60]]
        got += list(await session.step(x[60:100]))
        assert session.durable_t < 100
        await reborn(server)
        got.append(await session.step(x[100]))
        assert session.t == 101
        got += [await session.step(row) for row in x[101:150]]
        await reborn(server)
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
    mortal: Mortal, connect: Connect, networks: dict[str, Network], interval: str
):
    x, moments = draw(400), random.Random(1)
    server = await mortal(interval)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm")
        got, kills = [], 0
        async for y in session.stream(slowly(x) if isinstance(client, AsyncClient) else iter(x)):
            got.append(y)
            if len(got) == 150:
                await asyncio.sleep(moments.uniform(0.0, 0.02))
                await reborn(server)
                kills += 1
        assert kills == 1
        assert session.t == (await client.info(session.session_id)).t == 400
    assert difference(got, networks["lstm"], x) <= TOLERANCE


async def slowly(x: np.ndarray) -> AsyncIterator[np.ndarray]:
    for place, row in enumerate(x):
        if place % 50 == 0:
            await asyncio.sleep(0.01)
        yield row


async def test_a_long_history_is_sent_again_in_parts(mortal: Mortal, networks: dict[str, Network]):
    x = draw(14_000)
    server = await mortal(SELDOM)
    async with AsyncClient(server.address, timeout=HANG) as client:
        session = await client.open("lstm")
        got = [await session.step(part, last_only=True) for part in np.split(x[:10_000], 2)]
        got += [y async for y in session.stream(np.split(x[10_000:13_900], 39))]
        await reborn(server)
        got.append(await session.step(x[13_900:], last_only=True))
    ends = [5_000, 10_000, *range(10_100, 14_000, 100), 14_000]
    want = networks["lstm"].offline(x)[np.array(ends) - 1]
    assert largest_difference(np.array(got), want) <= TOLERANCE


async def test_a_drain_is_gone_through(
    mortal: Mortal, connect: Connect, networks: dict[str, Network]
):
    """SIGTERM saves all, so that nothing is sent again, of sessions with durability none too."""
    x = draw(300)
    server = await mortal(SELDOM)
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
    mortal: Mortal, connect: Connect, networks: dict[str, Network]
):
    x = draw(40)
    server = await mortal(OFTEN)
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
        assert [len(getattr(s, "real", s).backlog) for s in (late, sync, none)] == [0, 0, 0]
        info = await client.info("late")
        assert (info.residency, bool(info.owner), info.epoch > 0) == ("resident", True, True)
        await reborn(server)
        assert (await client.info("sync")).residency == "spilled"
        for session in (late, sync):
            rest = await session.step(x[20:])
            want = networks["lstm"].offline(x)[20:]
            assert largest_difference(rest, want) <= TOLERANCE
        with pytest.raises(errors.SessionLost):
            await none.step(x[20])


async def test_cancelled_steps_are_repeated_across_kills(
    mortal: Mortal, networks: dict[str, Network]
):
    x, moments = draw(120), random.Random(3)
    server = await mortal(OFTEN)
    async with AsyncClient(server.address, timeout=HANG) as client:
        session = await client.open("lstm")
        got = []
        for place, row in enumerate(x):
            restart: asyncio.Future[None] | None = None
            for _ in range(3):
                stepping = asyncio.create_task(session.step(row))
                await asyncio.sleep(moments.uniform(0.0, 0.003))
                if place % 50 == 30 and restart is None:
                    restart = asyncio.ensure_future(reborn(server))
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
    mortal: Mortal, networks: dict[str, Network]
):
    x = draw(200)
    server = await mortal(SELDOM)
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
                await reborn(server)
    assert difference(got, networks["lstm"], x) <= TOLERANCE


# A client that is gone.


async def test_a_client_goes_on_from_its_own_t(
    mortal: Mortal, connect: Connect, networks: dict[str, Network]
):
    """It has recorded fewer outputs than the server gave; both were killed meanwhile."""
    x, network = draw(120), networks["lstm"]
    server = await mortal(OFTEN)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm", session_id="a")
        got = [await session.step(row) for row in x[:60]]
        await reborn(server)
        got += [await session.step(row) for row in x[60:80]]
    await saved(server.address, "a", 80)
    await reborn(server)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.session("a", t=65)
        assert session.t == 65
        again = [await session.step(row) for row in x[65:70]]
        again += [y async for y in session.stream(iter(x[70:]))]
        assert np.array_equal(np.array(again[:15]), np.array(got[65:]))
        assert session.t == 120
    assert difference(got[:65] + again, network, x) <= TOLERANCE


async def test_a_server_behind_the_clients_own_t_names_the_rows(
    mortal: Mortal, connect: Connect, networks: dict[str, Network]
):
    x = draw(60)
    server = await mortal(SELDOM)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm", session_id="a")
        got = [await session.step(row) for row in x[:40]]
        await reborn(server)
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


async def collect(session: AnySession, xs: np.ndarray) -> list[np.ndarray]:
    return [y async for y in session.stream(xs)]


async def test_rows_beyond_the_buffer_are_missing_by_name(
    mortal: Mortal, connect: Connect, networks: dict[str, Network]
):
    x = draw(80)
    server = await mortal(SELDOM)
    async with connect(server.address, timeout=HANG, resume_rows=25) as client:
        session = await client.open("lstm")
        got = [await session.step(row) for row in x[:60]]
        await reborn(server)
        first = (await client.info(session.session_id)).t
        with pytest.raises(errors.RowsMissing) as missing:
            await session.step(x[60])
        assert (missing.value.first, missing.value.last) == (first, 35)
        await session.refresh()
        assert session.t == first
        got = got[:first] + [await session.step(row) for row in x[first:]]
    assert difference(got, networks["lstm"], x) <= TOLERANCE


# Many sessions on one stream.


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


@pytest.mark.parametrize("interval", [SELDOM, OFTEN])
async def test_many_sessions_go_on_after_kills(
    mortal: Mortal, networks: dict[str, Network], interval: str
):
    """Each output once and in order, whatever the server had saved of which session."""
    count, rows = 40, 150
    xs = [draw(rows, seed=seed) for seed in range(count)]
    server, chance = await mortal(interval), random.Random(5)
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
        await reborn(server)


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
    mortal: Mortal, networks: dict[str, Network]
):
    x = draw(40)
    server = await mortal(SELDOM)
    async with AsyncClient(server.address, timeout=HANG) as client:
        kept = await client.open("lstm", session_id="kept")
        await client.open("lstm", session_id="own")
        other = await client.session("own", t=30)
        await kept.step(x[:30])
        await reborn(server)
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


async def test_an_idle_stream_needs_no_server(mortal: Mortal, networks: dict[str, Network]):
    """While nothing is unanswered, a server may be away for longer than the timeout."""
    x = draw(20)
    server = await mortal(SELDOM)
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


async def test_a_server_that_stays_away_ends_the_stream(mortal: Mortal):
    server = await mortal(SELDOM)
    async with AsyncClient(server.address, timeout=1.0) as client:
        sessions = [await client.open("lstm") for _ in range(2)]
        server.kill()
        with pytest.raises(errors.ServerUnreachable):
            async for _ in client.stream((session, draw(1)[0]) for session in sessions):
                pass


@pytest.mark.parametrize("seed", range(3))
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
                way._target = servers[count // 70 % 2].address.rpartition(":")
                way.cut()
        pages = [await scrape(each.metrics_address) for each in servers]
    for session, x in zip(sessions, xs, strict=True):
        assert difference(got[session.session_id], networks["lstm"], x) <= TOLERANCE
    # The owner before is refused by the store, or finds out before a step comes: both may be.
    taken_over = [sample(text, "stepstate_session_takeovers_total") for text in pages]
    assert min(taken_over) > 0


# Copies.


async def test_a_fork_goes_on_apart_and_is_resumed_too(
    mortal: Mortal, connect: Connect, networks: dict[str, Network]
):
    x, network = draw(60), networks["lstm"]
    other = np.concatenate((x[:30], draw(30, seed=9)))
    server = await mortal(SELDOM)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm", session_id="a")
        await session.step(x[:30])
        fork = await session.fork("b")
        plain = await client.fork("a", durability="sync")
        assert (fork.t, plain.t, plain.info.durability) == (30, 30, "sync")
        assert fork.info.model == "lstm"
        head = await session.step(x[30:40]), await fork.step(other[30:40])
        await plain.step(other[30:40])
        await reborn(server)
        tail = await session.step(x[40:]), await fork.step(other[40:])
        rest = await plain.step(other[40:])
        with pytest.raises(errors.SessionExists):
            await client.fork(session, "b")
        with pytest.raises(errors.SessionUnknown):
            await client.fork("nope")
    for rows, first, second in zip((x, other), head, tail, strict=True):
        got = np.concatenate((first, second))
        assert largest_difference(got, network.offline(rows)[30:]) <= TOLERANCE
    assert largest_difference(rest, network.offline(other)[40:]) <= TOLERANCE


async def test_a_fork_of_a_session_that_was_set_back_stands_where_the_application_does(
    mortal: Mortal, connect: Connect, networks: dict[str, Network]
):
    x = draw(50)
    server = await mortal(SELDOM)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm")
        for row in x[:40]:
            await session.step(row)
        await reborn(server)
        fork = await session.fork()
        assert fork.t == 40
        got = await fork.step(x[40:])
    assert largest_difference(got, networks["lstm"].offline(x)[40:]) <= TOLERANCE


async def test_a_snapshot_moves_a_session_to_another_server(
    mortal: Mortal, server: Server, connect: Connect, networks: dict[str, Network]
):
    x, network = draw(60), networks["lstm"]
    old = await mortal(SELDOM)
    async with (
        connect(old.address, timeout=HANG) as source,
        connect(server.address, timeout=HANG) as target,
    ):
        session = await source.open("lstm", session_id="a")
        got = await session.step(x[:30])
        snapshot = await source.export("a")
        moved = await target.restore(snapshot)
        renamed = await target.restore(snapshot, session_id="b", durability="none")
        assert (moved.session_id, moved.t, renamed.session_id) == ("a", 30, "b")
        assert renamed.info.durability == "none"
        assert np.array_equal(await moved.step(x[30:]), await renamed.step(x[30:]))
        again = await target.session("b", t=0)
        assert np.array_equal(await again.step(x[:30]), got)  # the replies came along
        with pytest.raises(errors.SessionExists):
            await target.restore(snapshot)
        with pytest.raises(errors.SnapshotCorrupt):
            await target.restore(snapshot[:-1] + b"?", session_id="c")
        with pytest.raises(errors.InvalidField, match="durability"):
            await target.open("lstm", durability="maybe")  # type: ignore[arg-type]
        rest = (await source.info("a")).t
    assert rest == 30
    assert largest_difference(got, network.offline(x[:30])) <= TOLERANCE


async def test_a_lost_reply_of_a_fork_does_not_fork_twice(server: Server, connect: Connect):
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm", session_id="a")
        await session.step(draw(5))
        way.hold_replies()
        forking = asyncio.ensure_future(session.fork())
        await asyncio.wait_for(way.withheld.wait(), HANG)
        while len(server.sessions) < 2:
            await asyncio.sleep(0.005)
        way.lose()
        fork = await forking
        await fork.step(draw(1))
        assert sorted([info.t async for info in client.sessions()]) == [5, 6]


# The commands.


@pytest.fixture
def command(server: Server) -> Callable[..., Awaitable[Result]]:
    """Runs `stepstate` in this process, against the server."""

    async def run(*arguments: str) -> Result:
        told = [*arguments, "--server", server.address]
        return await asyncio.to_thread(CliRunner().invoke, main, told)

    return run


async def test_the_commands_move_a_session(
    command: Callable[..., Awaitable[Result]],
    client: AsyncClient,
    networks: dict[str, Network],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    x, want = draw(30), networks["lstm"].offline(draw(30))
    session = await client.open("lstm", session_id="a", durability="sync")
    await session.step(x[:20])

    exported = await command("sessions", "export", "a")
    assert exported.exit_code == 0, exported.output
    size = (tmp_path / "a.snapshot").stat().st_size
    assert f"a.snapshot: {size} bytes" in exported.stderr
    assert "a.snapshot exists: --force" in (await command("sessions", "export", "a")).stderr
    assert (await command("sessions", "export", "a", "--force")).exit_code == 0
    piped = await command("sessions", "export", "a", "--output", "-")
    assert piped.stdout_bytes == (tmp_path / "a.snapshot").read_bytes()
    nowhere = await command("sessions", "export", "a", "--output", "no/where")
    assert "no/where: No such file" in nowhere.stderr

    taken = await command("sessions", "import", "a.snapshot")
    assert (taken.exit_code, "already open at t=20" in taken.stderr) == (1, True)
    imported = await command("sessions", "import", "a.snapshot", "--session-id", "b")
    assert (json.loads(imported.stdout)["t"], json.loads(imported.stdout)["session_id"]) == (
        20,
        "b",
    )
    forked = json.loads((await command("sessions", "fork", "a", "c")).stdout)
    assert (forked["session_id"], forked["durable_t"]) == ("c", 20)
    made = json.loads((await command("sessions", "fork", "a")).stdout)["session_id"]
    (tmp_path / "broken").write_bytes((tmp_path / "a.snapshot").read_bytes()[:-1])
    broken = await command("sessions", "import", "broken", "--session-id", "d")
    assert "the snapshot can't be read" in broken.stderr
    assert "unknown" in (await command("sessions", "export", "nope")).stderr

    listed = (await command("sessions", "list")).stdout.splitlines()[1:]
    rows = {line.split()[0]: line.split()[1:5] for line in listed}
    assert rows == {name: ["lstm/1", "20", "20", "resident"] for name in ("a", "b", "c", made)}
    for name in rows:
        copy = await client.session(name)
        assert largest_difference(await copy.step(x[20:]), want[20:]) <= TOLERANCE


async def test_the_command_step_opens_with_a_durability(
    command: Callable[..., Awaitable[Result]], client: AsyncClient
):
    options = ("--model", "lstm", "--session-id", "a", "--durability", "sync", "--keep")
    assert (await command("step", *options)).exit_code == 0
    assert (await client.info("a")).durability == "sync"
    refused = await command("step", "--model", "lstm", "--durability", "disk")
    assert "'disk' is not one of" in refused.stderr
