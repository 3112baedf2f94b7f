"""The report of a comparison with a baseline, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from benchmarks.load import CallPath
from benchmarks.models import DESCRIPTION
from benchmarks.report import Report, spread_text
from benchmarks.results import (
    Case,
    Comparison,
    Figure,
    Matchup,
    Measurement,
    cpu_of,
    median_round,
    p50_of,
    rate_of,
    ratio,
)
from benchmarks.runner import forward_rows
from benchmarks.sender import GRACE_SECONDS

SHOWN = ("50", "90", "99", "99.9")
"""The percentiles of the table; --json has more."""


def comparison_report(comparisons: Sequence[Comparison], what: str) -> Report:
    """The report of what `runner.run` measured, with a line for each contender.

    Args:
        comparisons: at least one.
        what: the load, in words.
    """
    baseline = comparisons[0].baseline
    columns = [column for column in _columns(baseline) if column.wanted(comparisons)]
    return Report(
        workload=f"{DESCRIPTION}; {what}",
        heads=[column.head for column in columns],
        rows=[
            [column.cell(line) for column in columns]
            for compared in comparisons
            for line in _lines(compared)
        ],
        notes=_notes(comparisons),
        results=[_result(compared) for compared in comparisons],
    )


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the table: the rounds of the baseline, of a contender or of the forward."""

    case: Case
    name: str
    rounds: Sequence[Measurement]
    baseline: Sequence[Measurement]
    """Empty: it is the baseline itself, or is not compared with it."""
    forward: Sequence[Measurement]

    @property
    def median(self) -> Measurement:
        return median_round(self.rounds)


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    cell: Callable[[_Line], str]
    wanted: Callable[[Sequence[Comparison]], bool] = lambda _: True


def _columns(baseline: str) -> list[_Column]:
    return [
        _Column("path", lambda line: line.case.path.value, _has_forward),
        _Column("sessions", lambda line: str(line.case.sessions)),
        _Column("rows", lambda line: str(line.case.rows), _has_rows),
        _Column("due/s", lambda line: f"{line.case.rate or 0:,.0f}", _has_rates),
        _Column("what", lambda line: line.name),
        _Column("steps/s", lambda line: f"{line.median.steps_per_second:,.0f}"),
        *(_Column(f"p{name} ms", partial(_latency, name)) for name in SHOWN),
        _Column("CPU µs", lambda line: f"{line.median.cpu_us_per_step:.1f}"),
        _Column("store's CPU µs", _store_cpu, _has_store_cpu),
        _Column(f"rate ÷ {baseline}'s", partial(_ratio, rate_of)),
        _Column(f"p50 ÷ {baseline}'s", partial(_ratio, p50_of)),
        _Column(f"CPU ÷ {baseline}'s", partial(_ratio, cpu_of)),
        _Column("rate ÷ forward's", partial(_forward_ratio, rate_of), _has_forward),
        _Column("CPU ÷ forward's", partial(_forward_ratio, cpu_of), _has_forward),
    ]


def _lines(compared: Comparison) -> Iterator[_Line]:
    case, forward = compared.case, compared.forward
    yield _Line(case, compared.baseline, compared.baseline_rounds, (), ())
    for matchup in compared.matchups:
        yield _Line(case, matchup.name, matchup.measured, matchup.baseline, forward)
    if forward:
        yield _Line(case, f"forward of {forward_rows(case)}", forward, (), ())


def _latency(percentile: str, line: _Line) -> str:
    found = line.median.latency_ms.get(percentile)
    if found is None:
        return "–"
    # Steps without a reply are counted with the time that they waited: a lower bound.
    return f"≥ {found:.3f}" if line.median.unanswered else f"{found:.3f}"


def _store_cpu(line: _Line) -> str:
    used = line.median.store_cpu_us_per_step
    return f"{used:.1f}" if used else "–"


def _ratio(of: Figure, line: _Line) -> str:
    return spread_text(ratio(line.rounds, line.baseline, of)) if line.baseline else "–"


def _forward_ratio(of: Figure, line: _Line) -> str:
    return spread_text(ratio(line.rounds, line.forward, of)) if line.forward else "–"


def _has_rows(comparisons: Sequence[Comparison]) -> bool:
    return any(compared.case.path is CallPath.PACKED for compared in comparisons)


def _has_rates(comparisons: Sequence[Comparison]) -> bool:
    return comparisons[0].case.rate is not None


def _has_forward(comparisons: Sequence[Comparison]) -> bool:
    return bool(comparisons[0].forward)


def _has_store_cpu(comparisons: Sequence[Comparison]) -> bool:
    matchups = (matchup for compared in comparisons for matchup in compared.matchups)
    return any(one.store_cpu_us_per_step for matchup in matchups for one in matchup.measured)


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    baseline = comparisons[0].baseline
    notes = [
        "CPU is the server's, for one step. Latency is a message's. Figures are those of the",
        "median round by rate; a ratio is the median (least–most) of the rounds, each over the",
        f"window of {baseline} just before it.",
    ]
    if _has_store_cpu(comparisons):
        notes.append("The store's CPU is shown where the benchmark started a process for it.")
    if comparisons[0].forward:
        notes.append("The bare forward is gather, cell and scatter of so many rows in one thread.")
    late = sum(
        one.unanswered
        for compared in comparisons
        for matchup in compared.matchups
        for one in (*matchup.baseline, *matchup.measured)
    )
    if late:
        notes.append(
            f"{late:,} steps that were due had no reply {GRACE_SECONDS:g} s after their window: "
            "the rate is more than can be answered."
        )
    return notes


def _result(compared: Comparison) -> dict[str, object]:
    return {
        "path": compared.case.path.value,
        "sessions": compared.case.sessions,
        "rows": compared.case.rows,
        "rate": compared.case.rate,
        "baseline": {
            "name": compared.baseline,
            "median_round": asdict(median_round(compared.baseline_rounds)),
        },
        "matchups": [
            {
                **asdict(matchup),
                "median_round": asdict(median_round(matchup.measured)),
                "rate_ratio": asdict(matchup.rate_ratio),
                "p50_ratio": asdict(matchup.p50_ratio),
                "cpu_ratio": asdict(matchup.cpu_ratio),
                **_forward_ratios(compared, matchup),
            }
            for matchup in compared.matchups
        ],
        "forward": [asdict(each) for each in compared.forward],
    }


def _forward_ratios(compared: Comparison, matchup: Matchup) -> dict[str, object]:
    if not compared.forward:
        return {}
    return {
        "forward_rate_ratio": asdict(ratio(matchup.measured, compared.forward, rate_of)),
        "forward_cpu_ratio": asdict(ratio(matchup.measured, compared.forward, cpu_of)),
    }
