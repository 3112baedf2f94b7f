"""Steps on each transport, beside echoes of the same messages and the bare forward."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from benchmarks import analyzer
from benchmarks.checkouts import NoSuchCommit, checkout
from benchmarks.clients import running_clients
from benchmarks.contenders import (
    AIO_ECHO,
    CPP_ECHO,
    LEAN,
    Targets,
    durable,
    echoes,
    stepping,
    variants,
)
from benchmarks.contest import Contest, contest_report, run_contest
from benchmarks.cpp import CppPrograms, MissingTools, build_programs
from benchmarks.generator import CppGenerator
from benchmarks.load import CallPath
from benchmarks.loads import (
    BARS,
    LoadsPlan,
    analyzed,
    calling,
    connected,
    durably,
    of_model,
    packed,
    streams,
)
from benchmarks.models import DESCRIPTION, INPUTS
from benchmarks.options import MAX_SESSIONS, option, whole_numbers
from benchmarks.procstat import check_proc
from benchmarks.report import Report
from benchmarks.results import Case, Measurement
from benchmarks.runner import LoadClients, Target, forward_rows, measure, opened_sessions
from benchmarks.servers import bench_folder
from benchmarks.steps import forward_of

FORWARD = "bare forward"
GRPCIO_ONLY = "c157ff34dfa092db991a3a19e76f27702bd7ccb9"
"""The last commit whose server has no transport but grpcio's."""

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportsPlan(LoadsPlan):
    """Steps on each transport, beside echoes of the same messages and the bare forward.

    All are measured in each round, one after the other, and in the next round in reverse order.
    The client is in C++ where a compiler and libgrpc++ are there, else in Python. The store is
    memory, but for one load.
    """

    sessions: tuple[int, ...] = option(
        "1,16,64,256", whole_numbers(MAX_SESSIONS), "Numbers of streams on one connection, in turn."
    )
    sequences: int = option(
        64,
        click.IntRange(1, 1024),
        "Then perf_analyzer with so many sequences, if .ci/perf_analyzer has installed it.",
    )
    beside: int = option(
        64, click.IntRange(1, MAX_SESSIONS), "Then so many streams with sqlite, and of each model."
    )
    seconds: float = option(1.0, click.FloatRange(0.1, 3600.0), "The measured window of a round.")
    warm_up: float = option(0.3, click.FloatRange(0.0, 3600.0), "Seconds before the window.")
    other: str = option(
        GRPCIO_ONLY,
        str,
        "Another commit or checkout, whose server is measured too; by default the last one before "
        "the lean transport.",
    )
    processes: int = 1

    def single_loads(self) -> dict[str, Case]:
        """The loads with one row a message, by name."""
        loads = {streams(count): Case(CallPath.STREAM, count, 1) for count in self.sessions}
        count = self.connections
        spread = Case(CallPath.STREAM, count, 1, connections=count)
        unary = Case(CallPath.UNARY, self.callers, 1)
        return loads | {connected(count): spread, calling(self.callers): unary}


def transports(plan: TransportsPlan, log: Log) -> Report:
    """Measures everything in turn.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    check_proc()
    programs, other = cpp_programs(log), _other(plan.other, log)
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        servers = stack.enter_context(stepping(folder, other))
        all_echoes = stack.enter_context(echoes(programs))
        python = stack.enter_context(running_clients(plan.processes))
        client: LoadClients = python
        if programs is not None:
            client = stack.enter_context(CppGenerator(programs.load))
        measuring = _Measuring(plan, folder, servers, all_echoes, client=client, python=python)
        contests = stack.enter_context(closing(measuring.contests(other, log)))
        results = [run_contest(one, plan.rounds, log) for one in contests]
    baseline = AIO_ECHO if programs is None else CPP_ECHO
    workload = f"{DESCRIPTION}; {_workload(plan, programs)}"
    return contest_report(workload, results, baseline=baseline, bars=BARS)


def cpp_programs(log: Log) -> CppPrograms | None:
    """The programs in C++; None: they can't be built here."""
    log("the load generator in C++ is built, if it has to be")
    try:
        return build_programs()
    except MissingTools as missing:
        log(f"{missing}; the client is in Python, and there is no echo in C++")
        return None


def _other(where: str, log: Log) -> Path | None:
    """The other checkout; None: there is none here."""
    try:
        return checkout(where)
    except NoSuchCommit as missing:
        log(f"{missing}: nothing is compared with its server")
        return None


@dataclass(frozen=True, slots=True)
class _Measuring:
    plan: TransportsPlan
    folder: Path
    stepping: Targets
    echoes: Targets
    client: LoadClients
    """Sends single rows."""
    python: LoadClients
    """Sends packed ones."""

    def contests(self, other: Path | None, log: Log) -> Generator[Contest]:
        for name, case in self.plan.single_loads().items():
            yield self._beside_forward(name, case, self.echoes | self.stepping)
        rows = self.plan.packed_rows
        case = Case(CallPath.PACKED, rows * self.plan.in_flight, rows)
        yield self._beside_forward(packed(rows), case, self.stepping)
        if analyzer.START.exists():
            yield self._analyzer()
        else:
            log(f"{analyzer.START} is missing: perf_analyzer is left out")
        yield from self._durable_and_models(other)

    def _durable_and_models(self, other: Path | None) -> Iterator[Contest]:
        """Those with servers of their own, which end with them."""
        count = self.plan.beside
        case = Case(CallPath.STREAM, count, 1)
        with durable(self.folder) as saving:
            targets = {LEAN: self.stepping[LEAN], **saving}
            yield Contest(durably(count), self._contenders(case, targets))
        with variants(other) as by_model:
            for model, targets in by_model.items():
                yield Contest(of_model(model, count), self._contenders(case, targets))

    def _beside_forward(self, name: str, case: Case, targets: Targets) -> Contest:
        rows = forward_rows(case)
        forward = partial(forward_of(self.folder, self.plan), rows)
        return Contest(name, self._contenders(case, targets) | {f"{FORWARD} of {rows}": forward})

    def _contenders(self, case: Case, targets: Targets) -> dict[str, Callable[[], Measurement]]:
        return {name: partial(self._measure, target, case) for name, target in targets.items()}

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
        "warm-up, all in turn, every other round in reverse order"
    )
