"""What the files of a trained model hold: the keys of `manifest.json`, and the tensors."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from drift import DriftTest
from network import DAILY_HARMONICS, DAY_SECONDS, Fitted
from series import HORIZONS, STEP_INTERVAL_SECONDS, STEPS_PER_WEEK, Series

PROFILE = "profile.demand"
LEVEL = 0.9
RATE = 0.1
"""At 0.05 the intervals a day ahead take too long to widen when the errors grow."""
TRACKED_HORIZONS = (1, 12, 24, 48)
DRIFT = DriftTest(delta=0.4, threshold=2.0, min_rows=336, forget=0.9999)
"""Half as much again as the training weeks come to at their worst; 10% more demand is beyond it."""


def describe(version: str, adapt: Fitted, series: Series) -> dict[str, object]:
    """The keys of `manifest.json`."""
    column = {"name": "demand", "unit": "MW", "mean": 0.0, "scale": adapt.scale}
    column["profile"] = PROFILE
    output: dict[str, object] = {**column, "horizons": list(range(1, HORIZONS + 1))}
    cell = {"kind": "lstm", "hidden_size": adapt.network.cell.hidden_size}
    found: dict[str, object] = {
        "format": "stepstate.model/1",
        "name": "electricity",
        "version": version,
        "description": "Electricity demand of England and Wales, the next 48 half-hours.",
        "cell": {**cell, "num_layers": 1, "proj_size": 0},
        "step_interval_seconds": STEP_INTERVAL_SECONDS,
        "inputs": [column],
        "calendar": [
            {"kind": "fourier", "period_seconds": DAY_SECONDS, "harmonics": DAILY_HARMONICS},
            {"kind": "day_of_week"},
        ],
        "profiles": {PROFILE: {"period_steps": STEPS_PER_WEEK, "origin": f"{series.times[0]}Z"}},
        "outputs": [output],
    }
    network = adapt.network
    if network.lags:
        lag = {"kind": "lag", "input": "demand", "steps": list(network.lags), "into": "head"}
        found |= {"lags": [lag], "fallback": "level", "tracking": tracking()}
        output["quantiles"] = list(network.quantiles)
    return found


def tracking() -> dict[str, object]:
    """What the manifest says of tracking."""
    return {
        "horizons": list(TRACKED_HORIZONS),
        "level": LEVEL,
        "rate": RATE,
        "season_steps": STEPS_PER_WEEK,
        "drift": dataclasses.asdict(DRIFT),
    }


def tensors(adapt: Fitted) -> dict[str, NDArray[np.float32]]:
    """The tensors of `model.safetensors`: the network's and the profile."""
    network = {name: tensor.numpy() for name, tensor in adapt.network.state_dict().items()}
    return {**network, PROFILE: adapt.profile.astype(np.float32)}
