"""Weights with fewer bits, as an option: products that are coarser and, on some processors, faster.

Only the cell's products in steps are meant; states, gates, head and whole sequences stay in
float32. A row's result depends on no other row in any of them: int8 has a scale for each row,
where torch's dynamic quantisation has one for the batch. B rows of different sessions.
"""

from __future__ import annotations

import enum
from typing import Protocol

import torch
from torch import Tensor

from stepstate.engine.linear import Linear

_TINY = 1e-30


class Precision(enum.Enum):
    """What the cell's weights are kept as."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class LinearKernel(Protocol):
    """W v + b for rows [B, inputs]."""

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, inputs] -> [B, outputs]."""
        ...

    def into(self, out: Tensor, rows: Tensor) -> None:
        """The same, written to `out` [B, outputs]."""
        ...


def make_product(weight: Tensor, bias: Tensor, precision: Precision) -> LinearKernel:
    """The product of a weight [outputs, inputs] and a bias [outputs].

    Without instructions for it in the processor it is float32 with rounded weights: torch
    would compute it ten times as slowly.
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


class Bfloat16Linear:
    """Weights, rows and results as bfloat16, sums in float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight.bfloat16(), bias.bfloat16()

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, inputs] -> [B, outputs], float32."""
        return self._product(rows).float()

    def into(self, out: Tensor, rows: Tensor) -> None:
        """The same, written to `out` [B, outputs]."""
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
        """[B, inputs] -> [B, outputs], float32; a row's scale carries its NaN on to the result."""
        scale = _scale(rows)
        product = torch._int_mm((rows / scale).round_().to(torch.int8), self._transposed)  # noqa: SLF001
        return torch.addcmul(self._bias, product * self._scales, scale)

    def into(self, out: Tensor, rows: Tensor) -> None:
        """The same, written to `out` [B, outputs]."""
        out.copy_(self(rows))


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [outputs, inputs] as int8, and the scale [outputs] of each of its rows."""
    scale = _scale(weight)
    return (weight / scale).round_().to(torch.int8), scale[:, 0]


def _scale(rows: Tensor) -> Tensor:
    """What brings each row into -127 … 127, [B, 1]."""
    return rows.abs().amax(dim=1, keepdim=True).clamp_(min=_TINY) / 127
