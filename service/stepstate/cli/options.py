"""Options that are also environment variables."""

from __future__ import annotations

from collections.abc import Callable

import click

Command = Callable[..., None]


def option(name: str, default: object, kind: object, text: str) -> Callable[[Command], Command]:
    """The option --some-name, which the variable STEPSTATE_SOME_NAME sets too."""
    variable = "STEPSTATE_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(
        name,
        type=kind,
        default=default,
        help=text,
        envvar=variable,
        show_envvar=True,
        show_default=True,
    )


server_option = option("--server", "127.0.0.1:50051", str, "The server's host:port.")


def format_options(command: Command) -> Command:
    """How a file of rows is to be read, where it does not tell."""
    command = click.option(
        "--time-column",
        default="",
        help="The column with the times; left out: time, timestamp, datetime or date, if any.",
    )(command)
    return click.option(
        "--delimiter",
        type=click.Choice([",", ";", "tab"]),
        callback=lambda _context, _option, value: {"tab": "\t"}.get(value, value or ""),
        help="Between cells; left out: what the first line has. With ; and tab numbers may have a "
        "decimal comma.",
    )(command)
