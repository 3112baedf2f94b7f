"""Steps on each transport, beside echoes of the same messages and the bare forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from benchmarks import analyzer
from benchmarks.clients import running_clients
from benchmarks.contest import Bar, Contest, as_figures, bars_table, results_table, run_contest
from benchmarks.cpp import CppPrograms, MissingTools, build_programs
from benchmarks.generator import CppGenerator
from benchmarks.load import CallPath
from benchmarks.models import DESCRIPTION, INPUTS
from benchmarks.options import MAX_SESSIONS, option, whole_numbers
from benchmarks.procstat import check_proc
from benchmarks.report import Report
from benchmarks.results import Case, Measurement, Plan
from benchmarks.runner import LoadClients, Target, forward_rows, measure, opened_sessions
from benchmarks.servers import bench_folder, running_floor, running_step_echo, running_stepstate
from benchmarks.steps import forward_of

CPP_ECHO, AIO_ECHO, LEAN_ECHO = "C++ echo", "grpc.aio echo", "lean echo"
LEAN, GRPCIO, OTHER = "Stepstate lean", "Stepstate grpcio", "other checkout"
FORWARD = "bare forward"

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportsPlan(Plan):
    """Steps on each transport, beside echoes of the same messages and the bare forward.

    All are measured in each round, one after the other. The client is in C++ where a compiler
    and libgrpc++ are there, else in Python. The store is memory.
    """

    sessions: tuple[int, ...] = option(
        "1,64,256", whole_numbers(MAX_SESSIONS), "Numbers of streams on one connection, in turn."
    )
    connections: int = option(
        64, click.IntRange(2, MAX_SESSIONS), "Then as many connections, with a stream each."
    )
    callers: int = option(
        16, click.IntRange(1, MAX_SESSIONS), "Then as many callers of the unary Step."
    )
    packed_rows: int = option(
        256, click.IntRange(1, 4096), "Then packed messages of so many rows, from Python."
    )
    sequences: int = option(
        64,
        click.IntRange(1, 1024),
        "Then perf_analyzer with so many sequences, if .ci/perf_analyzer has installed it.",
    )
    seconds: float = option(2.0, click.FloatRange(0.1, 3600.0), "The measured window of a round.")
    warm_up: float = option(0.5, click.FloatRange(0.0, 3600.0), "Seconds before the window.")
    other: Path | None = option(
        None,
        click.Path(exists=True, file_okay=False, path_type=Path),
        "Another checkout, whose server is measured too.",
    )
    processes: int = 1

    def single_loads(self) -> dict[str, Case]:
        """The loads with one row a message, by name."""
        loads = {streams(count): Case(CallPath.STREAM, count, 1) for count in self.sessions}
        count = self.connections
        spread = Case(CallPath.STREAM, count, 1, connections=count)
        unary = Case(CallPath.UNARY, self.callers, 1)
        return loads | {connected(count): spread, calling(self.callers): unary}


def streams(count: int) -> str:
    """The name of the load with so many streams on one connection."""
    return f"{count} stream{'s' if count > 1 else ''}"


def connected(count: int) -> str:
    """The name of the load with so many connections."""
    return f"{count} connections"


def calling(count: int) -> str:
    """The name of the load with so many callers of the unary Step."""
    return f"{count} callers of Step"


def packed(rows: int) -> str:
    """The name of the load with packed messages."""
    return f"packed, {rows} rows"


def analyzed(count: int) -> str:
    """The name of the load that perf_analyzer makes."""
    return f"perf_analyzer, {count} sequences"


def transports(plan: TransportsPlan, log: Log) -> Report:
    """Measures everything in turn.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    check_proc()
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        programs = _programs(log)
        stepping = stack.enter_context(_stepping(folder, plan.other))
        echoes = stack.enter_context(_echoes(programs))
        python = stack.enter_context(running_clients(plan.processes))
        client: LoadClients = python
        if programs is not None:
            client = stack.enter_context(CppGenerator(programs.load))
        measuring = _Measuring(plan, folder, stepping, echoes, client=client, python=python)
        results = [run_contest(one, plan.rounds, log) for one in measuring.contests(log)]
    baseline = AIO_ECHO if programs is None else CPP_ECHO
    table = results_table(results, baseline)
    return Report(
        workload=f"{DESCRIPTION}; {_workload(plan, programs)}",
        heads=table.heads,
        rows=table.rows,
        notes=table.notes,
        results=as_figures(results),
        more=(bars_table(results, _bars(OTHER if plan.other else GRPCIO)),),
    )


