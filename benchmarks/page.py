"""Measures what docs/benchmarks.md shows, and writes its tables and pictures, and README's table.

    python -m benchmarks.page measure          # all of it but the million, in some 25 minutes
    python -m benchmarks.page measure scale    # some of it
    python -m benchmarks.page render           # tables and pictures from what was measured

Every figure comes from the JSON files in docs/benchmarks/, which `python -m benchmarks --json`
writes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

from benchmarks.report import Machine, table

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
PAGE = DOCS / "benchmarks.md"
MEASURED = DOCS / "benchmarks"
IMAGES = DOCS / "images"

RUNS = {
    "transports": "transports --rounds 5",
    "profile": "profile",
    "engines": "engines",
    "stream": "steps --path stream --sessions 1,16,64,256,1000,10000 --processes 2 --seconds 2",
    "unary": "steps --path unary --sessions 1,64 --processes 2 --seconds 2",
    "packed": "steps --path packed --sessions 1 --rows 16,64,256 --seconds 2",
    "rates": "steps --path stream --sessions 64 --rate 500,2000,4000,8000 --seconds 2",
    "scale": "scale --sessions 1000,10000,100000 --seconds 2",
    "stored": "scale --sessions 1000,10000 --store sqlite --seconds 2",
    "sweeps": "sweeps --sessions 20000 --seconds 20",
    "priming": "priming --rounds 5",
    "million": "scale --sessions 1000000 --seconds 2",
}
BY_HAND = ("million",)
"""It takes longer than all others together, and 8 GiB."""

ECHO, STEPS, FORWARD = "#8a8a8a", "#0a7d8c", "#c4762b"
CONTENDERS = {
    "C++ echo": "#444444",
    "grpc.aio echo": ECHO,
    "lean echo": "#c9c9c9",
    "Stepstate lean": STEPS,
    "Stepstate grpcio": FORWARD,
}
"""Who takes part in `benchmarks transports`, and in which color."""
_STEPS, _FORWARD = "Stepstate lean", "bare forward of 256"
_README = {
    "1 stream": ("one row per message, one stream per session", "1"),
    "64 streams": ("", "64"),
    "256 streams": ("", "256"),
    "64 connections": ("the same, a connection per session", "64"),
}
"""Loads of README's table: the path and the sessions."""
_FIGURES = re.compile(r"(<!-- figures -->\n).*?(<!-- end -->)", re.DOTALL)
_SUMMARY = re.compile(r"(<!-- summary -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Results = Any


def measure(names: Sequence[str]) -> None:
    """Runs benchmarks, one after the other."""
    MEASURED.mkdir(exist_ok=True)
    for name in names:
        out = str(MEASURED / f"{name}.json")
        command = [sys.executable, "-m", "benchmarks", *RUNS[name].split()]
        subprocess.run([*command, "--json", out], check=True)


def rendered(page: str) -> str:
    """The page with its tables as they were measured last."""
    page = _SUMMARY.sub(lambda found: found[1] + _summary() + found[2], page)
    return _TABLE.sub(lambda found: found[1] + _section(found[2]) + found[3], page)


def _summary() -> str:
    """Everybody's steps/s and CPU time, a line for each load of all transports."""
    loads = _common_loads()
    rows = [[load["load"], *(_rate_and_cpu(load, name) for name in CONTENDERS)] for load in loads]
    return "\n".join(table(["load", *CONTENDERS], rows)) + "\n" if rows else "Not measured yet.\n"


def with_figures(readme: str) -> str:
    """README with its table as it was measured last."""
    return _FIGURES.sub(lambda found: found[1] + _figures() + found[2], readme)


def _figures() -> str:
    loads = {load["load"]: load for load in _results("transports")}
    rows = [
        [path, sessions, *_rate_and_p50(loads[name]), _echoes(loads[name])]
        for name, (path, sessions) in _README.items()
        if name in loads
    ]
    many = loads.get("packed, 256 rows")
    if many is not None:
        beside = f"the forward pass alone: {_median(many, _FORWARD, 'steps_per_second'):,.0f}"
        rows.append(["packed stream, 256 rows per message", "512", *_rate_and_p50(many), beside])
    lines = ["| path | sessions | steps/s | p50, ms | beside it, in the same run |"]
    lines += ["|---|---:|---:|---:|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n" if rows else "Not measured yet.\n"


def _rate_and_p50(load: Results) -> tuple[str, str]:
    rounds = load["rounds"][_STEPS]
    p50 = median(float(one["latency_ms"]["50"]) for one in rounds)
    return f"{_median(load, _STEPS, 'steps_per_second'):,.0f}", f"{p50:.2f}"


def _echoes(load: Results) -> str:
    rates = {
        what: f"{_median(load, name, 'steps_per_second'):,.0f}"
        for what, name in (("a `grpc.aio` echo", "grpc.aio echo"), ("an echo in C++", "C++ echo"))
        if name in load["rounds"]
    }
    return ", ".join(f"{what}: {rate}" for what, rate in rates.items())


def _common_loads() -> list[Results]:
    """The loads of `benchmarks transports` in which the echoes take part."""
    return [load for load in _results("transports") if "lean echo" in load["rounds"]]


def _rate_and_cpu(load: Results, name: str) -> str:
    if name not in load["rounds"]:
        return "–"
    rate = _median(load, name, "steps_per_second")
    return f"{rate:,.0f}/s, {_median(load, name, 'cpu_us_per_step'):.0f} µs"


def _median(load: Results, name: str, figure: str) -> float:
    return median(float(one[figure]) for one in load["rounds"][name])


def _section(name: str) -> str:
    path = MEASURED / f"{name}.json"
    if not path.exists():
        return "Not measured yet.\n"
    report = json.loads(path.read_text())
    machine = Machine(**report["machine"])
    lines = (
        f"`{report['command']}`, {report['date'][:10]}. {machine}. {report['workload']}.",
        "",
        *table(report["table"]["heads"], report["table"]["rows"]),
        "",
        " ".join(report["table"]["notes"]),
        *(
            line
            for more in report.get("more", ())
            for line in ("", *table(more["heads"], more["rows"]))
        ),
    )
    return "\n".join(lines) + "\n"


def draw() -> None:
    """Draws what was measured."""
    mpl.rcParams |= {"svg.hashsalt": "stepstate", "font.size": 9}
    for name, picture in (
        ("transports", _draw_transports),
        ("paths", _draw_paths),
        ("latency", _draw_latency),
        ("scale", _draw_scale),
    ):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        picture(*axes)
        for each in axes:
            each.spines[["top", "right"]].set_visible(False)
            each.grid(axis="y", alpha=0.3)
            _name(each.yaxis)
            if picture is not _draw_transports:  # both of its axes have the same bars
                each.legend(frameon=False)
        if picture is _draw_transports:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
        figure.savefig(IMAGES / f"bench-{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def _results(name: str) -> Results:
    path = MEASURED / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def _draw_transports(rate: Axes, cpu: Axes) -> None:
    """Bars: a group for each load."""
    found = _common_loads()
    width = 0.8 / len(CONTENDERS)
    for axes, figure, title in (
        (rate, "steps_per_second", "steps/s"),
        (cpu, "cpu_us_per_step", "CPU µs of the server for a step"),
    ):
        for place, (name, color) in enumerate(CONTENDERS.items()):
            heights = [_median(load, name, figure) for load in found if name in load["rounds"]]
            across = [group + width * place - 0.4 for group in range(len(heights))]
            axes.bar(across, heights, width, align="edge", color=color, label=name)
        axes.set_xticks(range(len(found)), [load["load"] for load in found], rotation=20)
        axes.set(yscale="log")
        axes.set_title(title)


def _draw_paths(single: Axes, packed: Axes) -> None:
    for name, style in (("stream", "o-"), ("unary", "s--")):
        found = _results(name)
        across = [case["sessions"] for case in found]
        for who, color in (("echo", ECHO), ("steps", STEPS)):
            rates = [_window(case, who)["steps_per_second"] for case in found]
            single.plot(across, rates, style, color=color, label=f"{name}, {who}")
    single.set(yscale="log", xlabel="sessions", ylabel="steps/s")
    _space(single, [case["sessions"] for case in _results("stream")])
    single.set_title("one row a message")
    found = _results("packed")
    across = [case["rows"] for case in found]
    for who, color in (("forward", FORWARD), ("steps", STEPS)):
        rates = [_window(case, who)["steps_per_second"] for case in found]
        label = {"forward": "bare forward", "steps": "packed stream"}[who]
        packed.plot(across, rates, "o-", color=color, label=label)
    packed.set(xlabel="rows a message", ylabel="steps/s", ylim=(0, None))
    _space(packed, across)
    packed.set_title("many rows a message")


def _name(axis: Axis) -> None:
    """Labels an axis with plain numbers; a logarithmic one at 1, 2 and 5."""
    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())


def _space(axes: Axes, across: Sequence[int]) -> None:
    """Makes a logarithmic axis, labelled at the measured values."""
    axes.set_xscale("log")
    axes.set_xticks(across, [f"{value:,}" for value in across])
    axes.minorticks_off()


def _window(case: Results, who: str) -> Results:
    """The median round of the echo, the steps or the forward."""
    if who == "forward":
        return sorted(case["forward"], key=lambda one: one["steps_per_second"])[
            (len(case["forward"]) - 1) // 2
        ]
    held = case["baseline"] if who == "echo" else case["matchups"][0]
    return held["median_round"]


def _draw_latency(loop: Axes, paced: Axes) -> None:
    for case in _results("stream"):
        if case["sessions"] == 64:
            for who, color in (("echo", ECHO), ("steps", STEPS)):
                latency = _window(case, who)["latency_ms"]
                shares = sorted(map(float, latency))
                values = [latency[f"{share:g}"] for share in shares]
                loop.plot(values, shares, "o-", color=color, label=who)
    loop.set(xscale="log", xlabel="ms", ylabel="% of the messages")
    _name(loop.xaxis)
    loop.set_title("64 sessions in closed loop")
    found = _results("rates")
    across = [case["rate"] for case in found]
    for who, color in (("echo", ECHO), ("steps", STEPS)):
        for percentile, style in (("50", "o-"), ("99", "s--"), ("99.9", "^:")):
            values = [_window(case, who)["latency_ms"][percentile] for case in found]
            paced.plot(across, values, style, color=color, label=f"{who}, p{percentile}")
    paced.set(yscale="log", xlabel="steps/s that are due", ylabel="ms since due")
    _name(paced.xaxis)
    paced.set_title("64 sessions at a fixed rate")


def _draw_scale(rate: Axes, turnover: Axes) -> None:
    found = [*_results("scale"), *_results("million")]
    across = [level["sessions"] for level in found]
    ratios = [level["rate_ratio"] for level in found]
    middle = [one["median"] for one in ratios]
    spread = [
        [one["median"] - one["least"] for one in ratios],
        [one["most"] - one["median"] for one in ratios],
    ]
    rate.errorbar(across, middle, spread, fmt="o-", color=STEPS, capsize=3, label="64 active ones")
    rate.axhline(1.0, color=ECHO, linewidth=1, label="beside 1,000")
    rate.set(xlabel="idle sessions", ylabel="their steps/s over those", ylim=(0, None))
    _space(rate, across)
    rate.set_title("stepping beside idle sessions")
    for what, color in (("opened", STEPS), ("closed", FORWARD)):
        rates = [level[what]["sessions"] / level[what]["seconds"] for level in found]
        turnover.plot(across, rates, "o-", color=color, label=what)
    turnover.set(xlabel="sessions", ylabel="sessions/s", ylim=(0, None))
    _space(turnover, across)
    turnover.set_title("opening and closing them")


def main(arguments: Sequence[str]) -> None:
    """Measures if asked to, and renders."""
    if arguments[:1] == ["measure"]:
        measure(arguments[1:] or [name for name in RUNS if name not in BY_HAND])
    elif list(arguments) != ["render"]:
        raise SystemExit(__doc__)
    draw()
    PAGE.write_text(rendered(PAGE.read_text()))
    README.write_text(with_figures(README.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
