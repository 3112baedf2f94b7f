"""The command line of the benchmarks: `python -m benchmarks [COMMAND]`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from benchmarks import BenchError
from benchmarks.engines import EnginesPlan, engines
from benchmarks.forecasting import ForecastPlan, forecasting
from benchmarks.options import command_line, options_of
from benchmarks.priming import PrimingPlan, priming
from benchmarks.profiling import ProfilePlan, profile
from benchmarks.report import Report, as_json, as_text, this_machine
from benchmarks.residency import ResidencyPlan, residency
from benchmarks.restart import RestartPlan, restart
from benchmarks.scale import ScalePlan, scale
from benchmarks.security import SecurityPlan, security
from benchmarks.steps import DurabilityPlan, StepsPlan, durability, steps
from benchmarks.sweeps import SweepsPlan, sweeps
from benchmarks.transports import TransportsPlan, transports

Plan = TypeVar("Plan")
Log = Callable[[str], None]


class _WithDefault(click.Group):
    """A group whose first command is the default."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


@click.group(cls=_WithDefault, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures a server in one of several ways. The default COMMAND is `steps`.

    It starts all servers itself, on free loopback ports. Machines differ and
    are shared: compare the ratios of one run, not the figures of two.
    """


def _add(name: str, plan: type[Plan], measure: Callable[[Plan, Log], Report]) -> None:
    """Adds a command whose options are the fields of its plan, and whose help is its docstring."""

    def run(json: str, **given: object) -> None:
        _publish(json, lambda: measure(plan(**given), _log))

    to_file = click.Option(
        ["--json"],
        type=click.Path(dir_okay=False),
        default="",
        help="Also writes every figure to this file.",
    )
    params = [*options_of(plan), to_file]
    main.add_command(click.Command(name, callback=run, params=params, help=plan.__doc__))


_add("steps", StepsPlan, steps)
_add("transports", TransportsPlan, transports)
_add("security", SecurityPlan, security)
_add("profile", ProfilePlan, profile)
_add("engines", EnginesPlan, engines)
_add("durability", DurabilityPlan, durability)
_add("restart", RestartPlan, restart)
_add("residency", ResidencyPlan, residency)
_add("forecast", ForecastPlan, forecasting)
_add("priming", PrimingPlan, priming)
_add("scale", ScalePlan, scale)
_add("sweeps", SweepsPlan, sweeps)


def _publish(json: str, measure: Callable[[], Report]) -> None:
    """Measures, prints, and writes the file if one is wanted."""
    if json and not Path(json).absolute().parent.is_dir():
        raise click.BadParameter(f"the folder of {json!r} does not exist", param_hint="--json")
    _exit_on_signals()
    machine = this_machine()
    try:
        report = measure()
    except BenchError as error:
        raise click.ClickException(str(error)) from error
    command = command_line(click.get_current_context())
    click.echo(as_text(machine, command, report))
    if json:
        Path(json).write_text(as_json(machine, command, report))


def _log(line: str) -> None:
    click.echo(line, err=True)


def _exit_on_signals() -> None:
    """Lets a signal end the run as an exception, so that no server is left behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda caught, _: sys.exit(128 + caught))
