"""What computes a step of single rows on the host: ONNX Runtime, or torch.

ONNX Runtime takes 0.4 to 0.8 of torch's time (`docs/decisions.md`). It runs single rows in
float32. Everything else is torch's: `inspect`, requests with many rows, rows with missing values,
forecasts, other devices and weights with fewer bits. Both agree to float32's rounding.

B rows of different sessions, D inputs, O outputs, Rc the width of a state.
"""

from __future__ import annotations

import enum
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from stepstate.engine.network import Network, RowHistory
from stepstate.engine.work import Floats
from stepstate.errors import RuntimeUnavailable
from stepstate.models import Model

MAX_GRAPH_BYTES = 2_000_000_000
"""A graph is one message of protobuf, which may have 2 GiB. Larger models are torch's."""

MAX_BOUND_ROWS = 256
"""Larger batches get new arrays each time: there they cost next to nothing."""


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
            y [B, O] in raw units, and the new states [B, Rc], which the next step may overwrite.
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
        sizes = model.manifest.input_width, network.state_width, model.manifest.output_width
        self._buffers = [
            np.empty((MAX_BOUND_ROWS, size), np.float32) for size in (*sizes, network.state_width)
        ]
        """x, states, y and the states after."""
        self._bound: dict[int, BoundRun] = {}

    def step(
        self, x: Floats, phase: NDArray[np.int64], state: Floats, past: RowHistory | None
    ) -> tuple[Floats, Floats]:
        """See `RowStepper`."""
        if self._has_side_inputs or len(x) > MAX_BOUND_ROWS:
            given = {"x": x, "state": state}
            if self._has_side_inputs:
                given |= self._side_inputs(x, phase, past)
            y, after = self._session.run(None, given)
        else:
            y, after = self._bound_run(len(x)).step(x, state)
        if self._network.has_quantiles:
            self._network.order_quantiles(y)
        return y, after

    def _bound_run(self, rows: int) -> BoundRun:
        run = self._bound.get(rows)
        if run is None:
            parts = [buffer[:rows] for buffer in self._buffers]
            run = self._bound[rows] = BoundRun(self._session, *parts)
        return run

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


class BoundRun:
    """A run of B rows between buffers that are bound once.

    It takes 6 microseconds less than a run with arrays of its own: a sixth, for a lone row.
    """

    def __init__(self, session: Any, x: Floats, state: Floats, y: Floats, after: Floats) -> None:
        self._session = session
        self._x, self._state, self._y, self._after = x, state, y, after
        self._binding = session.io_binding()
        self._binding.bind_cpu_input("x", x)
        self._binding.bind_cpu_input("state", state)
        for output, rows in zip(session.get_outputs(), (y, after), strict=True):
            place = rows.ctypes.data
            self._binding.bind_output(output.name, "cpu", 0, np.float32, rows.shape, place)

    def step(self, x: Floats, state: Floats) -> tuple[Floats, Floats]:
        """y [B, O] of rows x [B, D], and the states after them, which the next run overwrites."""
        self._x[:] = x
        self._state[:] = state
        self._session.run_with_iobinding(self._binding)
        return self._y.copy(), self._after
