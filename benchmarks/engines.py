"""What a step costs by each engine, beside its matrix products alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.options import option, whole_numbers
from benchmarks.report import Report, spread_text
from benchmarks.results import Spread, spread
from stepstate.models import Model

MILLISECONDS = 10
"""Of one round of one column, at least."""
BARE = "products"
"""The column that the others are compared with."""

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginesPlan:
    """What a step costs by each engine, beside its matrix products alone, by batch size.

    It is the CPU time of one thread of this process, without a server.
    """

    rows: tuple[int, ...] = option(
        "1,2,4,8,16,32,64,128,256", whole_numbers(65_536), "Numbers of rows of a step, in turn."
    )
    rounds: int = option(15, click.IntRange(1, 1000), "Rounds, of all in turn.")
    model: Path | None = option(
        None,
        click.Path(exists=True, file_okay=False, path_type=Path),
        "The folder of a model; without it: the benchmarks' own.",
    )


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """What steps of so many rows cost."""

    rows: int
    rounds: dict[str, list[float]]
    """Microseconds of CPU time of one step, by column of the table."""

    def ratio(self, column: str) -> Spread:
        """Over the products alone, round by round."""
        pairs = zip(self.rounds[column], self.rounds[BARE], strict=True)
        return spread(cost / bare for cost, bare in pairs)


def engines(plan: EnginesPlan, log: Callable[[str], None]) -> Report:
    """Measures everything in turn."""
    from benchmarks.forward import model_in  # noqa: PLC0415 - only it needs torch

    model = model_in(plan.model)
    found = []
    for rows in plan.rows:
        log(f"{rows} rows")
        found.append(engine_costs(model, rows, plan.rounds))
    columns = list(found[0].rounds)
    compared = [column for column in columns if column != BARE]
    return Report(
        workload=f"{model.manifest.description or model.key}; {plan.rounds} round(s), all in turn",
        heads=("rows", *columns, *(f"{column} ÷ {BARE}" for column in compared)),
        rows=[
            [
                f"{one.rows}",
                *(f"{median(one.rounds[column]):,.0f}" for column in columns),
                *(spread_text(one.ratio(column)) for column in compared),
            ]
            for one in found
        ],
        notes=(
            "CPU time of a step in µs, the median of the rounds; ratios are medians (least–most),",
            "each within its round. At 16 to 256 rows onnxruntime has to be at most 1.35, and aims",
            "at 1.15. The forward is the step by onnxruntime with states that are gathered from",
            "many sessions, not all of them in the CPU's cache, and scattered.",
        ),
        results=[asdict(one) for one in found],
    )


def engine_costs(model: Model, rows: int, rounds: int) -> EngineCosts:
    """Measures steps of B rows."""
    columns = _columns(model, rows)
    costs = [{name: _cost(run) for name, run in columns.items()} for _ in range(rounds)]
    return EngineCosts(rows, {name: [cost[name] for cost in costs] for name in columns})


def _columns(model: Model, rows: int) -> dict[str, Run]:
    """What is measured, by name."""
    from benchmarks.bare import BareForward, BareProducts  # noqa: PLC0415 - needs torch
    from benchmarks.forward import SEED, SPREAD  # noqa: PLC0415
    from stepstate.engine import Runtime, use_one_thread  # noqa: PLC0415

    use_one_thread()
    by = {runtime: BareForward(model, rows * SPREAD, runtime) for runtime in Runtime}
    onnx, torch = by[Runtime.ONNX_RUNTIME], by[Runtime.TORCH]
    random = np.random.default_rng(SEED)
    slots = itertools.cycle(random.permutation(rows * SPREAD).reshape(SPREAD, rows))
    scales = [column.scale for column in model.manifest.inputs]
    x = (onnx.levels(1) + random.normal(size=(rows, len(scales))) * scales).astype(np.float32)
    return {
        BARE: BareProducts(model, rows).compute,
        "torch": lambda: torch.compute(x),
        "onnxruntime": lambda: onnx.compute(x),
        "forward": lambda: onnx.step(next(slots), x, 0),
    }


def _cost(run: Run) -> float:
    """Microseconds of CPU time of one run, in a round of many."""
    runs, started = 0, time.thread_time()
    while (used := time.thread_time() - started) < MILLISECONDS / 1e3:
        run()
        runs += 1
    return used / runs * 1e6
