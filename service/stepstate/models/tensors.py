"""The tensors that a model must hold, and whether float32 is precise enough for its columns.

x and y travel as float32. Near v its numbers are about |v| / 2**23 apart. Where that is as much as
the column's scale, x - mean has no digit that a network could use, however exactly it is computed:
the digits were lost when x was sent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepstate.errors import ModelInvalid
from stepstate.models.manifest import (
    MANIFEST,
    CellKind,
    CellSpec,
    InputSpec,
    Manifest,
    OutputSpec,
)

log = logging.getLogger(__name__)

Tensors = Mapping[str, NDArray[np.float32]]

WEIGHTS = "model.safetensors"
GATES = {CellKind.LSTM: 4, CellKind.GRU: 3, CellKind.RNN_TANH: 1, CellKind.RNN_RELU: 1}
"""Blocks of rows stacked in each weight: (i, f, g, o), (r, z, n) or one, as in torch.nn."""
MAX_STEP = 1.0
"""In scales: with steps this long, values a whole scale apart may be the same number."""
COARSE_STEP = 0.01
"""In scales: with longer steps fewer than two digits below the scale are left."""
_MAX_PROBLEMS = 10


def tensor_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor: the cell's as in torch.nn, the head's, the profiles'."""
    shapes = cell_shapes(manifest.cell, manifest.network_width)
    shapes["head.weight"] = (manifest.output_width, manifest.cell.output_size)
    shapes["head.bias"] = (manifest.output_width,)
    if manifest.head_lags:
        shapes["head.lags"] = (manifest.output_width, manifest.head_lags)
    for name, profile in manifest.profiles.items():
        shapes[name] = (profile.period_steps,)
    return shapes


def cell_shapes(cell: CellSpec, input_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the cell's tensors, named as in torch.nn with the prefix "cell."."""
    rows = GATES[cell.kind] * cell.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(cell.num_layers):
        below = input_size if layer == 0 else cell.output_size
        shapes[f"cell.weight_ih_l{layer}"] = (rows, below)
        shapes[f"cell.weight_hh_l{layer}"] = (rows, cell.output_size)
        shapes[f"cell.bias_ih_l{layer}"] = (rows,)
        shapes[f"cell.bias_hh_l{layer}"] = (rows,)
        if cell.proj_size:
            shapes[f"cell.weight_hr_l{layer}"] = (cell.proj_size, cell.hidden_size)
    return shapes


def check_tensors(folder: Path, manifest: Manifest, tensors: Tensors) -> None:
    """Checks the names, shapes, types and values of the weights.

    Raises:
        ModelInvalid: it names the tensor.
    """
    path = str(folder / WEIGHTS)
    shapes = tensor_shapes(manifest)
    missing, extra = sorted(shapes.keys() - tensors), sorted(tensors.keys() - shapes)
    if missing or extra:
        raise ModelInvalid(
            path,
            f"tensors missing: {_listed(missing)}, unknown: {_listed(extra)}; the cell's are named "
            'as in torch.nn with "cell." before, the others head.weight, head.bias, head.lags and '
            "as the profiles",
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ModelInvalid(
                path, f"{name} has shape {list(tensor.shape)}, the manifest asks for {list(shape)}"
            )
        if tensor.dtype != np.float32:
            raise ModelInvalid(path, f"{name} is {tensor.dtype}, expected float32")
        if not np.isfinite(tensor).all():
            raise ModelInvalid(path, f"{name} holds NaN or infinity")


def check_resolution(folder: Path, manifest: Manifest, tensors: Tensors) -> None:
    """Checks that float32 can distinguish the values of every column; logs those with few digits.

    Raises:
        ModelInvalid: it names the columns.
    """
    coarse = [one for one in _resolutions(manifest, tensors) if one.coarse]
    lost = [one for one in coarse if one.lost]
    if lost:
        more = f"; and {len(lost) - _MAX_PROBLEMS} more" if len(lost) > _MAX_PROBLEMS else ""
        raise ModelInvalid(
            str(folder / MANIFEST),
            f"{'; '.join(map(str, lost[:_MAX_PROBLEMS]))}{more}: the digits that the network is to "
            "see are lost before the mean is taken off; train on the difference between two rows "
            "of a counter, or on its distance from a fixed number, and send that",
        )
    for one in coarse[:_MAX_PROBLEMS]:
        log.warning(
            "%s: %s: few digits are left; send the difference between two rows of a counter",
            folder / MANIFEST,
            one,
        )


@dataclass(frozen=True, slots=True)
class _Resolution:
    """A column, its largest level, and the distance of float32's numbers there."""

    key: str
    level: float
    step: float
    scale: float

    @property
    def lost(self) -> bool:
        """Whether values that the network must distinguish are the same number."""
        return not self.step < MAX_STEP * self.scale

    @property
    def coarse(self) -> bool:
        """Whether few digits are left."""
        return not self.step < COARSE_STEP * self.scale

    def __str__(self) -> str:
        return (
            f"{self.key}: values about {self.level:.9g} are {self.step:.3g} apart in float32, as "
            f"which they are sent, and its scale is {self.scale:.3g}"
        )


def _resolutions(manifest: Manifest, tensors: Tensors) -> Iterator[_Resolution]:
    """The resolution of each column of x and y at its largest level, of mean and profile."""
    kinds: list[tuple[str, Sequence[InputSpec | OutputSpec]]] = [
        ("inputs", manifest.inputs),
        ("outputs", manifest.outputs),
    ]
    for kind, columns in kinds:
        for index, column in enumerate(columns):
            level = _largest_level(column, tensors)
            with np.errstate(over="ignore", invalid="ignore"):
                step = float(np.spacing(np.float32(level)))
            key = f"{kind}.{index} ({column.name})"
            yield _Resolution(key, level, step, abs(column.scale))


def _largest_level(column: InputSpec | OutputSpec, tensors: Tensors) -> float:
    profile = np.zeros(1) if column.profile is None else tensors[column.profile].astype(np.float64)
    return float(np.abs(profile + column.mean).max())


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _MAX_PROBLEMS} more" if len(names) > _MAX_PROBLEMS else ""
    return f"{names[:_MAX_PROBLEMS]}{more}"
