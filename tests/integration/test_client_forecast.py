"""Both clients against real servers: missing rows, forecasts and accuracy."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stepstate import errors
from stepstate.client import AsyncClient, Forecast
from stepstate.client._protocol import forecasts
from stepstate.client._protocol.history import PIECE_ROWS
from stepstate.config import ServerConfig
from stepstate.server import Server
from tests import offline
from tests.chaos.restartable import restartable_server
from tests.integration.clients import AnyClient, Connect
from tests.integration.forecasters import CLOSE
from tests.integration.wire import HANG, TOLERANCE, draw, largest_difference
from tests.networks import Network
from tests.offline import rows

START = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def config(config: ServerConfig, forecasters: Path) -> ServerConfig:
    return replace(config, models=forecasters)


@pytest.fixture
async def client(connect: Connect, server: Server) -> AsyncIterator[AnyClient]:
    async with connect(server.address) as made:
        yield made


# Missing rows.


async def test_what_stood_in_is_told(client: AnyClient):
    x = rows(30)
    session = await client.open("sensor1", missing="hold", history=x[:10])
    x[12], x[15, 1] = math.nan, math.nan
    await session.step(x[10:20])
    assert session.imputed_rows == 2
    counts = [session.imputed_rows async for _ in session.stream([x[20], x[12], x[21]])]
    assert counts == [0, 1, 0]
    results = [one async for one in client.stream([(session, x[12]), (session, x[22])])]
    assert [one.imputed_rows for one in results] == [1, 0]
    assert (await client.info(session.session_id)).missing == "hold"
    new = await client.open("sensor1")
    counts = [new.fallback_rows async for _ in new.stream(iter(x[:9]))]
    assert counts == [1] * 7 + [0] * 2


@pytest.mark.parametrize("missing", ["impute", "hold"])
async def test_advancing_is_stepping_missing_rows(client: AnyClient, missing: str):
    x = rows(20)
    one, other = [await client.open("sensor1", missing=missing, history=x) for _ in range(2)]
    y = await one.advance(5)
    assert (one.t, one.imputed_rows) == (25, 5)
    assert largest_difference(y, (await other.step(np.full((5, 2), np.nan)))[-1]) <= CLOSE
    many = PIECE_ROWS + 10
    assert (await one.advance(many)).shape == y.shape
    assert (one.t, one.imputed_rows) == (25 + many, many)


@pytest.mark.parametrize("missing", ["impute", "hold"])
async def test_what_is_missing_at_the_start_is_stood_in_for_on_every_way(
    client: AnyClient, sensor: Network, missing: str
):
    """The first row misses both columns, or the session begins with rows that never came."""
    x = rows(12)
    x[0] = x[1:4, 1] = math.nan
    filled = x.copy()
    filled[0] = [column["mean"] for column in sensor.manifest["inputs"]]
    filled[1:4, 1] = filled[0, 1]
    want = offline.outputs(sensor, filled)
    stepped = await client.open("sensor1", missing=missing)
    assert largest_difference(await stepped.step(x[0]), want[0]) <= CLOSE
    assert stepped.imputed_rows == 1
    assert largest_difference(await stepped.step(x[1:]), want[1:]) <= CLOSE
    assert stepped.imputed_rows == 3
    streamed = await client.open("sensor1", missing=missing)
    found = [(y, streamed.imputed_rows) async for y in streamed.stream(iter(x))]
    assert largest_difference([y for y, _ in found], want) <= CLOSE
    assert [count for _, count in found] == [1] * 4 + [0] * 8
    primed = await client.open("sensor1", missing=missing, history=x)
    assert primed.t == 12
    packed = await client.open("sensor1", missing=missing)
    async with client.packed([packed]) as pack:
        told = [await pack.step(row[None]) for row in x]
    assert largest_difference([one.y[0] for one in told], want) <= CLOSE
    assert [bool(one.imputed[0]) for one in told] == [True] * 4 + [False] * 8
    fans = [await one.forecast(3) for one in (stepped, streamed, primed, packed)]
    for fan in fans[1:]:
        assert largest_difference(fan.values, fans[0].values) <= CLOSE
    late = await client.open("sensor1", missing="hold")
    assert (
        largest_difference(
            await late.advance(3), offline.outputs(sensor, np.repeat(filled[:1], 3, axis=0))[-1]
        )
        <= CLOSE
    )
    assert late.imputed_rows == 3


async def test_a_session_without_a_policy_refuses_missing_rows(client: AnyClient):
    session = await client.open("sensor1", history=rows(3))
    with pytest.raises(errors.NonFiniteInput):
        await session.advance(1)
    with pytest.raises(errors.InvalidField, match="expected 1 or more"):
        await session.advance(0)
    for bad in ({"missing": "zero"}, {"interval_level": 0.0}, {"interval_level": 1.5}):
        with pytest.raises(errors.InvalidField, match=next(iter(bad))):
            await client.open("sensor1", **bad)


# Forecasts.


async def test_a_forecast_is_what_the_last_step_said(client: AnyClient, sensor: Network):
    x = rows(60)
    session = await client.open("sensor1", history=x, interval_level=0.8)
    assert session.info.interval_level == pytest.approx(0.8)
    y = offline.outputs(sensor, x)
    forecast = await session.forecast(3)
    assert (forecast.session_id, forecast.t, forecast.scenario) == (session.session_id, 60, "")
    assert forecast.horizons.tolist() == [1, 2, 3]
    assert (forecast.times, forecast.methods) == (None, ("direct",) * 3)
    assert forecast.levels == pytest.approx((0.1, 0.5, 0.9))
    assert largest_difference(forecast.median, y[-1, [1, 4, 7]]) <= CLOSE
    assert (forecast.low < forecast.median).all()
    assert (forecast.median < forecast.high).all()
    assert forecast["level"].unit == "m"
    assert session.t == (await client.info(session.session_id)).t == 60
    fan = await session.forecast(3, quantiles=np.array([0.25, 0.75]))
    assert fan.values.shape == (3, 2)
    assert np.isnan(fan.median).all()


async def test_a_model_without_intervals_forecasts_its_median(client: AnyClient):
    session = await client.open("hourly", start_time=START, history=draw(5, 1))
    forecast = await session.forecast()
    assert (forecast.levels, len(forecast)) == ((0.5,), 3)
    assert np.isnan(forecast.low).all()
    with pytest.raises(errors.InvalidField, match="quantiles"):
        await session.forecast(quantiles=[0.1])


async def test_each_scenario_has_a_forecast_of_its_own(client: AnyClient):
    session = await client.open("sensor1", history=rows(60))
    told = await session.forecast(
        6,
        scenarios={
            "given": np.full((6, 2), 4.0),
            "warm": pd.DataFrame({"heat": [3.0] * 6}),
            "nothing": np.array([[math.nan, 3.0]] * 6),
        },
    )
    assert list(told) == ["given", "warm", "nothing"]
    assert [one.scenario for one in told.values()] == list(told)
    assert set(told["given"]["level"].methods) == {"given"}
    assert told["given"]["level"].median.tolist() == [4.0] * 6
    warm, nothing = (told[name]["level"].values for name in ("warm", "nothing"))
    # Where a row stands in a product may change its last bit; the promise is 1e-5.
    assert np.allclose(warm, nothing, rtol=0, atol=TOLERANCE, equal_nan=True)
    for bad, named in (
        ({}, "scenarios: "),
        ({"a": [1.0, 2.0, 3.0]}, "scenarios\\['a'\\]"),
        ({"a": pd.DataFrame({"cold": [1.0]})}, "scenarios\\['a'\\]"),
        ({"a": [[1.0, math.inf]]}, "scenarios\\['a'\\]"),
        ([[1.0]], "scenarios: "),
    ):
        with pytest.raises(errors.InvalidField, match=named):
            await session.forecast(scenarios=bad)


async def test_forecasts_of_many_sessions_come_with_their_errors(client: AnyClient):
    sensors = [await client.open("sensor1", history=rows(20, seed=n)) for n in range(3)]
    hourly = await client.open("hourly", start_time=START, history=draw(5, 1))
    minutely = await client.open("minutely", start_time=START, history=draw(7, 1))
    empty = await client.open("sensor1")
    asked = [sensors[0], "nobody", sensors[1].session_id, empty, hourly.session_id, minutely]
    told = await client.forecast([*asked, minutely.session_id], 3)
    kinds = [type(one).__name__ for one in told]
    assert (
        kinds == ["Forecast", "SessionUnknown", "Forecast", "ForecastImpossible"] + ["Forecast"] * 3
    )
    alone = await sensors[1].forecast(3)
    assert np.allclose(told[2].values, alone.values, equal_nan=True, atol=CLOSE)
    firsts = [None if told[n].times is None else told[n].times.tolist() for n in (0, 4, 5, 6)]
    assert firsts == [
        None,
        [datetime(2026, 3, 1, hour) for hour in (5, 6, 7)],  # noqa: DTZ001 - as NumPy has them
        *[[datetime(2026, 3, 1, 0, minute) for minute in (7, 8, 9)]] * 2,  # noqa: DTZ001
    ]
    assert isinstance((await client.forecast(["nobody"]))[0], errors.SessionUnknown)
    assert await client.forecast([]) == []
    with pytest.raises(errors.InvalidField, match="quantiles"):
        await client.forecast(asked, quantiles=[7.0])
    paths = await client.forecast(["nobody", hourly], scenarios={"a": [[1.0]], "b": [[2.0]]})
    assert list(paths[1]) == ["a", "b"]


async def test_very_many_forecasts_take_several_calls(
    client: AnyClient, monkeypatch: pytest.MonkeyPatch
):
    sessions = [await client.open("sensor1", history=rows(9, seed=n)) for n in range(7)]
    whole = await client.forecast(sessions, 3)
    monkeypatch.setattr(forecasts, "CALL_SESSIONS", 3)
    parts = await client.forecast([*sessions, "nobody"], 3)
    for one, other in zip(whole, parts[:-1], strict=True):
        assert isinstance(one, Forecast)
        assert one.session_id == other.session_id
        assert np.allclose(one.values, other.values, atol=CLOSE)
    assert isinstance(parts[-1], errors.SessionUnknown)


async def test_a_forecast_of_ten_thousand_ids_is_read(server: Server):
    async with AsyncClient(server.address) as client:
        await client.open("sensor1", session_id="x" * 128, history=rows(9))
        told = await client.forecast(["x" * 128] * 12_000, 3, quantiles=[0.5] * 9)
    assert len(told) == 12_000
    assert all(isinstance(one, Forecast) for one in told)


@pytest.mark.parametrize("saved", [0, 40])
async def test_a_server_that_was_set_back_is_brought_up_before_it_forecasts(
    forecasters: Path, tmp_path: Path, connect: Connect, saved: int
):
    x = rows(50)
    store = f"sqlite:{tmp_path / 'restartable.db'}"
    options = ("--models", str(forecasters), "--store", store, "--snapshot-interval", "600")
    async with (
        restartable_server(tmp_path, *options) as server,
        connect(server.address, timeout=HANG) as client,
    ):
        session = await client.open("sensor1", session_id="a")
        other = await client.open("sensor1", session_id="b", history=x)
        for row in x[:40]:
            await session.step(row)
        if saved:
            await server.drained()
            await server.start()
        await session.step(x[40:45])
        for row in x[45:]:
            await session.step(row)
        before = await session.forecast(3)
        server.kill()
        await server.start()
        assert (await client.info("a")).t < 50
        after, bulk = await client.forecast([session, other], 3)
        assert (after.t, bulk.t, session.t) == (50, 50, 50)
        assert largest_difference(after.values, before.values) <= CLOSE
        assert (await client.info("a")).t == 50
        await session.step(x[0])
        assert session.t == 51


async def test_rows_that_are_not_kept_are_missing_by_name(
    forecasters: Path, tmp_path: Path, connect: Connect
):
    options = ("--models", str(forecasters), "--store", f"sqlite:{tmp_path / 'restartable.db'}")
    options += ("--snapshot-interval", "600")
    async with (
        restartable_server(tmp_path, *options) as server,
        connect(server.address, timeout=HANG, resume_rows=5) as client,
    ):
        session = await client.open("sensor1", history=rows(20))
        server.kill()
        await server.start()
        with pytest.raises(errors.RowsMissing):
            await session.forecast()


# Accuracy.


async def test_accuracy_and_drift_are_told(client: AnyClient):
    session = await client.open("sensor1", history=rows(60))
    info = await session.refresh()
    assert [(one.output, one.horizon, one.scored) for one in info.accuracy] == [
        ("level", 1, 59),
        ("level", 3, 57),
    ]
    assert all(0 <= one.coverage <= 1 for one in info.accuracy)
    assert [one.recent_scored for one in info.accuracy] == [59, 57]
    assert all(0 < one.recent_median_absolute_error < 10 for one in info.accuracy)
    assert info.drift.alarms >= 0
    reset = await session.reset_accuracy()
    assert (reset.t, [one.scored for one in reset.accuracy]) == (60, [0, 0])
    assert np.isnan(reset.accuracy[0].recent_mean_absolute_error)
    assert (reset.drift.alarms, reset.drift.learning) == (0, True)
    await session.step(rows(5))
    info = await client.reset_accuracy(session.session_id)
    assert (info.t, info.accuracy[0].scored) == (65, 0)
    model = await client.model("sensor1")
    assert (model.lag_rows, model.tracked_horizons, model.output_width) == (7, (1, 3), 13)
    assert model.outputs[0].quantiles == offline.QUANTILES
