"""What it costs to know who calls, and to let nobody else read along."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from benchmarks.access import OPEN, Protection, with_jwt, with_tls, with_token
from benchmarks.clients import running_clients
from benchmarks.contest import Bar, Contest, contest_report, run_contest
from benchmarks.cpp import CppPrograms
from benchmarks.generator import CppGenerator
from benchmarks.load import CallPath
from benchmarks.loads import LoadsPlan, calling, connected, packed, streams
from benchmarks.models import DESCRIPTION, INPUTS
from benchmarks.options import MAX_SESSIONS, option, whole_numbers
from benchmarks.procstat import check_proc
from benchmarks.report import Report
from benchmarks.results import Case, Measurement
from benchmarks.runner import LoadClients, Target, measure, opened_sessions
from benchmarks.servers import bench_folder, running_stepstate
from benchmarks.transports import cpp_programs

NONE, TOKENS, JWT, TLS, MUTUAL = "none", "tokens and limits", "JWT", "TLS", "mutual TLS"
BARS = tuple(
    Bar(load, contender, NONE, bar, ambition)
    for load in (streams(64), packed(256))
    for contender, bar, ambition in (
        (TOKENS, 0.97, 1.0),
        (JWT, 0.97, 1.0),
        (TLS, 0.75, 0.9),
        (MUTUAL, 0.75, 0.9),
    )
)
"""What the rate has to be, over that of a server that lets everybody in."""

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityPlan(LoadsPlan):
    """A server that lets everybody in, beside one with tokens and limits, JWTs, TLS, mutual TLS.

    All are measured in each round, one after the other, and in the next round in reverse order.
    The client is in C++ where a compiler and libgrpc++ are there, else in Python.
    """

    sessions: tuple[int, ...] = option(
        "64", whole_numbers(MAX_SESSIONS), "Numbers of streams on one connection, in turn."
    )
    transport: str = option("lean", click.Choice(["lean", "grpcio"]), "Of the servers.")
    seconds: float = option(1.0, click.FloatRange(0.1, 3600.0), "The measured window of a round.")
    warm_up: float = option(0.3, click.FloatRange(0.0, 3600.0), "Seconds before the window.")
    processes: int = 1

    def loads(self) -> dict[str, Case]:
        """By name."""
        rows, count = self.packed_rows, self.connections
        return {
            **{streams(one): Case(CallPath.STREAM, one, 1) for one in self.sessions},
            packed(rows): Case(CallPath.PACKED, rows * self.in_flight, rows),
            connected(count): Case(CallPath.STREAM, count, 1, connections=count),
            calling(self.callers): Case(CallPath.UNARY, self.callers, 1),
        }


def security(plan: SecurityPlan, log: Log) -> Report:
    """Measures everything in turn.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    check_proc()
    programs = cpp_programs(log)
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        python: LoadClients = stack.enter_context(running_clients(plan.processes))
        client = python
        if programs is not None:
            client = stack.enter_context(CppGenerator(programs.load))
        targets = [_started(stack, folder, plan, *one) for one in _protections(folder).items()]
        results = []
        for load, case in plan.loads().items():
            clients = python if case.path is CallPath.PACKED else client
            contenders = {one.name: partial(_measure, plan, clients, one, case) for one in targets}
            results.append(run_contest(Contest(load, contenders), plan.rounds, log))
    workload = f"{DESCRIPTION}; {_workload(plan, programs)}"
    return contest_report(workload, results, baseline=NONE, bars=BARS)


def _protections(folder: Path) -> dict[str, Protection]:
    return {
        NONE: Protection((), OPEN),
        TOKENS: with_token(folder),
        JWT: with_jwt(folder),
        TLS: with_tls(folder, mutual=False),
        MUTUAL: with_tls(folder, mutual=True),
    }


def _started(
    stack: ExitStack, folder: Path, plan: SecurityPlan, name: str, protection: Protection
) -> Target:
    options = ("--transport", plan.transport, *protection.options)
    server = stack.enter_context(running_stepstate(folder, "memory:", *options))
    return Target(name, server, access=protection.access)


def _measure(plan: SecurityPlan, clients: LoadClients, target: Target, case: Case) -> Measurement:
    with opened_sessions(target, case.sessions) as names:
        return measure(plan, target, clients, case, names)


def _workload(plan: SecurityPlan, programs: CppPrograms | None) -> str:
    client = "Python" if programs is None else f"C++, on libgrpc++ {programs.library}"
    return (
        f"transport {plan.transport}; closed loop, one row of {INPUTS} a message or call, with t, "
        f"packed messages with {plan.in_flight} in flight; store memory; one client in {client}, "
        f"packed messages from Python; {plan.rounds} round(s) of {plan.seconds:g} s after "
        f"{plan.warm_up:g} s of warm-up, all in turn, every other round in reverse order"
    )
