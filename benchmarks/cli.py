"""The command line of the benchmarks: `python -m benchmarks [COMMAND]`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from benchmarks import BenchError
from benchmarks.forecasting import ForecastPlan, forecasting
from benchmarks.load import CallPath
from benchmarks.priming import PrimingPlan, priming
from benchmarks.report import Report, as_json, as_text, this_machine
from benchmarks.residency import ResidencyPlan, residency
from benchmarks.restart import RestartPlan, restart
from benchmarks.results import MAX_SESSIONS, Plan
from benchmarks.scale import ScalePlan, scale
from benchmarks.servers import DURABILITIES, DURABLE, STORES, without_password
from benchmarks.steps import StoreChoice, beside_echo, beside_memory, beside_other
from benchmarks.sweeps import SweepsPlan, sweeps

Command = Callable[..., None]
MAX_RATE = 10_000_000
"""More than any machine can do."""
MAX_IDLE = 10_000_000
"""The most sessions that a server can be configured to keep in memory."""


def whole_numbers(most: int) -> Callable[[str], tuple[int, ...]]:
    """A type for whole numbers separated by commas."""

    def counts(value: str) -> tuple[int, ...]:
        try:
            found = tuple(int(part) for part in value.split(","))
        except ValueError:
            found = ()
        if not found or not all(1 <= count <= most for count in found):
            raise click.BadParameter(
                f"{value!r}: expected whole numbers from 1 to {most:,} separated by commas, "
                "such as 1,16,64"
            )
        return found

    return counts


counts, many = whole_numbers(MAX_SESSIONS), whole_numbers(MAX_IDLE)


def rates(value: str) -> tuple[float, ...]:
    """Steps per second, separated by commas; an empty value means a closed loop."""
    try:
        found = tuple(float(part) for part in value.split(",") if value)
    except ValueError:
        found = (0.0,)
    if not all(0.1 <= rate <= MAX_RATE for rate in found):
        raise click.BadParameter(
            f"{value!r}: expected steps a second from 0.1 to {MAX_RATE:,} separated by commas"
        )
    return found


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for some of the known names, separated by commas."""

    def names(value: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(value.split(",")))
        if not set(found) <= set(known):
            raise click.BadParameter(f"{value!r}: expected some of {','.join(known)}")
        return found

    return names


def option(name: str, default: object, kind: object, text: str) -> Callable[[Command], Command]:
    """An option with a default that `--help` shows; `kind` is what click calls its type."""
    return click.option(name, type=kind, default=default, help=text, show_default=True)


class _WithDefault(click.Group):
    """A group whose first command is the default."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


def _plan(sessions: str) -> Callable[[Command], Command]:
    """The options of every `Plan`."""
    return _together(
        option(
            "--sessions",
            sessions,
            counts,
            "Sessions that step at once; several numbers: one after the other.",
        ),
        option(
            "--seconds",
            3.0,
            click.FloatRange(0.1, 3600.0),
            "Length of the measured window of a round.",
        ),
        option("--warm-up", 1.0, click.FloatRange(0.0, 3600.0), "Seconds before the window."),
        option("--rounds", 3, click.IntRange(1, 100), "Rounds of each; the median is printed."),
        option("--processes", 1, click.IntRange(1, 64), "Client processes, sharing the sessions."),
    )


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorated(command: Command) -> Command:
        for each in reversed(options):
            command = each(command)
        return command

    return decorated


_json = option("--json", "", click.Path(dir_okay=False), "Also writes every figure to this file.")
_folder = click.Path(exists=True, file_okay=False, path_type=Path)
_paths = some_of([path.value for path in CallPath])


@click.group(cls=_WithDefault, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures a server in one of several ways. The default COMMAND is `steps`.

    It starts all servers itself, on free loopback ports. Machines differ and
    are shared: compare the ratios of one run, not the figures of two.
    """


