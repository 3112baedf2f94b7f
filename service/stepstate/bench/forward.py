"""The bare forward: what a step costs before any queue, session or transport is added.

`python -m stepstate.bench.forward [MODEL_FOLDER]` prints it by batch size.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from stepstate.bench.machine import this_machine
from stepstate.bench.model import NAME, write_bench_model
from stepstate.engine import BareForward, use_one_thread
from stepstate.models import Model, build_timeline, load_model

_SPREAD = 16
"""Slots are taken from so many times the rows: a server's sessions are not all in the cache."""
_SEED = 1


@dataclass(frozen=True, slots=True)
class ForwardRate:
    """How fast forwards of one size ran."""

    rows: int
    steps_per_second: float
    cpu_us_per_step: float
    """Of this process, in user and kernel mode."""


def bare_forward(model: Path | Model, rows: int, seconds: float) -> ForwardRate:
    """Runs forwards (gather, cell, scatter) one after the other, in one thread of this process.

    Args:
        model: a model, or the folder of one.
        rows: sessions stepped together, B.
        seconds: for how long; a fifth as much goes before it, to warm up.
    """
    use_one_thread()
    loaded = load_model(model) if isinstance(model, Path) else model
    forward = BareForward(loaded, rows * _SPREAD)
    random = np.random.default_rng(_SEED)
    slots = random.permutation(rows * _SPREAD).reshape(_SPREAD, rows)
    scales = [column.scale for column in loaded.manifest.inputs]
    noise = random.normal(size=(rows, len(scales))) * scales
    x = (build_timeline(loaded).levels[0] + noise).astype(np.float32)
    _run(forward, slots, x, seconds / 5)
    started, used = time.perf_counter(), time.process_time()
    steps = rows * _run(forward, slots, x, seconds)
    used, taken = time.process_time() - used, time.perf_counter() - started
    return ForwardRate(rows, steps / taken, used / steps * 1e6)


def _run(forward: BareForward, slots: np.ndarray, x: np.ndarray, seconds: float) -> int:
    """The forwards that fit into so many seconds, each with the next group of slots [G, B]."""
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        forward.step(slots[count % len(slots)], x, count // len(slots))
        count += 1
    return count


def main(folder: str | None = None) -> None:
    """Prints the bare forward of a model, or of the benchmarks' own, by batch size."""
    print(this_machine())
    with TemporaryDirectory() as own:
        if folder is None:
            write_bench_model(Path(own))
        model = load_model(Path(own) / NAME / "1" if folder is None else Path(folder))
    print(f"{model.manifest.description or model.key}\nrows  steps/s  CPU us a step")
    for rows in (1, 4, 16, 64, 256):
        found = bare_forward(model, rows, 1.0)
        print(f"{rows:4}  {found.steps_per_second:7,.0f}  {found.cpu_us_per_step:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
