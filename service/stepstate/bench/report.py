"""What a benchmark tells: machine, workload, command and figures, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from stepstate.bench.figures import Spread
from stepstate.bench.machine import Machine


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, and how."""

    workload: str
    command: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The table, as people read it."""
    notes: Sequence[str]
    """What one must know to read it."""
    results: object
    """Every figure, for programs."""


def as_text(machine: Machine, report: Report) -> str:
    """For people; the table is Markdown's."""
    return "\n".join(
        (
            f"machine   {machine}",
            f"workload  {report.workload}",
            f"command   {report.command}",
            "",
            *table(report.heads, report.rows),
            "",
            *report.notes,
        )
    )


def as_json(machine: Machine, report: Report) -> str:
    """For programs: every round too."""
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "workload": report.workload,
        "command": report.command,
        "table": {"heads": report.heads, "rows": report.rows, "notes": report.notes},
        "results": report.results,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def spread_text(spread: Spread, digits: int = 2) -> str:
    """The median (least–most)."""
    median, least, most = (
        f"{value:.{digits}f}" for value in (spread.median, spread.least, spread.most)
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
