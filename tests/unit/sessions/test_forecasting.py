"""Lagged inputs, stand-ins, tracking and forecasts of sessions, against `tests.offline`."""

from __future__ import annotations

import asyncio
import math
import struct
import zlib
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from stepstate.engine import Method
from stepstate.engine.scores import _PAIRS, BLOCK
from stepstate.errors import (
    ForecastImpossible,
    InvalidField,
    NonFiniteResult,
    QueueFull,
    SessionUnknown,
    SnapshotCorrupt,
)
from stepstate.sessions import Copying, Scenario, Wish, forecast_bounds
from stepstate.sessions.snapshot import decode, encode
from stepstate.transport.codec import REPLY_BYTES
from stepstate.transport.forecasts import decode_wish, encode_forecasts, reply_bytes
from stepstate.v1 import stepstate_pb2 as pb
from tests import offline
from tests.offline import forecasting_network
from tests.unit.rig import Rig, model_of, outputs, rounds

CLOSE = 2e-5  # of values around 5
BOUNDS = "stepstate.sessions.forecast_bounds"
PATH = np.zeros(2, np.float32)


def rows(count: int, seed: int = 0) -> np.ndarray:
    """x [T, 2]: a level that swings, and heat."""
    rng = np.random.default_rng(seed)
    level = 5 + 2 * np.sin(np.arange(count) / 2) + rng.normal(0, 0.5, count)
    return np.stack([level, rng.normal(-1, 0.5, count)], axis=1).astype(np.float32)


@pytest.fixture(scope="module", params=["level", "first", "point"])
def sensor(request):
    if request.param == "point":
        return forecasting_network(quantiles=())
    return forecasting_network(fallback=request.param)


@pytest.fixture
def rig(make_rig, sensor) -> Rig:
    return make_rig(model_of(sensor), replay_rows=64)


async def stepped(rig, session, x):
    return np.concatenate([await rig.y(session, row) for row in x])


async def told(rig, session_id="a", horizon=0, quantiles=(), scenarios=()):
    wish = Wish(horizon, tuple(quantiles), tuple(scenarios))
    found = (await rig.sessions.forecast([session_id], wish))[0]
    if isinstance(found, Exception):
        raise found
    return found


async def test_stepping_equals_the_whole_sequence_offline(rig, sensor):
    x = rows(30)
    found = await stepped(rig, await rig.open(), x)
    assert np.abs(found - offline.outputs(sensor, x)).max() < CLOSE


async def test_priming_leaves_what_stepping_leaves(rig, sensor):
    """Outputs, past rows and all that is tracked; chunks of 128, 1 row, 7 rows."""
    x = rows(400)
    x[37, 0] = x[250] = np.nan
    one = await rig.open("one", missing="hold")
    many = await rig.open("many", missing="hold")
    slow = await stepped(rig, one, x)
    fast = np.concatenate([await rig.y(many, part) for part in (x[:300], x[300:301], x[301:])])
    assert np.abs(slow - fast).max() < CLOSE
    states = rig.lane.engine.read_states(np.array([one.slot, many.slot]))
    assert np.array_equal(np.isnan(states[0]), np.isnan(states[1]))
    assert np.nanmax(np.abs(states[0] - states[1])) < 1e-3  # counts and sums, over 400 rows


async def test_what_is_tracked_is_what_its_definition_gives(rig, sensor):
    x = rows(120)
    x[50, 0] = np.nan
    session = await rig.open(missing="impute", level=0.8)
    y = await stepped(rig, session, x)
    quality = rig.sessions.standing(session).quality
    assert quality.level == pytest.approx(0.8)
    for accuracy, spot in zip(quality.accuracy, offline.track(sensor, x, y, 0.8), strict=True):
        assert (accuracy.output, accuracy.horizon) == ("level", spot.horizon)
        figures = accuracy.lifetime
        assert accuracy.recent == figures
        assert figures.scored == len(spot.errors) == 119 - spot.horizon
        assert figures.mean_absolute_error == pytest.approx(np.mean(spot.errors), rel=1e-3)
        scaled = offline.scaled_error(spot)
        assert figures.mean_absolute_scaled_error == pytest.approx(scaled, rel=2e-2)
        assert figures.coverage == pytest.approx(np.mean(spot.held), rel=1e-3)
        assert accuracy.offset == pytest.approx(spot.offset, abs=1e-3)


