"""Where a step's time goes in the server, by part: sampled while the load runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import click

from benchmarks.clients import running_clients
from benchmarks.cpp import build_programs
from benchmarks.generator import CppGenerator
from benchmarks.load import CallPath
from benchmarks.loads import LoadsPlan, calling, connected, packed, streams
from benchmarks.models import DESCRIPTION, NAME, VARIANTS
from benchmarks.options import MAX_SESSIONS, option, whole_numbers
from benchmarks.parts import PARTS, part_of
from benchmarks.procstat import check_proc, series
from benchmarks.report import Report, Table
from benchmarks.results import Case
from benchmarks.runner import LoadClients, Target, measure, opened_sessions
from benchmarks.sampler import Stack, sampled
from benchmarks.servers import bench_folder, running_stepstate

_FUNCTIONS = 4
"""The busiest of a part, which are printed."""
_ROWS = "stepstate_microbatch_rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePlan(LoadsPlan):
    """Where a step's time goes in the server: frames, decode, checks, forward, commit and so on.

    The CPU time of a step is measured in one window, and its shares in another, in which py-spy
    samples the server. Nothing in the server is changed for it. The client is in C++.
    """

    sessions: tuple[int, ...] = option(
        "1,64,256", whole_numbers(MAX_SESSIONS), "Numbers of streams on one connection, in turn."
    )
    model: str = option(NAME, click.Choice([NAME, *VARIANTS]), "That is stepped.")
    transport: str = option("lean", click.Choice(["lean", "grpcio"]), "The server's.")
    seconds: float = option(4.0, click.FloatRange(1.0, 3600.0), "Each of the two windows.")
    warm_up: float = option(0.5, click.FloatRange(0.0, 3600.0), "Seconds before a window.")
    rounds: int = 1
    processes: int = 1

    def loads(self) -> dict[str, Case]:
        """All loads, by name."""
        loads = {streams(count): Case(CallPath.STREAM, count, 1) for count in self.sessions}
        count, rows = self.connections, self.packed_rows
        return loads | {
            connected(count): Case(CallPath.STREAM, count, 1, connections=count),
            calling(self.callers): Case(CallPath.UNARY, self.callers, 1),
            packed(rows): Case(CallPath.PACKED, rows * self.in_flight, rows),
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """What a step cost under a load, and where."""

    load: str
    steps_per_second: float
    cpu_us_per_step: float
    rows_per_forward: float | None
    """None: the server counts none, as of packed messages."""
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
        bench_folder(plan.model) as folder,
        running_stepstate(folder, "memory:", "--transport", plan.transport) as server,
        CppGenerator(programs.load) as client,
        running_clients(plan.processes) as python,
    ):
        target = Target("steps", server, model=plan.model)
        profiling = _Profiling(plan, target, client=client, python=python)
        found = []
        for load, case in plan.loads().items():
            log(load)
            found.append(profiling.profile(load, case))
    return _report(plan, found)


@dataclass(frozen=True, slots=True)
class _Profiling:
    plan: ProfilePlan
    target: Target
    client: LoadClients
    """Sends single rows."""
    python: LoadClients
    """Sends packed ones."""

    def profile(self, load: str, case: Case) -> Profile:
        clients = self.python if case.path is CallPath.PACKED else self.client
        with opened_sessions(self.target, case.sessions) as names:
            rows, forwards = self._stepped()
            measured = measure(self.plan, self.target, clients, case, names)
            rows_after, forwards_after = self._stepped()
        stacks = self._sample(case, clients)
        samples, counted = stacks.total(), forwards_after - forwards
        us = measured.cpu_us_per_step / samples
        functions = _by_part(stacks)
        return Profile(
            load=load,
            steps_per_second=measured.steps_per_second,
            cpu_us_per_step=measured.cpu_us_per_step,
            rows_per_forward=(rows_after - rows) / counted if counted else None,
            samples=samples,
            parts={part: us * found.total() for part, found in functions.items()},
            functions={
                part: {name: us * count for name, count in found.most_common(_FUNCTIONS)}
                for part, found in functions.items()
            },
        )

    def _sample(self, case: Case, clients: LoadClients) -> Counter[Stack]:
        with (
            opened_sessions(self.target, case.sessions) as names,
            sampled(clients, self.target.server.pid) as watched,
        ):
            measure(self.plan, self.target, watched, case, names)
            return watched.stacks()

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
            f"{VARIANTS.get(plan.model, DESCRIPTION)}; closed loop, with t, packed messages with "
            f"{plan.in_flight} in flight; store memory; transport {plan.transport}; one client in "
            f"C++, packed messages from Python; for each load a window of {plan.seconds:g} s after "
            f"{plan.warm_up:g} s of warm-up, then one of as long with py-spy"
        ),
        heads=("part", *(one.load for one in found)),
        rows=[
            *([part, *(_part_text(one, part) for one in found)] for part in PARTS),
            ["CPU µs a step", *(f"{one.cpu_us_per_step:.1f}" for one in found)],
            ["steps/s", *(f"{one.steps_per_second:,.0f}" for one in found)],
            ["rows a forward", *map(_rows_text, found)],
            ["samples", *(f"{one.samples:,}" for one in found)],
        ],
        notes=(
            "Parts are in µs of the server's CPU time for a step, with their share. The other",
            "table has the functions of each part that take most, in µs of a step; with what they",
            "call that belongs to no part, such as torch.",
        ),
        results=[asdict(one) for one in found],
        more=(_functions_table(max(found[: len(plan.sessions)], key=_rate_of)),),
    )


def _rate_of(one: Profile) -> float:
    return one.steps_per_second


def _rows_text(one: Profile) -> str:
    return "–" if one.rows_per_forward is None else f"{one.rows_per_forward:.1f}"


def _part_text(one: Profile, part: str) -> str:
    us = one.parts[part]
    return f"{us:.1f} ({us / one.cpu_us_per_step:.0%})"


def _functions_table(one: Profile) -> Table:
    rows = [
        [part, ", ".join(f"`{name}` {us:.1f}" for name, us in functions.items())]
        for part, functions in one.functions.items()
    ]
    return Table(("part", f"functions, with {one.load}"), rows, ())