@main.command("steps")
@option("--path", "stream", _paths, "How steps are sent: some of stream,unary,packed.")
@_plan("1,16,64,256")
@option(
    "--rows", "16,64,256", counts, "Rows of a packed message; several numbers: one after the other."
)
@option("--in-flight", 2, click.IntRange(1, 64), "Unanswered packed messages of a process.")
@option("--rate", "", rates, "Steps a second in all, at fixed times; empty: a closed loop.")
@option("--echo", "plain", click.Choice(["plain", "tuned"]), "tuned: the server's gRPC settings.")
@option("--other", None, _folder, "Another checkout: its server takes the place of the echo.")
@_json
def steps_command(
    path: tuple[str, ...],
    sessions: tuple[int, ...],
    seconds: float,
    warm_up: float,
    rounds: int,
    processes: int,
    rows: tuple[int, ...],
    in_flight: int,
    rate: tuple[float, ...],
    echo: str,
    other: Path | None,
    json: str,
) -> None:
    """Steps, beside a bare gRPC echo of the same messages and the bare forward.

    In closed loop a message follows the reply to the one before it. With --rate
    messages are sent at fixed times, and latency counts from when a message was
    due: waiting is not hidden.
    """
    plan = Plan(
        sessions=sessions,
        seconds=seconds,
        warm_up=warm_up,
        rounds=rounds,
        processes=processes,
        paths=tuple(map(CallPath, path)),
        rows=rows,
        in_flight=in_flight,
        rates=rate,
    )
    if other is not None:
        _publish(json, lambda: beside_other(plan, other, _log))
    else:
        _publish(json, lambda: beside_echo(plan, _log, tuned=echo == "tuned"))


@main.command("durability")
@_plan("64")
@option("--stores", "sqlite,redis", some_of(DURABLE), "Which stores to compare.")
@option("--durabilities", "none,async,sync", some_of(DURABILITIES), "Which durabilities.")
@option("--redis-url", "", str, "A running Redis; empty: a redis-server is started.")
@_json
def durability_command(
    sessions: tuple[int, ...],
    seconds: float,
    warm_up: float,
    rounds: int,
    processes: int,
    stores: tuple[str, ...],
    durabilities: tuple[str, ...],
    redis_url: str,
    json: str,
) -> None:
    """The same steps with each store and durability, beside those with the store `memory:`.

    Files are below TMPDIR: set it to compare disks.
    """
    plan = Plan(
        sessions=sessions, seconds=seconds, warm_up=warm_up, rounds=rounds, processes=processes
    )
    choice = StoreChoice(stores, durabilities, redis_url)
    _publish(json, lambda: beside_memory(plan, choice, _log))


@main.command("restart")
@option("--store", "sqlite", click.Choice(DURABLE), "Where the sessions are stored.")
@option("--stored", 10_000, click.IntRange(2, 1_000_000), "Sessions that are stored.")
@option(
    "--rows", 32, click.IntRange(1, 10_000), "Rows of each session, all kept in its replay window."
)
@option("--rounds", 3, click.IntRange(1, 100), "Starts of each kind.")
@_json
def restart_command(store: str, stored: int, rows: int, rounds: int, json: str) -> None:
    """From kill -9 to the first step of a stored session, beside a bare start."""
    _publish(json, lambda: restart(RestartPlan(store, stored, rows, rounds), _log))


@main.command("residency")
@option("--store", "sqlite", click.Choice(DURABLE), "Where spilled sessions are.")
@option("--sessions", 200_000, click.IntRange(1, 10_000_000), "Sessions that are open.")
@option("--slots", 10_000, click.IntRange(1, 10_000_000), "How many of them fit in memory.")
@option("--durability", "async", click.Choice(DURABILITIES), "Durability of the sessions.")
@option("--rounds", 2, click.IntRange(1, 100), "How often each is stepped.")
@_json
def residency_command(
    store: str, sessions: int, slots: int, durability: str, rounds: int, json: str
) -> None:
    """More open sessions than slots, opened at once and stepped in random order."""
    plan = ResidencyPlan(store, sessions, slots, durability, rounds)
    _publish(json, lambda: residency(plan, _log))


