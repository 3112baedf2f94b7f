"""`stepstate sessions`: lists, shows and closes sessions."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from stepstate.cli.options import option, server_option
from stepstate.client import Client, SessionInfo
from stepstate.errors import StepstateError


@click.group("sessions")
def sessions_group() -> None:
    """Lists, shows and closes sessions."""


@sessions_group.command("list")
@server_option
@option("--model", "", str, "Only sessions of this model.")
def list_command(server: str, model: str) -> None:
    """Prints a line for each open session."""
    try:
        with Client(server) as client:
            click.echo(f"{'session':<40} {'model':<20} {'t':>10}  expires")
            for info in client.sessions(model):
                name = f"{info.model}/{info.version}"
                click.echo(
                    f"{info.session_id:<40} {name:<20} {info.t:>10}  {info.expire_time:%F %T}Z"
                )
    except StepstateError as error:
        raise click.ClickException(str(error)) from error


@sessions_group.command("show")
@server_option
@click.argument("session_id")
def show_command(server: str, session_id: str) -> None:
    """Prints where a session stands, as JSON."""
    try:
        with Client(server) as client:
            _print(client.info(session_id))
    except StepstateError as error:
        raise click.ClickException(str(error)) from error


@sessions_group.command("close")
@server_option
@click.argument("session_id")
def close_command(server: str, session_id: str) -> None:
    """Closes a session and prints how it stood, as JSON."""
    try:
        with Client(server) as client:
            _print(client.close(session_id))
    except StepstateError as error:
        raise click.ClickException(str(error)) from error


def _print(info: SessionInfo) -> None:
    click.echo(json.dumps(asdict(info), default=str, indent=2))
