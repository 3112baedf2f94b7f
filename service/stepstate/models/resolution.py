"""Whether float32, as which x and y travel, can tell a column's values apart.

Near v two neighbours in float32 lie about |v| / 2**23 apart. Where that is as much as the column's
scale, x - mean holds no digit that a network could use, however exactly it is computed: they were
lost when x was sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepstate.models.manifest import InputSpec, Manifest, OutputSpec

MAX_STEP = 1.0
"""In scales: with such steps, or longer ones, values a whole scale apart may be the same."""
COARSE_STEP = 0.01
"""In scales: with longer ones fewer than two digits below the scale are left."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """A column, its largest level, and how far apart float32's numbers are there."""

    key: str
    level: float
    step: float
    scale: float

    @property
    def lost(self) -> bool:
        """Whether values that the network is to tell apart are the same number."""
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


def resolutions(
    manifest: Manifest, tensors: Mapping[str, NDArray[np.float32]]
) -> Iterator[Resolution]:
    """How finely float32 holds each column of x and y about its level, mean and profile."""
    kinds: list[tuple[str, Sequence[InputSpec | OutputSpec]]] = [
        ("inputs", manifest.inputs),
        ("outputs", manifest.outputs),
    ]
    for kind, columns in kinds:
        for place, column in enumerate(columns):
            level = _largest_level(column, tensors)
            with np.errstate(over="ignore", invalid="ignore"):
                step = float(np.spacing(np.float32(level)))
            key = f"{kind}.{place} ({column.name})"
            yield Resolution(key, level, step, abs(column.scale))


def _largest_level(
    column: InputSpec | OutputSpec, tensors: Mapping[str, NDArray[np.float32]]
) -> float:
    profile = np.zeros(1) if column.profile is None else tensors[column.profile].astype(np.float64)
    return float(np.abs(profile + column.mean).max())
