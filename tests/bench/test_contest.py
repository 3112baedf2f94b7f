"""Contenders in turn, and the tables of what they did."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from benchmarks.contest import (
    Bar,
    Contest,
    Quantity,
    Results,
    bars_table,
    results_table,
    run_contest,
)
from benchmarks.results import Measurement


def measured(rate: float, **latency_ms: float) -> Measurement:
    names = {name.removeprefix("p"): value for name, value in latency_ms.items()}
    return Measurement(round(rate), rate, names, cpu_us_per_step=1e6 / rate)


ECHO = [measured(10_000, p50=1.0, p99=4.0), measured(8_000, p50=2.0, p99=5.0)]
STEPS = [measured(5_000, p50=3.0, p99=6.0), measured(6_000, p50=2.5, p99=9.0)]
FOUND = Results("64 streams", {"echo": ECHO, "steps": STEPS, "forward": [measured(90_000)]})


def test_contenders_are_measured_in_turn_and_every_other_round_in_reverse():
    order = count()

    def counting() -> Callable[[], Measurement]:
        return lambda: measured(1.0 + next(order))

    lines: list[str] = []
    found = run_contest(Contest("any", {"a": counting(), "b": counting()}), 2, lines.append)
    rates = {name: [one.steps_per_second for one in found.rounds[name]] for name in "ab"}
    assert rates == {"a": [1.0, 4.0], "b": [2.0, 3.0]}
    assert lines == ["any, round 1 of 2: a 1/s, b 2/s", "any, round 2 of 2: a 4/s, b 3/s"]


def test_a_line_has_the_spread_of_the_rates_and_the_ratios_within_rounds():
    echo, steps, _ = results_table(
        [Results("64 streams", {**FOUND.rounds, "forward": STEPS})], "echo"
    ).rows
    assert echo == ["64 streams", "echo", "9,000 (8,000–10,000)", "2.00", "5.00", "125.0", "–", "–"]
    assert steps[2:] == [
        "5,500 (5,000–6,000)",
        "3.00",
        "6.00",
        "200.0",
        "0.62 (0.50–0.75)",
        "1.67 (1.33–2.00)",
    ]


def test_what_has_no_latency_or_baseline_is_left_open():
    rows = results_table([Results("packed", {"forward": [measured(90_000)]})], "echo").rows
    assert rows == [["packed", "forward", "90,000 (90,000–90,000)", "–", "–", "11.1", "–", "–"]]


def test_a_bar_is_measured_where_both_took_part():
    bars = [
        Bar("64 streams", "steps", "echo", 0.5, 0.7),
        Bar("64 streams", "steps", "another", 1.0, 1.0),
        Bar("256 streams", "steps", "echo", 1.0, 1.0),
    ]
    (row,) = bars_table([FOUND], bars).rows
    measured, cpu = "0.62 (0.50–0.75)", "1.67 (1.33–2.00)"
    what = ["64 streams", "steps ÷ echo", "steps/s"]
    assert row == [*what, "≥ 0.5", "≥ 0.7", measured, "bar", cpu]


@pytest.mark.parametrize(
    ("bar", "ambition", "quantity", "reached"),
    [
        (0.5, 0.6, Quantity.RATE, "ambition"),
        (0.6, 0.7, Quantity.RATE, "bar"),
        (0.7, 0.8, Quantity.RATE, "missed"),
        (3.0, 2.2, Quantity.P50, "ambition"),
        (2.2, 2.0, Quantity.P50, "bar"),
        (1.6, 1.2, Quantity.CPU, "missed"),
    ],
)
def test_a_bar_says_what_the_median_reaches(
    bar: float, ambition: float, quantity: Quantity, reached: str
):
    wanted = Bar("64 streams", "steps", "echo", bar, ambition, quantity)
    (row,) = bars_table([FOUND], [wanted]).rows
    assert row[6] == reached