async def test_a_forecast_is_what_the_last_step_said(rig, sensor):
    x = rows(20)
    session = await rig.open()
    y = (await stepped(rig, session, x))[-1]
    (forecast,) = await told(rig, horizon=3, quantiles=(0.5,))
    columns = [1, 4, 7] if len(y) > 5 else [0, 1, 2]
    (level,) = forecast.outputs
    assert level.values[:, 0] == pytest.approx(y[columns], abs=CLOSE)
    assert level.methods == [Method.DIRECT] * 3
    assert (forecast.t, forecast.session_id) == (20, "a")


async def test_beyond_the_horizons_forecasts_are_fed_back(rig, sensor):
    """Horizon 4 has no column: it is read, a row fed back, at 3; heat is not forecast."""
    session = await rig.open()
    await stepped(rig, session, rows(20))
    with pytest.raises(ForecastImpossible, match="column 'heat'"):
        await told(rig, horizon=9)
    (forecast,) = await told(rig, horizon=5, quantiles=(0.5,))
    methods = forecast.outputs[0].methods
    assert methods == [Method.DIRECT] * 3 + [Method.NONE, Method.DIRECT]
    assert np.isnan(forecast.outputs[0].values[3])


async def test_a_scenario_is_what_a_fork_would_say(rig, sensor):
    """Heat is given for 6 rows and level is the model's own, a row at a time."""
    x = rows(20)
    await stepped(rig, await rig.open(), x)
    heat = np.array([0.0, 1.0, -3.0, 0.5, 2.0, -1.0], np.float32)
    ahead = np.stack([np.full(6, np.nan, np.float32), heat], axis=1)
    (forecast,) = await told(
        rig, horizon=8, quantiles=(0.5,), scenarios=[Scenario("warm", ahead.ravel())]
    )
    level, warm = forecast.outputs
    path, said, median = x, [], 1 if len(offline.outputs(sensor, x)[0]) > 5 else 0
    for value in heat:
        said.append(offline.outputs(sensor, path)[-1, median])
        path = np.concatenate([path, [[said[-1], value]]]).astype(np.float32)
    last = offline.outputs(sensor, path)
    said += [last[-1, median], last[-1, median + (3 if median else 1)]]
    assert level.values[:, 0] == pytest.approx(said, abs=10 * CLOSE)
    assert level.methods == [Method.DIRECT] + [Method.FED_BACK] * 7
    assert warm.values[:6, 0] == pytest.approx(last[-6:, -1], abs=CLOSE)
    assert np.isnan(warm.values[6:]).all()


async def test_given_values_are_told_as_given(rig):
    await stepped(rig, await rig.open(), rows(20))
    ahead = Scenario("all", np.array([7.0, 0.0, 8.0, 0.0], np.float32))
    (forecast,) = await told(rig, horizon=3, quantiles=(0.1, 0.9), scenarios=[ahead])
    level = forecast.outputs[0]
    assert level.values[:2].tolist() == [[7.0, 7.0], [8.0, 8.0]]
    assert level.methods == [Method.GIVEN, Method.GIVEN, Method.FED_BACK]


