"""The model of every benchmark: an LSTM 8 → 128 × 2 layers with a linear head 128 → 1.

Its weights are random but always the same; what a step costs does not depend on them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stepstate.models import Manifest, write_model
from stepstate.models.layout import tensor_shapes

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


def write_bench_model(root: Path) -> None:
    """Writes the model into a folder of models, with U(-1/√H, 1/√H) weights as in torch.nn."""
    generator = np.random.default_rng(_SEED)
    bound = HIDDEN**-0.5
    tensors = {
        name: generator.uniform(-bound, bound, shape).astype(np.float32)
        for name, shape in tensor_shapes(Manifest.model_validate(_MANIFEST)).items()
    }
    write_model(root / NAME / "1", _MANIFEST, tensors)
