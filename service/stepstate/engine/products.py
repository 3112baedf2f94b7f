"""W v + b for a batch of rows: by MKL for a few rows, by oneDNN with packed weights for more.

Measured, 256 -> 512, one thread of an AMD EPYC, microseconds: 1 row 7 (MKL)
against 18 (oneDNN), 16 rows 60 against 32, 64 rows 190 against 90. The packed
product is the one that torch.compile emits for frozen weights; torch offers it
as an operator only, so where a build lacks it the plain product serves all.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW_ROWS = 3
"""From here on the packed product is the faster one."""


class Product:
    """One matrix [outputs, inputs] with its bias [outputs], ready for any number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._transposed = weight.t().contiguous()
        self._bias = bias.contiguous()
        self._packed = _pack(weight.contiguous())

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, inputs] -> [B, outputs]."""
        if self._packed is None or len(rows) < FEW_ROWS:
            return torch.addmm(self._bias, rows, self._transposed)
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(  # noqa: SLF001
            rows, self._packed, self._bias, "none", [], ""
        )
        return product


def _pack(weight: Tensor) -> Tensor | None:
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001
    except (AttributeError, RuntimeError):  # a build of torch without these operators
        return None
    return packed
