"""What open and idle sessions cost: rate of active sessions, memory, opening and closing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks import BenchError
from benchmarks.clients import Clients, running_clients
from benchmarks.idle import IdleSessions
from benchmarks.load import CallPath
from benchmarks.models import DESCRIPTION, INPUTS
from benchmarks.options import MAX_IDLE, option, whole_numbers
from benchmarks.procstat import check_proc, cpu_seconds, resident_bytes, series
from benchmarks.report import Report, spread_text
from benchmarks.results import (
    Case,
    Matchup,
    Measurement,
    Plan,
    Spread,
    median_round,
    p99_of,
    rate_of,
    ratio,
)
from benchmarks.runner import Target, measure, opened_sessions
from benchmarks.servers import STORES, ServerProcess, bench_folder, fresh_store, running_stepstate
from benchmarks.sessions import AT_ONCE, SessionOptions
from stepstate.config import ServerConfig

FEW = 1_000
"""Idle sessions of the server that the others are compared with."""
CLOSED = 100_000
"""At most so many are closed: more would show nothing new."""
SETTLE_SECONDS = 600.0
"""Time for a store to save them all."""
REPLAY_BYTES = ServerConfig().replay_rows * (4 * (INPUTS + 1) + 8)
"""Of a session's replay window: rows of x and y, and the t of each."""
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """What idle sessions cost: memory, opening, closing, the rate of active sessions."""

    sessions: tuple[int, ...] = option(
        "1000,10000,100000", whole_numbers(MAX_IDLE), "Numbers of open and idle sessions, in turn."
    )
    store: str = option("memory", click.Choice(STORES), "Where they are kept.")
    active: int = option(64, click.IntRange(1, 10_000), "Sessions that are stepped beside them.")
    seconds: float = option(3.0, click.FloatRange(0.1, 3600.0), "The measured window of a round.")
    rounds: int = option(3, click.IntRange(1, 100), "Rounds of each; the median is printed.")
    processes: int = option(2, click.IntRange(1, 64), "Clients that open and close sessions.")

    @property
    def load(self) -> Plan:
        """The load of the active sessions."""
        return Plan(
            sessions=(self.active,),
            seconds=self.seconds,
            warm_up=1.0,
            rounds=self.rounds,
            processes=1,
        )


@dataclass(frozen=True, slots=True)
class _Turnover:
    """What opening or closing sessions took."""

    sessions: int
    seconds: float
    cpu_us_per_session: float
    """The server's."""

    @property
    def per_second(self) -> float:
        return self.sessions / self.seconds


@dataclass(frozen=True, slots=True)
class _Memory:
    """Memory of a server with idle sessions that were stepped once."""

    resident_bytes: int
    """Of the process."""
    state_bytes: float
    """Of one session's state."""
    replay_bytes: int
    """Of one session's replay window."""
    beyond_bytes: float | None
    """What each session beyond `FEW` takes more than these; None: there are only `FEW`."""


@dataclass(frozen=True, slots=True)
class _Level:
    """One number of idle sessions."""

    sessions: int
    opened: _Turnover
    closed: _Turnover
    memory: _Memory
    matchup: Matchup
    """The active sessions, beside those of the server with few."""

    @property
    def p99_ratio(self) -> Spread:
        return ratio(self.matchup.measured, self.matchup.baseline, p99_of)


def scale(plan: ScalePlan, log: Callable[[str], None]) -> Report:
    """Opens more and more sessions, and steps some beside them and beside few, in turn.

    Raises:
        BenchError: a server does not start, refuses something, or breaks off.
    """
    check_proc()
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        stepper = stack.enter_context(running_clients(1))
        openers = stack.enter_context(running_clients(plan.processes))
        few = stack.enter_context(_host(plan, folder, FEW))
        _fill(IdleSessions(FEW, few.server.address, openers), few.server)
        few_bytes = resident_bytes(few.server.pid)
        scaled = _Scale(plan, folder, log, stepper, openers, few, few_bytes)
        return _report(plan, [scaled.level(sessions) for sessions in plan.sessions])


@contextmanager
def _host(plan: ScalePlan, folder: Path, sessions: int) -> Iterator[Target]:
    """A server with room for idle and active sessions, and no more."""
    room = str(sessions + plan.active)
    options = ("--slots", room, "--max-sessions", room)
    with (
        fresh_store(plan.store, folder) as store,
        running_stepstate(folder, store.url, *options) as server,
    ):
        yield Target(f"{sessions} idle", server)


def _fill(idle: IdleSessions, server: ServerProcess) -> _Turnover:
    """Opens sessions and steps each once, so that its replay window is used."""
    opened = _turnover(server, len(idle.names), lambda: idle.open(SessionOptions()))
    idle.step()
    deadline = time.monotonic() + SETTLE_SECONDS
    while series(server.metrics_url, "stepstate_snapshot_backlog_rows"):
        if time.monotonic() > deadline:
            raise BenchError(f"the store did not save all sessions within {SETTLE_SECONDS:g} s")
        time.sleep(0.5)
    return opened


