"""The equations of DESIGN in float64 NumPy: no torch, no batching, one row after the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def sigmoid(a: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 1.0 / (1.0 + np.exp(-a))


def lstm(tensors: Mapping[str, np.ndarray], x: np.ndarray, layers: int) -> np.ndarray:
    """y [T, O] of x [T, D] from zero state, by a stacked LSTM and a linear head.

    i_t = sigma(W_xi x_t + W_hi h_{t-1} + b_i), f, o alike, g_t = tanh(...),
    c_t = f_t * c_{t-1} + i_t * g_t, m_t = tanh(c_t), h_t = o_t * m_t,
    y_t = W_yh h_t + b_y; PyTorch's gate order (i, f, g, o).
    """
    weights = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    hidden = weights["cell.weight_hh_l0"].shape[1]
    h = np.zeros((layers, hidden))
    c = np.zeros((layers, hidden))
    y = []
    for row in np.asarray(x, np.float64):
        below = row
        for layer in range(layers):
            total = (
                weights[f"cell.weight_ih_l{layer}"] @ below
                + weights[f"cell.bias_ih_l{layer}"]
                + weights[f"cell.weight_hh_l{layer}"] @ h[layer]
                + weights[f"cell.bias_hh_l{layer}"]
            )
            i, f, g, o = np.split(total, 4)
            c[layer] = sigmoid(f) * c[layer] + sigmoid(i) * np.tanh(g)
            m = np.tanh(c[layer])
            h[layer] = sigmoid(o) * m
            below = h[layer]
        y.append(weights["head.weight"] @ below + weights["head.bias"])
    return np.array(y)
