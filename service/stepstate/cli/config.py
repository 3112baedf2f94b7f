"""`stepstate config`: what a server would run with, and what would stop it."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from stepstate.cli.settings import loader, settings_options
from stepstate.config import ConfigError
from stepstate.configuration import Configuration, Load, as_toml

_file = click.argument("file", default="", envvar="STEPSTATE_CONFIG")
_options = partial(settings_options, hidden=True)


@click.group("config")
def config_group() -> None:
    """Checks and shows the settings of a server.

    FILE is its configuration file. Both commands also take the options of `stepstate serve` and its
    variables, which win over the file.
    """


@config_group.command("show")
@_file
@_options
def show_command(file: str, **settings: Any) -> None:
    """Prints all settings as a configuration file, with the origin of each, without secrets."""
    click.echo(as_toml(_loaded(loader(file, settings))), nl=False)


@config_group.command("check")
@_file
@_options
def check_command(file: str, **settings: Any) -> None:
    """Says what would stop a server with these settings; the exit status is 1 then.

    Reads the files that are named: models, keys, passwords. It asks no store and listens nowhere.
    """
    from stepstate.configuration.checks import problems  # noqa: PLC0415 - torch: for this one only

    found = problems(_loaded(loader(file, settings)))
    for problem in found:
        click.echo(problem, err=True)
    if found:
        raise click.ClickException(f"{len(found)} to put right")
    click.echo("nothing found that would stop a server; its store and addresses were not tried")


def _loaded(load: Load) -> Configuration:
    try:
        return load()
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
