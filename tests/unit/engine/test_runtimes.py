"""ONNX Runtime's single rows and torch's: the same results, whatever the model and the batch."""

from __future__ import annotations

import math
import os
from importlib import util

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepstate.engine import Runtime, check_runtime
from stepstate.engine.arena import append_rows, past_rows
from stepstate.engine.network import Network, RowHistory
from stepstate.engine.runtimes import OnnxStepper, RowStepper, TorchStepper, make_stepper
from stepstate.errors import RuntimeUnavailable
from stepstate.models import Model, build_timeline
from tests.networks import make_network
from tests.offline import forecasting_network
from tests.unit.rig import model_of, timed_network

CLOSE = 5e-6
"""Of a step from the same state, in units of y's scale."""
DRIFT = 1e-5
"""Of a thousand steps, each from its own state."""
KINDS = ["lstm", "single", "projected", "gru", "tanh", "relu"]
SIZES = (1, 2, 3, 15, 16, 17, 64, 255, 256, 257, 600)
MODELS = [*KINDS, "deep", "scaled", "timed", "profile", "lagged", "first", "quantiles"]


@pytest.fixture(scope="module")
def models(networks) -> dict[str, Model]:
    scaled, profile = make_network("scaled", seed=9), make_network("profile", "gru", seed=10)
    scaled.manifest["inputs"][1].update(mean=50.0, scale=-7.0)
    scaled.manifest["outputs"][0].update(mean=1000.0, scale=250.0)
    profile.manifest["step_interval_seconds"] = 60
    profile.manifest["inputs"][0]["profile"] = "p"
    profile.manifest["profiles"] = {"p": {"period_steps": 3, "origin": "2026-01-01T00:00:00Z"}}
    made = {kind: model_of(networks[kind]) for kind in KINDS}
    made |= {
        "deep": model_of(make_network("deep", layers=12, seed=12)),
        "scaled": model_of(scaled),
        "timed": model_of(*timed_network()),
        "profile": model_of(profile, {"p": np.float32([1, 2, 3])}),
        "lagged": model_of(forecasting_network(quantiles=())),
        "first": model_of(forecasting_network(fallback="first", quantiles=())),
        "quantiles": model_of(forecasting_network()),
    }
    return made


class Sessions:
    """B sessions of a model that are stepped together, without an engine."""

    def __init__(self, model: Model, batch: int, runtime: Runtime) -> None:
        self.network = Network(model, build_timeline(model))
        self.stepper = make_stepper(model, self.network, runtime)
        self.states = np.zeros((batch, self.network.state_width), np.float32)
        manifest = model.manifest
        shape = (batch, manifest.history_rows, manifest.input_width)
        self.rings = np.full(shape, np.nan, np.float32)
        self.t = 0

    def compute(self, x: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y and the states after one row of each of the first sessions; nothing is kept."""
        batch = len(x)
        at, past = np.full(batch, self.t), None
        if self.network.lagged:
            rows = past_rows(self.rings, np.arange(batch), at)
            past = RowHistory(torch.from_numpy(rows), torch.from_numpy(at))
        y, after = self.stepper.step(x, at, states, past)
        return y, after.copy()

    def step(self, x: np.ndarray) -> np.ndarray:
        """y of one row of each."""
        y, self.states = self.compute(x, self.states)
        for ring, row in zip(self.rings, x, strict=True):
            append_rows(ring, self.t, row[None])
        self.t += 1
        return y


def rows_for(model: Model, count: int, batch: int, seed: int = 0) -> np.ndarray:
    """x [T, B, D] about the levels of a model."""
    inputs = model.manifest.inputs
    noise = np.random.default_rng(seed).normal(size=(count, batch, len(inputs)))
    rows = noise * [column.scale for column in inputs] + [column.mean for column in inputs]
    return rows.astype(np.float32)


def differences(model: Model, a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of outputs [B, O], in units of their scale."""
    outputs = model.manifest.outputs
    scales = [abs(output.scale) for output in outputs for _ in range(output.width)]
    return float((np.abs(a - b) / scales).max())


def some_states(width: int, batch: int) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 0.3, (batch, width)).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_a_thousand_steps_do_not_drift_apart(models, name):
    model = models[name]
    both = [Sessions(model, 2, runtime) for runtime in Runtime]
    for x in rows_for(model, 1000, 2):
        ys = [sessions.step(x) for sessions in both]
        assert differences(model, *ys) <= DRIFT
    assert np.abs(both[0].states - both[1].states).max() <= DRIFT


@pytest.mark.parametrize("name", MODELS)
def test_a_row_gets_the_same_in_a_batch_of_any_size(models, name):
    model = models[name]
    x = rows_for(model, 1, max(SIZES))[0]
    ours, by_torch = (Sessions(model, len(x), runtime) for runtime in Runtime)
    states = some_states(ours.network.state_width, len(x))
    for size in SIZES:
        y, after = ours.compute(x[:size], states[:size])
        expected, expected_after = by_torch.compute(x[:size], states[:size])
        assert differences(model, y, expected) <= CLOSE
        assert np.abs(after - expected_after).max() <= CLOSE
        for place in {0, size // 2, size - 1}:
            one = slice(place, place + 1)
            alone, alone_after = ours.compute(x[one], states[one])
            assert differences(model, alone, y[one]) <= CLOSE
            assert np.abs(alone_after - after[one]).max() <= CLOSE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [3e38, -3e38, math.inf])