async def test_scenarios_of_many_lengths_come_back_in_order(rig):
    for session_id in ("a", "b", "c"):
        await stepped(rig, await rig.open(session_id), rows(20, seed=ord(session_id)))
    paths = [np.full((length, 2), float(length), np.float32) for length in (3, 1, 3, 2)]
    scenarios = tuple(Scenario(str(n), path.ravel()) for n, path in enumerate(paths))
    wish = Wish(4, (0.5,), scenarios)
    found = await rig.sessions.forecast(["a", "b", "c"], wish)
    for session_id, of_session in zip("abc", found, strict=True):
        assert [one.scenario for one in of_session] == ["0", "1", "2", "3"]
        for one, scenario in zip(of_session, scenarios, strict=True):
            (alone,) = await told(rig, session_id, 4, (0.5,), [scenario])
            for mine, its in zip(one.outputs, alone.outputs, strict=True):
                assert np.allclose(mine.values, its.values, atol=CLOSE, equal_nan=True)


async def test_a_forecast_changes_nothing_and_comes_again_the_same(rig):
    x = rows(40)
    session, other = await rig.open(), await rig.open("other")
    for row in x[:20]:
        await rig.y(session, row)
        await rig.y(other, row)
    scenario = Scenario("s", rows(4, seed=9).ravel())
    first = await told(rig, horizon=5, scenarios=[scenario])
    again = await told(rig, horizon=5, scenarios=[scenario])
    assert first[0].outputs[0].values.tobytes() == again[0].outputs[0].values.tobytes()
    assert np.array_equal(await stepped(rig, session, x[20:]), await stepped(rig, other, x[20:]))
    left = rig.lane.engine.read_states(np.array([session.slot, other.slot]))
    assert left[0].tobytes() == left[1].tobytes()


async def test_a_forecast_waits_for_the_steps_before_it(rig):
    session = await rig.open()
    await rig.y(session, rows(5))
    callers = [rig.send(session, row) for row in rows(5, seed=3)]
    (forecast,) = await told(rig, horizon=1)
    assert forecast.t == 10
    assert all(caller.answered for caller in callers)


async def test_intervals_are_those_that_were_tracked(rig, sensor):
    x = rows(60)
    y = await stepped(rig, await rig.open(), x)
    spots = offline.track(sensor, x, y)
    (forecast,) = await told(rig, horizon=3)
    assert forecast.levels == pytest.approx((0.05, 0.5, 0.95))
    values = forecast.outputs[0].values
    for spot in spots:
        issued = spot.issued[59 + spot.horizon]
        assert values[spot.horizon - 1] == pytest.approx(issued, abs=1e-3)
    between = values[1]
    assert between[0] <= between[1] <= between[2]


async def test_quantiles_rise_with_their_levels(rig):
    await stepped(rig, await rig.open(), rows(60))
    levels = (0.01, 0.05, 0.2, 0.5, 0.7, 0.95, 0.99)
    (forecast,) = await told(rig, horizon=3, quantiles=levels)
    assert (np.diff(forecast.outputs[0].values, axis=1) >= 0).all()


async def test_a_session_without_rows_has_no_forecast(rig):
    await rig.open()
    with pytest.raises(ForecastImpossible, match="no rows yet"):
        await told(rig)


async def test_calls_under_way_are_bounded_by_their_bytes(rig, monkeypatch):
    """A session counts once, with the whole of its state; what is refused can be asked again."""
    await stepped(rig, await rig.open(), rows(3))
    state_bytes = 4 * rig.lane.engine.layout.width
    monkeypatch.setattr(f"{BOUNDS}.MOST_BYTES", state_bytes + 2_000)
    calls = [rig.sessions.forecast(["a"] * 9, Wish(1, (), ())) for _ in range(3)]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(one) for one in found] == [list, QueueFull, QueueFull]
    (forecast,) = await told(rig, horizon=1)
    assert forecast.t == 3


async def test_a_call_alone_can_be_too_large(rig, monkeypatch):
    await stepped(rig, await rig.open(), rows(3))
    busy = await rig.open("busy")
    await stepped(rig, busy, rows(3))
    monkeypatch.setattr(f"{BOUNDS}.MOST_BYTES", 6 * rig.lane.engine.layout.width)
    caller = rig.send(busy, rows(5))
    with pytest.raises(InvalidField, match="ask for fewer at once"):
        await rig.sessions.forecast(["busy", "a"], Wish(1, (), ()))
    await caller.outcome()
    assert (await told(rig, horizon=1))[0].t == 3


