"""`stepstate bench`: what a step costs here, beside a bare echo of the same messages."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from stepstate.bench.errors import BenchError
from stepstate.bench.figures import Plan
from stepstate.bench.report import Report, as_json, as_text, this_machine
from stepstate.bench.rounds import run
from stepstate.cli.options import option

MOST_SESSIONS = 10_000
"""What a server with default settings holds."""


def counts(value: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        found = ()
    if not found or not all(1 <= count <= MOST_SESSIONS for count in found):
        raise click.BadParameter(
            f"{value!r}: expected whole numbers from 1 to {MOST_SESSIONS:,} separated by commas, "
            "such as 1,16,64"
        )
    return found


@click.command("bench")
@option("--sessions", "1,16,64,256", counts, "How many sessions step at once, in turn.")
@option("--seconds", 3.0, click.FloatRange(0.1, 3600.0), "Length of what is counted of a round.")
@option("--rounds", 3, click.IntRange(1, 100), "Rounds of each; the median one is printed.")
@option("--processes", 1, click.IntRange(1, 64), "Client processes that share the sessions.")
@option("--json", "", click.Path(dir_okay=False), "Also writes every round to this file.")
def bench_command(
    sessions: tuple[int, ...], seconds: float, rounds: int, processes: int, json: str
) -> None:
    """Measures one-message steps in a closed loop, beside a bare gRPC echo of the same bytes.

    It starts both servers itself, on free loopback ports. Machines differ and
    are shared: compare the ratios of one run, not the figures of two.
    """
    if json and not Path(json).absolute().parent.is_dir():
        raise click.BadParameter(f"the folder of {json!r} does not exist", param_hint="--json")
    _end_cleanly()
    plan = Plan(sessions, seconds, rounds, processes)
    machine = this_machine()
    try:
        report = Report(machine, plan, run(plan, lambda line: click.echo(line, err=True)))
    except BenchError as error:
        raise click.ClickException(str(error)) from error
    click.echo(as_text(report))
    if json:
        Path(json).write_text(as_json(report))


def _end_cleanly() -> None:
    """Lets a signal end the run as an exception, so that no server is left behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda caught, _: sys.exit(128 + caught))
