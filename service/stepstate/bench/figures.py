"""What was asked for and what was measured: plain values, and how rounds are summed up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    sessions: tuple[int, ...]
    seconds: float
    rounds: int
    processes: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One window of one server."""

    messages: int
    messages_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_message: float
    """The server's, all its threads, in user and kernel mode."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rounds with one number of sessions; those of one place followed one another."""

    sessions: int
    echo: tuple[Measurement, ...]
    step: tuple[Measurement, ...]

    @property
    def rate_ratio(self) -> Spread:
        """Steps a second over echoes a second, round by round."""
        return self._ratio(lambda measured: measured.messages_per_second)

    @property
    def p50_ratio(self) -> Spread:
        """Median latency of a step over that of an echo, round by round."""
        return self._ratio(lambda measured: measured.p50_ms)

    def _ratio(self, figure: Callable[[Measurement], float]) -> Spread:
        pairs = zip(self.echo, self.step, strict=True)
        ratios = [figure(step) / figure(echo) for echo, step in pairs]
        return Spread(statistics.median(ratios), min(ratios), max(ratios))


def median_round(rounds: Sequence[Measurement]) -> Measurement:
    """The middle one by rate; of two the slower."""
    ordered = sorted(rounds, key=lambda measured: measured.messages_per_second)
    return ordered[(len(ordered) - 1) // 2]
