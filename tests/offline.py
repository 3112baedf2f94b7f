"""Forecasting models offline: lagged inputs, outputs and tracking, from their definitions.

Slow and plain: float64 NumPy, Python loops, one row after the other, nothing shared with the
server but the manifest. The cell itself is torch.nn's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import torch

from tests.networks import Network, make_network

QUANTILES = (0.05, 0.5, 0.95)


def forecasting_network(
    *, fallback: str = "level", quantiles: tuple[float, ...] = QUANTILES, version: str = "1"
) -> Network:
    """A model that forecasts one of its two inputs, with lagged inputs and tracking.

    x: level, heat. y: level at horizons 1, 2, 3, 5, each with its quantiles; warm, the row itself.
    """
    horizons = (1, 2, 3, 5)
    columns = len(horizons) * max(1, len(quantiles)) + 1
    lagged = 2 + 1 + 1
    network = make_network(f"sensor{version}", inputs=2 + lagged, outputs=columns, seed=11)
    if quantiles:  # rising: spread the head's biases
        with torch.no_grad():
            bias = network.head.bias[:-1].view(len(horizons), len(quantiles))
            bias += torch.linspace(-1.5, 1.5, len(quantiles))
    rng = np.random.default_rng(11)
    network.manifest.update(
        inputs=[
            {"name": "level", "mean": 5.0, "scale": 2.0},
            {"name": "heat", "mean": -1.0, "scale": 0.5},
        ],
        lags=[
            {"kind": "lag", "input": "level", "steps": [1, 6]},
            {"kind": "rolling", "input": "heat", "steps": 4, "statistic": "mean"},
            {"kind": "rolling", "input": "level", "steps": 3, "statistic": "max"},
            {"kind": "lag", "input": "level", "steps": [0, 2, 7], "into": "head"},
        ],
        fallback=fallback,
        outputs=[
            {
                "name": "level",
                "unit": "m",
                "mean": 5.0,
                "scale": 2.0,
                "horizons": list(horizons),
                "quantiles": list(quantiles),
            },
            {"name": "warm"},
        ],
        tracking={
            "horizons": [1, 3],
            "season_steps": 4,
            "rate": 0.2,
            "drift": {"threshold": 2.0, "min_rows": 5},
        },
    )
    network.extra["head.lags"] = rng.normal(0, 0.2, (columns, 3)).astype(np.float32)
    return network


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Rows x [T, 2] for it: a level that swings, and heat."""
    rng = np.random.default_rng(seed)
    level = 5 + 2 * np.sin(np.arange(count) / 2) + rng.normal(0, 0.5, count)
    return np.stack([level, rng.normal(-1, 0.5, count)], axis=1).astype(np.float32)


def seen(manifest: dict, x: np.ndarray) -> np.ndarray:
    """x [T, D] as the network sees it (no calendar, no profile)."""
    mean = [column.get("mean", 0.0) for column in manifest["inputs"]]
    scale = [column.get("scale", 1.0) for column in manifest["inputs"]]
    return (np.asarray(x, np.float64) - mean) / scale


def lagged(manifest: dict, x: np.ndarray, into: str) -> np.ndarray:
    """The lagged inputs [T, n] of rows x [T, D]."""
    rows = seen(manifest, x)
    names = [column["name"] for column in manifest["inputs"]]
    first = manifest.get("fallback") == "first"

    def at(t: int, column: int) -> float:
        if t >= 0:
            return rows[t, column]
        return rows[0, column] if first else 0.0

    found = []
    for t in range(len(rows)):
        features = []
        for part in manifest.get("lags", ()):
            if part.get("into", "cell") != into:
                continue
            column = names.index(part["input"])
            if part["kind"] == "lag":
                features += [at(t - steps, column) for steps in part["steps"]]
            else:
                window = [at(t - back, column) for back in range(part["steps"])]
                features.append(getattr(np, part["statistic"])(window))
        found.append(features)
    return np.array(found, np.float64).reshape(len(rows), -1)


