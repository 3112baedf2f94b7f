"""The loads of `benchmarks transports` by name, and what has to be reached under them."""

from __future__ import annotations

from dataclasses import dataclass

import click

from benchmarks.contenders import CPP_ECHO, LEAN, LEAN_ECHO, OTHER, SQLITE
from benchmarks.contest import Bar, Quantity
from benchmarks.models import VARIANTS
from benchmarks.options import MAX_SESSIONS, option
from benchmarks.results import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadsPlan(Plan):
    """How large the loads are that more than one benchmark makes."""

    connections: int = option(
        64, click.IntRange(2, MAX_SESSIONS), "Then as many connections, with a stream each."
    )
    callers: int = option(
        16, click.IntRange(1, MAX_SESSIONS), "Then as many callers of the unary Step."
    )
    packed_rows: int = option(
        256, click.IntRange(1, 4096), "Then packed messages of so many rows, from Python."
    )


def streams(count: int) -> str:
    """The name of the load with so many streams on one connection."""
    return f"{count} stream{'s' if count > 1 else ''}"


def connected(count: int) -> str:
    """The name of the load with so many connections."""
    return f"{count} connections"


def calling(count: int) -> str:
    """The name of the load with so many callers of the unary Step."""
    return f"{count} callers of Step"


def packed(rows: int) -> str:
    """The name of the load with packed messages."""
    return f"packed, {rows} rows"


def analyzed(count: int) -> str:
    """The name of the load that perf_analyzer makes."""
    return f"perf_analyzer, {count} sequences"


def durably(count: int) -> str:
    """The name of the load whose steps are saved in a file."""
    return f"{streams(count)}, durability async"


def of_model(model: str, count: int) -> str:
    """The name of the load with another model."""
    return f"{streams(count)}, {VARIANTS[model]}"


BARS = (
    Bar(streams(64), LEAN_ECHO, CPP_ECHO, 1.0, 1.2),
    Bar(streams(64), LEAN, CPP_ECHO, 0.75, 1.0),
    Bar(streams(256), LEAN, CPP_ECHO, 0.9, 1.15),
    Bar(streams(16), LEAN, CPP_ECHO, 0.5, 0.7),
    Bar(connected(64), LEAN, CPP_ECHO, 0.75, 1.0),
    Bar(streams(64), LEAN, OTHER, 4.5, 6.0),
    Bar(streams(64), LEAN, CPP_ECHO, 1.6, 1.2, Quantity.CPU),
    Bar(streams(1), LEAN, CPP_ECHO, 2.2, 1.5, Quantity.P50),
    Bar(analyzed(64), LEAN, OTHER, 2.0, 3.0),
    Bar(durably(64), SQLITE, LEAN, 0.8, 0.95),
    *(Bar(of_model(model, 64), LEAN, OTHER, 2.0, 3.0) for model in VARIANTS),
    Bar(packed(256), LEAN, OTHER, 1.25, 1.6),
    Bar(calling(16), LEAN, OTHER, 2.0, 3.0),
)
"""What Stepstate has to reach, and where it aims at."""
