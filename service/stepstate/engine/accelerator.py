"""Which accelerator there is, and CUDA graphs on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[], None]
"""Reads and writes tensors that stay where they are."""

WARM_UP_RUNS = 3
"""As in torch's example: in the first ones libraries make themselves ready."""


@dataclass(eq=False)
class DeviceUnavailable(Exception):
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
        DeviceUnavailable: it is not.
    """
    if not torch.cuda.is_available():
        raise DeviceUnavailable(name, "this build of torch, or this machine, has no CUDA")
    count = torch.cuda.device_count()
    if (torch.device(name).index or 0) >= count:
        raise DeviceUnavailable(name, f"the last CUDA device is cuda:{count - 1}")


def capture(run: Run, device: torch.device) -> Run:
    """A CUDA graph of `run`, which is run a few times for it: its replay is one launch.

    After https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: warmed up on a side
    stream, then captured. What `run` allocates stays the graph's. A graph captures, and is
    replayed on, a stream of the current device, which has to be the tensors' own.
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
