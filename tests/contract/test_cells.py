"""What every cell promises, whatever its kind."""

from __future__ import annotations

import pytest
import torch

from stepstate.engine.cells import MANY_ROWS, MAX_BUFFERED_ROWS, Cell, build_cell
from stepstate.engine.linear import FEW_ROWS
from tests.networks import Network
from tests.unit.rig import model_of, rows_of

KINDS = ["lstm", "single", "projected", "gru", "tanh", "relu"]
CLOSE = 1e-6
SIZES = (1, 2, FEW_ROWS, MANY_ROWS + 1)


@pytest.fixture(params=KINDS)
def network(request, networks) -> Network:
    return networks[request.param]


@pytest.fixture(params=["AVX2", "AVX512"], autouse=True)
def _capability(request, monkeypatch) -> None:
    """Both ways to make a product: the processor decides which one a server takes."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)


@pytest.fixture
def cell(network) -> Cell:
    model = model_of(network)
    weights = {
        name.removeprefix("cell."): torch.from_numpy(value)
        for name, value in model.tensors.items()
        if name.startswith("cell.")
    }
    return build_cell(model.manifest.cell, model.manifest.network_width, weights)


@pytest.fixture
def x(network) -> torch.Tensor:
    """[B, T, D] of the largest batch."""
    batch = max(SIZES)
    return torch.stack([torch.from_numpy(rows_of(network, 30, seed)) for seed in range(batch)])


def stepped(cell: Cell, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h [B, T, P] and the last state, row by row."""
    rows = []
    for t in range(x.shape[1]):
        h, state = cell.step(x[:, t], state)
        rows.append(h)
    return torch.stack(rows, dim=1), state


def some_state(cell: Cell, batch: int) -> torch.Tensor:
    drawn = torch.randn(batch, cell.state_width, generator=torch.Generator().manual_seed(5))
    return drawn * 0.3


def zeros(cell: Cell, batch: int) -> torch.Tensor:
    return torch.zeros(batch, cell.state_width)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= CLOSE


@pytest.mark.parametrize("batch", SIZES)
def test_stepping_equals_torch_over_the_whole_sequence(cell, network, x, batch):
    h, _ = stepped(cell, x[:batch], zeros(cell, batch))
    with torch.no_grad():
        assert_close(h, network.module(x[:batch])[0])


@pytest.mark.parametrize("batch", SIZES)
def test_the_sequence_kernel_equals_stepping_in_outputs_and_state(cell, x, batch):
    state = some_state(cell, batch)
    whole, after = cell.sequence(x[:batch], state)
    one_by_one, state = stepped(cell, x[:batch], state)
    assert_close(whole, one_by_one)
    assert_close(after, state)


def test_a_sequence_can_be_cut_anywhere(cell, x):
    whole, after = cell.sequence(x, zeros(cell, len(x)))
    first, state = cell.sequence(x[:, :11], zeros(cell, len(x)))
    rest, state = cell.sequence(x[:, 11:], state)
    assert_close(torch.cat((first, rest), dim=1), whole)
    assert_close(state, after)


def test_a_row_does_not_feel_its_batch_mates(cell, x):
    state = some_state(cell, len(x))
    h, after = cell.step(x[:, 0], state)
    for place in range(len(x)):
        alone, alone_after = cell.step(x[place : place + 1, 0], state[place : place + 1])
        assert_close(h[place], alone[0])
        assert_close(after[place], alone_after[0])


def test_nan_in_one_row_stays_in_that_row(cell, x):
    clean, clean_after = cell.step(x[:, 0], zeros(cell, len(x)))
    x[3, 0, 0] = torch.nan
    h, after = cell.step(x[:, 0], zeros(cell, len(x)))
    others = [place for place in range(len(x)) if place != 3]
    assert torch.equal(h[others], clean[others])
    assert torch.equal(after[others], clean_after[others])
    assert not after[3].isfinite().all()


def test_a_step_leaves_its_arguments_alone(cell, x):
    row, state = x[:, 0].clone(), some_state(cell, len(x))
    before = row.clone(), state.clone()
    cell.step(row, state, [])
    cell.sequence(x, state)
    assert torch.equal(row, before[0])
    assert torch.equal(state, before[1])


def test_what_a_step_returned_stays_as_it_is(cell, x):
    trace: list[dict[str, torch.Tensor]] = []
    h, after = cell.step(x[:, 0], zeros(cell, len(x)), trace)
    traced = [part for layer in trace for part in layer.values()]
    before = [part.clone() for part in (h, after, *traced)]
    cell.step(x[:, 1], some_state(cell, len(x)), [])
    for part, copied in zip((h, after, *traced), before, strict=True):
        assert torch.equal(part, copied)


@pytest.mark.parametrize("batch", [MAX_BUFFERED_ROWS, MAX_BUFFERED_ROWS + 1])
def test_a_batch_may_have_any_size(cell, x, batch):
    many = x[:, 0].repeat(batch // len(x) + 1, 1)[:batch]
    h, after = cell.step(many, zeros(cell, batch))
    few, few_after = cell.step(x[:, 0], zeros(cell, len(x)))
    for place in (0, len(x) - 1, batch - 1):
        assert_close(h[place], few[place % len(x)])
        assert_close(after[place], few_after[place % len(x)])


def test_inference_mode_may_come_and_go(cell, x):
    with torch.inference_mode():
        h, _ = cell.step(x[:, 0], zeros(cell, len(x)))
    assert torch.equal(cell.step(x[:, 0], zeros(cell, len(x)))[0], h)


def test_a_trace_has_every_layer_and_changes_no_result(cell, network, x):
    trace: list[dict[str, torch.Tensor]] = []
    with_trace = cell.step(x[:, 0], zeros(cell, len(x)), trace)
    without = cell.step(x[:, 0], zeros(cell, len(x)))
    assert len(trace) == network.module.num_layers
    assert torch.equal(trace[-1]["h"], with_trace[0])
    assert torch.equal(with_trace[0], without[0])
    assert torch.equal(with_trace[1], without[1])


@pytest.mark.parametrize("network", [kind for kind in KINDS if kind != "relu"], indirect=True)
def test_extreme_rows_give_finite_states_of_bounded_cells(cell, network):
    x = torch.full((4, network.module.input_size), 1e30)
    x[1] = -1e30
    _, after = cell.step(x, zeros(cell, 4))
    assert after.isfinite().all()
    assert after.abs().max() <= 1 + CLOSE


def test_the_state_is_as_wide_as_its_layers(cell, network):
    module = network.module
    width = module.proj_size or module.hidden_size
    memory = module.hidden_size if isinstance(module, torch.nn.LSTM) else 0
    assert cell.state_width == module.num_layers * (width + memory)