@pytest.fixture
def blocks(rig, monkeypatch) -> list[int]:
    """How many states were forecast together, block by block."""
    found: list[int] = []
    forecast = rig.lane.engine.forecast

    async def counted(origins, plan, scenario):
        found.append(len(origins.rows))
        return await forecast(origins, plan, scenario)

    monkeypatch.setattr(rig.lane.engine, "forecast", counted)
    return found


async def test_sessions_and_scenarios_go_in_blocks(rig, blocks, monkeypatch):
    """However many scenarios there are; and a session that is named twice is forecast once."""
    monkeypatch.setattr("stepstate.sessions.forecaster.TOGETHER", 4)
    for session_id in ("a", "b", "c"):
        await stepped(rig, await rig.open(session_id), rows(20, seed=ord(session_id)))
    scenarios = tuple(Scenario(str(n), np.full(2, float(n), np.float32)) for n in range(5))
    found = await rig.sessions.forecast(["a", "b", "a", "c"], Wish(1, (0.5,), scenarios))
    assert blocks == [4, 4, 4, 3]
    for session_id, mine in zip("abac", found, strict=True):
        assert [one.session_id for one in mine] == [session_id] * 5
        assert [one.scenario for one in mine] == ["0", "1", "2", "3", "4"]
        for number, one in enumerate(mine):
            assert one.outputs[0].values.tolist() == [[float(number)]]


async def test_calls_take_turns_block_by_block(rig, blocks, monkeypatch):
    """A small one is not kept waiting for a large one; both are from where sessions stood."""
    monkeypatch.setattr("stepstate.sessions.forecaster.TOGETHER", 1)
    names = [f"s{n}" for n in range(7)]
    for name in names:
        await stepped(rig, await rig.open(name), rows(5))
    large = asyncio.create_task(rig.sessions.forecast(names, Wish(3, (), ())))
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
    monkeypatch.setattr("stepstate.sessions.forecaster.LONG_ROWS", 99)
    await stepped(rig, await rig.open(), rows(20))
    cold = Scenario("cold", np.array([np.nan, -1.0] * 100, np.float32))
    calls = [asyncio.create_task(told(rig, horizon=100, scenarios=[cold])) for _ in range(2)]
    await rounds(3)
    assert (await told(rig, horizon=1))[0].t == 20
    assert not any(call.done() for call in calls)
    assert blocks == [1, 1]
    await asyncio.gather(*calls)


async def test_each_session_has_its_own_interval_among_others(rig):
    x = rows(60)
    for name, level in (("a", 0.5), ("b", 0.9), ("c", 0.5)):
        await stepped(rig, await rig.open(name, level=level), x)
    found = await rig.sessions.forecast(["a", "b", "c"], Wish(3, (), ()))
    for name, (together,) in zip("abc", found, strict=True):
        (alone,) = await told(rig, name, horizon=3)
        assert together.levels == alone.levels
        assert np.allclose(together.outputs[0].values, alone.outputs[0].values, atol=CLOSE)


async def test_a_scenario_that_can_not_be_forecast_is_named(rig):
    await stepped(rig, await rig.open(), rows(20))
    cold = np.array([np.nan, -1.0] * 8, np.float32)
    unknown = cold.copy()
    unknown[-1] = np.nan
    scenarios = [Scenario("cold", cold), Scenario("unknown", unknown)]
    with pytest.raises(ForecastImpossible, match=r"scenarios\[1\] 'unknown': the row 8 ahead"):
        await told(rig, horizon=9, quantiles=(0.5,), scenarios=scenarios)


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
    monkeypatch.setattr("stepstate.sessions.forecaster.MOST_FED_ROWS", 7)
    path = Scenario("s", np.zeros(10, np.float32))
    assert len(await told(rig, horizon=5, scenarios=[path])) == 1
    for names, scenarios in ((["a", "b"], (path,)), (["a"], (path, path, path))):
        with pytest.raises(InvalidField, match=r"rows to be fed back.*at most 7: ask"):
            await rig.sessions.forecast(names, Wish(5, (), scenarios))
    assert blocks == [1]


