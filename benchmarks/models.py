"""The models of the benchmarks: one that steps, others beside it, and one that forecasts.

All but those that say otherwise are an LSTM 8 → 128 × 2 layers with a linear head 128 → 1. Weights
are random but always the same; what a step costs does not depend on them.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np

from stepstate.models import Manifest, write_model
from stepstate.models.tensors import tensor_shapes

NAME = "bench"
INPUTS = 8
HIDDEN = 128
LAYERS = 2
DESCRIPTION = f"LSTM {INPUTS}→{HIDDEN}×{LAYERS} layers, linear {HIDDEN}→1, float32"
FORECASTING_NAME = "bench-forecasting"
HORIZONS = 48
FORECASTING_DESCRIPTION = (
    f"LSTM 1→{HIDDEN}, linear {HIDDEN}→{HORIZONS} horizons × 3 quantiles, float32, tracked at 1, "
    "12, 24 and 48"
)
VARIANTS = MappingProxyType(
    {
        "bench-gru": "GRU",
        "bench-deep": "12 layers",
        "bench-lags": "8 lags",
        "bench-tracked": "24 horizons, tracked",
    }
)
"""Models that take the same rows as the one that steps, and what is different about them."""
_SEED = 1


def _cell(kind: str, layers: int) -> dict[str, object]:
    return {"kind": kind, "hidden_size": HIDDEN, "num_layers": layers}


def _forecasts(name: str, horizons: int) -> dict[str, object]:
    quantiles = [0.05, 0.5, 0.95]
    return {"name": name, "horizons": list(range(1, horizons + 1)), "quantiles": quantiles}


_STEPPING: dict[str, object] = {
    "format": "stepstate.model/1",
    "version": "1",
    "cell": _cell("lstm", LAYERS),
    "inputs": [{"name": f"x{place}"} for place in range(INPUTS)],
    "outputs": [{"name": "y"}],
}
_DIFFERENCES: dict[str, dict[str, object]] = {
    NAME: {"description": f"{DESCRIPTION}, random weights"},
    "bench-gru": {"cell": _cell("gru", LAYERS)},
    "bench-deep": {"cell": _cell("lstm", 12)},
    "bench-lags": {"lags": [{"kind": "lag", "input": "x0", "steps": list(range(1, 9))}]},
    "bench-tracked": {"outputs": [_forecasts("x0", 24)], "tracking": {"horizons": [1, 24]}},
    FORECASTING_NAME: {
        "description": f"{FORECASTING_DESCRIPTION}, random weights",
        "cell": _cell("lstm", 1),
        "inputs": [{"name": "x"}],
        "outputs": [_forecasts("x", HORIZONS)],
        "tracking": {"horizons": [1, 12, 24, 48]},
    },
}


def write_bench_model(root: Path, name: str = NAME) -> None:
    """Writes one of the models into a folder.

    A server keeps room for every model that it loads. Weights are U(-1/√H, 1/√H), as in torch.nn.
    """
    manifest = _STEPPING | _DIFFERENCES[name] | {"name": name}
    generator = np.random.default_rng(_SEED)
    bound = HIDDEN**-0.5
    tensors = {
        tensor: generator.uniform(-bound, bound, shape).astype(np.float32)
        for tensor, shape in tensor_shapes(Manifest.model_validate(manifest)).items()
    }
    write_model(root / name / "1", manifest, tensors)