def _programs(log: Log) -> CppPrograms | None:
    """The programs in C++; None: they can't be built here."""
    log("the load generator in C++ is built, if it has to be")
    try:
        return build_programs()
    except MissingTools as missing:
        log(f"{missing}; the client is in Python, and there is no echo in C++")
        return None


@contextmanager
def _stepping(folder: Path, other: Path | None) -> Iterator[dict[str, Target]]:
    """Servers of sessions, by name."""
    with ExitStack() as stack:
        found = {
            name: stack.enter_context(
                running_stepstate(folder, "memory:", "--transport", transport)
            )
            for name, transport in ((LEAN, "lean"), (GRPCIO, "grpcio"))
        }
        if other is not None:
            found[OTHER] = stack.enter_context(running_stepstate(folder, "memory:", checkout=other))
        yield {name: Target(name, server) for name, server in found.items()}


@contextmanager
def _echoes(programs: CppPrograms | None) -> Iterator[dict[str, Target]]:
    """Echoes, by name."""
    with ExitStack() as stack:
        found = {}
        if programs is not None:
            found[CPP_ECHO] = stack.enter_context(running_floor(programs.floor))
        for name, transport in ((AIO_ECHO, "grpcio"), (LEAN_ECHO, "lean")):
            found[name] = stack.enter_context(running_step_echo(transport))
        yield {name: Target(name, server, stateless=True) for name, server in found.items()}


@dataclass(frozen=True, slots=True)
class _Measuring:
    plan: TransportsPlan
    folder: Path
    stepping: Mapping[str, Target]
    echoes: Mapping[str, Target]
    client: LoadClients
    """Sends single rows."""
    python: LoadClients
    """Sends packed ones."""

    def contests(self, log: Log) -> Iterator[Contest]:
        for name, case in self.plan.single_loads().items():
            yield Contest(name, self._contenders(case, {**self.echoes, **self.stepping}))
        rows = self.plan.packed_rows
        case = Case(CallPath.PACKED, rows * self.plan.in_flight, rows)
        yield Contest(packed(rows), self._contenders(case, self.stepping))
        if analyzer.START.exists():
            yield self._analyzer()
        else:
            log(f"{analyzer.START} is missing: perf_analyzer is left out")

    def _contenders(
        self, case: Case, targets: Mapping[str, Target]
    ) -> dict[str, Callable[[], Measurement]]:
        contenders: dict[str, Callable[[], Measurement]] = {
            name: partial(self._measure, target, case) for name, target in targets.items()
        }
        rows = forward_rows(case)
        contenders[f"{FORWARD} of {rows}"] = partial(forward_of(self.folder, self.plan), rows)
        return contenders

    def _measure(self, target: Target, case: Case) -> Measurement:
        clients = self.python if case.path is CallPath.PACKED else self.client
        with opened_sessions(target, case.sessions) as names:
            return measure(self.plan, target, clients, case, names)

    def _analyzer(self) -> Contest:
        sequences, seconds = self.plan.sequences, self.plan.seconds / 2
        return Contest(
            analyzed(sequences),
            {
                name: partial(analyzer.measure_sequences, target.server, sequences, seconds)
                for name, target in self.stepping.items()
            },
        )


def _workload(plan: TransportsPlan, programs: CppPrograms | None) -> str:
    client = "Python" if programs is None else f"C++, on libgrpc++ {programs.library}"
    return (
        f"closed loop, one row of {INPUTS} a message or call, with t, packed messages with "
        f"{plan.in_flight} in flight; store memory; one client in {client}, packed messages from "
        f"Python; {plan.rounds} round(s) of {plan.seconds:g} s after {plan.warm_up:g} s of "
        "warm-up, all in turn"
    )


def _bars(before: str) -> list[Bar]:
    """What the transport is to reach; `before`: the server that it is compared with."""
    return [
        Bar(streams(64), LEAN_ECHO, CPP_ECHO, 1.0, 1.2),
        Bar(streams(64), LEAN, CPP_ECHO, 0.33, 0.4),
        Bar(streams(256), LEAN, CPP_ECHO, 0.4, 0.5),
        Bar(connected(64), LEAN, CPP_ECHO, 0.45, 0.6),
        Bar(streams(64), LEAN, before, 2.0, 2.5),
        Bar(calling(16), LEAN, before, 2.0, 3.0),
        Bar(packed(256), LEAN, before, 1.0, 1.2),
        Bar(analyzed(64), LEAN, before, 1.5, 2.0),
    ]