@main.command("forecast")
@option("--sessions", 1_000, click.IntRange(1, 6_000), "Sessions forecast in one call.")
@option("--calls", 300, click.IntRange(1, 100_000), "Calls of each kind in a round.")
@option("--rounds", 3, click.IntRange(1, 100), "Rounds of all kinds in turn.")
@_json
def forecast_command(sessions: int, calls: int, rounds: int, json: str) -> None:
    """A forecast beside a step, and many sessions' forecasts in one call."""
    _publish(json, lambda: forecasting(ForecastPlan(sessions, calls, rounds), _log))


@main.command("priming")
@option("--rows", 100_000, click.IntRange(1, 1_000_000), "Rows of history.")
@option("--others", 16, click.IntRange(1, 10_000), "Sessions that are stepped meanwhile.")
@option("--rate", 50.0, click.FloatRange(0.1, 10_000.0), "Steps a second of each of them.")
@option("--rounds", 3, click.IntRange(1, 100), "Primed sessions, one after the other.")
@_json
def priming_command(rows: int, others: int, rate: float, rounds: int, json: str) -> None:
    """The latency of other sessions while one is primed with history, and the rate of priming."""
    _publish(json, lambda: priming(PrimingPlan(rows, others, rate, rounds), _log))


@main.command("scale")
@option(
    "--sessions",
    "1000,10000,100000",
    many,
    "Open and idle sessions; several numbers: one after the other.",
)
@option("--store", "memory", click.Choice(STORES), "Where they are kept.")
@option("--active", 64, click.IntRange(1, 10_000), "Sessions that are stepped beside them.")
@option(
    "--seconds", 3.0, click.FloatRange(0.1, 3600.0), "Length of the measured window of a round."
)
@option("--rounds", 3, click.IntRange(1, 100), "Rounds of each; the median is printed.")
@option("--processes", 2, click.IntRange(1, 64), "Client processes that open and close sessions.")
@_json
def scale_command(
    sessions: tuple[int, ...],
    store: str,
    active: int,
    seconds: float,
    rounds: int,
    processes: int,
    json: str,
) -> None:
    """What idle sessions cost: memory, opening, closing, and the rate of active sessions."""
    plan = ScalePlan(sessions, store, active, seconds, rounds, processes)
    _publish(json, lambda: scale(plan, _log))


@main.command("sweeps")
@option("--sessions", 100_000, click.IntRange(1, MAX_IDLE), "Sessions that expire, or are saved.")
@option("--store", "sqlite", click.Choice(STORES), "Where they are kept; memory saves none.")
@option("--active", 64, click.IntRange(1, 10_000), "Sessions that are stepped meanwhile.")
@option("--rate", 500.0, click.FloatRange(1.0, 1e6), "Steps a second of all of them.")
@option("--seconds", 30.0, click.FloatRange(1.0, 3600.0), "How long each sweep is watched.")
@option("--processes", 2, click.IntRange(1, 64), "Client processes that open the sessions.")
@_json
def sweeps_command(
    sessions: int,
    store: str,
    active: int,
    rate: float,
    seconds: float,
    processes: int,
    json: str,
) -> None:
    """Latency of active sessions while very many others expire, and while they are saved."""
    plan = SweepsPlan(sessions, store, active, rate, seconds, processes)
    _publish(json, lambda: sweeps(plan, _log))


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
    command = _command_line(click.get_current_context())
    click.echo(as_text(machine, command, report))
    if json:
        Path(json).write_text(as_json(machine, command, report))


def _command_line(context: click.Context) -> str:
    """The command with all its options, to measure the same again; without passwords."""
    words = [f"python -m benchmarks {context.info_name}"]
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        if parameter.name != "json" and value not in ("", (), None):
            words.append(f"{parameter.opts[0]} {_text_of(value)}")
    return " ".join(words)


def _text_of(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text_of, value))
    return f"{value:g}" if isinstance(value, float) else without_password(str(value))


def _log(line: str) -> None:
    click.echo(line, err=True)


def _exit_on_signals() -> None:
    """Lets a signal end the run as an exception, so that no server is left behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda caught, _: sys.exit(128 + caught))
