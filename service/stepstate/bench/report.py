"""What a benchmark tells: machine, workload, command and figures, as a table or as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from stepstate.bench.figures import Comparison, Measurement, Plan, Spread, median_round
from stepstate.bench.model import DESCRIPTION, INPUTS
from stepstate.bench.rounds import WARM_UP_SECONDS

_PACKAGES = ("stepstate", "torch", "grpcio", "uvloop")

_HEADS = (
    "sessions",
    "echo/s",
    "p50 ms",
    "p99 ms",
    "CPU µs",
    "steps/s",
    "p50 ms",
    "p99 ms",
    "CPU µs",
    "steps/s ÷ echo/s",
    "p50 ÷ echo's p50",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it ran."""

    cpu: str
    cores: int
    load_average: float
    """Over the minute before the benchmark: what else was running."""
    python: str
    packages: dict[str, str]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured, and how."""

    machine: Machine
    plan: Plan
    comparisons: Sequence[Comparison]


def this_machine() -> Machine:
    """Describes this machine; call it before the load starts."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        load_average=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        packages={name: version(name) for name in _PACKAGES},
    )


def as_text(report: Report) -> str:
    """For people; the table is Markdown's."""
    rows = [_HEADS, *(_cells(compared) for compared in report.comparisons)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join(
        (
            f"machine   {_machine(report.machine)}",
            f"workload  {_workload(report.plan)}",
            f"command   {_command(report.plan)}",
            "",
            *(lines[0], rule, *lines[1:]),
            "",
            "CPU is the server's, for one message. Figures are those of the median round by rate;",
            "a ratio is the median (least–most) of the rounds, each over the echo just before it.",
        )
    )


def as_json(report: Report) -> str:
    """For programs: every round too."""
    document = {
        "machine": asdict(report.machine),
        "workload": _workload(report.plan),
        "command": _command(report.plan),
        "plan": asdict(report.plan),
        "results": [_result(compared) for compared in report.comparisons],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _result(compared: Comparison) -> dict[str, object]:
    return {
        "sessions": compared.sessions,
        "echo": _figures(compared.echo),
        "step": _figures(compared.step),
        "rate_ratio": asdict(compared.rate_ratio),
        "p50_ratio": asdict(compared.p50_ratio),
    }


def _figures(rounds: Sequence[Measurement]) -> dict[str, object]:
    return {
        "median_round": asdict(median_round(rounds)),
        "rounds": [asdict(measured) for measured in rounds],
    }


def _cells(compared: Comparison) -> tuple[str, ...]:
    return (
        str(compared.sessions),
        *_measured(median_round(compared.echo)),
        *_measured(median_round(compared.step)),
        _spread(compared.rate_ratio),
        _spread(compared.p50_ratio),
    )


def _measured(measured: Measurement) -> tuple[str, ...]:
    return (
        f"{measured.messages_per_second:,.0f}",
        f"{measured.p50_ms:.3f}",
        f"{measured.p99_ms:.3f}",
        f"{measured.cpu_us_per_message:.1f}",
    )


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.least:.2f}–{spread.most:.2f})"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
    return f"| {' | '.join(cells)} |"


def _machine(machine: Machine) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in machine.packages.items())
    return (
        f"{machine.cpu}, {machine.cores} cores, load average {machine.load_average} before; "
        f"Python {machine.python}, {packages}"
    )


def _workload(plan: Plan) -> str:
    return (
        f"{DESCRIPTION}; closed loop, one stream a session, one row of {INPUTS} a message, with t; "
        f"clients: {plan.processes} Python process(es) on the same machine; {plan.rounds} round(s) "
        f"of {plan.seconds:g} s after {WARM_UP_SECONDS:g} s of warm-up, echo and steps in turn"
    )


def _command(plan: Plan) -> str:
    sessions = ",".join(map(str, plan.sessions))
    return (
        f"stepstate bench --sessions {sessions} --seconds {plan.seconds:g} "
        f"--rounds {plan.rounds} --processes {plan.processes}"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
