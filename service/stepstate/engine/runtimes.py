"""What computes a step of single rows on the host: ONNX Runtime, or torch.

ONNX Runtime takes 0.4 to 0.8 of torch's time (`docs/decisions.md`). It runs single rows in
float32. Everything else is torch's: `inspect`, requests with many rows, rows with missing values,
forecasts, other devices and weights with fewer bits. Both agree to float32's rounding.

B rows of different sessions, D inputs, O outputs, Rc the width of a state.
"""

from __future__ import annotations

import enum
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from stepstate.engine.network import Network, RowHistory
from stepstate.engine.work import Floats
from stepstate.errors import RuntimeUnavailable
from stepstate.models import Model

MAX_GRAPH_BYTES = 2_000_000_000
"""A graph is one message of protobuf, which may have 2 GiB. Larger models are torch's."""


class Runtime(enum.Enum):
    """What computes the steps of single rows."""

    ONNX_RUNTIME = "onnxruntime"
    TORCH = "torch"


class RowStepper(Protocol):
    """A model as a function of single rows, in NumPy's arrays."""

    def step(
        self, x: Floats, phase: NDArray[np.int64], state: Floats, past: RowHistory | None
    ) -> tuple[Floats, Floats]:
        """Applies one raw row to each of B states.

        Args:
            x: [B, D], raw units.
            phase: [B], the steps of the rows in the model's timeline.
            state: [B, Rc].
            past: the rows before; None: the model has no lagged inputs.

        Returns:
            y [B, O] in raw units, and the new states [B, Rc].
        """
        ...


def check_runtime(runtime: Runtime) -> None:
    """Checks that the packages of a runtime are installed.

    Raises:
        RuntimeUnavailable: one is not.
    """
    packages = ("onnx", "onnxruntime") if runtime is Runtime.ONNX_RUNTIME else ()
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise RuntimeUnavailable(runtime.value, " ".join(missing))


def make_stepper(model: Model, network: Network, runtime: Runtime) -> RowStepper:
    """The function of a model's single rows; `network` is the same model."""
    fits = sum(tensor.nbytes for tensor in model.tensors.values()) <= MAX_GRAPH_BYTES
    if runtime is Runtime.ONNX_RUNTIME and fits:
        return OnnxStepper(model, network)
    return TorchStepper(network)


class TorchStepper:
    """`Network.step`."""

    def __init__(self, network: Network) -> None:
        self._network = network

    @torch.inference_mode()
    def step(
        self, x: Floats, phase: NDArray[np.int64], state: Floats, past: RowHistory | None
    ) -> tuple[Floats, Floats]:
        """See `RowStepper`."""
        y, after = self._network.step(
            torch.from_numpy(x), torch.from_numpy(phase), torch.from_numpy(state), past
        )
        return y.numpy(), after.numpy()


class OnnxStepper:
    """The same as a graph in ONNX Runtime; what depends on time or past rows is torch's."""

    def __init__(self, model: Model, network: Network) -> None:
        # Imported here, as a server that steps with torch needs neither.
        import onnxruntime  # noqa: PLC0415

        from stepstate.engine.graph import build_step_graph  # noqa: PLC0415

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        self._network = network
        self._has_side_inputs = network.timed or network.lagged
        self._session = onnxruntime.InferenceSession(
            build_step_graph(model, network), options, providers=["CPUExecutionProvider"]
        )

    def step(
        self, x: Floats, phase: NDArray[np.int64], state: Floats, past: RowHistory | None
    ) -> tuple[Floats, Floats]:
        """See `RowStepper`."""
        given = {"x": x, "state": state}
        if self._has_side_inputs:
            given |= self._side_inputs(x, phase, past)
        y, after = self._session.run(None, given)
        if self._network.has_quantiles:
            self._network.order_quantiles(y)
        return y, after

    @torch.inference_mode()
    def _side_inputs(
        self, x: Floats, phase: NDArray[np.int64], past: RowHistory | None
    ) -> dict[str, Floats]:
        found = self._network.side_inputs(torch.from_numpy(x), torch.from_numpy(phase), past)
        parts = {
            "levels": found.levels,
            "bases": found.bases,
            "columns": found.columns,
            "features": found.features,
        }
        return {name: part.numpy() for name, part in parts.items() if part is not None}
