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