def outputs(network: Network, x: np.ndarray) -> np.ndarray:
    """y [T, O] in raw units of a whole sequence x [T, D] from zero state."""
    manifest = network.manifest
    inputs = np.concatenate([seen(manifest, x), lagged(manifest, x, "cell")], axis=1)
    with torch.no_grad():
        h, _ = network.module(torch.tensor(inputs, dtype=torch.float32)[None])
        y = network.head(h)[0].double().numpy()
    if "head.lags" in network.extra:
        y = y + lagged(manifest, x, "head") @ network.extra["head.lags"].astype(np.float64).T
    place = 0
    for output in manifest["outputs"]:
        width = len(output.get("horizons", [0])) * max(1, len(output.get("quantiles", ())))
        part = slice(place, place + width)
        raw = y[:, part] * output.get("scale", 1.0) + output.get("mean", 0.0)
        levels = max(1, len(output.get("quantiles", ())))
        y[:, part] = np.sort(raw.reshape(len(y), -1, levels), axis=2).reshape(raw.shape)
        place += width
    return y


@dataclass
class Spot:
    """What is tracked at one horizon."""

    horizon: int
    offset: float = 0.0
    scale: float = 0.0
    errors: list[float] = field(default_factory=list)
    scaled: list[float] = field(default_factory=list)
    pairs: list[tuple[float, float]] = field(default_factory=list)
    """Errors, and those of the naive forecast of the same rows."""
    held: list[bool] = field(default_factory=list)
    issued: dict[int, tuple[float, float, float]] = field(default_factory=dict)


def track(network: Network, x: np.ndarray, y: np.ndarray, level: float = 0.9) -> list[Spot]:
    """What is tracked of the first output over rows x [T, D] (NaN: missing) with outputs y [T, O].

    For fewer rows than a block of scores has.

    By the definitions in FORECASTING and in the manifest, with lists instead of running sums.
    """
    manifest = network.manifest
    output, tracking = manifest["outputs"][0], manifest["tracking"]
    column = [c["name"] for c in manifest["inputs"]].index(output["name"])
    quantiles, alpha = output.get("quantiles", ()), 1 - level
    z = NormalDist().inv_cdf((1 + level) / 2)
    spots = [Spot(horizon) for horizon in tracking["horizons"]]
    truths, season = np.asarray(x, np.float64)[:, column], tracking["season_steps"]
    for t, truth in enumerate(truths):
        naive = abs(truth - truths[t - season]) if t >= season else math.nan
        known = [error for _, error in spots[0].pairs]
        for spot in spots:
            low, median, high = spot.issued.get(t, (math.nan,) * 3)
            error = abs(truth - median)
            if not math.isnan(error):
                spot.errors.append(error)
                usual = min(error, 20 * spot.scale) if len(spot.errors) > 50 else error
                spot.scale += max(1 / len(spot.errors), 0.02) * (usual - spot.scale)
                if known:
                    spot.scaled.append(min(usual / np.mean(known), 20))
                if not math.isnan(naive):
                    spot.pairs.append((error, naive))
                if not math.isnan(low):
                    held = low <= truth <= high
                    spot.held.append(held)
                    miss = 0.0 if held else 1.0
                    spot.offset += tracking["rate"] * spot.scale * (miss - alpha)
            first = output["horizons"].index(spot.horizon) * max(1, len(quantiles))
            if quantiles:
                low, median, high = y[t, first : first + 3]
                wide = z / NormalDist().inv_cdf(quantiles[-1])
                below, above = wide * max(median - low, 0), wide * max(high - median, 0)
            else:
                median = y[t, first]
                half = z * math.sqrt(math.pi / 2) * spot.scale if spot.errors else math.nan
                below = above = half
            spot.issued[t + spot.horizon] = (
                median - max(below + spot.offset, 0),
                median,
                median + max(above + spot.offset, 0),
            )
    return spots


def scaled_error(spot: Spot) -> float:
    """The mean absolute scaled error of a horizon, as Hyndman and Koehler define it."""
    errors, naive = zip(*spot.pairs, strict=True)
    return float(np.mean(errors) / np.mean(naive))
