"""What is special to each cell; what all promise is in tests/contract/test_cells.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepstate.engine.cells import build_cell
from tests.reference import sigmoid
from tests.unit.rig import model_of, rows_of


def traced_step(network, x: np.ndarray, state: torch.Tensor):
    """A cell's step of rows x [B, D] with its trace, all as float64 arrays."""
    model = model_of(network)
    weights = {
        name.removeprefix("cell."): torch.from_numpy(value)
        for name, value in model.tensors.items()
        if name.startswith("cell.")
    }
    cell = build_cell(model.manifest.cell, x.shape[1], weights)
    trace: list[dict[str, torch.Tensor]] = []
    h, state = cell.step(torch.from_numpy(x), state, trace)
    layers = [{name: part.double().numpy() for name, part in layer.items()} for layer in trace]
    double = {name: value.double().numpy() for name, value in weights.items()}
    return h.double().numpy(), state.double().numpy(), layers, double


def split(weights, part: str, layer: int, a: np.ndarray, gates: int) -> list[np.ndarray]:
    total = a @ weights[f"weight_{part}_l{layer}"].T + weights[f"bias_{part}_l{layer}"]
    return np.split(total, gates, axis=1)


def state_of(width: int, batch: int = 5) -> torch.Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(3)) * 0.5


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(actual - expected).max() <= 1e-6


@pytest.mark.parametrize("batch", [1, 5])
def test_an_lstm_traces_the_equations(networks, batch):
    network = networks["lstm"]
    state = state_of(4 * 16, batch)
    x = rows_of(network, batch)
    top, after, layers, weights = traced_step(network, x, state)
    h0, h1, c0, c1 = np.split(state.double().numpy(), 4, axis=1)
    below = x.astype(np.float64)
    for layer, (h, c) in enumerate(((h0, c0), (h1, c1))):
        from_x, from_h = (
            split(weights, "ih", layer, below, 4),
            split(weights, "hh", layer, h, 4),
        )
        i, f, g, o = (a + b for a, b in zip(from_x, from_h, strict=True))
        traced = layers[layer]
        assert list(traced) == ["i", "f", "g", "o", "c", "m", "h"]
        assert_close(traced["i"], sigmoid(i))
        assert_close(traced["f"], sigmoid(f))
        assert_close(traced["g"], np.tanh(g))
        assert_close(traced["o"], sigmoid(o))
        assert_close(traced["c"], sigmoid(f) * c + sigmoid(i) * np.tanh(g))
        assert_close(traced["m"], np.tanh(traced["c"]))
        assert_close(traced["h"], traced["o"] * traced["m"])
        below = traced["h"]
    assert_close(top, layers[1]["h"])
    states = [layers[0]["h"], layers[1]["h"], layers[0]["c"], layers[1]["c"]]
    assert_close(after, np.concatenate(states, axis=1))


def test_a_projection_is_applied_to_h_alone(networks):
    network = networks["projected"]
    _, after, layers, weights = traced_step(network, rows_of(network, 5), state_of(2 * 5 + 2 * 12))
    for layer, traced in enumerate(layers):
        assert_close(traced["h"], traced["o"] * traced["m"] @ weights[f"weight_hr_l{layer}"].T)
        assert (traced["h"].shape, traced["c"].shape) == ((5, 5), (5, 12))
    states = [layers[0]["h"], layers[1]["h"], layers[0]["c"], layers[1]["c"]]
    assert_close(after, np.concatenate(states, axis=1))


def test_a_gru_traces_the_equations(networks):
    network = networks["gru"]
    state = state_of(2 * 16)
    x = rows_of(network, 5)
    top, after, layers, weights = traced_step(network, x, state)
    below = x.astype(np.float64)
    for layer, h in enumerate(np.split(state.double().numpy(), 2, axis=1)):
        xr, xz, xn = split(weights, "ih", layer, below, 3)
        hr, hz, hn = split(weights, "hh", layer, h, 3)
        r, z = sigmoid(xr + hr), sigmoid(xz + hz)
        n = np.tanh(xn + r * hn)
        traced = layers[layer]
        assert list(traced) == ["r", "z", "n", "h"]
        assert_close(traced["r"], r)
        assert_close(traced["z"], z)
        assert_close(traced["n"], n)
        assert_close(traced["h"], (1 - z) * n + z * h)
        below = traced["h"]
    assert_close(top, below)
    assert_close(after, np.concatenate([layer["h"] for layer in layers], axis=1))


@pytest.mark.parametrize(
    ("name", "activation"), [("tanh", np.tanh), ("relu", lambda a: np.maximum(a, 0))]
)
def test_a_plain_rnn_traces_the_equation(networks, name, activation):
    network = networks[name]
    state = state_of(2 * 16)
    x = rows_of(network, 5)
    top, _, layers, weights = traced_step(network, x, state)
    below = x.astype(np.float64)
    for layer, h in enumerate(np.split(state.double().numpy(), 2, axis=1)):
        (a,), (b,) = split(weights, "ih", layer, below, 1), split(weights, "hh", layer, h, 1)
        assert list(layers[layer]) == ["h"]
        assert_close(layers[layer]["h"], activation(a + b))
        below = layers[layer]["h"]
    assert_close(top, below)
