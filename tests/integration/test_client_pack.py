"""`client.packed`: NumPy in, NumPy out, each row exactly once, for both clients."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from stepstate.client import AsyncClient
from stepstate.client._protocol import packed
from stepstate.errors import (
    InvalidField,
    NonFiniteInput,
    RowsMissing,
    SessionClosed,
    Unavailable,
)
from stepstate.server import Server, running_server
from tests.chaos.faults import relay
from tests.integration.clients import AnyClient, AnySession, Connect
from tests.integration.packed import series
from tests.integration.restarts import StartRestartable, kill_and_restart
from tests.integration.wire import HANG, TOLERANCE, draw, largest_difference
from tests.networks import Network


async def crowd(client: AnyClient, count: int, **fields: object) -> list[AnySession]:
    return [await client.open("lstm", session_id=f"s{place}", **fields) for place in range(count)]


def differences(y: Sequence[np.ndarray], x: np.ndarray, network: Network) -> float:
    """The largest of all sessions; y [T] of [sessions, O]."""
    got = np.stack(y, axis=1)
    return max(
        largest_difference(mine, network.offline(rows[: len(y)]))
        for mine, rows in zip(got, x, strict=True)
    )


async def test_a_pack_gives_the_numbers_of_the_offline_network(
    server: Server, connect: Connect, network: Network
):
    x = series(10, 20)
    async with connect(server.address) as client:
        sessions = await crowd(client, 10)
        async with client.packed(sessions) as pack:
            told = [await pack.step(x[:, t]) for t in range(20)]
        assert [session.t for session in sessions] == [20] * 10
        assert [one.t.tolist() for one in told] == [[t + 1] * 10 for t in range(20)]
        assert not any(one.errors or one.imputed.any() or one.fallback.any() for one in told)
        y = [
            *(one.y for one in told),
            np.array([await session.step(x[0, 0]) for session in sessions]),
        ]
    assert differences(y[:20], x, network) <= TOLERANCE


async def test_a_pack_binds_its_sessions_in_several_messages(
    server: Server, connect: Connect, network: Network, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(packed, "MAX_BINDINGS", 3)
    x = series(10, 1)
    async with (
        connect(server.address) as client,
        client.packed(await crowd(client, 10)) as pack,
    ):
        told = await pack.step(x[:, 0])
    assert differences([told.y], x, network) <= TOLERANCE


async def test_sessions_may_come_in_any_order_several_times_and_more_than_a_message_takes(
    server: Server, connect: Connect, network: Network
):
    x = series(6, 1000)
    which = np.random.default_rng(1).permutation(np.repeat(np.arange(6), 1000))
    at = np.zeros(6, int)
    rows = np.empty((6000, 3), np.float32)
    for place, one in enumerate(which):
        rows[place] = x[one, at[one]]
        at[one] += 1
    async with connect(server.address, timeout=HANG) as client:
        sessions = await crowd(client, 6)
        async with client.packed(sessions) as pack:
            told = await pack.step(rows, which=which)
    assert [session.t for session in sessions] == [1000] * 6
    for one in range(6):
        assert told.t[which == one].tolist() == list(range(1, 1001))
        want = network.offline(x[one])
        assert largest_difference(told.y[which == one], want) <= TOLERANCE


async def test_a_row_that_cannot_be_applied_ends_its_session_in_that_call_only(
    server: Server, connect: Connect, network: Network
):
    x = series(3, 6)
    async with connect(server.address) as client:
        sessions = await crowd(client, 3)
        async with client.packed(sessions) as pack:
            bad = x[[0, 1, 1, 1, 2], [0, 0, 1, 2, 0]]
            bad[2, 1] = math.nan
            told = await pack.step(bad, which=[0, 1, 1, 1, 2])
            assert sorted(told.errors) == [2, 3]
            assert all(isinstance(error, NonFiniteInput) for error in told.errors.values())
            assert told.t.tolist() == [1, 1, 0, 0, 1]
            assert np.isnan(told.y[[2, 3]]).all()
            assert [session.t for session in sessions] == [1, 1, 1]
            again = await pack.step(x[:, 1])
            assert not again.errors
    assert differences([told.y[[0, 1, 4]], again.y], x, network) <= TOLERANCE


async def test_a_closed_session_is_refused_alone(server: Server, connect: Connect):
    async with connect(server.address) as client:
        sessions = await crowd(client, 4)
        await sessions[1].close()
        async with client.packed(sessions) as pack:
            told = await pack.step(draw(4))
    assert {row: type(error) for row, error in told.errors.items()} == {1: SessionClosed}


async def test_rows_whose_replies_are_lost_are_applied_once(
    server: Server, connect: Connect, network: Network
):
    x = series(5, 30)
    async with relay(server.address) as way, connect(way.address, timeout=HANG) as client:
        sessions = await crowd(client, 5)
        got = []
        async with client.packed(sessions) as pack:
            for t in range(30):
                if t % 7 == 3:
                    way.hold_replies()
                    step = asyncio.create_task(pack.step(x[:, t]))
                    await asyncio.wait_for(way.withheld.wait(), HANG)
                    way.lose()
                    got.append((await step).y)
                else:
                    got.append((await pack.step(x[:, t])).y)
        assert [session.t for session in sessions] == [30] * 5
        assert [(await client.info(s.session_id)).t for s in sessions] == [30] * 5
    assert differences(got, x, network) <= TOLERANCE


@pytest.mark.parametrize("interval", ["600", "0.05"])
async def test_a_pack_goes_on_after_kill_9_with_what_the_server_lacks(
    restartable: StartRestartable, connect: Connect, network: Network, interval: str
):
    x = series(8, 60)
    server = await restartable(interval)
    async with connect(server.address, timeout=HANG) as client:
        sessions = await crowd(client, 8)
        got = []
        async with client.packed(sessions) as pack:
            for t in range(40):
                if t == 25:
                    await kill_and_restart(server)
                got.append((await pack.step(x[:, t])).y)
            await kill_and_restart(server)
            which = np.repeat(np.arange(8), 20)
            rest = await pack.step(x[:, 40:].reshape(160, 3), which=which)
            assert not rest.errors
        got += list(rest.y.reshape(8, 20, -1).swapaxes(0, 1))
        assert [(await client.info(s.session_id)).t for s in sessions] == [60] * 8
    assert differences(got, x, network) <= TOLERANCE


async def test_rows_that_are_kept_nowhere_are_missing_and_the_other_sessions_go_on(
    restartable: StartRestartable, connect: Connect, network: Network
):
    x = series(3, 6)
    server = await restartable("600")
    async with connect(server.address, timeout=HANG) as client:
        sessions = await crowd(client, 2)
        async with client.packed(sessions) as pack:
            got = [(await pack.step(x[:2, t])).y for t in range(3)]
        strange = await client.session("s0")  # an object that never had the rows
        async with client.packed([strange, sessions[1]]) as pack:
            await kill_and_restart(server)
            told = await pack.step(x[:2, 3])
        assert {row: type(error) for row, error in told.errors.items()} == {0: RowsMissing}
        assert (told.errors[0].first, told.errors[0].last) == (0, 2)
        assert (strange.t, sessions[1].t) == (3, 4)
    assert (
        largest_difference(np.array([*(y[1] for y in got), told.y[1]]), network.offline(x[1, :4]))
        <= TOLERANCE
    )


async def test_without_a_server_every_row_is_refused_in_time_and_can_be_sent_again(
    config, connect: Connect, network: Network
):
    x = series(3, 3)
    async with running_server(config) as server, connect(server.address, timeout=0.5) as client:
        sessions = await crowd(client, 3)
        async with client.packed(sessions) as pack:
            got = [(await pack.step(x[:, 0])).y]
            await server.drain()
            told = await pack.step(x[:, 1])
            assert sorted(told.errors) == [0, 1, 2]
            assert all(isinstance(error, Unavailable) for error in told.errors.values())
            assert [session.t for session in sessions] == [1, 1, 1]
            port = server.address.rpartition(":")[2]
            same = replace(config, listen=f"127.0.0.1:{port}")
            async with running_server(same):
                got += [(await pack.step(x[:, t], timeout=HANG)).y for t in (1, 2)]
    assert differences(got, x, network) <= TOLERANCE


async def test_a_call_that_was_cancelled_is_repeated_with_the_same_rows(
    server: Server, network: Network
):
    x = series(3, 2)
    async with relay(server.address) as way, AsyncClient(way.address, timeout=HANG) as client:
        sessions = await crowd(client, 3)
        async with client.packed(sessions) as pack:
            got = [(await pack.step(x[:, 0])).y]
            way.hold_replies()
            step = asyncio.create_task(pack.step(x[:, 1]))
            await asyncio.wait_for(way.withheld.wait(), HANG)
            step.cancel()
            await asyncio.wait([step])
            assert [session.t for session in sessions] == [1, 1, 1]
            way.release()
            got.append((await pack.step(x[:, 1])).y)
        assert [(await client.info(s.session_id)).t for s in sessions] == [2] * 3
    assert differences(got, x, network) <= TOLERANCE


async def test_several_calls_of_a_pack_may_be_under_way_for_different_sessions(
    client: AsyncClient, network: Network
):
    x = series(9, 10)
    sessions = await crowd(client, 9)
    async with client.packed(sessions) as pack:

        async def some(first: int) -> list[np.ndarray]:
            which = np.arange(first, first + 3)
            return [(await pack.step(x[which, t], which=which)).y for t in range(10)]

        parts = await asyncio.gather(*(some(first) for first in (0, 3, 6)))
        first = asyncio.create_task(pack.step(draw(9)))
        await asyncio.sleep(0)
        with pytest.raises(InvalidField, match="on their way"):
            await pack.step(draw(2), which=[4, 7])
        await first
    got = [np.concatenate(step) for step in zip(*parts, strict=True)]
    assert differences(got, x, network) <= TOLERANCE


WRONG = {
    "x of another width": (np.zeros((3, 4)), None, "x"),
    "x with too few rows": (np.zeros((2, 3)), None, "x"),
    "x that is no numbers": ([["a"] * 3] * 3, None, "x"),
    "a place outside": (np.zeros((1, 3)), [3], "which"),
    "a place below": (np.zeros((1, 3)), [-1], "which"),
    "no places": (np.zeros((1, 3)), [], "which"),
    "places that are no numbers": (np.zeros((1, 3)), [0.5], "which"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_call_that_makes_no_sense_is_refused_before_it_is_sent(
    server: Server, connect: Connect, what: str
):
    x, which, field = WRONG[what]
    async with connect(server.address) as client:
        sessions = await crowd(client, 3)
        async with client.packed(sessions) as pack:
            with pytest.raises(InvalidField) as refused:
                await pack.step(x, which=which)
            assert refused.value.field == field
            assert not (await pack.step(draw(3))).errors


async def test_a_pack_is_of_sessions_of_one_model_each_once(server: Server, connect: Connect):
    async with connect(server.address) as client:
        (one,) = await crowd(client, 1)
        other = await client.open("gru")
        for sessions in ([], [one, one], [one, other]):
            with pytest.raises(InvalidField) as refused:
                client.packed(sessions)
            assert refused.value.field == "sessions"


async def test_a_single_step_brings_up_a_server_that_lacks_rows_of_a_pack(
    restartable: StartRestartable, connect: Connect, network: Network
):
    x = series(2, 12)
    server = await restartable("600")
    async with connect(server.address, timeout=HANG) as client:
        sessions = await crowd(client, 2)
        async with client.packed(sessions) as pack:
            got = [(await pack.step(x[:, t])).y for t in range(5)]
            await kill_and_restart(server)
            got.append(
                np.array([await s.step(row) for s, row in zip(sessions, x[:, 5], strict=True)])
            )
            got += [(await pack.step(x[:, t])).y for t in range(6, 12)]
    assert differences(got, x, network) <= TOLERANCE
