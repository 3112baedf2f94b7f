"""What to measure and what was measured, as plain values, and the summary of rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import click

from benchmarks import BenchError
from benchmarks.load import CallPath
from benchmarks.options import MAX_SESSIONS, option, whole_numbers

PERCENTILES = (1, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 100)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of load."""

    path: CallPath
    sessions: int
    rows: int
    """Of a message."""
    rate: float | None = None
    """Steps a second that are due; None: closed loop."""
    connections: int = 1
    """Of each client."""

    def __str__(self) -> str:
        packed = f", {self.rows} rows a message" if self.path is CallPath.PACKED else ""
        paced = "" if self.rate is None else f", {self.rate:g} steps/s due"
        spread = f", {self.connections} connections" if self.connections > 1 else ""
        return f"{self.path.value}, sessions {self.sessions}{packed}{paced}{spread}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run."""

    sessions: tuple[int, ...] = option(
        "1,16,64,256", whole_numbers(MAX_SESSIONS), "Numbers of sessions that step, in turn."
    )
    seconds: float = option(3.0, click.FloatRange(0.1, 3600.0), "The measured window of a round.")
    warm_up: float = option(1.0, click.FloatRange(0.0, 3600.0), "Seconds before the window.")
    rounds: int = option(3, click.IntRange(1, 100), "Rounds of each; the median is printed.")
    processes: int = option(1, click.IntRange(1, 64), "Clients, which share the sessions.")
    paths: tuple[CallPath, ...] = (CallPath.STREAM,)
    rows: tuple[int, ...] = (64,)
    """Of a packed message."""
    in_flight: int = 2
    """Packed messages of a process that are unanswered at once, in closed loop."""
    rates: tuple[float, ...] = ()
    """Steps a second in all, in turn; none: closed loop."""

    def cases(self) -> list[Case]:
        """Every load, in turn.

        Packed messages hold rows of as many sessions as the most of the other paths, or of
        more, so that those in flight have different ones.

        Raises:
            BenchError: packed messages would need more sessions than a server keeps.
        """
        loads = [load for path in self.paths for load in self._loads(path)]
        rates = self.rates or (None,)
        return [Case(*load, rate) for load in loads for rate in rates]

    def _loads(self, path: CallPath) -> list[tuple[CallPath, int, int]]:
        if path is not CallPath.PACKED:
            return [(path, sessions, 1) for sessions in self.sessions]
        return [(path, max(self._needed(rows), *self.sessions), rows) for rows in self.rows]

    def _needed(self, rows: int) -> int:
        """As many sessions as the packed messages in flight have rows."""
        needed = rows * self.in_flight * self.processes
        if needed > MAX_SESSIONS:
            raise BenchError(
                f"{rows} rows × {self.in_flight} messages in flight × {self.processes} "
                f"processes are more than {MAX_SESSIONS:,} sessions: give less of one"
            )
        return needed


@dataclass(frozen=True, slots=True)
class Measurement:
    """One window of one server, or one run of the bare forward."""

    steps: int
    """Answered within it."""
    steps_per_second: float
    latency_ms: dict[str, float]
    """Of a message, by percentile; empty for the bare forward."""
    cpu_us_per_step: float
    """The server's, all its threads, in user and kernel mode."""
    store_cpu_us_per_step: float = 0.0
    """The same of its store's process, if it has one of its own here."""
    counted: int = 0
    """Whose latencies these are: at a fixed rate those that were due within it."""
    unanswered: int = 0
    """At a fixed rate: steps that were due and still not answered long after the window."""

    @property
    def p50_ms(self) -> float:
        """The median latency."""
        return self.latency_ms["50"]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float


Figure = Callable[[Measurement], float]


def rate_of(measured: Measurement) -> float:
    """Steps a second."""
    return measured.steps_per_second


def p50_of(measured: Measurement) -> float:
    """The median latency."""
    return measured.p50_ms


def p99_of(measured: Measurement) -> float:
    """The 99th percentile of latency."""
    return measured.latency_ms["99"]


def cpu_of(measured: Measurement) -> float:
    """The server's CPU time a step."""
    return measured.cpu_us_per_step


@dataclass(frozen=True, slots=True)
class Matchup:
    """The rounds of a contender, each with that of the baseline just before it."""

    name: str
    baseline: tuple[Measurement, ...]
    measured: tuple[Measurement, ...]

    @property
    def rate_ratio(self) -> Spread:
        """Its steps a second over the baseline's, round by round."""
        return ratio(self.measured, self.baseline, rate_of)

    @property
    def p50_ratio(self) -> Spread:
        """Its median latency over the baseline's, round by round."""
        return ratio(self.measured, self.baseline, p50_of)

    @property
    def cpu_ratio(self) -> Spread:
        """Its server's CPU time a step over that of the baseline's, round by round."""
        return ratio(self.measured, self.baseline, cpu_of)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rounds of one case."""

    case: Case
    baseline: str
    matchups: tuple[Matchup, ...]
    forward: tuple[Measurement, ...] = ()
    """The bare forward, after each round, if it was run."""

    @property
    def baseline_rounds(self) -> tuple[Measurement, ...]:
        """Those of the baseline, of all matchups."""
        return tuple(measured for matchup in self.matchups for measured in matchup.baseline)


def ratio(measured: Sequence[Measurement], baseline: Sequence[Measurement], of: Figure) -> Spread:
    """A figure over the baseline's, round by round."""
    return spread(of(one) / of(base) for one, base in zip(measured, baseline, strict=True))


def spread(values: Iterable[float]) -> Spread:
    """Median, least and most."""
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1])


def median_round(rounds: Sequence[Measurement]) -> Measurement:
    """The middle one by rate; of two the slower."""
    ordered = sorted(rounds, key=rate_of)
    return ordered[(len(ordered) - 1) // 2]