@pytest.mark.parametrize(
    ("names", "wish"),
    [
        (["a"] * 30, Wish(3, (), ())),
        (["a"], Wish(3, (0.1, 0.5) * 50, ())),
        (["a"], Wish(3, (), tuple(Scenario("n" * 100, PATH) for _ in range(20)))),
        (["a", *(f"nobody{n}" for n in range(9))], Wish(3, (), ())),
        (["a" * 100, *("ü" * 100 for n in range(9))], Wish(3, (), ())),
        (["a"] * 9, Wish(9, (), ())),
    ],
    ids=["sessions", "quantiles", "scenarios", "errors", "ids", "the model's errors"],
)
async def test_a_reply_that_would_be_too_large_is_refused_before_the_work(
    rig, blocks, monkeypatch, names, wish
):
    await stepped(rig, await rig.open(), rows(20))
    monkeypatch.setattr(f"{BOUNDS}.MOST_REPLY_BYTES", 2_000)
    with pytest.raises(InvalidField, match="more than 2000: ask for fewer"):
        await rig.sessions.forecast(names, wish)
    assert not blocks


async def test_what_a_reply_takes_is_known_before_it_is_made(rig):
    """Not less than it takes, and not much more."""
    await stepped(rig, await rig.open(), rows(20))
    names = ["a", "x" * 128, "ü" * 200, "no\n", "a"]
    for wish in (
        Wish(3, (0.1, 0.5, 0.9), ()),
        Wish(5, (), (Scenario("so heiß", rows(2).ravel()), Scenario("x" * 128, rows(3).ravel()))),
        Wish(200, (0.5,), (Scenario("", np.zeros(400, np.float32)),)),
        Wish(9, (), ()),
    ):
        found = await rig.sessions.forecast(names, wish)
        for name, one in zip(names, found, strict=True):
            size = (await encode_forecasts([name] * 2, [one] * 2)).ByteSize()
            ids = 2 * len(name[:128].encode()) if isinstance(one, Exception) else 0
            assert size <= ids + reply_bytes([one] * 2) <= 2.5 * size


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
    assert size <= reply_bytes([[extreme]]) == reply_bytes([[forecast]])


def test_replies_are_bounded_like_all_others():
    assert forecast_bounds.MOST_REPLY_BYTES == REPLY_BYTES


def test_too_many_scenarios_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(f"{BOUNDS}.MOST_SCENARIOS", 2)
    monkeypatch.delattr("stepstate.transport.forecasts.array_of")
    request = pb.ForecastRequest(session_id=["a"], scenarios=[pb.Scenario(x=[1.0])] * 3)
    with pytest.raises(InvalidField, match="scenarios: holds 3, expected at most 2"):
        decode_wish(request)


async def test_others_take_turns_while_a_reply_is_made(rig, monkeypatch):
    """Whether it is one session under many scenarios, or many sessions."""
    await stepped(rig, await rig.open(), rows(20))
    (forecast,) = await told(rig, horizon=3)
    monkeypatch.setattr("stepstate.transport.forecasts.ENCODED_AT_ONCE", 1)
    for found in ([[forecast] * 20], [[forecast]] * 20):
        making = asyncio.create_task(encode_forecasts(["a"] * len(found), found))
        await rounds(15)
        assert not making.done()
        assert len((await making).forecasts) == 20