def _turnover(server: ServerProcess, sessions: int, work: Callable[[], float]) -> _Turnover:
    used = cpu_seconds(server.pid)
    seconds = work()
    return _Turnover(sessions, seconds, (cpu_seconds(server.pid) - used) / sessions * 1e6)


@dataclass(frozen=True, slots=True)
class _Scale:
    plan: ScalePlan
    folder: Path
    log: Callable[[str], None]
    stepper: Clients
    openers: Clients
    few: Target
    few_bytes: int
    """Memory of the server with few sessions."""

    def level(self, sessions: int) -> _Level:
        with _host(self.plan, self.folder, sessions) as many:
            idle = IdleSessions(sessions, many.server.address, self.openers)
            opened = _fill(idle, many.server)
            memory = self._memory(many.server, sessions)
            self.log(
                f"{sessions:,} sessions opened at {opened.per_second:,.0f}/s, "
                f"{memory.resident_bytes / _MIB:,.0f} MiB"
            )
            matchup = self._matchup(many)
            leaving = idle.first(CLOSED)
            closed = _turnover(many.server, len(leaving.names), leaving.close)
            self.log(f"{len(leaving.names):,} closed at {closed.per_second:,.0f}/s")
            return _Level(sessions, opened, closed, memory, matchup)

    def _memory(self, server: ServerProcess, sessions: int) -> _Memory:
        resident = resident_bytes(server.pid)
        state = series(server.metrics_url, "stepstate_state_bytes") / sessions
        beyond = None
        if sessions > FEW:
            each = (resident - self.few_bytes) / (sessions - FEW)
            beyond = each - state - REPLAY_BYTES
        return _Memory(resident, state, REPLAY_BYTES, beyond)

    def _matchup(self, many: Target) -> Matchup:
        """Windows of the active sessions beside few and beside many, in turn."""
        before: list[Measurement] = []
        measured: list[Measurement] = []
        for number in range(1, self.plan.rounds + 1):
            before.append(self._window(self.few))
            measured.append(self._window(many))
            self.log(
                f"round {number} of {self.plan.rounds}: beside {FEW:,} "
                f"{rate_of(before[-1]):,.0f}/s, beside {many.name} {rate_of(measured[-1]):,.0f}/s"
            )
        return Matchup(many.name, tuple(before), tuple(measured))

    def _window(self, target: Target) -> Measurement:
        case = Case(CallPath.STREAM, self.plan.active, 1)
        with opened_sessions(target, case.sessions) as names:
            return measure(self.plan.load, target, self.stepper, case, names)


def _report(plan: ScalePlan, levels: Sequence[_Level]) -> Report:
    return Report(
        workload=(
            f"{DESCRIPTION}; store {plan.store}; idle sessions, opened by {plan.processes} Python "
            f"process(es) with {AT_ONCE} calls on their way each and stepped once; beside them "
            f"{plan.active} active ones in closed loop, one stream a session, one row a message; "
            f"{plan.rounds} round(s) of {plan.seconds:g} s after 1 s of warm-up, in turn with a "
            f"server that has {FEW:,} idle sessions"
        ),
        heads=(
            *("idle sessions", "opened/s", "CPU µs an open", "closed/s", "CPU µs a close"),
            *("memory MiB", "state + replay B", "beyond B", "steps/s", f"rate ÷ {FEW:,}'s"),
            f"p99 ÷ {FEW:,}'s",
        ),
        rows=[_row(level) for level in levels],
        notes=(
            "CPU is the server's. Memory is its process's; beyond is what a session takes more",
            f"than its state and replay window, over the server with {FEW:,}. Ratios are medians",
            "(least–most) of the rounds.",
        ),
        results=[_result(level) for level in levels],
    )


def _row(level: _Level) -> tuple[str, ...]:
    memory = level.memory
    beyond = memory.beyond_bytes
    return (
        f"{level.sessions:,}",
        f"{level.opened.per_second:,.0f}",
        f"{level.opened.cpu_us_per_session:.0f}",
        f"{level.closed.per_second:,.0f}",
        f"{level.closed.cpu_us_per_session:.0f}",
        f"{memory.resident_bytes / _MIB:,.0f}",
        f"{memory.state_bytes + memory.replay_bytes:,.0f}",
        "–" if beyond is None else f"{beyond:,.0f}",
        f"{median_round(level.matchup.measured).steps_per_second:,.0f}",
        spread_text(level.matchup.rate_ratio),
        spread_text(level.p99_ratio),
    )


def _result(level: _Level) -> dict[str, object]:
    return {
        **asdict(level),
        "rate_ratio": asdict(level.matchup.rate_ratio),
        "p99_ratio": asdict(level.p99_ratio),
    }
