"""Forecasts, missing rows and accuracy, as any gRPC client sees them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from grpc import StatusCode as Code

from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub as Stub
from tests import offline
from tests.integration.wire import raw_stub, refused
from tests.offline import rows
from tests.processes import server_process

CLOSE = 1e-4  # of values around 5


@pytest.fixture(scope="module")
def sensor():
    return offline.forecasting_network()


@pytest.fixture
def sensors(sensor, tmp_path) -> Path:
    root = tmp_path / "sensors"
    sensor.write(root)
    return root


@pytest.fixture
async def server(config, sensors) -> AsyncIterator[Server]:
    async with running_server(replace(config, models=sensors, slots=3)) as running:
        yield running


@pytest.fixture
async def stub(server) -> AsyncIterator[Stub]:
    async with raw_stub(server.address) as made:
        yield made


async def opened(stub: Stub, session_id: str, **fields: object) -> pb.Session:
    request = pb.OpenSessionRequest(session_id=session_id, **fields)
    return (await stub.OpenSession(request)).session


async def stepped(stub: Stub, session_id: str, x: np.ndarray, t: int) -> np.ndarray:
    request = pb.StepRequest(session_id=session_id, x=np.ravel(x).tolist(), t=t)
    return np.array((await stub.Step(request)).y, np.float32).reshape(len(x), -1)


def values(forecast: pb.SessionForecast) -> np.ndarray:
    return np.array(forecast.outputs[0].values).reshape(-1, len(forecast.quantiles))


async def test_a_forecast_comes_with_its_median_and_interval(stub, sensor):
    x = rows(50)
    await opened(stub, "a")
    y = await stepped(stub, "a", x, 0)
    reply = await stub.Forecast(pb.ForecastRequest(session_id=["a"], horizon=3))
    (forecast,) = reply.forecasts
    assert (forecast.session_id, forecast.t, forecast.scenario) == ("a", 50, "")
    assert not forecast.HasField("first_time")
    assert list(forecast.quantiles) == pytest.approx([0.05, 0.5, 0.95])
    (level,) = forecast.outputs
    assert (level.name, level.unit) == ("level", "m")
    assert list(level.methods) == [pb.FORECAST_METHOD_DIRECT] * 3
    assert values(forecast)[:, 1] == pytest.approx(y[-1, [1, 4, 7]], abs=CLOSE)
    for spot in offline.track(sensor, x, y):
        issued = spot.issued[49 + spot.horizon]
        assert values(forecast)[spot.horizon - 1] == pytest.approx(issued, abs=1e-3)


async def test_thousands_of_forecasts_in_one_call_are_those_of_single_calls(stub):
    """More sessions than slots: most are in the store, and are fetched."""
    names = [f"s{n}" for n in range(8)]
    for n, name in enumerate(names):
        await opened(stub, name)
        await stepped(stub, name, rows(12, seed=n), 0)
    together = await stub.Forecast(pb.ForecastRequest(session_id=names * 250, horizon=3))
    assert len(together.forecasts) == 2000
    for name, one in zip(names, together.forecasts[:8], strict=True):
        alone = (await stub.Forecast(pb.ForecastRequest(session_id=[name], horizon=3))).forecasts[0]
        assert one.session_id == name
        assert values(one) == pytest.approx(values(alone), abs=CLOSE)


async def test_errors_are_in_band_only_among_several_sessions(stub):
    await opened(stub, "a")
    await stepped(stub, "a", rows(3), 0)
    error = await refused(stub.Forecast(pb.ForecastRequest(session_id=["nobody"])))
    assert (error.code, error.reason) == (Code.NOT_FOUND, "SESSION_UNKNOWN")
    reply = await stub.Forecast(pb.ForecastRequest(session_id=["nobody", "a"], horizon=1))
    assert reply.forecasts[0].error.code == Code.NOT_FOUND.value[0]
    assert reply.forecasts[1].t == 3
    error = await refused(stub.Forecast(pb.ForecastRequest(session_id=["a"], horizon=50)))
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, "FORECAST_IMPOSSIBLE")
    error = await refused(stub.Forecast(pb.ForecastRequest()))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")


async def test_a_reply_beyond_what_clients_read_is_refused(stub):
    await opened(stub, "a")
    await stepped(stub, "a", rows(3), 0)
    path = pb.Scenario(name="n" * 128, x=[0, 0])
    for request in (
        pb.ForecastRequest(session_id=["a"] * 10_000, quantiles=[0.5] * 40, horizon=3),
        pb.ForecastRequest(session_id=["a"] * 100, scenarios=[path] * 200, horizon=1),
        pb.ForecastRequest(session_id=[f"{n:0128}" for n in range(10_000)]),
    ):
        error = await refused(stub.Forecast(request))
        assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")
        assert "more than 4000000: ask for fewer" in error.message
    most = await stub.Forecast(pb.ForecastRequest(session_id=["a"] * 10_000, horizon=3))
    assert len(most.forecasts) == 10_000


async def test_advancing_imputes_and_says_so(stub):
    for name in ("a", "b"):
        await opened(stub, name, missing=pb.MISSING_POLICY_HOLD)
        await stepped(stub, name, rows(9), 0)
    skipped = await stub.Step(pb.StepRequest(session_id="a", advance=4, t=9))
    assert (skipped.imputed_rows, skipped.t) == (4, 13)
    by_hand = await stepped(stub, "b", np.repeat(rows(9)[-1:], 4, axis=0), 9)
    assert np.array(skipped.y).reshape(4, -1) == pytest.approx(by_hand, abs=CLOSE)
    again = await stub.Step(pb.StepRequest(session_id="a", advance=4, t=9))
    assert again.replayed
    assert (list(again.y), again.imputed_rows) == (list(skipped.y), 4)


async def test_ten_bytes_do_not_ask_for_megabytes(stub: Stub):
    """All outputs of 30,000 missing rows are refused before they are computed."""
    await opened(stub, "a", missing=pb.MISSING_POLICY_HOLD)
    skip = pb.StepRequest(session_id="a", advance=30_000)
    error = await refused(stub.Step(skip))
    assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "advance")
    assert "set last_only" in error.message
    skip.advance, skip.last_only = 300, True
    assert (await stub.Step(skip)).t == 300


async def test_steps_go_on_while_many_forecasts_are_made(stub):
    """Long roll-outs run in pieces: a step in between is answered before they end."""
    await opened(stub, "a")
    await opened(stub, "b")
    for name in ("a", "b"):
        await stepped(stub, name, rows(9), 0)
    heat = np.stack([np.full(3000, np.nan), np.zeros(3000)], axis=1).ravel().tolist()
    request = pb.ForecastRequest(
        session_id=["a"], horizon=3000, scenarios=[pb.Scenario(name="s", x=heat)]
    )
    long = asyncio.ensure_future(stub.Forecast(request))
    await asyncio.sleep(0.02)
    for t, row in enumerate(rows(20, seed=4), start=9):
        await stepped(stub, "b", row[None], t)
    assert not long.done()
    assert len((await long).forecasts[0].outputs[0].methods) == 3000


async def test_accuracy_is_told_by_get_session(stub, sensor):
    x = rows(60)
    x[30] = np.nan
    told = await opened(stub, "a", missing=pb.MISSING_POLICY_IMPUTE, interval_level=0.8)
    assert (told.missing, told.interval_level) == (pb.MISSING_POLICY_IMPUTE, pytest.approx(0.8))
    y = await stepped(stub, "a", x, 0)
    told = (await stub.GetSession(pb.GetSessionRequest(session_id="a"))).session
    for accuracy, spot in zip(told.accuracy, offline.track(sensor, x, y, 0.8), strict=True):
        assert (accuracy.horizon, accuracy.scored) == (spot.horizon, len(spot.errors))
        assert accuracy.mean_absolute_error == pytest.approx(np.mean(spot.errors), rel=1e-3)
        assert accuracy.coverage == pytest.approx(np.mean(spot.held), abs=1e-3)


@pytest.mark.parametrize("durability", [pb.DURABILITY_SYNC, pb.DURABILITY_ASYNC])
async def test_past_rows_and_tracking_survive_kill_9(sensor, sensors, tmp_path, durability):
    x, half = rows(80), 40
    options = ["--models", str(sensors), "--store", f"sqlite:{tmp_path / 'kept.db'}"]
    with server_process(*options) as first:
        async with raw_stub(first.address) as stub:
            await opened(stub, "a", durability=durability)
            for t in range(half):
                await stepped(stub, "a", x[t : t + 1], t)
            while (await _session(stub, "a")).durable_t < half:
                await asyncio.sleep(0.05)
            before = await _session(stub, "a")
        first.process.kill()
        first.process.wait()
    with server_process(*options) as second:
        async with raw_stub(second.address) as stub:
            y = [await stepped(stub, "a", x[t : t + 1], t) for t in range(half, len(x))]
            after = await _session(stub, "a")
            forecast = (await stub.Forecast(pb.ForecastRequest(session_id=["a"]))).forecasts[0]
    whole = offline.outputs(sensor, x)
    assert np.concatenate(y) == pytest.approx(whole[half:], abs=CLOSE)
    spots = offline.track(sensor, x, whole)
    for early, late, spot in zip(before.accuracy, after.accuracy, spots, strict=True):
        assert early.scored == half - spot.horizon
        assert late.scored == len(spot.errors)
        assert late.mean_absolute_error == pytest.approx(np.mean(spot.errors), rel=1e-3)
        assert late.offset == pytest.approx(spot.offset, abs=1e-3)
        issued = spot.issued[79 + spot.horizon]
        assert values(forecast)[spot.horizon - 1] == pytest.approx(issued, abs=1e-3)


@pytest.mark.parametrize("durability", [pb.DURABILITY_SYNC, pb.DURABILITY_ASYNC])
async def test_a_reset_of_accuracy_survives_kill_9(sensors, tmp_path, durability):
    options = ["--models", str(sensors), "--store", f"sqlite:{tmp_path / 'kept.db'}"]
    with server_process(*options) as first:
        async with raw_stub(first.address) as stub:
            await opened(stub, "a", durability=durability)
            await stepped(stub, "a", rows(40), 0)
            before = await _session(stub, "a")
            request = pb.ResetAccuracyRequest(session_id="a")
            reset = (await stub.ResetAccuracy(request)).session
        first.process.kill()
        first.process.wait()
    with server_process(*options) as second:
        async with raw_stub(second.address) as stub:
            await stepped(stub, "a", rows(50)[40:], 40)
            after = await _session(stub, "a")
    assert [one.scored for one in before.accuracy] == [39, 37]
    for one in reset.accuracy:
        assert (one.scored, one.recent_scored) == (0, 0)
        assert math.isnan(one.mean_absolute_error)
        assert math.isnan(one.recent_median_absolute_error)
    assert (reset.t, reset.drift.alarms, reset.drift.learning) == (40, 0, True)
    assert [one.scored for one in after.accuracy] == [one.recent_scored for one in after.accuracy]
    assert [one.scored for one in after.accuracy] == [10, 10]


async def _session(stub: Stub, session_id: str) -> pb.Session:
    return (await stub.GetSession(pb.GetSessionRequest(session_id=session_id))).session


async def test_a_model_tells_what_a_forecaster_must_know(stub):
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.lag_rows, list(model.tracked_horizons)) == (7, [1, 3])
    assert list(model.outputs[0].quantiles) == list(offline.QUANTILES)
    assert not model.outputs[1].quantiles
