"""The tables of docs/benchmarks.md and README, from the JSON files in docs/benchmarks/."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import Machine, table

DOCS = Path(__file__).parents[1] / "docs"
MEASURED = DOCS / "benchmarks"
CONTENDERS = ("C++ echo", "grpc.aio echo", "lean echo", "Stepstate lean", "Stepstate grpcio")
"""Who takes part in the loads that all transports have."""
MISSING = "Not measured yet.\n"
_STEPS, _FORWARD = "Stepstate lean", "bare forward of 256"
_README = {
    "1 stream": ("one row per message, one stream per session", "1"),
    "64 streams": ("", "64"),
    "256 streams": ("", "256"),
    "64 connections": ("the same, a connection per session", "64"),
}
"""Loads of README's table: the path and the sessions."""

Results = Any


def results(name: str) -> Results:
    """Of a run; empty if it was not measured."""
    path = MEASURED / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def common_loads() -> list[Results]:
    """The loads of `benchmarks transports` in which the echoes take part."""
    return [load for load in results("transports") if "lean echo" in load["rounds"]]


def median_of(load: Results, name: str, figure: str) -> float:
    """Of the rounds of a contender."""
    return median(float(one[figure]) for one in load["rounds"][name])


def summary() -> str:
    """Everybody's steps/s and CPU time, a line for each load of all transports."""
    loads = common_loads()
    rows = [[load["load"], *(_rate_and_cpu(load, name) for name in CONTENDERS)] for load in loads]
    return "\n".join(table(["load", *CONTENDERS], rows)) + "\n" if rows else MISSING


def readme_figures() -> str:
    """README's table: a line for each of some loads."""
    loads = {load["load"]: load for load in results("transports")}
    rows = [
        [path, sessions, *_rate_and_p50(loads[name]), _echoes(loads[name])]
        for name, (path, sessions) in _README.items()
        if name in loads
    ]
    many = loads.get("packed, 256 rows")
    if many is not None:
        beside = f"the forward pass alone: {median_of(many, _FORWARD, 'steps_per_second'):,.0f}"
        rows.append(["packed stream, 256 rows per message", "512", *_rate_and_p50(many), beside])
    lines = ["| path | sessions | steps/s | p50, ms | beside it, in the same run |"]
    lines += ["|---|---:|---:|---:|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n" if rows else MISSING


def _rate_and_p50(load: Results) -> tuple[str, str]:
    rounds = load["rounds"][_STEPS]
    p50 = median(float(one["latency_ms"]["50"]) for one in rounds)
    return f"{median_of(load, _STEPS, 'steps_per_second'):,.0f}", f"{p50:.2f}"


def _echoes(load: Results) -> str:
    rates = {
        what: f"{median_of(load, name, 'steps_per_second'):,.0f}"
        for what, name in (("a `grpc.aio` echo", "grpc.aio echo"), ("an echo in C++", "C++ echo"))
        if name in load["rounds"]
    }
    return ", ".join(f"{what}: {rate}" for what, rate in rates.items())


def _rate_and_cpu(load: Results, name: str) -> str:
    if name not in load["rounds"]:
        return "–"
    rate = median_of(load, name, "steps_per_second")
    return f"{rate:,.0f}/s, {median_of(load, name, 'cpu_us_per_step'):.0f} µs"


def section(name: str) -> str:
    """All that a run reported."""
    path = MEASURED / f"{name}.json"
    if not path.exists():
        return MISSING
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