async def test_one_unknown_session_does_not_hide_the_others(rig):
    await stepped(rig, await rig.open(), rows(3))
    found = await rig.sessions.forecast(["a", "nobody", "a"], Wish(1, (), ()))
    assert isinstance(found[1], SessionUnknown)
    assert [type(one) for one in (found[0], found[2])] == [list, list]


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        (Wish(10_001, (), ()), "horizon"),
        (Wish(1, (0.0,), ()), r"quantiles\[0\]"),
        (Wish(1, (0.5, math.nan), ()), r"quantiles\[1\]"),
        (Wish(1, (0.5,) * 101, ()), "quantiles: holds 101"),
        (Wish(1, (), (Scenario("s", PATH),) * 1001), "scenarios: holds 1001"),
        (Wish(1, (), (Scenario("s" * 129, PATH),)), r"scenarios\[0\].name: has 129"),
        (Wish(1, (), (Scenario("s", np.ones(3, np.float32)),)), r"scenarios\[0\].x"),
        (Wish(1, (), (Scenario("s", np.array([1, math.inf], np.float32)),)), r"scenarios\[0\].x"),
        (Wish(1, (), (Scenario("s", np.ones(0, np.float32)),)), r"scenarios\[0\].x"),
    ],
)
async def test_what_can_not_be_asked_for_is_told_by_field(rig, wish, field):
    await stepped(rig, await rig.open(), rows(3))
    with pytest.raises(InvalidField, match=field):
        found = (await rig.sessions.forecast(["a"], wish))[0]
        if isinstance(found, Exception):
            raise found


async def test_imputed_values_are_the_models_own_forecast(rig, sensor):
    x = rows(20)
    median = 1 if len(offline.outputs(sensor, x)[0]) > 5 else 0
    session = await rig.open(missing="impute")
    await stepped(rig, session, x)
    filled = x
    for holes in ([np.nan, 0.5], [np.nan, np.nan], [6.0, np.nan]):
        own = offline.outputs(sensor, filled)[-1, median], filled[-1, 1]
        row = np.where(np.isnan(holes), own, holes)
        filled = np.concatenate([filled, [row]]).astype(np.float32)
        found = await rig.y(session, holes)
        assert found[0] == pytest.approx(offline.outputs(sensor, filled)[-1], abs=10 * CLOSE)


async def test_held_values_are_those_of_the_row_before(rig, sensor):
    x = rows(20)
    session = await rig.open(missing="hold")
    await stepped(rig, session, x)
    found = await rig.y(session, np.full((3, 2), np.nan))
    held = np.concatenate([x, x[-1:], x[-1:], x[-1:]])
    assert found == pytest.approx(offline.outputs(sensor, held)[-3:], abs=CLOSE)


@pytest.mark.parametrize("policy", ["hold", "impute"])
async def test_a_columns_level_stands_in_until_its_first_value(rig, sensor, policy):
    """One of two sensors is not there yet: its mean stands in, and no row is scored by it."""
    session = await rig.open(missing=policy)
    x = rows(12)
    x[:5, 1] = np.nan
    step = await rig.step(session, x[0])
    assert step.missing_rows == 1
    found = np.concatenate([outputs(step), await rig.y(session, x[1:])])
    x[:5, 1] = sensor.manifest["inputs"][1]["mean"]
    assert found == pytest.approx(offline.outputs(sensor, x), abs=CLOSE)


async def test_a_level_that_stood_in_is_no_naive_forecast(rig):
    session = await rig.open(missing="hold")
    x = rows(9)
    x[:4, 0] = np.nan
    await stepped(rig, session, x)
    part = rig.lane.engine.read_states(np.array([session.slot]))[
        0, rig.lane.engine.layout.tracked_from :
    ]
    spot = rig.lane.engine._tracker.targets[0].spots[0]
    assert (
        part[spot.place + BLOCK + _PAIRS] == 1
    )  # of nine rows, only the last had one a season before


async def test_missing_rows_are_answered_again_like_others(rig):
    session = await rig.open(missing="impute")
    await rig.y(session, rows(5), 0)
    for x, t in (([np.nan, 0.0], 5), (np.full((4, 2), np.nan), 6)):
        first = await rig.step(session, x, t)
        again = await rig.step(session, x, t)
        assert (again.replayed, again.y) == (True, first.y)