def test_both_find_the_same_rows_too_large_and_their_mates_feel_nothing(models, name, value):
    model, bad = models[name], [4, 19]
    mates = np.delete(np.arange(20), bad)
    x = rows_for(model, 1, 20)[0]
    sent = x.copy()
    sent[bad, 0] = value
    applied = []
    for runtime in Runtime:
        calm, sessions = Sessions(model, 20, runtime), Sessions(model, 20, runtime)
        y, expected = sessions.step(sent), calm.step(x)
        assert (y[mates] == expected[mates]).all()
        assert (sessions.states[mates] == calm.states[mates]).all()
        applied.append([np.isfinite(found[bad]).tolist() for found in (y, sessions.states)])
    assert applied[0] == applied[1]
    assert not (np.any(applied[0][1]) and math.isinf(value))


def test_a_cell_that_forgets_nothing_keeps_what_it_has():
    """Where f and z are 1, what is kept is the same to the last bit but for what is added."""
    gru = make_network("gru", "gru", inputs=1, hidden=4, layers=1)
    with torch.no_grad():
        for tensor in gru.module.state_dict().values():
            tensor.zero_()
        gru.module.bias_ih_l0[4:8] = 40.0  # z = 1
        gru.module.bias_ih_l0[8:] = 0.3  # n = 0.29
    sessions = Sessions(model_of(gru), 1, Runtime.ONNX_RUNTIME)
    sessions.states = kept = np.float32([[0.1, -0.7, 1 / 3, 1e-7]])
    for _ in range(100):
        sessions.step(np.ones((1, 1), np.float32))
    assert (sessions.states == kept).all()


def test_what_it_is_given_is_not_changed_and_may_be_a_view(models):
    model = models["lstm"]
    sessions = Sessions(model, 4, Runtime.ONNX_RUNTIME)
    x = rows_for(model, 1, 8)[0]
    states = some_states(sessions.network.state_width, 8)
    before = x.copy(), states.copy()
    x.setflags(write=False)
    y, after = sessions.stepper.step(x[::2], np.zeros(4, np.int64), states[::2], None)
    again, _ = sessions.stepper.step(x[::2].copy(), np.zeros(4, np.int64), states[::2].copy(), None)
    assert (y == again).all()
    assert (x == before[0]).all()
    assert (states == before[1]).all()
    assert y.flags.writeable
    assert after.flags.writeable


def test_all_sizes_of_batches_leave_no_memory_behind(models):
    model = models["deep"]
    sessions = Sessions(model, 256, Runtime.ONNX_RUNTIME)
    states = some_states(sessions.network.state_width, 256)
    x = rows_for(model, 1, 256)[0]

    def run_all() -> int:
        for batch in range(1, 257):
            sessions.stepper.step(x[:batch], np.zeros(batch, np.int64), states[:batch], None)
        return psutil.Process(os.getpid()).memory_info().rss

    sessions.stepper.step(x, np.zeros(256, np.int64), states, None)
    first = psutil.Process(os.getpid()).memory_info().rss
    assert run_all() - first < 8 * 2**20
    assert run_all() - first < 8 * 2**20


@given(
    kind=st.sampled_from(["lstm", "gru", "rnn_tanh", "rnn_relu"]),
    sizes=st.tuples(*(st.integers(1, n) for n in (9, 20, 4, 3))),
    projected=st.booleans(),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_any_network_steps_alike(kind, sizes, projected, batch, seed):
    inputs, hidden, layers, outputs = sizes
    projection = hidden - 1 if projected and kind == "lstm" else 0
    network = make_network(
        "any", kind, inputs=inputs, hidden=hidden, layers=layers, outputs=outputs,
        projection=projection, seed=seed,
    )  # fmt: skip
    model = model_of(network)
    both = [Sessions(model, batch, runtime) for runtime in Runtime]
    for x in rows_for(model, 5, batch, seed):
        ys = [sessions.step(x) for sessions in both]
        assert differences(model, *ys) <= DRIFT
    assert np.abs(both[0].states - both[1].states).max() <= DRIFT


@pytest.mark.parametrize("packages", ["onnx", "onnxruntime", "onnx onnxruntime"])
def test_missing_packages_are_named_with_what_to_do(monkeypatch, packages):
    real = util.find_spec
    monkeypatch.setattr(
        "stepstate.engine.runtimes.find_spec",
        lambda name: None if name in packages.split() else real(name),
    )
    check_runtime(Runtime.TORCH)
    with pytest.raises(RuntimeUnavailable, match=f"pip install {packages}`.*--engine torch"):
        check_runtime(Runtime.ONNX_RUNTIME)


def test_each_runtime_has_its_stepper_and_torch_the_models_that_are_too_large(models, monkeypatch):
    model = models["lstm"]
    network = Network(model, build_timeline(model))
    steppers: dict[Runtime, type[RowStepper]] = {
        Runtime.ONNX_RUNTIME: OnnxStepper,
        Runtime.TORCH: TorchStepper,
    }
    for runtime, stepper in steppers.items():
        assert type(make_stepper(model, network, runtime)) is stepper
    monkeypatch.setattr("stepstate.engine.runtimes.MAX_GRAPH_BYTES", 1000)
    assert type(make_stepper(model, network, Runtime.ONNX_RUNTIME)) is TorchStepper
