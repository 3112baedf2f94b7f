"""Both clients against real servers, over connections that break."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import numpy as np
import pandas as pd
import pytest

from stepstate import errors
from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.chaos.faults import relay
from tests.integration.clients import KINDS, AnyClient, AnySession, Connect
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    blocker,
    draw,
    largest_difference,
    queued,
    raw_stub,
    request,
    sample,
    scrape,
    until,
    where,
)
from tests.networks import Network


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Connect:
    return KINDS[request.param]


@pytest.fixture
async def any_client(connect: Connect, server: Server) -> AsyncIterator[AnyClient]:
    async with connect(server.address) as client:
        yield client


async def collect(session: AnySession, xs) -> np.ndarray:
    async with asyncio.timeout(HANG):
        return np.array([y async for y in session.stream(xs)])


def inner(it: Any) -> Any:
    """The client or session itself, without its thread."""
    return getattr(it, "real", it)


# What they give.


@pytest.mark.parametrize(
    ("field", "value"), [("start_time", "2000-06-05"), ("idle_timeout", 60), ("durability", "disk")]
)
async def test_what_a_session_can_not_be_opened_with_is_named(
    any_client: AnyClient, field: str, value: object
):
    with pytest.raises(errors.InvalidField, match=f"^{field}: is {value!r}, expected"):
        await any_client.open("lstm", **{field: value})


async def test_a_client_that_was_disconnected_says_so(server: Server, connect: Connect):
    async with connect(server.address) as client:
        session = await client.open("lstm")
    for call in (
        client.models,
        lambda: client.open("lstm"),
        lambda: client.forecast([session]),
        lambda: session.step(draw(1)),
        lambda: session.prime(draw(1)),
        lambda: collect(session, draw(1)),
        session.refresh,
        session.close,
    ):
        with pytest.raises(errors.Cancelled, match="the client was disconnected"):
            await call()


async def test_rows_come_back_in_the_shape_they_were_given(
    any_client: AnyClient, networks: dict[str, Network]
):
    x = draw(12)
    want = networks["lstm"].offline(x)
    session = await any_client.open("lstm")
    one = await session.step(x[0])
    many = await session.step(x[1:5])
    last = await session.step(x[5:8], last_only=True)
    one_of_many = await session.step(x[8:9])
    streamed = await collect(session, [x[9], x[10], x[11:12]])
    assert [part.shape for part in (one, many, last, one_of_many)] == [(2,), (4, 2), (2,), (1, 2)]
    assert streamed.shape == (3, 2)
    got = np.concatenate((one[None], many, last[None], one_of_many, streamed))
    assert largest_difference(got, want[[0, 1, 2, 3, 4, 7, 8, 9, 10, 11]]) <= TOLERANCE
    assert got.dtype == np.float32
    assert session.t == 12


async def test_rows_of_one_input_may_be_numbers(
    any_client: AnyClient, networks: dict[str, Network]
):
    x = draw(6, 1)[:, 0]
    session = await any_client.open("single")
    first = await session.step(float(x[0]))
    many = await session.step(x[1:4])
    streamed = await collect(session, [float(value) for value in x[4:]])
    assert (first.shape, many.shape, streamed.shape) == ((1,), (3, 1), (2, 1))
    got = np.concatenate((first, many[:, 0], streamed[:, 0]))
    assert largest_difference(got, networks["single"].offline(x[:, None])[:, 0]) <= TOLERANCE


async def test_many_rows_may_be_an_item_of_a_stream(
    any_client: AnyClient, networks: dict[str, Network]
):
    x = draw(1_000)
    session = await any_client.open("lstm")
    got = await collect(session, np.split(x, 50))
    assert largest_difference(got, networks["lstm"].offline(x)[19::20]) <= TOLERANCE
    assert session.t == 1_000


async def test_inspect_gives_every_layer(any_client: AnyClient, networks: dict[str, Network]):
    x = draw(40)
    session = await any_client.open("lstm")
    found = await session.inspect(x)
    assert largest_difference(found.y, networks["lstm"].offline(x)) <= TOLERANCE
    assert [set(layer) for layer in found.layers] == [set("ifgocmh")] * 2
    for layer in found.layers:
        assert {part.shape for part in layer.values()} == {(40, 16)}
        assert np.allclose(layer["o"] * layer["m"], layer["h"], atol=1e-6)
    assert session.t == 40


async def test_sessions_are_opened_found_listed_and_closed(any_client: AnyClient):
    start, idle = datetime(2026, 3, 1, 12, tzinfo=UTC), timedelta(seconds=90)
    session = await any_client.open("gru", session_id="a", start_time=start, idle_timeout=idle)
    await session.step(draw(7))
    info = await any_client.info("a")
    assert (info.session_id, info.model, info.version, info.t) == ("a", "gru", "1", 7)
    assert (info.start_time, info.idle_timeout) == (start, idle)
    assert timedelta() < info.expire_time - info.open_time <= timedelta(seconds=150)

    same = await any_client.session("a")
    assert same.t == 7
    await same.step(draw(1))
    assert session.t == 7
    assert (await session.refresh()).t == session.t == 8

    await any_client.open("lstm", session_id="b")
    assert {found.session_id async for found in any_client.sessions()} == {"a", "b"}
    assert [found.session_id async for found in any_client.sessions("lstm")] == ["b"]
    assert (await session.close()).t == 8
    with pytest.raises(errors.SessionClosed) as closed:
        await any_client.info("a")
    assert closed.value.t == 8


async def test_models_are_described(any_client: AnyClient, networks: dict[str, Network]):
    assert [model.name for model in await any_client.models()] == sorted(networks)
    model = await any_client.model("projected")
    assert (model.cell, model.hidden_size, model.num_layers) == ("lstm", 12, 2)
    assert list(model.inputs) == ["x0", "x1", "x2"]
    assert (model.input_width, model.output_width, model.needs_start_time) == (3, 2, False)


async def test_pandas_frames_and_series_are_rows(
    any_client: AnyClient, networks: dict[str, Network]
):
    x = draw(6)
    frame = pd.DataFrame(x, columns=["x0", "x1", "x2"]).iloc[:, [2, 0, 1]]
    session = await any_client.open("lstm")
    many = await session.step(frame.iloc[:3])
    one = await session.step(pd.Series(x[3]))
    streamed = await collect(session, (frame.iloc[[place]] for place in (4, 5)))
    got = np.concatenate((many, one[None], streamed))
    assert largest_difference(got, networks["lstm"].offline(x)) <= TOLERANCE


async def test_fifty_sessions_at_once_are_each_right(
    any_client: AnyClient, networks: dict[str, Network]
):
    async def run(seed: int) -> float:
        x = draw(40, seed=seed)
        session = await any_client.open("lstm")
        head = [await session.step(row) for row in x[:5]]
        tail = await collect(session, x[5:])
        return largest_difference(np.concatenate((head, tail)), networks["lstm"].offline(x))

    assert max(await asyncio.gather(*map(run, range(50)))) <= TOLERANCE


# What they raise.


async def test_every_refusal_is_an_error_of_its_own_type(any_client: AnyClient):
    session = await any_client.open("lstm", session_id="a")
    other = await any_client.session("a")
    await session.step(draw(3))

    with pytest.raises(errors.StepMismatch) as mismatch:
        await other.step(draw(3, seed=5))
    assert (mismatch.value.t, mismatch.value.expected_t) == (0, 3)
    with pytest.raises(errors.SessionExists):
        await any_client.open("lstm", session_id="a")
    with pytest.raises(errors.NonFiniteInput) as non_finite:
        await session.step([0.0, math.inf, 0.0])
    assert (non_finite.value.row, non_finite.value.column) == (0, "x1")
    with pytest.raises(errors.NonFiniteInput):
        await collect(session, [[math.nan] * 3])
    with pytest.raises(errors.InvalidField, match="takes one row \\[3\\]"):
        await session.step([1.0, 2.0])
    with pytest.raises(errors.InvalidField):
        await session.step(np.zeros((0, 3)))
    with pytest.raises(errors.InvalidField):
        await any_client.open("lstm", session_id="no spaces")
    with pytest.raises(errors.ModelUnknown, match="lstm/1"):
        await any_client.open("nope")
    with pytest.raises(errors.SessionUnknown):
        await any_client.session("nope")
    assert session.t == 3
    await other.refresh()
    inner(other).t = 1_000
    with pytest.raises(errors.RowsMissing) as missing:
        await other.step(draw(1))
    assert (missing.value.first, missing.value.last) == (3, 999)
    await other.refresh()
    await collect(other, draw(40))
    with pytest.raises(errors.StepTooOld) as too_old:
        await session.step(draw(1))
    assert (too_old.value.t, too_old.value.expected_t) == (3, 43)
    await session.close()
    for step in (session.step(draw(1)), collect(session, draw(1)), session.inspect(draw(1))):
        with pytest.raises(errors.SessionClosed):
            await step


async def test_a_bad_row_of_a_stream_ends_it_after_the_good_ones(
    any_client: AnyClient, networks: dict[str, Network]
):
    x = draw(30)
    bad = [*x[:20], np.array([0.0, math.nan, 0.0]), *x[20:]]
    session = await any_client.open("lstm")
    got = []
    with pytest.raises(errors.NonFiniteInput):
        async for y in session.stream(bad):
            got.append(y)  # noqa: PERF401 - what came before the error counts
    assert largest_difference(np.array(got), networks["lstm"].offline(x)[:20]) <= TOLERANCE
    assert session.t == (await session.refresh()).t == 20
    tail = await collect(session, x[20:])
    assert largest_difference(tail, networks["lstm"].offline(x)[20:]) <= TOLERANCE


@pytest.mark.parametrize("after", [0, 1, 40])
async def test_an_error_of_the_source_comes_out_after_the_rows_before_it(
    any_client: AnyClient, networks: dict[str, Network], after: int
):
    x = draw(after + 5)

    def source() -> Iterator[np.ndarray]:
        yield from x[:after]
        raise LookupError("the meter is gone")

    session = await any_client.open("lstm")
    got = []
    with pytest.raises(LookupError, match="the meter is gone"):
        async with asyncio.timeout(HANG):
            async for y in session.stream(source()):
                got.append(y)  # noqa: PERF401
    assert len(got) == session.t == after
    tail = await collect(session, x[after:])
    want = networks["lstm"].offline(x)
    assert largest_difference(np.array([*got, *tail]), want) <= TOLERANCE


async def test_an_empty_source_is_an_empty_stream(any_client: AnyClient):
    session = await any_client.open("lstm")
    assert len(await collect(session, [])) == session.t == 0


async def test_leaving_a_stream_early_lets_the_same_rows_go_on(
    any_client: AnyClient, networks: dict[str, Network]
):
    """Rows in flight may have been applied; sent again they are answered again."""
    x = draw(60)
    session = await any_client.open("lstm")
    got: list[np.ndarray] = []
    while session.t < len(x):
        stream = session.stream(iter(x[session.t :]))
        async for y in stream:
            got.append(y)
            if len(got) % 7 == 0:
                break
        await stream.aclose()
    assert largest_difference(np.array(got), networks["lstm"].offline(x)) <= TOLERANCE
    assert (await session.refresh()).t == len(got) == 60


async def test_a_server_that_is_not_there_is_unreachable_after_the_timeout(connect: Connect):
    async with relay("127.0.0.1:1") as way, connect(way.address, timeout=0.5) as client:
        with pytest.raises(errors.ServerUnreachable, match=way.address):
            await client.open("lstm")
        with pytest.raises(errors.Unavailable):
            await client.models()


async def test_a_server_of_something_else_is_an_unexpected_status(connect: Connect):
    other = grpc.aio.server()
    port = other.add_insecure_port("127.0.0.1:0")
    await other.start()
    try:
        async with connect(f"127.0.0.1:{port}") as client:
            with pytest.raises(errors.UnexpectedStatus, match="UNIMPLEMENTED"):
                await client.open("lstm")
    finally:
        await other.stop(None)


# Connections that break.


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


# Time.


async def test_a_step_that_got_no_answer_in_time_can_be_repeated(
    server: Server, connect: Connect, networks: dict[str, Network]
):
    x = draw(6)
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm")
        first = await session.step(x[:3])
        way.hold_replies()
        with pytest.raises(errors.ServerUnreachable):
            await session.step(x[3:], timeout=0.3)
        way.release()
        assert session.t == 3
        second = await session.step(x[3:])
        assert session.t == 6
    want = networks["lstm"].offline(x)
    assert largest_difference(np.concatenate((first, second)), want) <= TOLERANCE


async def test_a_request_that_waits_too_long_was_not_applied(
    server: Server, client: AsyncClient, networks: dict[str, Network], stub: StepstateServiceStub
):
    session = await client.open("lstm", session_id="a")
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=100_000)))
    await queued(stub, "a", 1)
    session.t = 100_000
    with pytest.raises(errors.Unavailable):
        await session.step(draw(1), timeout=0.2)
    long.cancel()
    await queued(stub, "a", 0)
    assert (await session.refresh()).t == 0


async def test_a_cancelled_step_is_repeated_with_the_same_rows(
    client: AsyncClient, stub: StepstateServiceStub, networks: dict[str, Network]
):
    x = draw(20)
    session = await client.open("lstm", session_id="a")
    got = []
    for place, row in enumerate(x):
        stepping = asyncio.create_task(session.step(row))
        for _ in range(place):  # at another moment each time
            await asyncio.sleep(0)
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)
        if not stepping.cancelled():
            got.append(stepping.result())
            continue
        assert session.t == place
        got.append(await session.step(row))
    assert largest_difference(np.array(got), networks["lstm"].offline(x)) <= TOLERANCE


async def test_a_cancelled_stream_leaves_a_session_that_goes_on(
    client: AsyncClient, networks: dict[str, Network]
):
    x = draw(80)
    session = await client.open("lstm")
    got: list[np.ndarray] = []

    async def run(stop_at: int) -> None:
        async for y in session.stream(x[session.t :]):
            got.append(y)
            if len(got) == stop_at:
                enough.set()

    for stop_at in (10, 30, 55):
        enough = asyncio.Event()
        running = asyncio.create_task(run(stop_at))
        await enough.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    got += [y async for y in session.stream(x[session.t :])]
    assert largest_difference(np.array(got), networks["lstm"].offline(x)) <= TOLERANCE


async def test_each_output_comes_before_a_slow_source_gives_the_next_row(
    client: AsyncClient, networks: dict[str, Network]
):
    x, answered = draw(20), asyncio.Semaphore(0)

    async def source() -> AsyncIterator[np.ndarray]:
        for row in x:
            yield row
            await answered.acquire()

    session = await client.open("lstm")
    got = []
    async with asyncio.timeout(HANG):
        async for y in session.stream(source()):
            got.append(y)
            answered.release()
    assert largest_difference(np.array(got), networks["lstm"].offline(x)) <= TOLERANCE


async def test_a_source_is_read_no_further_than_the_window(client: AsyncClient):
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        for row in draw(200):
            taken += 1
            yield row

    session = await client.open("lstm")
    stream = session.stream(source())
    for place in range(50):
        await anext(stream)
        await asyncio.sleep(0.001)
        assert taken <= place + 1 + 20
    await stream.aclose()


async def test_an_async_source_that_fails_is_heard_of(client: AsyncClient):
    async def source() -> AsyncIterator[list[float]]:
        yield [0.0] * 3
        await asyncio.sleep(0)
        raise LookupError("no more")

    session = await client.open("lstm")
    with pytest.raises(LookupError, match="no more"):
        await collect(session, source())
    assert session.t == 1


async def test_steps_of_a_client_carry_t_on_the_wire(
    server: Server, connect: Connect, stub: StepstateServiceStub
):
    """A second writer is noticed: the client does not step from wherever the session stands."""
    async with connect(server.address) as client:
        session = await client.open("lstm", session_id="a")
        await session.step(draw(1))
        await stub.Step(request("a", None, draw(1, seed=9)))
        with pytest.raises(errors.StepMismatch):
            await session.step(draw(1, seed=8))
        with pytest.raises(errors.StepMismatch):
            await collect(session, draw(3, seed=8))
        await stub.CloseSession(pb.CloseSessionRequest(session_id="a"))


# What they need.


BLOCKING = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name == BLOCKED or name.startswith(BLOCKED):
                raise ModuleNotFoundError(f"{name} is blocked", name=name)

    sys.meta_path.insert(0, Blocked())
"""


