"""What a step costs by each engine, beside its matrix products alone.

`python -m benchmarks.engines [MODEL_FOLDER]` prints microseconds of CPU time by batch size, each
the least of several rounds in turn. `forward` is the step by onnxruntime with states that are
gathered from many sessions, not all of them in the CPU's cache, and scattered.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.bare import BareForward, BareProducts
from benchmarks.forward import SEED, SPREAD, model_in
from benchmarks.report import this_machine
from stepstate.engine import Runtime, use_one_thread
from stepstate.models import Model

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS = 15
MILLISECONDS = 10
"""Of one round of one column, at least."""

Run = Callable[[], object]


def engine_costs(model: Model, rows: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds of CPU time that B rows take, by column of the table."""
    use_one_thread()
    by = {runtime: BareForward(model, rows * SPREAD, runtime) for runtime in Runtime}
    onnx, torch = by[Runtime.ONNX_RUNTIME], by[Runtime.TORCH]
    random = np.random.default_rng(SEED)
    slots = itertools.cycle(random.permutation(rows * SPREAD).reshape(SPREAD, rows))
    scales = [column.scale for column in model.manifest.inputs]
    x = (onnx.levels(1) + random.normal(size=(rows, len(scales))) * scales).astype(np.float32)
    columns: dict[str, Run] = {
        "products": BareProducts(model, rows).compute,
        "torch": lambda: torch.compute(x),
        "onnxruntime": lambda: onnx.compute(x),
        "forward": lambda: onnx.step(next(slots), x, 0),
    }
    costs = [{name: _cost(run) for name, run in columns.items()} for _ in range(rounds)]
    return {name: min(cost[name] for cost in costs) for name in columns}


def _cost(run: Run) -> float:
    """Microseconds of CPU time of one run, in a round of many."""
    runs, started = 0, time.thread_time()
    while (used := time.thread_time() - started) < MILLISECONDS / 1e3:
        run()
        runs += 1
    return used / runs * 1e6


def main(arguments: Sequence[str] = ()) -> None:
    """Prints the table of a model, or of the benchmarks' own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("folder", nargs="?", help="of a model; without: the benchmarks' own")
    model = model_in(parser.parse_args(arguments).folder)
    print(f"{this_machine()}\n{model.manifest.description or model.key}")
    print("rows  products  torch  onnxruntime  forward   each over the products: torch, ...")
    for rows in SIZES:
        costs = engine_costs(model, rows)
        products = costs.pop("products")
        times = "  ".join(f"{cost:8,.0f}" for cost in (products, *costs.values()))
        print(f"{rows:4}{times}   {'  '.join(f'{c / products:.2f}' for c in costs.values())}")


if __name__ == "__main__":
    main(sys.argv[1:])
