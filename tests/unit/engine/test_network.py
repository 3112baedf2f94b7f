"""Against a slow computation in float64, row by row, from the manifest's own words."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch

from stepstate.engine.network import Network
from stepstate.models import build_timeline
from tests.networks import make_network
from tests.unit.models.test_timeline import slow_row
from tests.unit.rig import model_of, rows_of, timed_network

START = datetime(2026, 3, 28, 20, 30, tzinfo=UTC)


def slow(network, model, x: np.ndarray) -> np.ndarray:
    """y [T, O]: scaling and calendar by the manifest, then torch.nn in float64."""
    manifest = model.manifest
    interval = timedelta(seconds=manifest.step_interval_seconds or 1)
    table = [slow_row(model, START + t * interval) for t in range(len(x))]
    levels, calendar, bases = (np.array(part) for part in zip(*table, strict=True))
    scaled = (x - levels) / [column.scale for column in manifest.inputs]
    seen = torch.tensor(np.concatenate((scaled, calendar), axis=1))
    with torch.no_grad():
        h, _ = copy.deepcopy(network.module).double()(seen[None])
        head = copy.deepcopy(network.head).double()(h)[0].numpy()
    scales = [output.scale for output in manifest.outputs for _ in output.horizons]
    return head * scales + bases


def both(model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y of rows stepped one by one, and as one sequence."""
    timeline = build_timeline(model)
    network = Network(model, timeline)
    rows = torch.from_numpy(x)
    phase = torch.arange(len(x)) + timeline.phase(START)
    state, stepped = torch.zeros(1, network.state_width), []
    for t in range(len(x)):
        y, state = network.step(rows[t : t + 1], phase[t : t + 1], state)
        stepped.append(y[0])
    whole, _ = network.sequence(rows[None], phase[None], torch.zeros(1, network.state_width))
    return torch.stack(stepped).numpy(), whole[0].numpy()


def assert_right(network, model, x: np.ndarray) -> None:
    expected = slow(network, model, x)
    tolerance = 1e-5 * max(1.0, np.abs(expected).max())
    for y in both(model, x):
        assert y.shape == expected.shape
        assert np.abs(y - expected).max() <= tolerance


def needs_interval(network) -> None:
    """`slow` asks for the interval; a model without time has none."""
    network.manifest["step_interval_seconds"] = 60


def test_scaling_profiles_calendar_and_horizons_are_the_manifests():
    network, profiles = timed_network()
    x = np.random.default_rng(1).normal(100, 30, size=(200, 2)).astype(np.float32)
    assert_right(network, model_of(network, profiles), x)


def test_scaling_without_time_is_the_manifests():
    network = make_network("scaled", seed=9)
    needs_interval(network)
    network.manifest["inputs"][1].update(mean=50.0, scale=-7.0)
    network.manifest["outputs"][0].update(mean=1000.0, scale=250.0, horizons=[4])
    assert_right(network, model_of(network), rows_of(network, 50) * 10)


@pytest.mark.parametrize("change", [{"mean": 3.0}, {"scale": 4.0}])
def test_either_a_mean_or_a_scale_alone_counts(change):
    network = make_network("scaled", seed=9)
    needs_interval(network)
    network.manifest["inputs"][2].update(change)
    assert_right(network, model_of(network), rows_of(network, 20))


def test_a_plain_model_sees_x_as_it_is(network):
    x = rows_of(network, 50)
    for y in both(model_of(network), x):
        assert np.abs(y - network.offline(x)).max() <= 1e-5


def test_a_calendar_alone_counts():
    network = make_network("calendar", inputs=3 + 2, seed=10)
    needs_interval(network)
    network.manifest["inputs"] = [{"name": f"x{place}"} for place in range(3)]
    network.manifest["calendar"] = [{"kind": "fourier", "period_seconds": 3600, "harmonics": 1}]
    assert_right(network, model_of(network), rows_of(network, 100))


def test_a_calendar_that_repeats_at_every_step_is_an_input_all_the_same():
    network = make_network("daily", inputs=3 + 2, seed=10)
    network.manifest["step_interval_seconds"] = 86_400
    network.manifest["inputs"] = [{"name": f"x{place}"} for place in range(3)]
    network.manifest["calendar"] = [{"kind": "fourier", "period_seconds": 86_400, "harmonics": 1}]
    assert_right(network, model_of(network), rows_of(network, 20))


def test_a_profile_of_one_step_is_taken_off_x_all_the_same():
    network = make_network("constant", seed=10)
    needs_interval(network)
    network.manifest["inputs"][0]["profile"] = "level"
    network.manifest["profiles"] = {"level": {"period_steps": 1, "origin": "2026-01-01T00:00:00Z"}}
    model = model_of(network, {"level": np.array([5.0], np.float32)})
    assert_right(network, model, rows_of(network, 20))


def test_rows_of_one_batch_have_their_own_phases():
    network, profiles = timed_network()
    model = model_of(network, profiles)
    timeline = build_timeline(model)
    runs = Network(model, timeline)
    phase = torch.tensor([0, 5, -1])
    x, state = torch.full((3, 2), 90.0), torch.zeros(3, runs.state_width)
    together, _ = runs.step(x, phase, state)
    for place in range(3):
        one = slice(place, place + 1)
        alone, _ = runs.step(x[one], phase[one], state[one])
        assert (together[one] - alone).abs().max() <= 1e-4
