"""The equations of DESIGN in float64 NumPy: no torch, no batching, one row after the other.

And a session of a forecasting model, as the manifest's words and the docs say it: lagged inputs,
their fallback, profiles, stand-ins for missing values, forecasts fed back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

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


class Series:
    """One session of a model with an LSTM and no calendar, from zero state.

    Args:
        manifest: the model's, as it is written.
        tensors: its weights and profiles.
        policy: what stands in for NaN, "impute" or "hold".
        start: steps from every profile's origin to the session's first row.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        *,
        policy: str,
        start: int = 0,
    ) -> None:
        self.manifest = manifest
        self.policy = policy
        self.start = start
        self.weights = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
        layers, hidden = manifest["cell"]["num_layers"], manifest["cell"]["hidden_size"]
        self.h, self.c = np.zeros((layers, hidden)), np.zeros((layers, hidden))
        self.rows: list[list[float]] = []
        """As they were applied, raw; NaN where a column's level stood in for it."""
        self.y = np.zeros(0)

    @property
    def names(self) -> list[str]:
        return [column["name"] for column in self.manifest["inputs"]]

    def profile(self, column: Mapping[str, Any], t: int) -> float:
        """The profile's value at row t; 0 without one."""
        if "profile" not in column:
            return 0.0
        values = self.weights[column["profile"]]
        return float(values[(self.start + t) % len(values)])

    def level(self, column: Mapping[str, Any], t: int) -> float:
        return column.get("mean", 0.0) + self.profile(column, t)

    def seen(self, t: int, place: int) -> float:
        """Column `place` of row t as the network sees it."""
        column, value = self.manifest["inputs"][place], self.rows[t][place]
        if np.isnan(value):
            return 0.0  # its level stood in
        return (value - self.level(column, t)) / column.get("scale", 1.0)

    def back(self, t: int, place: int) -> float:
        """The same of a row that may lie before the first one."""
        if t >= 0:
            return self.seen(t, place)
        return self.seen(0, place) if self.manifest.get("fallback") == "first" else 0.0

    def lagged(self, t: int, into: str) -> list[float]:
        found: list[float] = []
        for part in self.manifest.get("lags", ()):
            if part.get("into", "cell") != into:
                continue
            place = self.names.index(part["input"])
            if part["kind"] == "lag":
                found += [self.back(t - steps, place) for steps in part["steps"]]
            else:
                window = [self.back(t - ago, place) for ago in range(part["steps"])]
                found.append(float(getattr(np, part["statistic"])(window)))
        return found

    def median(self, name: str, horizon: int) -> int | None:
        """The column of y that is the forecast of an input, so many rows ahead, if any."""
        first = 0
        for output in self.manifest["outputs"]:
            quantiles, horizons = output.get("quantiles", ()), output.get("horizons", [0])
            if output["name"] == name and horizon in horizons:
                middle = list(quantiles).index(0.5) if quantiles else 0
                return int(first + horizons.index(horizon) * max(1, len(quantiles)) + middle)
            first += len(horizons) * max(1, len(quantiles))
        return None

    def filled(self, x: np.ndarray) -> list[float]:
        """A row with what stands in for what is missing; NaN where that is the column's level."""
        row = [float(value) for value in x]
        for place, name in enumerate(self.names):
            if not np.isnan(row[place]) or not self.rows:
                continue
            column = self.median(name, 1)
            own = self.policy == "impute" and column is not None
            row[place] = float(self.y[column]) if own else self.rows[-1][place]
        return row

    def step(self, x: np.ndarray) -> np.ndarray:
        """y [O] of the next row x [D]."""
        self.rows.append(self.filled(x))
        t = len(self.rows) - 1
        below = np.array(
            [self.seen(t, place) for place in range(len(self.names))] + self.lagged(t, "cell")
        )
        for layer in range(len(self.h)):
            below = self.advance(layer, below)
        y = self.weights["head.weight"] @ below + self.weights["head.bias"]
        if "head.lags" in self.weights:
            y = y + self.weights["head.lags"] @ np.array(self.lagged(t, "head"))
        self.y = np.concatenate([self.raw(output, part, t) for output, part in self.outputs(y)])
        return self.y

    def advance(self, layer: int, below: np.ndarray) -> np.ndarray:
        weights, h, c = self.weights, self.h, self.c
        total = (
            weights[f"cell.weight_ih_l{layer}"] @ below
            + weights[f"cell.bias_ih_l{layer}"]
            + weights[f"cell.weight_hh_l{layer}"] @ h[layer]
            + weights[f"cell.bias_hh_l{layer}"]
        )
        i, f, g, o = np.split(total, 4)
        c[layer] = sigmoid(f) * c[layer] + sigmoid(i) * np.tanh(g)
        h[layer] = sigmoid(o) * np.tanh(c[layer])
        return h[layer].copy()

    def outputs(self, y: np.ndarray) -> list[tuple[Mapping[str, Any], np.ndarray]]:
        found, first = [], 0
        for output in self.manifest["outputs"]:
            width = len(output.get("horizons", [0])) * max(1, len(output.get("quantiles", ())))
            found.append((output, y[first : first + width]))
            first += width
        return found

    def raw(self, output: Mapping[str, Any], part: np.ndarray, t: int) -> np.ndarray:
        """An output's columns in raw units; the quantiles of a horizon rise."""
        horizons = output.get("horizons", [0])
        table = part.reshape(len(horizons), -1) * output.get("scale", 1.0)
        return np.concatenate(
            [
                np.sort(row) + self.level(output, t + k)
                for row, k in zip(table, horizons, strict=True)
            ]
        )

    def forecast(self, name: str, others: np.ndarray) -> list[float]:
        """Its own forecasts of an input for the rows whose other inputs are given, and one more.

        Of a model that looks one row ahead: each forecast is fed back as the next row.
        """
        ahead, column, found = copy.deepcopy(self), self.median(name, 1), []
        assert column is not None
        for row in others:
            found.append(float(ahead.y[column]))
            ahead.step(np.where(np.isnan(row), found[-1], row))
        return [*found, float(ahead.y[column])]
