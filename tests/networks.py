"""Models for tests: real torch.nn networks with random weights, written as model folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stepstate.models import write_model

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}


@dataclass(frozen=True, slots=True)
class Network:
    """A torch network, and what its manifest says."""

    name: str
    module: nn.RNNBase
    head: nn.Linear
    manifest: dict[str, object]
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """Further tensors of its folder: profiles, the head's weights for lagged inputs."""

    def offline(self, x: np.ndarray) -> np.ndarray:
        """y [T, O] of a whole sequence x [T, D] from zero state, by torch.nn in float32."""
        with torch.no_grad():
            h, _ = self.module(torch.from_numpy(np.asarray(x, np.float32))[None])
            return self.head(h)[0].numpy()

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights under their names in a model folder."""
        cell = {f"cell.{name}": value for name, value in self.module.state_dict().items()}
        head = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        return {name: value.numpy() for name, value in (cell | head).items()} | self.extra

    def write(self, root: Path) -> Path:
        """Writes the model under a root folder and returns its own folder."""
        folder = root / self.name / "1"
        write_model(folder, self.manifest, self.tensors())
        return folder


def make_network(
    name: str,
    kind: str = "lstm",
    *,
    inputs: int = 3,
    hidden: int = 16,
    layers: int = 2,
    outputs: int = 2,
    projection: int = 0,
    seed: int = 0,
) -> Network:
    """A network with PyTorch's default random weights; raw units, no calendar."""
    torch.manual_seed(seed)
    options: dict[str, object] = {"batch_first": True}
    if projection:
        options["proj_size"] = projection
    if kind == "rnn_relu":
        options["nonlinearity"] = "relu"
    module = KINDS[kind](inputs, hidden, layers, **options)
    head = nn.Linear(projection or hidden, outputs)
    manifest = {
        "format": "stepstate.model/1",
        "name": name,
        "version": "1",
        "cell": {
            "kind": kind,
            "hidden_size": hidden,
            "num_layers": layers,
            "proj_size": projection,
        },
        "inputs": [{"name": f"x{place}"} for place in range(inputs)],
        "outputs": [{"name": f"y{place}"} for place in range(outputs)],
    }
    return Network(name, module, head, manifest)


def far_back(rows: int = 90_000) -> Network:
    """A model whose sessions keep so many rows of 50 inputs: a snapshot takes 18 MB."""
    network = make_network("far", inputs=51, hidden=2, layers=1)
    del network.manifest["inputs"][50]
    name = network.manifest["inputs"][0]["name"]
    network.manifest["lags"] = [{"kind": "lag", "input": name, "steps": [rows]}]
    return network
