"""Options that are also environment variables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click

Command = Callable[..., None]


INTERRUPTED = 128 + 2
"""The exit status of a command that Ctrl-C ends, as shells give it (SIGINT is 2)."""
_VARIABLES = {"--version": "STEPSTATE_MODEL_VERSION"}
"""STEPSTATE_VERSION is what images call the version of the software."""


def option(name: str, default: object, kind: object, text: str) -> Callable[[Command], Command]:
    """The option --some-name, which the variable STEPSTATE_SOME_NAME sets too.

    Args:
        name: with its dashes.
        default: its value if neither sets it.
        kind: what click calls its type; of a bool, the bare option means true.
        text: for --help.
    """
    usual = "STEPSTATE_" + name.removeprefix("--").replace("-", "_").upper()
    made = partial(
        click.option,
        name,
        type=kind,
        default=default,
        help=text,
        envvar=_VARIABLES.get(name, usual),
        show_envvar=True,
        show_default=True,
    )
    return made(is_flag=False, flag_value=True) if kind is bool else made()


server_option = option("--server", "127.0.0.1:50051", str, "The server's host:port.")


def format_options(command: Command) -> Command:
    """How a file of rows is to be read, where it does not tell."""
    command = click.option(
        "--time-column",
        default="",
        help="The column with the times. Default: time, timestamp, datetime or date, if any.",
    )(command)
    return click.option(
        "--delimiter",
        type=click.Choice([",", ";", "tab"]),
        callback=lambda _context, _option, value: {"tab": "\t"}.get(value, value or ""),
        help="Separates cells. Default: found from the first line. With ; and tab, numbers may "
        "have a decimal comma.",
    )(command)
