"""Many more open sessions than slots, all of them stepped at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import click
import numpy as np

from benchmarks.models import DESCRIPTION
from benchmarks.options import MAX_IDLE, option
from benchmarks.procstat import check_proc, counters, cpu_seconds, resident_bytes
from benchmarks.report import Report
from benchmarks.servers import (
    DURABILITIES,
    DURABLE,
    ServerProcess,
    Store,
    bench_folder,
    fresh_store,
    running_stepstate,
)
from benchmarks.sessions import AT_ONCE, STEPPED_AT_ONCE, SessionGroup, Timing

MIB = 2**20


@dataclass(frozen=True, slots=True)
class ResidencyPlan:
    """More open sessions than slots, opened at once and stepped in random order."""

    store: str = option("sqlite", click.Choice(DURABLE), "Where spilled sessions are.")
    sessions: int = option(200_000, click.IntRange(1, MAX_IDLE), "Sessions that are open.")
    slots: int = option(10_000, click.IntRange(1, MAX_IDLE), "How many of them fit in memory.")
    durability: str = option("async", click.Choice(DURABILITIES), "Durability of the sessions.")
    rounds: int = option(2, click.IntRange(1, 100), "How often each is stepped.")


@dataclass(frozen=True, slots=True)
class _Phase:
    """What was done with every session, and what it took."""

    what: str
    seconds: float
    sessions_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu_us_per_session: float
    spills: int
    restores: int
    resident_bytes: int
    """Memory of the server at its end."""
    file_bytes: int
    """Files of the store at its end."""


@dataclass(frozen=True, slots=True)
class _Watch:
    """The server and its store, before and after."""

    server: ServerProcess
    store: Store

    def during(self, what: str, work: Callable[[str], Timing]) -> _Phase:
        """Does something with every session, and says what it took."""
        before, used_before = counters(self.server.metrics_url), cpu_seconds(self.server.pid)
        taken = work(self.server.address)
        counted = counters(self.server.metrics_url) - before
        used = cpu_seconds(self.server.pid) - used_before
        count = len(taken.latencies)
        p50, p99 = np.percentile(taken.latencies, [50, 99]) * 1e3
        return _Phase(
            what=what,
            seconds=taken.seconds,
            sessions_per_second=count / taken.seconds,
            p50_ms=float(p50),
            p99_ms=float(p99),
            max_ms=float(taken.latencies.max() * 1e3),
            cpu_us_per_session=used / count * 1e6,
            spills=counted["stepstate_session_spills_total"],
            restores=counted["stepstate_session_restores_total"],
            resident_bytes=resident_bytes(self.server.pid),
            file_bytes=self.store.file_bytes(),
        )


def residency(plan: ResidencyPlan, log: Callable[[str], None]) -> Report:
    """Opens the sessions concurrently, then steps all of them in random order, some times.

    Raises:
        BenchError: the server does not start, refuses a step, or answers it wrongly.
    """
    check_proc()
    with bench_folder() as folder, fresh_store(plan.store, folder) as store:
        slots = ("--slots", str(plan.slots))
        with running_stepstate(folder, store.url, *slots) as server:
            watch, group = _Watch(server, store), SessionGroup(plan.sessions, plan.durability)
            empty_bytes = resident_bytes(server.pid)
            phases = [watch.during("opened", group.open)]
            log(f"opened {plan.sessions:,} at {phases[-1].sessions_per_second:,.0f}/s")
            for number in range(1, plan.rounds + 1):
                phases.append(watch.during(f"stepped, round {number}", group.step))
                log(f"round {number} of {plan.rounds}: {phases[-1].sessions_per_second:,.0f}/s")
        return _report(plan, store, empty_bytes, phases)


def _report(
    plan: ResidencyPlan, store: Store, empty_bytes: int, phases: Sequence[_Phase]
) -> Report:
    return Report(
        workload=(
            f"{DESCRIPTION}; {plan.sessions:,} {plan.durability} sessions with {plan.slots:,} "
            f"slots; {store.description}; one Python client on the same machine: {AT_ONCE} calls "
            f"to open, then one row for each session in random order on one stream, at most "
            f"{STEPPED_AT_ONCE} on their way"
        ),
        heads=(
            *("what", "seconds", "sessions/s", "p50 ms", "p99 ms", "most ms", "CPU µs"),
            *("spills", "restores", "memory MiB", "files MiB"),
        ),
        rows=[_row(phase) for phase in phases],
        notes=(
            f"Memory is the server's: {empty_bytes / MIB:,.0f} MiB before the first session. CPU",
            "is the server's, for one session. Every output was compared with those of the other",
            "sessions at the same t.",
        ),
        results={"empty_bytes": empty_bytes, "phases": [asdict(phase) for phase in phases]},
    )


def _row(phase: _Phase) -> tuple[str, ...]:
    return (
        phase.what,
        f"{phase.seconds:,.1f}",
        f"{phase.sessions_per_second:,.0f}",
        f"{phase.p50_ms:.1f}",
        f"{phase.p99_ms:.1f}",
        f"{phase.max_ms:.0f}",
        f"{phase.cpu_us_per_session:.0f}",
        f"{phase.spills:,}",
        f"{phase.restores:,}",
        f"{phase.resident_bytes / MIB:,.0f}",
        f"{phase.file_bytes / MIB:,.0f}",
    )