async def test_missing_rows_among_others_touch_only_their_own(rig, sensor):
    """One micro-batch of whole and missing rows; every session as if alone."""
    x = rows(9)
    sessions = [
        await rig.open(f"s{n}", missing=("reject", "hold", "impute")[n % 3]) for n in range(6)
    ]
    for session in sessions:
        await rig.y(session, x)
    callers = [
        rig.send(s, [5.0, 0.0] if s.record.missing.value == "reject" else [np.nan, 0.0])
        for s in sessions
    ]
    together = [outputs(await caller.outcome()) for caller in callers]
    for n, first in enumerate(together[:3]):
        assert first == pytest.approx(together[n + 3], abs=CLOSE)
    alone = await rig.open("alone")
    await rig.y(alone, x)
    assert together[0] == pytest.approx(await rig.y(alone, [5.0, 0.0]), abs=CLOSE)


async def test_a_row_beyond_float32_is_refused_among_others(rig):
    """Neither its session nor its mates, nor what is tracked of any of them, notice."""
    x = rows(12)
    sessions = [await rig.open(f"s{n}") for n in range(3)]
    for session in sessions:
        await rig.y(session, x)
    callers = [
        rig.send(s, row) for s, row in zip(sessions, ([5, 0], [3e38, 0], [5, 0]), strict=True)
    ]
    assert isinstance(await callers[1].error(), NonFiniteResult)
    assert outputs(await callers[0].outcome()) == pytest.approx(outputs(await callers[2].outcome()))
    scored = [
        rig.sessions.standing(session).quality.accuracy[0].lifetime.scored for session in sessions
    ]
    assert scored == [12, 11, 12]
    assert outputs(await rig.step(sessions[1], [5, 0])) == pytest.approx(
        outputs(await callers[0].outcome()), abs=CLOSE
    )


async def test_a_fork_carries_past_rows_and_what_is_tracked(make_rig, sensor):
    rig = make_rig(model_of(sensor), replay_rows=64)
    x = rows(60)
    session = await rig.open()
    await stepped(rig, session, x[:40])
    copy = await rig.sessions.fork("a", Copying("b", None, None))
    assert np.array_equal(await stepped(rig, session, x[40:]), await stepped(rig, copy, x[40:]))
    left = rig.lane.engine.read_states(np.array([session.slot, copy.slot]))
    assert left[0].tobytes() == left[1].tobytes()


async def test_metrics_add_up_what_sessions_tell(rig):
    for session_id in ("a", "b"):
        await rig.y(await rig.open(session_id), rows(50, seed=ord(session_id)))
    tally = rig.lane.engine.tally
    standings = [rig.sessions.standing(rig.sessions.find(s)) for s in ("a", "b")]
    for place, score in enumerate(tally.scores):
        parts = [standing.quality.accuracy[place].lifetime for standing in standings]
        assert score.scored == sum(part.scored for part in parts)
        total = sum(part.scored * part.mean_absolute_error for part in parts)
        assert score.absolute_error == pytest.approx(total, rel=1e-3)
        assert score.covered <= score.with_interval <= score.scored


def as_version_1(data: bytes, cell: int) -> bytes:
    """A snapshot as the first version wrote it: with the cell's state only."""
    snapshot = decode(data)
    old = bytearray(encode(replace(snapshot, state=snapshot.state[:cell])))
    old[8:10] = struct.pack("<H", 1)
    return bytes(old[:-4]) + struct.pack("<I", zlib.crc32(bytes(old[:-4])))


async def test_a_snapshot_of_version_1_goes_on_where_it_was(make_rig, model):
    """Its past rows are those of its replay window: what is missing next can be held."""
    rig = make_rig()
    x = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
    session = await rig.open(missing="hold")
    await stepped(rig, session, x)
    old = as_version_1((await rig.sessions.export("a"))[0], rig.lane.engine.layout.cell)
    copy = await rig.sessions.restore(old, Copying("b", None, None))
    states = rig.lane.engine.read_states(np.array([session.slot, copy.slot]))
    assert states[0].tobytes() == states[1].tobytes()
    hole = [np.nan, 1.0, np.nan]
    assert np.array_equal(await rig.y(session, hole), await rig.y(copy, hole))


