"""Rates of steps: beside a bare echo, beside another checkout, and of stores beside `memory:`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.comparison import comparison_report
from benchmarks.echo import TUNED
from benchmarks.load import CallPath, Kind
from benchmarks.options import MAX_SESSIONS, option, rates, some_of, whole_numbers, without_password
from benchmarks.report import Report
from benchmarks.results import Measurement, Plan
from benchmarks.runner import Forward, Target, run, workload
from benchmarks.servers import (
    DURABILITIES,
    DURABLE,
    ROOT,
    ServerProcess,
    Store,
    bench_folder,
    bench_model,
    fresh_store,
    running_echo,
    running_stepstate,
)

Log = Callable[[str], None]
FORWARD_SECONDS = 1.0
"""The bare forward is steady: a longer run shows nothing new."""


def call_paths(value: str) -> tuple[CallPath, ...]:
    """A type for some of the call paths, separated by commas."""
    return tuple(map(CallPath, some_of([path.value for path in CallPath])(value)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsPlan(Plan):
    """Steps, beside a bare gRPC echo of the same messages and the bare forward.

    In closed loop a message follows the reply to the one before it. With --rate
    messages are sent at fixed times, and latency counts from when a message was
    due: waiting is not hidden.
    """

    paths: tuple[CallPath, ...] = option(
        "stream", call_paths, "How steps are sent: some of stream,unary,packed.", name="--path"
    )
    rows: tuple[int, ...] = option(
        "16,64,256", whole_numbers(MAX_SESSIONS), "Numbers of rows of a packed message, in turn."
    )
    in_flight: int = option(
        2, click.IntRange(1, 64), "Unanswered packed messages of a client process."
    )
    rates: tuple[float, ...] = option(
        "", rates, "Steps a second in all, at fixed times; empty: a closed loop.", name="--rate"
    )
    echo: str = option(
        "plain", click.Choice(["plain", "tuned"]), "tuned: with the server's gRPC settings."
    )
    other: Path | None = option(
        None,
        click.Path(exists=True, file_okay=False, path_type=Path),
        "Another checkout: its server takes the place of the echo.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DurabilityPlan(Plan):
    """The same steps with each store and durability, beside those with `memory:`.

    Files are below TMPDIR: set it to compare disks.
    """

    sessions: tuple[int, ...] = option(
        "64", whole_numbers(MAX_SESSIONS), "Numbers of sessions that step, in turn."
    )
    stores: tuple[str, ...] = option("sqlite,redis", some_of(DURABLE), "Which stores to compare.")
    durabilities: tuple[str, ...] = option(
        "none,async,sync", some_of(DURABILITIES), "Which durabilities."
    )
    redis_url: str = option("", str, "A running Redis; empty: a redis-server is started.")


def steps(plan: StepsPlan, log: Log) -> Report:
    """Measures steps beside an echo of the same messages, or beside another checkout.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    return _beside_echo(plan, log) if plan.other is None else _beside_other(plan, plan.other, log)


def _beside_echo(plan: StepsPlan, log: Log) -> Report:
    tuned = plan.echo == "tuned"
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        echo_options = (TUNED,) if tuned else ()
        echo = Target("echo", stack.enter_context(running_echo(*echo_options)), Kind.ECHO)
        steps = Target("steps", stack.enter_context(_sqlite_server(folder)))
        found = run(plan, echo, [steps], log, forward_of(folder, plan))
    what = workload(plan, "echo, steps and the bare forward")
    if tuned:
        what += "; the echo gets gRPC's events as the server does"
    return comparison_report(found, what)


def forward_of(folder: Path, plan: Plan) -> Forward:
    """Measures the bare forward of the model in a `bench_folder`."""
    from benchmarks.forward import bare_forward  # noqa: PLC0415 - only it needs torch

    seconds = min(plan.seconds, FORWARD_SECONDS)

    def forward(rows: int) -> Measurement:
        found = bare_forward(bench_model(folder), rows, seconds)
        steps = round(found.steps_per_second * seconds)
        return Measurement(steps, found.steps_per_second, {}, found.cpu_us_per_step)

    return forward


def _beside_other(plan: Plan, checkout: Path, log: Log) -> Report:
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


def durability(plan: DurabilityPlan, log: Log) -> Report:
    """Measures steps with each store and durability beside steps with the store `memory:`.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        stores = [stack.enter_context(_store(kind, plan.redis_url, folder)) for kind in plan.stores]
        memory = Target("memory", stack.enter_context(running_stepstate(folder, "memory:")))
        contenders: list[Target] = []
        for store in stores:
            server = stack.enter_context(running_stepstate(folder, store.url))
            contenders += (
                Target(f"{store.kind} {durability}", server, Kind.STEP, durability, store.pid)
                for durability in plan.durabilities
            )
        found = run(plan, memory, contenders, log)
    what = "; ".join(
        (workload(plan, "memory and each other"), *(store.description for store in stores))
    )
    return comparison_report(found, what)


@contextmanager
def _store(kind: str, redis_url: str, folder: Path) -> Iterator[Store]:
    if kind == "redis" and redis_url:
        yield Store(kind, redis_url, f"the redis at {without_password(redis_url)}")
    else:
        with fresh_store(kind, folder) as store:
            yield store
