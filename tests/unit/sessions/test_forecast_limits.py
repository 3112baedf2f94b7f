"""Forecast calls are bounded in bytes, take turns in blocks, and their replies fit."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pytest

from stepstate.budget import MemoryAccount, MemoryBudget, MemoryUse
from stepstate.errors import InvalidField, MemoryLimit
from stepstate.sessions import ForecastRequest, Scenario
from stepstate.sessions.forecasting import limits
from stepstate.transport.convert import (
    REPLY_BYTES,
    decode_forecast,
    encode_forecasts,
    forecast_reply_bytes,
)
from stepstate.v1 import stepstate_pb2 as pb
from tests.offline import rows
from tests.unit.rig import Rig, model_of, rounds
from tests.unit.sessions.forecasts import BOUNDS, CLOSE, PATH, stepped, told


@pytest.fixture
def rig(make_rig, sensor) -> Rig:
    return make_rig(model_of(sensor), replay_rows=64)


async def test_calls_reserve_what_they_take(rig):
    """A session counts once, with the whole of its state; what is refused can be asked again."""
    await stepped(rig, await rig.open(), rows(3))
    state_bytes = 4 * rig.scheduler.engine.layout.width
    account = MemoryAccount(MemoryBudget(2 * (state_bytes + 2_000)))
    reserve = partial(account.reserve, MemoryUse.REPLIES)
    request = ForecastRequest(1, (), ())
    calls = [rig.sessions.forecast(["a"] * 9, request, reserve=reserve) for _ in range(3)]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(one) for one in found] == [list, MemoryLimit, MemoryLimit]
    assert state_bytes < account.held < state_bytes + 2_500  # of the first only
    (forecast,) = await told(rig, horizon=1)
    assert forecast.t == 3


async def test_a_call_alone_can_be_too_large(rig, monkeypatch):
    await stepped(rig, await rig.open(), rows(3))
    busy = await rig.open("busy")
    await stepped(rig, busy, rows(3))
    monkeypatch.setattr(f"{BOUNDS}.MAX_BYTES", 6 * rig.scheduler.engine.layout.width)
    caller = rig.send(busy, rows(5))
    with pytest.raises(InvalidField, match="ask for fewer at once"):
        await rig.sessions.forecast(["busy", "a"], ForecastRequest(1, (), ()))
    await caller.outcome()
    assert (await told(rig, horizon=1))[0].t == 3


@pytest.fixture
def blocks(rig, monkeypatch) -> list[int]:
    """How many states were forecast together, block by block."""
    found: list[int] = []
    forecast = rig.scheduler.engine.forecast

    async def counted(origins, plan, scenario):
        found.append(len(origins.rows))
        return await forecast(origins, plan, scenario)

    monkeypatch.setattr(rig.scheduler.engine, "forecast", counted)
    return found


async def test_sessions_and_scenarios_go_in_blocks(rig, blocks, monkeypatch):
    """However many scenarios there are; and a session that is named twice is forecast once."""
    monkeypatch.setattr("stepstate.sessions.forecasting.forecaster.BLOCK_STATES", 4)
    for session_id in ("a", "b", "c"):
        await stepped(rig, await rig.open(session_id), rows(20, seed=ord(session_id)))
    scenarios = tuple(Scenario(str(n), np.full(2, float(n), np.float32)) for n in range(5))
    found = await rig.sessions.forecast(["a", "b", "a", "c"], ForecastRequest(1, (0.5,), scenarios))
    assert blocks == [4, 4, 4, 3]
    for session_id, mine in zip("abac", found, strict=True):
        assert [one.session_id for one in mine] == [session_id] * 5
        assert [one.scenario for one in mine] == ["0", "1", "2", "3", "4"]
        for number, one in enumerate(mine):
            assert one.outputs[0].values.tolist() == [[float(number)]]


async def test_calls_take_turns_block_by_block(rig, blocks, monkeypatch):
    """A small one is not kept waiting for a large one; both are from where sessions stood."""
    monkeypatch.setattr("stepstate.sessions.forecasting.forecaster.BLOCK_STATES", 1)
    names = [f"s{n}" for n in range(7)]
    for name in names:
        await stepped(rig, await rig.open(name), rows(5))
    large = asyncio.create_task(rig.sessions.forecast(names, ForecastRequest(3, (), ())))
    await rounds(2)
    last = rig.sessions.find(names[-1])
    await rig.y(last, rows(1))
    (small,) = await told(rig, names[0], horizon=3)
    assert small.t == 5
    assert not large.done()
    assert [one[0].t for one in await large] == [5] * 7
    assert blocks == [1] * 8


async def test_a_short_forecast_does_not_wait_for_a_long_one(rig, blocks, monkeypatch):
    """Even though that is one block; a second long one waits."""
    monkeypatch.setattr("stepstate.sessions.forecasting.forecaster.LONG_ROWS", 99)
    await stepped(rig, await rig.open(), rows(20))
    cold = Scenario("cold", np.array([np.nan, -1.0] * 100, np.float32))
    calls = [asyncio.create_task(told(rig, horizon=100, scenarios=[cold])) for _ in range(2)]
    await rounds(3)
    assert (await told(rig, horizon=1))[0].t == 20
    assert not any(call.done() for call in calls)
    assert blocks == [1, 1]
    await asyncio.gather(*calls)


async def test_scenarios_that_give_other_values_have_their_own_plan(rig, blocks):
    await stepped(rig, await rig.open(), rows(20))
    cold = np.array([np.nan, -1.0] * 8, np.float32)
    given = np.array([5.0, -1.0] * 8, np.float32)
    paths = [Scenario("cold", cold), Scenario("given", given), Scenario("again", cold)]
    together = await told(rig, horizon=9, quantiles=(0.5,), scenarios=paths)
    assert blocks == [2, 1]
    for path, one in zip(paths, together, strict=True):
        (alone,) = await told(rig, horizon=9, quantiles=(0.5,), scenarios=[path])
        assert one.scenario == path.name
        for mine, its in zip(one.outputs, alone.outputs, strict=True):
            assert np.allclose(mine.values, its.values, atol=CLOSE, equal_nan=True)
            assert mine.methods == its.methods


async def test_rows_fed_back_are_bounded_over_all_states(rig, blocks, monkeypatch):
    await stepped(rig, await rig.open(), rows(20))
    await stepped(rig, await rig.open("b"), rows(20))
    monkeypatch.setattr(f"{BOUNDS}.MAX_FED_ROWS", 7)
    path = Scenario("s", np.zeros(10, np.float32))
    assert len(await told(rig, horizon=5, scenarios=[path])) == 1
    for names, scenarios in ((["a", "b"], (path,)), (["a"], (path, path, path))):
        with pytest.raises(InvalidField, match=r"rows to be fed back.*at most 7: ask"):
            await rig.sessions.forecast(names, ForecastRequest(5, (), scenarios))
    assert blocks == [1]


@pytest.mark.parametrize(
    ("names", "wish"),
    [
        (["a"] * 30, ForecastRequest(3, (), ())),
        (["a"], ForecastRequest(3, (0.1, 0.5) * 50, ())),
        (["a"], ForecastRequest(3, (), tuple(Scenario("n" * 100, PATH) for _ in range(20)))),
        (["a", *(f"nobody{n}" for n in range(9))], ForecastRequest(3, (), ())),
        (["a" * 100, *("ü" * 100 for n in range(9))], ForecastRequest(3, (), ())),
        (["a"] * 9, ForecastRequest(9, (), ())),
    ],
    ids=["sessions", "quantiles", "scenarios", "errors", "ids", "the model's errors"],
)
async def test_a_reply_that_would_be_too_large_is_refused_before_the_work(
    rig, blocks, monkeypatch, names, wish
):
    await stepped(rig, await rig.open(), rows(20))
    monkeypatch.setattr(f"{BOUNDS}.MAX_REPLY_BYTES", 2_000)
    with pytest.raises(InvalidField, match="more than 2000: ask for fewer"):
        await rig.sessions.forecast(names, wish)
    assert not blocks


async def test_what_a_reply_takes_is_known_before_it_is_made(rig):
    """Not less than it takes, and not much more."""
    await stepped(rig, await rig.open(), rows(20))
    names = ["a", "x" * 128, "ü" * 200, "no\n", "a"]
    for wish in (
        ForecastRequest(3, (0.1, 0.5, 0.9), ()),
        ForecastRequest(
            5, (), (Scenario("so heiß", rows(2).ravel()), Scenario("x" * 128, rows(3).ravel()))
        ),
        ForecastRequest(200, (0.5,), (Scenario("", np.zeros(400, np.float32)),)),
        ForecastRequest(9, (), ()),
    ):
        found = await rig.sessions.forecast(names, wish)
        for name, one in zip(names, found, strict=True):
            size = (await encode_forecasts([name] * 2, [one] * 2)).ByteSize()
            ids = 2 * len(name[:128].encode()) if isinstance(one, Exception) else 0
            assert size <= ids + forecast_reply_bytes([one] * 2) <= 2.5 * size


async def test_the_longest_numbers_and_times_are_counted(rig):
    await stepped(rig, await rig.open(), rows(20))
    (forecast,) = await told(rig, horizon=1, quantiles=(0.5,))
    extreme = replace(
        forecast,
        t=2**64 - 1,
        first_time=datetime(1, 1, 1, 1, 1, 1, 999_999, tzinfo=UTC),
        step_interval_seconds=2**31,
    )
    size = (await encode_forecasts(["a"], [[extreme]])).ByteSize()
    assert size <= forecast_reply_bytes([[extreme]]) == forecast_reply_bytes([[forecast]])


def test_replies_are_bounded_like_all_others():
    assert limits.MAX_REPLY_BYTES == REPLY_BYTES


def test_too_many_scenarios_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(f"{BOUNDS}.MAX_SCENARIOS", 2)
    monkeypatch.delattr("stepstate.transport.convert.array_of")
    request = pb.ForecastRequest(session_id=["a"], scenarios=[pb.Scenario(x=[1.0])] * 3)
    with pytest.raises(InvalidField, match="scenarios: holds 3, expected at most 2"):
        decode_forecast(request)


async def test_others_take_turns_while_a_reply_is_made(rig, monkeypatch):
    """Whether it is one session under many scenarios, or many sessions."""
    await stepped(rig, await rig.open(), rows(20))
    (forecast,) = await told(rig, horizon=3)
    monkeypatch.setattr("stepstate.transport.convert.ENCODED_AT_ONCE", 1)
    for found in ([[forecast] * 20], [[forecast]] * 20):
        making = asyncio.create_task(encode_forecasts(["a"] * len(found), found))
        await rounds(15)
        assert not making.done()
        assert len((await making).forecasts) == 20
