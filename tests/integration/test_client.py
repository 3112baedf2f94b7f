"""Both clients against a real server: what they return."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from stepstate import errors
from stepstate.server import Server
from tests.integration.clients import AnyClient, Connect, collect
from tests.integration.wire import (
    TOLERANCE,
    draw,
    largest_difference,
)
from tests.networks import Network


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
