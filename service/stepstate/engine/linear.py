"""W v + b for a batch of rows, in the precision that the weights are kept as.

float32 is computed by MKL, or by oneDNN with packed weights where that is faster. Which one
depends on the processor: with AVX-512, 64 rows of 256 -> 512 took MKL 190 and oneDNN 90
microseconds on an AMD; with AVX2 alone MKL takes two thirds of oneDNN's time at 4 rows and as much
at 256. It is a rule, not a race at start, so that equal machines give equal bytes. The packed
product is the one that torch.compile emits for frozen weights; torch offers it as an operator
only, so where a build lacks it the plain product serves all.

bfloat16 and int8 are coarser and, on some processors, faster. They apply to the cell's products in
steps only; states, gates, head and whole sequences stay in float32. A row's result never depends
on another row: int8 has a scale for each row, where torch's dynamic quantisation has one for the
batch.

B rows of different sessions.
"""

from __future__ import annotations

import enum
from typing import Protocol

import torch
from torch import Tensor

FEW_ROWS = 3
"""From here on the packed product is the faster one, where it is faster at all."""
_TINY = 1e-30


class Precision(enum.Enum):
    """What the cell's weights are kept as."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class LinearKernel(Protocol):
    """W v + b for rows [B, inputs]."""

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, inputs] -> [B, outputs], float32."""
        ...

    def into(self, out: Tensor, rows: Tensor) -> None:
        """The same, written to `out` [B, outputs]."""
        ...


def make_linear(weight: Tensor, bias: Tensor, precision: Precision) -> LinearKernel:
    """The kernel of a weight [outputs, inputs] and a bias [outputs].

    On a processor without instructions for the precision it is float32 with rounded weights:
    torch would compute it ten times as slowly.
    """
    if precision is Precision.FLOAT32:
        return Linear(weight, bias)
    if precision is Precision.BFLOAT16:
        if has_instructions(precision):
            return Bfloat16Linear(weight, bias)
        return Linear(weight.bfloat16().float(), bias)
    if has_instructions(precision):
        return Int8Linear(weight, bias)
    rounded, scales = _rounded(weight)
    return Linear(rounded.float() * scales[:, None], bias)


def has_instructions(precision: Precision) -> bool:
    """Whether this processor multiplies such numbers faster than it does float32."""
    cpu = torch.cpu
    if precision is Precision.BFLOAT16:
        return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()  # noqa: SLF001
    return precision is Precision.FLOAT32 or cpu._is_vnni_supported()  # noqa: SLF001


class Linear:
    """Weights, rows and results in float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._transposed = weight.t().contiguous()
        self._bias = bias.contiguous()
        self._packed = _pack(weight.contiguous())

    def __call__(self, rows: Tensor) -> Tensor:
        """See `LinearKernel`."""
        if self._packed is None or rows.shape[0] < FEW_ROWS:
            return torch.addmm(self._bias, rows, self._transposed)
        return self._by_onednn(rows, self._packed)

    def into(self, out: Tensor, rows: Tensor) -> None:
        """See `LinearKernel`."""
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


class Bfloat16Linear:
    """Weights, rows and results as bfloat16, sums in float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight.bfloat16(), bias.bfloat16()

    def __call__(self, rows: Tensor) -> Tensor:
        """See `LinearKernel`."""
        return self._product(rows).float()

    def into(self, out: Tensor, rows: Tensor) -> None:
        """See `LinearKernel`."""
        out.copy_(self._product(rows))

    def _product(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.linear(rows.bfloat16(), self._weight, self._bias)


class Int8Linear:
    """Weights as int8 with a scale for each output, rows as int8 with a scale for each row."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        rounded, self._scales = _rounded(weight)
        self._transposed = rounded.t().contiguous()
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        """See `LinearKernel`; a row's scale carries its NaN on to the result."""
        scale = _scale(rows)
        product = torch._int_mm((rows / scale).round_().to(torch.int8), self._transposed)  # noqa: SLF001
        return torch.addcmul(self._bias, product * self._scales, scale)

    def into(self, out: Tensor, rows: Tensor) -> None:
        """See `LinearKernel`."""
        out.copy_(self(rows))


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [outputs, inputs] as int8, and the scale [outputs] of each of its rows."""
    scale = _scale(weight)
    return (weight / scale).round_().to(torch.int8), scale[:, 0]


def _scale(rows: Tensor) -> Tensor:
    """What brings each row into -127 … 127, [B, 1]."""
    return rows.abs().amax(dim=1, keepdim=True).clamp_(min=_TINY) / 127
