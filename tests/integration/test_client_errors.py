"""Both clients against a real server: what they raise."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from stepstate import errors
from tests.chaos.faults import relay
from tests.integration.clients import AnyClient, Connect, collect
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    draw,
    largest_difference,
)
from tests.networks import Network


def inner(it: Any) -> Any:
    """The client or session itself, without its thread."""
    return getattr(it, "real", it)


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
