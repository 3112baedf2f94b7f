"""The models of the benchmarks: one that steps, and one that forecasts.

All but the forecasts' use an LSTM 8 → 128 × 2 layers with a linear head 128 → 1. Weights are
random but always the same; what a step costs does not depend on them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stepstate.models import Manifest, write_model
from stepstate.models.tensors import tensor_shapes

NAME = "bench"
INPUTS = 8
HIDDEN = 128
LAYERS = 2
DESCRIPTION = f"LSTM {INPUTS}→{HIDDEN}×{LAYERS} layers, linear {HIDDEN}→1, float32"
_SEED = 1

_MANIFEST: dict[str, object] = {
    "format": "stepstate.model/1",
    "name": NAME,
    "version": "1",
    "description": f"{DESCRIPTION}, random weights",
    "cell": {"kind": "lstm", "hidden_size": HIDDEN, "num_layers": LAYERS},
    "inputs": [{"name": f"x{place}"} for place in range(INPUTS)],
    "outputs": [{"name": "y"}],
}


FORECASTING_NAME = "bench-forecasting"
HORIZONS = 48
FORECASTING_DESCRIPTION = (
    f"LSTM 1→{HIDDEN}, linear {HIDDEN}→{HORIZONS} horizons × 3 quantiles, float32, tracked at 1, "
    "12, 24 and 48"
)
_FORECASTING: dict[str, object] = {
    "format": "stepstate.model/1",
    "name": FORECASTING_NAME,
    "version": "1",
    "description": f"{FORECASTING_DESCRIPTION}, random weights",
    "cell": {"kind": "lstm", "hidden_size": HIDDEN, "num_layers": 1},
    "inputs": [{"name": "x"}],
    "outputs": [
        {
            "name": "x",
            "horizons": list(range(1, HORIZONS + 1)),
            "quantiles": [0.05, 0.5, 0.95],
        }
    ],
    "tracking": {"horizons": [1, 12, 24, 48]},
}


def write_bench_model(root: Path, *, forecasting: bool = False) -> None:
    """Writes the model that steps, or the one that forecasts, into a folder.

    A server keeps room for every model that it loads. Weights are U(-1/√H, 1/√H), as in torch.nn.
    """
    manifest = _FORECASTING if forecasting else _MANIFEST
    generator = np.random.default_rng(_SEED)
    bound = HIDDEN**-0.5
    tensors = {
        name: generator.uniform(-bound, bound, shape).astype(np.float32)
        for name, shape in tensor_shapes(Manifest.model_validate(manifest)).items()
    }
    write_model(root / str(manifest["name"]) / "1", manifest, tensors)
