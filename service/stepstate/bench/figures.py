"""What was asked for and what was measured: plain values, and how rounds are summed up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    sessions: tuple[int, ...]
    seconds: float
    rounds: int
    processes: int

    @property
    def options(self) -> str:
        """It, as options of the command."""
        sessions = ",".join(map(str, self.sessions))
        return (
            f"--sessions {sessions} --seconds {self.seconds:g} "
            f"--rounds {self.rounds} --processes {self.processes}"
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """One window of one server."""

    messages: int
    messages_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_message: float
    """The server's, all its threads, in user and kernel mode."""
    store_cpu_us_per_message: float
    """The same of its store's process, if it has one of its own here."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Contest:
    """The rounds of a contender, each with that of the baseline just before it."""

    name: str
    baseline: tuple[Measurement, ...]
    measured: tuple[Measurement, ...]

    @property
    def rate_ratio(self) -> Spread:
        """Its messages a second over the baseline's, round by round."""
        return self._ratio(lambda measured: measured.messages_per_second)

    @property
    def p50_ratio(self) -> Spread:
        """Its median latency over the baseline's, round by round."""
        return self._ratio(lambda measured: measured.p50_ms)

    @property
    def cpu_ratio(self) -> Spread:
        """Its server's CPU time a message over that of the baseline's, round by round."""
        return self._ratio(lambda measured: measured.cpu_us_per_message)

    def _ratio(self, figure: Callable[[Measurement], float]) -> Spread:
        pairs = zip(self.baseline, self.measured, strict=True)
        return spread([figure(measured) / figure(baseline) for baseline, measured in pairs])


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rounds with one number of sessions."""

    sessions: int
    baseline: str
    contests: tuple[Contest, ...]

    @property
    def baseline_rounds(self) -> tuple[Measurement, ...]:
        """Those of the baseline, of all contests."""
        return tuple(measured for contest in self.contests for measured in contest.baseline)


def spread(values: Iterable[float]) -> Spread:
    """Median, least and most."""
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1])


def median_round(rounds: Sequence[Measurement]) -> Measurement:
    """The middle one by rate; of two the slower."""
    ordered = sorted(rounds, key=lambda measured: measured.messages_per_second)
    return ordered[(len(ordered) - 1) // 2]