async def test_a_state_that_is_not_a_number_is_corrupt(make_rig):
    rig = make_rig()
    await rig.y(await rig.open(), np.ones((2, 3)))
    snapshot = decode((await rig.sessions.export("a"))[0])
    state = snapshot.state.copy()
    state[0] = np.nan
    with pytest.raises(SnapshotCorrupt, match="not finite"):
        await rig.sessions.restore(encode(replace(snapshot, state=state)), Copying("b", None, None))


async def test_a_session_with_missing_rows_does_not_slow_another_that_is_primed(rig):
    """Its own forecasts take a row at a time; whole rows of another go a chunk at a time."""
    gappy = await rig.open("gappy", missing="impute")
    whole = await rig.open("whole")
    await rig.y(gappy, rows(1))
    chunks = []
    sequence = rig.lane.engine._network.sequence
    rig.lane.engine._network.sequence = lambda x, *rest: (
        chunks.append(x.shape),
        sequence(x, *rest),
    )[1]
    holes = rig.send(gappy, np.full((300, 2), np.nan))
    primed = rig.send(whole, rows(512))
    assert await primed.outcome()
    assert await holes.outcome()
    assert [shape[1] for shape in chunks if shape[1] > 1] == [128] * 4


@pytest.mark.parametrize("policy", ["hold", "impute"])
async def test_runs_of_missing_rows_leave_what_stepping_leaves(rig, policy):
    """From the first row on, in one request, in chunks; several sessions with gaps of their own."""
    x = [rows(140, seed=n) for n in range(3)]
    for n, mine in enumerate(x):
        mine[:n, 0] = np.nan
        mine[: 2 * n, 1] = np.nan
        mine[40 : 65 + n] = np.nan
        mine[100 + n : 130 : 2 + n, 0] = np.nan
    slow = [await rig.open(f"slow{n}", missing=policy) for n in range(3)]
    fast = [await rig.open(f"fast{n}", missing=policy) for n in range(3)]
    wanted = [await stepped(rig, session, mine) for session, mine in zip(slow, x, strict=True)]
    callers = [rig.send(session, mine) for session, mine in zip(fast, x, strict=True)]
    for caller, y in zip(callers, wanted, strict=True):
        step = await caller.outcome()
        assert outputs(step) == pytest.approx(y, abs=CLOSE)
    slots = np.array([session.slot for session in (*slow, *fast)])
    states = rig.lane.engine.read_states(slots)
    assert np.array_equal(np.isnan(states[:3]), np.isnan(states[3:]))
    assert np.nanmax(np.abs(states[:3] - states[3:])) < 1e-3


@pytest.mark.parametrize("policy", ["hold", "impute"])
async def test_inspect_fills_what_is_missing_too(rig, policy):
    x = rows(12)
    x[0, 1] = x[5:8] = np.nan
    one, other = [await rig.open(name, missing=policy) for name in ("one", "other")]
    step = await rig.step(one, x, inspect=True)
    assert outputs(step) == pytest.approx(await rig.y(other, x), abs=CLOSE)
    assert all(part.shape[0] == 12 for layer in step.layers for part in layer.values())


async def test_rows_held_are_applied_a_chunk_at_a_time(rig):
    session = await rig.open(missing="hold")
    x = rows(256)
    x[100:200] = np.nan
    pieces = []
    network = rig.lane.engine._network
    sequence = network.sequence_seen
    network.sequence_seen = lambda seen, *rest: (
        pieces.append(seen.shape[1]),
        sequence(seen, *rest),
    )[1]
    await rig.y(session, x)
    assert pieces == [128, 128]
