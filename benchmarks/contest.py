"""Several contenders under the same loads, in turn, and the tables of what they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum

from benchmarks.report import Report, Table, spread_text
from benchmarks.results import (
    Figure,
    Measurement,
    cpu_of,
    median_round,
    p50_of,
    rate_of,
    ratio,
    spread,
)


@dataclass(frozen=True, slots=True)
class Contest:
    """A load, and what measures each contender under it."""

    load: str
    contenders: Mapping[str, Callable[[], Measurement]]


@dataclass(frozen=True, slots=True)
class Results:
    """What was measured under a load: the rounds of each contender."""

    load: str
    rounds: Mapping[str, Sequence[Measurement]]

    def ratio_text(self, contender: str, baseline: str, of: Figure) -> str:
        """A figure over that of another, round by round, if both took part."""
        if contender == baseline or not {contender, baseline} <= self.rounds.keys():
            return "–"
        return spread_text(ratio(self.rounds[contender], self.rounds[baseline], of))


def run_contest(contest: Contest, rounds: int, log: Callable[[str], None]) -> Results:
    """Measures every contender in each round; every other round begins with the last of them."""
    found: dict[str, list[Measurement]] = {name: [] for name in contest.contenders}
    for number in range(1, rounds + 1):
        order = list(contest.contenders)[:: 1 if number % 2 else -1]
        for name in order:
            found[name].append(contest.contenders[name]())
        rates = (f"{name} {rate_of(measured[-1]):,.0f}/s" for name, measured in found.items())
        log(f"{contest.load}, round {number} of {rounds}: {', '.join(rates)}")
    return Results(contest.load, found)


def contest_report(
    workload: str, results: Sequence[Results], *, baseline: str, bars: Sequence[Bar]
) -> Report:
    """The figures of all loads, and what of the bars was reached.

    Args:
        workload: what was run.
        results: of all loads.
        baseline: the contender that the others are compared with.
        bars: what has to be reached.
    """
    table = results_table(results, baseline)
    return Report(
        workload=workload,
        heads=table.heads,
        rows=table.rows,
        notes=table.notes,
        results=as_figures(results),
        more=(bars_table(results, bars),),
    )


def results_table(results: Sequence[Results], baseline: str) -> Table:
    """A line for each contender under each load.

    Args:
        results: of all loads.
        baseline: the contender that the others are compared with.
    """
    ratios = (f"rate ÷ {baseline}'s", f"CPU ÷ {baseline}'s")
    heads = ("load", "what", "steps/s", "p50 ms", "p99 ms", "CPU µs", *ratios)
    notes = (
        "CPU is the server's, for one step. Latency is a message's. Rates and ratios are medians",
        "(least–most) of the rounds, a ratio within its round; all else is of the median round by",
        "rate. The bare forward is gather, cell and scatter of so many rows in one thread.",
    )
    return Table(heads, [row for found in results for row in _rows(found, baseline)], notes)


def _rows(found: Results, baseline: str) -> Iterator[list[str]]:
    for name, rounds in found.rounds.items():
        middle = median_round(rounds)
        yield [
            found.load,
            name,
            spread_text(spread(map(rate_of, rounds)), 0),
            _latency(middle, "50"),
            _latency(middle, "99"),
            f"{middle.cpu_us_per_step:.1f}",
            found.ratio_text(name, baseline, rate_of),
            found.ratio_text(name, baseline, cpu_of),
        ]


def _latency(measured: Measurement, percentile: str) -> str:
    found = measured.latency_ms.get(percentile)
    return "–" if found is None else f"{found:.2f}"


class Quantity(Enum):
    """What a bar is about, and the side of the bar that is wanted."""

    RATE = ("steps/s", rate_of, "≥")
    CPU = ("server CPU a step", cpu_of, "≤")
    P50 = ("p50", p50_of, "≤")

    def __init__(self, title: str, of: Figure, side: str) -> None:
        self.title = title
        self.of = of
        self.side = side

    def meets(self, value: float, limit: float) -> bool:
        """Whether a figure is on the wanted side of a limit."""
        return value >= limit if self.side == "≥" else value <= limit


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure of a contender has to be, over that of a baseline."""

    load: str
    contender: str
    baseline: str
    bar: float
    ambition: float
    quantity: Quantity = Quantity.RATE

    def reached(self, value: float) -> str:
        """The best of both that a figure reaches, in a word."""
        for limit, word in ((self.ambition, "ambition"), (self.bar, "bar")):
            if self.quantity.meets(value, limit):
                return word
        return "missed"


def bars_table(results: Sequence[Results], bars: Sequence[Bar]) -> Table:
    """What has to be reached and what was, where both contenders took part."""
    by_load = {found.load: found for found in results}
    rows = [_bar_row(by_load[bar.load], bar) for bar in bars if _took_part(by_load, bar)]
    heads = ("load", "what", "figure", "bar", "ambition", "measured", "reached", "CPU, ratio")
    return Table(heads, rows, ())


def _took_part(by_load: Mapping[str, Results], bar: Bar) -> bool:
    found = by_load.get(bar.load)
    return found is not None and {bar.contender, bar.baseline} <= found.rounds.keys()


def _bar_row(found: Results, bar: Bar) -> list[str]:
    quantity = bar.quantity
    measured = ratio(found.rounds[bar.contender], found.rounds[bar.baseline], quantity.of)
    return [
        bar.load,
        f"{bar.contender} ÷ {bar.baseline}",
        quantity.title,
        f"{quantity.side} {bar.bar:g}",
        f"{quantity.side} {bar.ambition:g}",
        spread_text(measured),
        bar.reached(measured.median),
        found.ratio_text(bar.contender, bar.baseline, cpu_of),
    ]


def as_figures(results: Sequence[Results]) -> list[dict[str, object]]:
    """Every figure of every round, for programs."""
    return [
        {
            "load": found.load,
            "rounds": {
                name: [asdict(one) for one in rounds] for name, rounds in found.rounds.items()
            },
        }
        for found in results
    ]
