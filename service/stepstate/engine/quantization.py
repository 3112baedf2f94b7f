"""What weights with fewer bits change in a model's outputs, on rows that are always the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stepstate.engine.bare import BareForward
from stepstate.engine.precision import Precision
from stepstate.models import Model

_SEQUENCES = 8
_ROWS = 400
_SEED = 1


@dataclass(frozen=True, slots=True)
class QuantizationError:
    """|dy| against float32, in units of the outputs' `scale` in the manifest."""

    largest: float
    mean: float


def measure_loss(model: Model, precision: Precision) -> QuantizationError:
    """Steps 8 sequences of 400 rows, level plus normal noise, with both weights from zero state."""
    forwards = [BareForward(model, _SEQUENCES, kept) for kept in (Precision.FLOAT32, precision)]
    noise = np.random.default_rng(_SEED).normal(
        size=(_ROWS, _SEQUENCES, model.manifest.input_width)
    ) * [column.scale for column in model.manifest.inputs]
    x = (forwards[0].levels(_ROWS)[:, None] + noise).astype(np.float32)
    y, rounded = (_outputs(forward, x) for forward in forwards)
    scales = [output.scale for output in model.manifest.outputs for _ in range(output.width)]
    difference = np.abs((rounded - y) / np.abs(scales))
    return QuantizationError(float(difference.max()), float(difference.mean()))


def _outputs(forward: BareForward, x: np.ndarray) -> np.ndarray:
    """y [T, N, O] of rows x [T, N, D] in N sessions."""
    slots = np.arange(_SEQUENCES)
    return np.stack([forward.step(slots, row, t) for t, row in enumerate(x)])
