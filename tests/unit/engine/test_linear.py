from __future__ import annotations

import pytest
import torch

from stepstate.engine import linear
from stepstate.engine.linear import FEW_ROWS, Linear


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(20, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def bias() -> torch.Tensor:
    return torch.linspace(-1, 1, 20)


@pytest.fixture(autouse=True)
def _wide_vectors(monkeypatch):
    monkeypatch.setattr(linear.torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def assert_right(product: Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    for count in (1, FEW_ROWS - 1, FEW_ROWS, 64):
        rows = torch.randn(count, 12, generator=torch.Generator().manual_seed(count))
        expected = rows.double() @ weight.double().t() + bias.double()
        out = torch.full((count, 20), torch.nan)
        product.into(out, rows)
        assert torch.equal(out, product(rows))
        assert (out - expected).abs().max() <= 1e-5


def test_both_paths_give_the_product(weight, bias):
    product = Linear(weight, bias)
    assert product._packed is not None  # noqa: SLF001 - only its speed shows it
    assert_right(product, weight, bias)


def test_rows_that_are_part_of_wider_ones_do(weight, bias):
    rows = torch.randn(5, 30, generator=torch.Generator().manual_seed(4))[:, 7:19]
    product, out = Linear(weight, bias), torch.empty(5, 20)
    product.into(out, rows)
    assert torch.allclose(out, rows @ weight.t() + bias, atol=1e-5)


@pytest.mark.parametrize("lacks", ["AVX-512", "oneDNN", "the operators", "this weight"])
def test_without_the_packed_path_the_plain_one_serves_all(weight, bias, monkeypatch, lacks):
    if lacks == "AVX-512":
        monkeypatch.setattr(linear.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    elif lacks == "oneDNN":
        monkeypatch.setattr(linear.torch.backends.mkldnn, "is_available", lambda: False)
    else:
        error = AttributeError if lacks == "the operators" else RuntimeError
        monkeypatch.setattr(linear.torch.ops, "mkldnn", Lacking(error))
    product = Linear(weight, bias)
    assert product._packed is None  # noqa: SLF001 - only its speed shows it
    assert_right(product, weight, bias)


class Lacking:
    def __init__(self, error: type[Exception]) -> None:
        self._error = error

    def __getattr__(self, name: str):
        raise self._error(name)


def test_a_weight_that_is_a_transposed_view_is_taken_as_it_reads(weight, bias):
    assert_right(Linear(weight.t().contiguous().t(), bias), weight, bias)
