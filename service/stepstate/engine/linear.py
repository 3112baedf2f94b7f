"""W v + b for a batch of rows: by MKL, or by oneDNN with packed weights where that is faster.

Which one it is depends on the processor. With AVX-512, 64 rows of 256 -> 512 took MKL 190 and
oneDNN 90 microseconds on an AMD; with AVX2 alone MKL takes two thirds of oneDNN's time at 4 rows
and as much at 256. It is a rule, not a race at start, so that equal machines give equal bytes.
The packed product is the one that torch.compile emits for frozen weights; torch offers it as an
operator only, so where a build lacks it the plain product serves all.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW_ROWS = 3
"""From here on the packed product is the faster one, where it is faster at all."""


class Linear:
    """One matrix [outputs, inputs] with its bias [outputs], ready for any number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._transposed = weight.t().contiguous()
        self._bias = bias.contiguous()
        self._packed = _pack(weight.contiguous())

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, inputs] -> [B, outputs]."""
        if self._packed is None or rows.shape[0] < FEW_ROWS:
            return torch.addmm(self._bias, rows, self._transposed)
        return self._by_onednn(rows, self._packed)

    def into(self, out: Tensor, rows: Tensor) -> None:
        """The same, written to `out` [B, outputs]."""
        if self._packed is None or rows.shape[0] < FEW_ROWS:
            torch.addmm(self._bias, rows, self._transposed, out=out)
        else:
            out.copy_(self._by_onednn(rows, self._packed))

    def _by_onednn(self, rows: Tensor, packed: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(  # noqa: SLF001
            rows, packed, self._bias, "none", [], ""
        )
        return product


def _pack(weight: Tensor) -> Tensor | None:
    """The weight as oneDNN wants it; None where MKL is the faster one, or there is no oneDNN."""
    if weight.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001
    except (AttributeError, RuntimeError):  # a build of torch without these operators
        return None
    return packed
