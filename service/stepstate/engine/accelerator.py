"""Steps on an accelerator, where the cells' states are kept, with CUDA graphs where it has them.

Rule 1: a forward changes no state. `commit` does, for all of its rows at once, so whatever
        raises before it leaves them unchanged.
Rule 2: the row after the last slot is scratch: forwards of fewer rows than their buffers
        have are padded with it.
Rule 3: what a forward does depends on no value that it computes, so that a graph can be
        captured: the device itself keeps the old state where a result is not finite.

B rows of different slots, padded to a power of two; D inputs, O outputs, Rc the width of a state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepstate.engine.arena import Arena, Layout
from stepstate.engine.network import Network
from stepstate.engine.work import Floats
from stepstate.errors import DeviceUnavailable

log = logging.getLogger(__name__)

Run = Callable[[], None]
"""Reads and writes tensors that stay where they are."""
Capture = Callable[[Run, torch.device], Run]
"""Makes one launch of what runs on a device; raises `RuntimeError` where it can't."""

WARM_UP_RUNS = 3
"""As in torch's example: the first runs initialise libraries."""


def check_accelerator(name: str) -> None:
    """Checks that a CUDA device exists.

    Raises:
        DeviceUnavailable: it does not.
    """
    if not torch.cuda.is_available():
        raise DeviceUnavailable(name, "this build of torch, or this machine, has no CUDA")
    count = torch.cuda.device_count()
    if (torch.device(name).index or 0) >= count:
        raise DeviceUnavailable(name, f"the last CUDA device is cuda:{count - 1}")


def capture(run: Run, device: torch.device) -> Run:
    """Captures a CUDA graph of `run`, after a few runs; its replay is one launch.

    After https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: warmed up on a side
    stream, then captured. What `run` allocates stays the graph's. A graph is captured and
    replayed on a stream of the current device, which has to be the device of the tensors.
    """
    current = torch.cuda.current_stream(device)
    # The stream is named, so that it is the current one again if the capture breaks off.
    with torch.cuda.device(device), torch.cuda.stream(current):
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # torch's own is of the first device used
            run()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


class DeviceArena(Arena):
    """An arena whose cells' states are on a device; past rows and tracked parts are on the host.

    Whole states that are read or written are the same bytes as those of an `Arena`.
    """

    def __init__(self, capacity: int, layout: Layout, blank: Floats, device: torch.device) -> None:
        super().__init__(capacity, replace(layout, cell=0), blank[layout.cell :])
        try:
            self.cells = torch.zeros(capacity + 1, layout.cell, device=device)
            """[capacity + 1, Rc]; the last row is scratch."""
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"on {device}: {error}") from error
        self._cell_bytes = 4 * layout.cell

    @property
    def used_bytes(self) -> int:
        """Bytes of their states."""
        return super().used_bytes + self.used * self._cell_bytes

    def claim(self) -> int:
        """Takes a free slot, with a blank state. The caller has checked that one is free."""
        self.cells[self._free[-1]].zero_()  # first: a device may fail, and then none is taken
        return super().claim()

    def gather(self, slots: NDArray[np.int64]) -> Floats:
        """Copies the cells' states [B, Rc] of slots [B]."""
        found: Floats = self.cells.index_select(0, self._at(slots)).cpu().numpy()
        return found

    def scatter(self, slots: NDArray[np.int64], states: Floats) -> None:
        """Writes the cells' states [B, Rc] of different slots [B]."""
        rows = torch.from_numpy(np.array(states, np.float32))  # torch takes none that is read-only
        self.cells.index_copy_(0, self._at(slots), rows.to(self.cells.device))

    def read(self, slots: NDArray[np.int64]) -> Floats:
        """Copies the states [B, R] of slots [B] out, whole."""
        return np.concatenate((self.gather(slots), super().read(slots)), axis=1)

    def write(self, slot: int, state: Floats) -> None:
        """Puts a state [R] into a slot, whole."""
        cell = self.cells.shape[1]
        self.scatter(np.array([slot]), state[None, :cell])
        super().write(slot, state[cell:])

    def _at(self, slots: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(slots).to(self.cells.device)


class DeviceForward:
    """The forward of single rows without missing values, of a model without lagged inputs.

    Args:
        network: the model, on the device.
        cells: the arena's states there [capacity + 1, Rc].
        inputs: D.
        capture: captures a graph of a forward; None: the device has no graphs.
    """

    def __init__(
        self,
        network: Network,
        cells: Tensor,
        *,
        inputs: int,
        capture: Capture | None = None,
    ) -> None:
        self._network = network
        self._cells = cells
        self._inputs = inputs
        self._capture = capture
        self._buckets: dict[int, _Bucket] = {}
        self._last: _Bucket | None = None

    def make_ready(self, rows: int) -> None:
        """Captures the graphs of forwards of up to B rows before their first use."""
        for power in range((rows - 1).bit_length() + 1):
            self._bucket(2**power)

    def step(
        self, slots: NDArray[np.int64], x: Floats, phase: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.bool_] | None]:
        """Computes row x [B, D], raw units, of slots [B] at steps [B]; `commit` applies it.

        Returns:
            y [B, O] in raw units, and for which rows [B] it and the state are finite; None: for
            all. The others' y is NaN.
        """
        bucket = self._last = self._bucket(len(slots))
        with torch.inference_mode():
            y = bucket.step(slots, x, phase)
        finite = ~np.isnan(y[:, 0])  # a row is NaN as a whole or not at all
        return y, None if finite.all() else finite

    def commit(self) -> None:
        """Writes the states after the last `step`, except those of rows that were not finite."""
        assert self._last is not None
        with torch.inference_mode():
            self._last.commit()

    def _bucket(self, rows: int) -> _Bucket:
        size = 1 << (rows - 1).bit_length()
        bucket = self._buckets.get(size)
        if bucket is None:
            bucket = self._buckets[size] = _Bucket(self._network, self._cells, size, self._inputs)
            self._make_graph(bucket)
        return bucket

    def _make_graph(self, bucket: _Bucket) -> None:
        if self._capture is None:
            return
        try:
            with torch.inference_mode():
                bucket.run = self._capture(bucket.forward, self._cells.device)
        except RuntimeError:
            self._capture = None
            log.warning(
                "no CUDA graph can be captured: forwards are launched operator by operator",
                exc_info=True,
            )


