"""Where a step's time goes in the server, by part: sampled while the load runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import click

from benchmarks.cpp import build_programs
from benchmarks.generator import CppGenerator
from benchmarks.load import CallPath
from benchmarks.models import DESCRIPTION
from benchmarks.options import MAX_SESSIONS, option, whole_numbers
from benchmarks.parts import PARTS, part_of
from benchmarks.procstat import check_proc, series
from benchmarks.report import Report, Table
from benchmarks.results import Case, Plan
from benchmarks.runner import Target, measure, opened_sessions
from benchmarks.sampler import Stack, sampled
from benchmarks.servers import bench_folder, running_stepstate
from benchmarks.transports import connected, streams

_FUNCTIONS = 4
"""The busiest of a part, which are printed."""
_ROWS = "stepstate_microbatch_rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePlan(Plan):
    """Where a step's time goes in the server: frames, decode, checks, forward, commit and so on.

    The CPU time of a step is measured in one window, and its shares in another, in which py-spy
    samples the server. Nothing in the server is changed for it. The client is in C++.
    """

    sessions: tuple[int, ...] = option(
        "1,64,256", whole_numbers(MAX_SESSIONS), "Numbers of streams on one connection, in turn."
    )
    connections: int = option(
        64, click.IntRange(2, MAX_SESSIONS), "Then as many connections, with a stream each."
    )
    transport: str = option("lean", click.Choice(["lean", "grpcio"]), "The server's.")
    seconds: float = option(4.0, click.FloatRange(1.0, 3600.0), "Each of the two windows.")
    warm_up: float = option(0.5, click.FloatRange(0.0, 3600.0), "Seconds before a window.")
    rounds: int = 1
    processes: int = 1

    def loads(self) -> dict[str, Case]:
        """All loads, by name."""
        loads = {streams(count): Case(CallPath.STREAM, count, 1) for count in self.sessions}
        count = self.connections
        return loads | {connected(count): Case(CallPath.STREAM, count, 1, connections=count)}


@dataclass(frozen=True, slots=True)
class Profile:
    """What a step cost under a load, and where."""

    load: str
    steps_per_second: float
    cpu_us_per_step: float
    rows_per_forward: float
    samples: int
    parts: dict[str, float]
    """CPU time in µs of a step, by part."""
    functions: dict[str, dict[str, float]]
    """The same of the busiest functions of each part, without what other functions of it take."""


def profile(plan: ProfilePlan, log: Callable[[str], None]) -> Report:
    """Profiles a server under each load.

    Raises:
        BenchError: the client can't be built, or py-spy may not trace the server.
    """
    check_proc()
    log("the load generator in C++ is built, if it has to be")
    programs = build_programs()
    with (
        bench_folder() as folder,
        running_stepstate(folder, "memory:", "--transport", plan.transport) as server,
        CppGenerator(programs.load) as clients,
    ):
        profiling = _Profiling(plan, Target("steps", server), clients)
        found = []
        for load, case in plan.loads().items():
            log(load)
            found.append(profiling.profile(load, case))
    return _report(plan, found)


@dataclass(frozen=True, slots=True)
class _Profiling:
    plan: ProfilePlan
    target: Target
    clients: CppGenerator

    def profile(self, load: str, case: Case) -> Profile:
        with opened_sessions(self.target, case.sessions) as names:
            rows, forwards = self._stepped()
            measured = measure(self.plan, self.target, self.clients, case, names)
            rows_after, forwards_after = self._stepped()
        stacks = self._sample(case)
        samples = stacks.total()
        us = measured.cpu_us_per_step / samples
        functions = _by_part(stacks)
        return Profile(
            load=load,
            steps_per_second=measured.steps_per_second,
            cpu_us_per_step=measured.cpu_us_per_step,
            rows_per_forward=(rows_after - rows) / (forwards_after - forwards),
            samples=samples,
            parts={part: us * found.total() for part, found in functions.items()},
            functions={
                part: {name: us * count for name, count in found.most_common(_FUNCTIONS)}
                for part, found in functions.items()
            },
        )

    def _sample(self, case: Case) -> Counter[Stack]:
        pid = self.target.server.pid
        with (
            opened_sessions(self.target, case.sessions) as names,
            sampled(self.clients, pid) as clients,
        ):
            measure(self.plan, self.target, clients, case, names)
            return clients.stacks()

    def _stepped(self) -> tuple[float, float]:
        """Rows, and the forwards that they were stepped in."""
        url = self.target.server.metrics_url
        return series(url, f"{_ROWS}_sum"), series(url, f"{_ROWS}_count")


def _by_part(stacks: Counter[Stack]) -> dict[str, Counter[str]]:
    """How often each function was at work, by part."""
    found: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    for stack, count in stacks.items():
        part, function = part_of(stack)
        found[part][function] += count
    return found


def _report(plan: ProfilePlan, found: Sequence[Profile]) -> Report:
    return Report(
        workload=(
            f"{DESCRIPTION}; closed loop, one row a message, with t; store memory; transport "
            f"{plan.transport}; one client in C++; for each load a window of {plan.seconds:g} s "
            f"after {plan.warm_up:g} s of warm-up, then one of as long with py-spy"
        ),
        heads=("part", *(one.load for one in found)),
        rows=[
            *([part, *(_part_text(one, part) for one in found)] for part in PARTS),
            ["CPU µs a step", *(f"{one.cpu_us_per_step:.1f}" for one in found)],
            ["steps/s", *(f"{one.steps_per_second:,.0f}" for one in found)],
            ["rows a forward", *(f"{one.rows_per_forward:.1f}" for one in found)],
            ["samples", *(f"{one.samples:,}" for one in found)],
        ],
        notes=(
            "Parts are in µs of the server's CPU time for a step, with their share. The other",
            "table has the functions of each part that take most, in µs of a step; with what they",
            "call that belongs to no part, such as torch.",
        ),
        results=[asdict(one) for one in found],
        more=(_functions_table(max(found, key=lambda one: one.steps_per_second)),),
    )


def _part_text(one: Profile, part: str) -> str:
    us = one.parts[part]
    return f"{us:.1f} ({us / one.cpu_us_per_step:.0%})"


def _functions_table(one: Profile) -> Table:
    rows = [
        [part, ", ".join(f"`{name}` {us:.1f}" for name, us in functions.items())]
        for part, functions in one.functions.items()
    ]
    return Table(("part", f"functions, with {one.load}"), rows, ())
