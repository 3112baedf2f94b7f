"""The pictures of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl

from benchmarks.tables import CONTENDERS, DOCS, Results, common_loads, median_of, results

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

IMAGES = DOCS / "images"

ECHO, STEPS, FORWARD = "#8a8a8a", "#0a7d8c", "#c4762b"
_COLORS = dict(zip(CONTENDERS, ("#444444", ECHO, "#c9c9c9", STEPS, FORWARD), strict=True))


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


def _draw_transports(rate: Axes, cpu: Axes) -> None:
    """Bars: a group for each load."""
    found = common_loads()
    width = 0.8 / len(CONTENDERS)
    for axes, figure, title in (
        (rate, "steps_per_second", "steps/s"),
        (cpu, "cpu_us_per_step", "CPU µs of the server for a step"),
    ):
        for place, (name, color) in enumerate(_COLORS.items()):
            heights = [median_of(load, name, figure) for load in found if name in load["rounds"]]
            across = [group + width * place - 0.4 for group in range(len(heights))]
            axes.bar(across, heights, width, align="edge", color=color, label=name)
        axes.set_xticks(range(len(found)), [load["load"] for load in found], rotation=20)
        axes.set(yscale="log")
        axes.set_title(title)


def _draw_paths(single: Axes, packed: Axes) -> None:
    for name, style in (("stream", "o-"), ("unary", "s--")):
        found = results(name)
        across = [case["sessions"] for case in found]
        for who, color in (("echo", ECHO), ("steps", STEPS)):
            rates = [_window(case, who)["steps_per_second"] for case in found]
            single.plot(across, rates, style, color=color, label=f"{name}, {who}")
    single.set(yscale="log", xlabel="sessions", ylabel="steps/s")
    _space(single, [case["sessions"] for case in results("stream")])
    single.set_title("one row a message")
    found = results("packed")
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
    for case in results("stream"):
        if case["sessions"] == 64:
            for who, color in (("echo", ECHO), ("steps", STEPS)):
                latency = _window(case, who)["latency_ms"]
                shares = sorted(map(float, latency))
                values = [latency[f"{share:g}"] for share in shares]
                loop.plot(values, shares, "o-", color=color, label=who)
    loop.set(xscale="log", xlabel="ms", ylabel="% of the messages")
    _name(loop.xaxis)
    loop.set_title("64 sessions in closed loop")
    found = results("rates")
    across = [case["rate"] for case in found]
    for who, color in (("echo", ECHO), ("steps", STEPS)):
        for percentile, style in (("50", "o-"), ("99", "s--"), ("99.9", "^:")):
            values = [_window(case, who)["latency_ms"][percentile] for case in found]
            paced.plot(across, values, style, color=color, label=f"{who}, p{percentile}")
    paced.set(yscale="log", xlabel="steps/s that are due", ylabel="ms since due")
    _name(paced.xaxis)
    paced.set_title("64 sessions at a fixed rate")


def _draw_scale(rate: Axes, turnover: Axes) -> None:
    found = [*results("scale"), *results("million")]
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