class _Bucket:
    """The buffers of forwards of up to `size` rows; their addresses never change."""

    def __init__(self, network: Network, cells: Tensor, size: int, inputs: int) -> None:
        self._network = network
        self._cells = cells
        self._scratch = len(cells) - 1
        pinned = cells.device.type == "cuda"
        # Pinned on the host, so that copies need not wait, and on the device: slots above steps.
        self._sent_places = torch.zeros(2, size, dtype=torch.int64, pin_memory=pinned)
        self._sent_x = torch.zeros(size, inputs, pin_memory=pinned)
        self.places = torch.full((2, size), self._scratch, device=cells.device)
        self.places[1] = 0
        self.x = torch.zeros(size, inputs, device=cells.device)
        self.y = torch.empty(0, device=cells.device)
        self.after = torch.empty(0, device=cells.device)
        self.run: Run = self.forward

    def step(self, slots: NDArray[np.int64], x: Floats, phase: NDArray[np.int64]) -> Floats:
        rows = len(slots)
        places = self._sent_places.numpy()
        places[0, :rows], places[0, rows:] = slots, self._scratch
        places[1, :rows], places[1, rows:] = phase, 0
        self._sent_x.numpy()[:rows] = x
        self.places.copy_(self._sent_places, non_blocking=True)
        self.x.copy_(self._sent_x, non_blocking=True)
        self.run()
        y: Floats = self.y[:rows].to("cpu", copy=True).numpy()  # waits for the device
        return y

    def commit(self) -> None:
        self._cells.index_copy_(0, self.places[0], self.after)

    def forward(self) -> None:
        """Makes new tensors from the buffers; a graph's replay writes those of its capture."""
        slots, phase = self.places
        before = self._cells.index_select(0, slots)
        y, after = self._network.step(self.x, phase, before)
        finite = (y.isfinite().all(dim=1) & after.isfinite().all(dim=1))[:, None]
        # Not `where`: a number in it may become a tensor on the host, which no graph may copy.
        self.y = y.masked_fill(~finite, math.nan)
        self.after = torch.where(finite, after, before)


def place_states(
    network: Network, layout: Layout, blank: Floats, capacity: int, accelerator: str | None
) -> tuple[Arena, DeviceForward | None]:
    """An arena, and the forward on the accelerator, if there is one and the model gains by it.

    Models with lagged inputs stay on the host: most of what they read of a session is its past
    rows, which are on the host.

    Args:
        network: the model on the host.
        layout: the parts of a state.
        blank: the state [R] of a session without rows.
        capacity: slots.
        accelerator: the device as torch names it; None: the host.
    """
    if accelerator is None or network.lagged:
        return Arena(capacity, layout, blank), None
    device = torch.device(accelerator)
    arena = DeviceArena(capacity, layout, blank, device)
    graphs = None
    if device.type == "cuda":
        graphs = capture
        # Not TF32, whose ten bits would move every output.
        torch.backends.cuda.matmul.allow_tf32 = False
    on_device = network.on(device)
    return arena, DeviceForward(on_device, arena.cells, inputs=layout.inputs, capture=graphs)
