"""Weights with fewer bits: how close they stay, and that a row still depends on itself alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepstate.engine import Precision, measure_loss
from stepstate.engine.cells import build_cell
from stepstate.engine.linear import Bfloat16Linear, Int8Linear, Linear, make_linear
from tests.unit.rig import model_of, timed_network

FEWER_BITS = [Precision.BFLOAT16, Precision.INT8]
PRODUCTS = [Bfloat16Linear, Int8Linear]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(20, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def bias() -> torch.Tensor:
    return torch.linspace(-1, 1, 20)


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("count", [1, 2, 64])
def test_a_product_is_near_the_exact_one(kind, count, weight, bias):
    found, exact = kind(weight, bias)(rows(count)), Linear(weight, bias)(rows(count))
    off = (found - exact).abs().max() / exact.abs().max()
    assert found.dtype is torch.float32
    assert 1e-5 < off < 0.03  # coarser, and no more than that
    out = torch.empty(count, 20)
    kind(weight, bias).into(out, rows(count))
    assert torch.equal(out, found)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_row_does_not_feel_its_batch_mates(kind, weight, bias):
    product, batch = kind(weight, bias), rows(5)
    clean = product(batch)
    batch[3] *= 1e6
    batch[4, 0] = torch.nan
    found = product(batch)
    assert torch.equal(found[:3], clean[:3])
    assert found[4].isnan().all()


def test_rows_and_weights_of_zeros_give_the_bias(bias):
    assert torch.equal(Int8Linear(torch.zeros(20, 12), bias)(rows(3)), bias.expand(3, 20))
    zeros = torch.zeros(2, 12)
    assert torch.equal(Int8Linear(torch.ones(20, 12), bias)(zeros), bias.expand(2, 20))


@pytest.mark.parametrize(("kept", "kind"), list(zip(FEWER_BITS, PRODUCTS, strict=True)))
def test_without_instructions_it_is_float32_with_rounded_weights(
    weight, bias, monkeypatch, kept, kind
):
    set_instructions(monkeypatch, there=True)
    exact = Linear(weight, bias)(rows(2))
    own = make_linear(weight, bias, kept)
    assert type(own) is kind
    set_instructions(monkeypatch, there=False)
    rounded = make_linear(weight, bias, kept)
    assert type(rounded) is Linear
    off = (rounded(rows(2)) - exact).abs().max()
    assert off > 1e-4
    assert (rounded(rows(2)) - own(rows(2))).abs().max() < 0.1


def set_instructions(monkeypatch, *, there: bool) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: there)


@pytest.mark.parametrize("there", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("kept", FEWER_BITS)
@pytest.mark.parametrize("name", ["lstm", "projected", "gru", "tanh", "relu"])
def test_every_cell_takes_them(networks, name, kept, there, monkeypatch):
    set_instructions(monkeypatch, there=there)
    model = model_of(networks[name])
    loss = measure_loss(model, kept)
    assert 1e-6 < loss.mean < loss.largest < 0.5
    assert measure_loss(model, Precision.FLOAT32).largest == 0
    tensors = {
        name.removeprefix("cell."): torch.from_numpy(value)
        for name, value in model.tensors.items()
        if name.startswith("cell.")
    }
    cell = build_cell(model.manifest.cell, model.manifest.network_width, tensors, kept)
    assert cell.step(torch.zeros(1, 3), torch.zeros(1, cell.state_width))[1].isfinite().all()


@pytest.mark.parametrize("kept", FEWER_BITS)
def test_a_loss_is_in_units_of_the_outputs_scale(kept):
    network, profiles = timed_network()
    before = measure_loss(model_of(network, profiles), kept)
    for output in network.manifest["outputs"]:
        output["scale"] = output.get("scale", 1.0) * 10
    after = measure_loss(model_of(network, profiles), kept)
    assert after.largest == pytest.approx(before.largest, rel=0.05)
    assert np.isfinite(after.mean)
