"""Rates of steps: beside a bare echo, beside another checkout, and of stores beside `memory:`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison import comparison_report
from benchmarks.echo import TUNED
from benchmarks.load import Kind
from benchmarks.report import Report
from benchmarks.results import Measurement, Plan
from benchmarks.runner import Forward, Target, run, workload
from benchmarks.servers import (
    ROOT,
    ServerProcess,
    Store,
    bench_folder,
    bench_model,
    fresh_store,
    running_echo,
    running_stepstate,
    without_password,
)

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StoreChoice:
    """Which stores and durabilities are compared."""

    stores: tuple[str, ...]
    durabilities: tuple[str, ...]
    redis_url: str
    """Empty: a Redis of its own."""


FORWARD_SECONDS = 1.0
"""The bare forward is steady: a longer run shows nothing new."""


def beside_echo(plan: Plan, log: Log, *, tuned: bool = False) -> Report:
    """Measures steps beside a bare echo of the same messages, and the bare forward.

    Args:
        plan: what to run.
        log: is called with a line of progress.
        tuned: the echo gets gRPC's events as the server does.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        echo_options = (TUNED,) if tuned else ()
        echo = Target("echo", stack.enter_context(running_echo(*echo_options)), Kind.ECHO)
        steps = Target("steps", stack.enter_context(_sqlite_server(folder)))
        found = run(plan, echo, [steps], log, _forward_of(folder, plan))
    what = workload(plan, "echo, steps and the bare forward")
    if tuned:
        what += "; the echo gets gRPC's events as the server does"
    return comparison_report(found, what)


def _forward_of(folder: Path, plan: Plan) -> Forward:
    from benchmarks.forward import bare_forward  # noqa: PLC0415 - only it needs torch

    seconds = min(plan.seconds, FORWARD_SECONDS)

    def forward(rows: int) -> Measurement:
        found = bare_forward(bench_model(folder), rows, seconds)
        steps = round(found.steps_per_second * seconds)
        return Measurement(steps, found.steps_per_second, {}, found.cpu_us_per_step)

    return forward


def beside_other(plan: Plan, checkout: Path, log: Log) -> Report:
    """Measures steps of this checkout beside those of another one.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        other, this = (
            Target(name, stack.enter_context(_sqlite_server(folder, path)))
            for name, path in (("other", checkout), ("this", ROOT))
        )
        found = run(plan, other, [this], log)
    return comparison_report(found, f"{workload(plan, 'both')}; the other checkout is {checkout}")


@contextmanager
def _sqlite_server(folder: Path, checkout: Path | None = None) -> Iterator[ServerProcess]:
    with (
        fresh_store("sqlite", folder) as store,
        running_stepstate(folder, store.url, checkout=checkout) as server,
    ):
        yield server


def beside_memory(plan: Plan, choice: StoreChoice, log: Log) -> Report:
    """Measures steps with each store and durability beside steps with the store `memory:`.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        stores = [stack.enter_context(_store(kind, choice, folder)) for kind in choice.stores]
        memory = Target("memory", stack.enter_context(running_stepstate(folder, "memory:")))
        contenders: list[Target] = []
        for store in stores:
            server = stack.enter_context(running_stepstate(folder, store.url))
            contenders += (
                Target(f"{store.kind} {durability}", server, Kind.STEP, durability, store.pid)
                for durability in choice.durabilities
            )
        found = run(plan, memory, contenders, log)
    what = "; ".join(
        (workload(plan, "memory and each other"), *(store.description for store in stores))
    )
    return comparison_report(found, what)


@contextmanager
def _store(kind: str, choice: StoreChoice, folder: Path) -> Iterator[Store]:
    if kind == "redis" and choice.redis_url:
        yield Store(kind, choice.redis_url, f"the redis at {without_password(choice.redis_url)}")
    else:
        with fresh_store(kind, folder) as store:
            yield store
