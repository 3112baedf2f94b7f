"""The bare forward: what a step costs before any queue, session or transport is added.

`python -m benchmarks.forward [MODEL_FOLDER] [--device cuda]` prints it by batch size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.bare import BareForward
from benchmarks.models import NAME, write_bench_model
from benchmarks.report import this_machine
from stepstate.engine import check_accelerator, use_one_thread
from stepstate.errors import DeviceUnavailable
from stepstate.models import Model, load_model

SPREAD = 16
"""Slots for each row of a batch: not all sessions of a server are in the CPU's cache."""
SEED = 1
_SIZES = (1, 4, 16, 64, 256)
_SIZES_THERE = (*_SIZES, 1_024, 4_096, 16_384, 65_536)
"""On an accelerator, which needs large batches."""


@dataclass(frozen=True, slots=True)
class ForwardRate:
    """How fast forwards of one size ran."""

    rows: int
    steps_per_second: float
    cpu_us_per_step: float
    """Of this process, in user and kernel mode."""
    p99_seconds: float
    """One forward in a hundred took longer."""


def bare_forward(
    model: Path | Model, rows: int, seconds: float, accelerator: str | None = None
) -> ForwardRate:
    """Runs forwards (gather, cell, scatter) one after the other, in one thread of this process.

    Args:
        model: a model, or the folder of one.
        rows: sessions stepped together, B.
        seconds: for how long; a fifth as much goes before it, to warm up.
        accelerator: where states are and steps run, as torch names it; None: the host.
    """
    use_one_thread()
    loaded = load_model(model) if isinstance(model, Path) else model
    forward = BareForward(loaded, rows * SPREAD, accelerator=accelerator)
    random = np.random.default_rng(SEED)
    slots = random.permutation(rows * SPREAD).reshape(SPREAD, rows)
    scales = [column.scale for column in loaded.manifest.inputs]
    noise = random.normal(size=(rows, len(scales))) * scales
    x = (forward.levels(1) + noise).astype(np.float32)
    _run(forward, slots, x, seconds / 5)
    started, used = time.perf_counter(), time.process_time()
    took = _run(forward, slots, x, seconds)
    used, taken = time.process_time() - used, time.perf_counter() - started
    steps = rows * len(took)
    return ForwardRate(rows, steps / taken, used / steps * 1e6, float(np.percentile(took, 99)))


def _run(forward: BareForward, slots: np.ndarray, x: np.ndarray, seconds: float) -> list[float]:
    """The seconds of each forward within the time; each one takes the next slots of [G, B]."""
    took: list[float] = []
    now = time.perf_counter()
    end = now + seconds
    while now < end or not took:
        before, count = now, len(took)
        forward.step(slots[count % len(slots)], x, count // len(slots))
        now = time.perf_counter()
        took.append(now - before)
    return took


def main(arguments: Sequence[str] = ()) -> None:
    """Prints the bare forward of a model, or of the benchmarks' own, by batch size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="of a model; without: the benchmarks' own"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    asked = parser.parse_args(arguments)
    accelerator = None if asked.device == "cpu" else asked.device
    if accelerator is not None:
        try:
            check_accelerator(accelerator)
        except DeviceUnavailable as error:
            parser.error(str(error))
    print(f"{this_machine()}; on {asked.device}")
    model = model_in(asked.folder)
    print(f"{model.manifest.description or model.key}\nrows  steps/s  CPU us a step  p99 ms")
    for rows in _SIZES if accelerator is None else _SIZES_THERE:
        found = bare_forward(model, rows, 1.0, accelerator)
        rate, cpu = f"{found.steps_per_second:,.0f}", f"{found.cpu_us_per_step:.2f}"
        print(f"{rows:6}  {rate:>11}  {cpu:>8}  {1e3 * found.p99_seconds:.2f}")


def model_in(folder: Path | None) -> Model:
    """The model in a folder; without one, the benchmarks' own."""
    if folder is not None:
        return load_model(folder)
    with TemporaryDirectory() as own:
        write_bench_model(Path(own))
        return load_model(Path(own) / NAME / "1")


if __name__ == "__main__":
    main(sys.argv[1:])
