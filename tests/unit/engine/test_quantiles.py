"""Quantiles are in order in every output and in what is tracked, whatever the head gives."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from stepstate.engine.forecast.intervals import quantiles_of
from stepstate.engine.forecast.rollout import HorizonForecast, Method
from stepstate.sessions import ForecastRequest
from stepstate.transport.triton.tensors import outputs_of
from tests import offline
from tests.accelerators import ACCELERATORS, there
from tests.networks import Network, make_network
from tests.offline import forecasting_network
from tests.unit.rig import Rig, model_of, outputs

CLOSE = 1e-5
LEVELS = (0.1, 0.5, 0.9)
SCALE = 2.0


def crossing_network() -> Network:
    """Its head says 3, 0, -3 for the levels 0.1, 0.5, 0.9, give or take what the cell adds."""
    network = make_network("crossing", inputs=1, outputs=2 * 3 + 1, seed=2)
    network.head.weight.data *= 0.1
    network.head.bias.data[:6] = network.head.bias.data.new_tensor([3.0, 0.0, -3.0] * 2)
    network.manifest.update(
        inputs=[{"name": "flow", "mean": 1.0, "scale": SCALE}],
        outputs=[
            {
                "name": "flow",
                "mean": 1.0,
                "scale": SCALE,
                "horizons": [1, 2],
                "quantiles": list(LEVELS),
            },
            {"name": "other"},
        ],
        tracking={"horizons": [1, 2]},
    )
    return network


NETWORK = crossing_network()
MODEL = model_of(NETWORK)


@pytest.fixture(params=ACCELERATORS)
def rig(request, make_rig) -> Rig:
    return make_rig(MODEL, accelerator=there(request.param), replay_rows=64)


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1, 2, (count, 1)).astype(np.float32)


def wanted(x: np.ndarray) -> np.ndarray:
    """y [T, O], by torch.nn and a sort."""
    y = NETWORK.offline((x - 1.0) / SCALE)
    raw = y[:, :6].reshape(-1, 2, 3) * SCALE + 1.0
    assert (raw[:, :, 0] > raw[:, :, 2]).all()  # they do cross
    return np.concatenate([np.sort(raw, axis=2).reshape(-1, 6), y[:, 6:]], axis=1)


async def test_y_rises_by_every_way(rig):
    x = rows(12)
    y = wanted(x)
    stepped, primed, packed = [await rig.open(name) for name in ("a", "b", "c")]
    for place, row in enumerate(x):
        step = await rig.step(stepped, row, place)
        again = await rig.step(stepped, row, place)
        assert np.abs(outputs(step)[0] - y[place]).max() < CLOSE
        assert (again.replayed, again.y) == (True, step.y)
        pack = await rig.send_pack([packed], row[None]).outcome()
        assert np.abs(pack.y[0] - y[place]).max() < CLOSE
    assert np.abs(await rig.y(primed, x[:8]) - y[:8]).max() < CLOSE
    assert np.abs(await rig.y(primed, x[8:], inspect=True) - y[8:]).max() < CLOSE
    for session in (stepped, primed, packed):
        forecast = (
            await rig.sessions.forecast([session.session_id], ForecastRequest(2, (0.5,), ()))
        )[0][0]
        assert np.abs(forecast.outputs[0].values[:, 0] - y[-1, [1, 4]]).max() < CLOSE
        forecast = (
            await rig.sessions.forecast([session.session_id], ForecastRequest(2, LEVELS, ()))
        )[0][0]
        assert (np.diff(forecast.outputs[0].values, axis=1) >= 0).all()


async def test_tritons_tensors_rise(rig):
    x = rows(3)
    step = await rig.step(await rig.open(), x)
    shapes, (quantiles, median) = outputs_of(step, ("quantiles", "flow"), flat=False)
    assert dict(shapes) == {"quantiles": (3, 2, 3), "flow": (3, 2)}
    found = np.frombuffer(quantiles, "<f4").reshape(3, 2, 3)
    assert np.abs(found - wanted(x)[:, :6].reshape(3, 2, 3)).max() < CLOSE
    assert np.array_equal(np.frombuffer(median, "<f4").reshape(3, 2), found[:, :, 1])


async def test_intervals_are_tracked_by_what_is_told(rig):
    """Unsorted, low is above high: no truth would be covered, and no distance be positive."""
    x = rows(200)
    session = await rig.open(level=0.8)
    y = np.concatenate([await rig.y(session, part) for part in np.split(x, 20)])
    quality = rig.sessions.summary(session).quality
    for accuracy, spot in zip(
        quality.accuracy, offline.track(NETWORK_TRACKED, x, y, 0.8), strict=True
    ):
        figures = accuracy.lifetime
        assert figures.coverage == pytest.approx(np.mean(spot.held), abs=0.01)
        assert figures.mean_absolute_error == pytest.approx(np.mean(spot.errors), rel=1e-3)
        assert figures.coverage > 0.7


NETWORK_TRACKED = copy.deepcopy(NETWORK)
NETWORK_TRACKED.manifest["tracking"] |= {"season_steps": 1, "rate": 0.05}


async def test_what_overflows_is_refused_and_sorts_nobody_elses(rig):
    sessions = [await rig.open(name) for name in ("a", "b")]
    x = rows(1)
    bad, good = rig.send(sessions[0], [3e38]), rig.send(sessions[1], x)
    assert await bad.error() is not None
    assert np.abs(outputs(await good.outcome()) - wanted(x)).max() < CLOSE


@pytest.mark.parametrize("accelerator", ["cpu"])
async def test_models_without_quantiles_are_left_alone(make_rig, accelerator, network):
    """Columns of several horizons fall as they like."""
    model = model_of(network)
    rig = make_rig(model, accelerator=accelerator)
    assert rig.scheduler.engine._network._head._quantiles == []  # noqa: SLF001
    x = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    assert np.abs(await rig.y(await rig.open(), x) - network.offline(x)).max() < CLOSE


async def test_farther_quantiles_are_never_nearer(make_rig):
    rig = make_rig(model_of(forecasting_network()), replay_rows=64)
    session = await rig.open()
    await rig.y(session, offline.rows(60))
    engine = rig.scheduler.engine
    state = engine.read_states(np.array([session.slot]))
    tracker = rig.tracker
    spot = tracker.targets[0].horizons[0]
    state[0, engine.layout.tracked_from + spot.place] = -0.4  # an offset that takes much off
    levels = (0.02, 0.05, 0.3, 0.45, 0.5, 0.6, 0.95, 0.99)
    values = np.array([[[-0.2, 0.0, 1.0]]], np.float32)
    methods = np.full((1, 1), Method.DIRECT, np.uint8)
    forecast = HorizonForecast(tracker.targets[0].output, values, methods)
    found = quantiles_of(forecast, levels, tracker, state[:, engine.layout.tracked_from :])
    assert (np.diff(found[0, 0]) >= 0).all()
