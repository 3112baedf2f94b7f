"""What a benchmark reports: machine, workload, command and figures, as a table or as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.results import Spread

_PACKAGES = ("stepstate", "torch", "onnxruntime", "grpcio", "uvloop")


@dataclass(frozen=True, slots=True)
class Table:
    """For people."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    """How to read it."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, and how."""

    workload: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The table, for people."""
    notes: Sequence[str]
    """How to read it."""
    results: object
    """Every figure, for programs."""
    more: Sequence[Table] = ()
    """Tables that follow."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine and what is installed on it."""

    cpu: str
    cores: int
    load_average: float
    """Over the minute before the benchmark: what else was running."""
    python: str
    packages: dict[str, str]

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        return (
            f"{self.cpu}, {self.cores} cores, load average {self.load_average} before; "
            f"Python {self.python}, {packages}"
        )


def this_machine() -> Machine:
    """Describes this machine; call it before the load starts."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        load_average=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        packages={name: version(name) for name in _PACKAGES},
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def as_text(machine: Machine, command: str, report: Report) -> str:
    """For people; the table is Markdown."""
    return "\n".join(
        (
            f"machine   {machine}",
            f"workload  {report.workload}",
            f"command   {command}",
            "",
            *table(report.heads, report.rows),
            "",
            *report.notes,
            *(line for each in report.more for line in ("", *table(each.heads, each.rows))),
        )
    )


def as_json(machine: Machine, command: str, report: Report) -> str:
    """For programs, with every round."""
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "workload": report.workload,
        "command": command,
        "table": {"heads": report.heads, "rows": report.rows, "notes": report.notes},
        "more": [asdict(each) for each in report.more],
        "results": report.results,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def spread_text(spread: Spread, digits: int = 2) -> str:
    """The median (least–most)."""
    median, least, most = (
        f"{one:,.{digits}f}" for one in (spread.median, spread.least, spread.most)
    )
    return f"{median} ({least}–{most})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return [_line(heads, widths), rule, *(_line(row, widths) for row in rows)]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
    return f"| {' | '.join(cells)} |"
