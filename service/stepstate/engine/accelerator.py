"""States of the cells on an accelerator, and the forward there: one CUDA graph for each bucket.

The host keeps what is bookkept there: past rows and what is tracked. The cells' states are in one
tensor on the device, with a scratch row behind those of the slots. A micro-batch is filled up with
it to the next power of two, its bucket, and a graph that was captured for the bucket gathers,
steps, looks for values that are not finite and scatters, without a word from the host between
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). On a device that is no CUDA
device the same is run operator by operator: so the tests run it on the CPU.

B rows of different slots, D inputs, O outputs, Rc the width of a cell's state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepstate.engine.arena import Arena
from stepstate.engine.layout import Layout
from stepstate.engine.network import Network
from stepstate.engine.work import Floats

log = logging.getLogger(__name__)


@dataclass(eq=False)
class NoAccelerator(Exception):
    """A device that the server was told to use is not there."""

    device: str
    detail: str

    def __str__(self) -> str:
        return (
            f"--device {self.device}: {self.detail}; check `python -c 'import torch; "
            "print(torch.cuda.is_available())'`, or leave the option out to run on the CPU"
        )


def check_accelerator(name: str) -> None:
    """Makes sure that a CUDA device is there.

    Raises:
        NoAccelerator: it is not.
    """
    if not torch.cuda.is_available():
        raise NoAccelerator(name, "this build of torch, or this machine, has no CUDA")
    count = torch.cuda.device_count()
    if (torch.device(name).index or 0) >= count:
        raise NoAccelerator(name, f"there are {count} CUDA devices, counted from 0")


class DeviceArena(Arena):
    """An arena whose cells' states are on a device; the other parts are the host's.

    Args:
        capacity, layout, blank: as for `Arena`.
        device: where.
    """

    def __init__(self, capacity: int, layout: Layout, blank: Floats, device: torch.device) -> None:
        super().__init__(capacity, layout, blank)
        self._cell_width = layout.cell
        self.device_cells = torch.zeros(capacity + 1, layout.cell, device=device)
        """[capacity + 1, Rc]; the last row is scratch."""

    def claim(self) -> int:
        """See `Arena.claim`."""
        slot = super().claim()
        self._put(slot, self._blank)
        return slot

    def gather(self, slots: NDArray[np.int64]) -> Floats:
        """See `Arena.gather`."""
        states: Floats = self.device_cells[self._index(slots)].cpu().numpy()
        return states

    def scatter(self, slots: NDArray[np.int64], states: Floats) -> None:
        """See `Arena.scatter`."""
        device = self.device_cells.device
        self.device_cells[self._index(slots)] = torch.from_numpy(states).to(device)

    def read(self, slots: NDArray[np.int64]) -> Floats:
        """See `Arena.read`."""
        rows = super().read(slots)
        rows[:, : self._cell_width] = self.gather(slots)
        return rows

    def write(self, slot: int, state: Floats) -> None:
        """See `Arena.write`."""
        super().write(slot, state)
        self._put(slot, state)

    def _put(self, slot: int, state: Floats) -> None:
        self.device_cells[slot] = torch.from_numpy(state[: self._cell_width].copy())

    def _index(self, slots: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(slots).to(self.device_cells.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Bucket:
    """The inputs and outputs of a forward of so many rows, always in the same place."""

    slots: Tensor
    x: Tensor
    phase: Tensor
    y: Tensor
    fine: Tensor
    run: Callable[[], None]


class DeviceForward:
    """Steps micro-batches of a model that needs nothing of the host between gather and scatter.

    Args:
        network: on the device, without branches on what it computes.
        cells: [capacity + 1, Rc], the last row scratch.
        inputs: D.
        outputs: O.
    """

    def __init__(self, network: Network, cells: Tensor, *, inputs: int, outputs: int) -> None:
        self._network = network
        self._cells = cells
        self._inputs = inputs
        self._outputs = outputs
        self._buckets: dict[int, _Bucket] = {}
        self._captures = cells.is_cuda

    def __call__(
        self, slots: NDArray[np.int64], x: Floats, phase: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.bool_] | None]:
        """Steps rows x [B, D]; returns y [B, O] and which rows are fine [B], None: all.

        The states of rows that are not fine are as they were, and their y is NaN.
        """
        count = len(slots)
        size = 1 << (count - 1).bit_length()
        bucket = self._buckets.get(size)
        if bucket is None:
            bucket = self._buckets[size] = self._make(size)
        bucket.slots[:count] = torch.from_numpy(slots)
        bucket.slots[count:] = len(self._cells) - 1
        bucket.x[:count] = torch.from_numpy(x)
        bucket.x[count:] = 0
        bucket.phase[:count] = torch.from_numpy(phase)
        bucket.phase[count:] = 0
        bucket.run()
        y = bucket.y[:count].cpu().numpy().copy()
        fine = bucket.fine[:count].cpu().numpy().copy()
        return y, None if fine.all() else fine

    def _make(self, size: int) -> _Bucket:
        device = self._cells.device
        bucket = _Bucket(
            slots=torch.full((size,), len(self._cells) - 1, dtype=torch.int64, device=device),
            x=torch.zeros(size, self._inputs, device=device),
            phase=torch.zeros(size, dtype=torch.int64, device=device),
            y=torch.zeros(size, self._outputs, device=device),
            fine=torch.zeros(size, dtype=torch.bool, device=device),
            run=lambda: self._step(bucket),
        )
        if not self._captures:
            return bucket
        try:
            return self._captured(bucket)
        except RuntimeError:
            log.exception("no CUDA graph can be captured: forwards run operator by operator")
            self._captures = False
            return bucket

    def _captured(self, bucket: _Bucket) -> _Bucket:
        """The same with a graph; what it steps meanwhile is the scratch row."""
        stream = torch.cuda.Stream(self._cells.device)
        stream.wait_stream(torch.cuda.current_stream(self._cells.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries make themselves ready in their first calls
                self._step(bucket)
        torch.cuda.current_stream(self._cells.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(bucket)
        return _Bucket(
            bucket.slots, bucket.x, bucket.phase, bucket.y, bucket.fine, run=graph.replay
        )

    def _step(self, bucket: _Bucket) -> None:
        before = self._cells.index_select(0, bucket.slots)
        y, after = self._network.step(bucket.x, bucket.phase, before)
        torch.logical_and(y.isfinite().all(dim=1), after.isfinite().all(dim=1), out=bucket.fine)
        fine = bucket.fine[:, None]
        self._cells.index_copy_(0, bucket.slots, torch.where(fine, after, before))
        bucket.y.copy_(torch.where(fine, y, math.nan))
