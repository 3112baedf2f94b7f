"""The tensors that a model must hold: their names and shapes, in PyTorch's order of gates."""

from __future__ import annotations

from stepstate.models.manifest import CellKind, CellSpec, Manifest

GATES = {CellKind.LSTM: 4, CellKind.GRU: 3, CellKind.RNN_TANH: 1, CellKind.RNN_RELU: 1}
"""Stacked blocks of rows in each weight: (i, f, g, o), (r, z, n) or one, as in torch.nn."""


def tensor_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, by name: the cell's as in torch.nn, the head's, the profiles'."""
    shapes = cell_shapes(manifest.cell, manifest.network_width)
    shapes["head.weight"] = (manifest.output_width, manifest.cell.output_size)
    shapes["head.bias"] = (manifest.output_width,)
    if manifest.head_lags:
        shapes["head.lags"] = (manifest.output_width, manifest.head_lags)
    for name, profile in manifest.profiles.items():
        shapes[name] = (profile.period_steps,)
    return shapes


def cell_shapes(cell: CellSpec, input_size: int) -> dict[str, tuple[int, ...]]:
    """The cell's tensors, named as in torch.nn.LSTM, GRU and RNN with the prefix "cell."."""
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