def run_blocking(blocked: tuple[str, ...], script: str) -> str:
    code = f"BLOCKED = {blocked!r}\n{textwrap.dedent(BLOCKING)}\n{textwrap.dedent(script)}"
    code = code.replace("name == BLOCKED or ", "")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("torch", "click", "google.rpc", "uvloop", "structlog", "pydantic", "prometheus_client")


def test_the_client_needs_none_of_the_servers_packages():
    loaded = run_blocking(
        (*HEAVY, "safetensors", "grpc_health", "grpc_reflection", "grpc_status", "pandas"),
        """
        import stepstate.client, stepstate.errors
        print(*sorted(sys.modules))
        """,
    ).split()
    assert "stepstate.client" in loaded
    assert not [name for name in loaded if name.startswith(HEAVY)]
    assert "stepstate.server" not in loaded


async def test_errors_are_understood_without_googles_package(server: Server):
    script = f"""
        import asyncio
        from stepstate import errors
        from stepstate.client import AsyncClient, Client
        nan = [[0.0] * 3, [float("nan")] * 3]

        def told(run):
            try:
                run()
            except errors.StepstateError as error:
                print(type(error).__name__, error.fields().get("column", ""))

        with Client({server.address!r}) as client:
            session = client.open("lstm")
            print(len(session.step([0.0] * 3)))
            told(lambda: session.step(nan[1]))
            told(lambda: list(session.stream(nan)))

        async def stream():
            async with AsyncClient({server.address!r}) as client:
                session = await client.open("lstm")
                async for y in session.stream(nan):
                    print(len(y))

        told(lambda: asyncio.run(stream()))
    """
    told = await asyncio.to_thread(run_blocking, HEAVY, script)
    assert told.splitlines() == ["2", *["NonFiniteInput x0"] * 2, "2", "NonFiniteInput x0"]
