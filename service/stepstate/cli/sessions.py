"""`stepstate sessions`: lists, shows, closes, copies, moves, restores; resets accuracy."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import click

from stepstate.cli.common import ServerOptions, connect, option, server_options, without_nan
from stepstate.client import SessionInfo


@click.group("sessions")
def sessions_group() -> None:
    """Lists, shows, closes, copies, moves and restores sessions, and resets their accuracy."""


@sessions_group.command("list")
@server_options
@option("--model", "", str, "Only sessions of this model.")
@click.option("--expired", is_flag=True, help="Also list expired sessions that can be restored.")
def list_command(server: ServerOptions, model: str, *, expired: bool) -> None:
    """Prints a line for each open session. `durable` of its t rows survive the end of the server.

    Sessions that are `model_missing` or `unreadable` take no steps, and can be closed. With
    --expired, expired sessions are listed too, with the time until which they can be restored.
    """
    with connect(server) as client:
        click.echo(
            f"{'session':<40} {'model':<20} {'t':>10} {'durable':>10}  {'where':<8}  "
            f"{'status':<13}  expires"
        )
        for info in client.sessions(model, show_expired=expired):
            if info.status == "unreadable":
                click.echo(f"{info.session_id:<40} {'':<53}  {info.status}")
                continue
            name = f"{info.model}/{info.version}"
            until = f"{info.expire_time:%F %T}Z"
            if info.purge_time is not None:
                until = f"can be restored until {info.purge_time:%F %T}Z"
            click.echo(
                f"{info.session_id:<40} {name:<20} {info.t:>10} {info.durable_t:>10}  "
                f"{info.residency:<8}  {info.status:<13}  {until}"
            )


@sessions_group.command("show")
@server_options
@click.argument("session_id")
def show_command(server: ServerOptions, session_id: str) -> None:
    """Prints the status of a session, as JSON."""
    with connect(server) as client:
        _print(client.info(session_id))


@sessions_group.command("close")
@server_options
@click.argument("session_id")
def close_command(server: ServerOptions, session_id: str) -> None:
    """Closes a session and prints its last status, as JSON."""
    with connect(server) as client:
        _print(client.close(session_id))


@sessions_group.command("reset-accuracy")
@server_options
@click.argument("session_id")
def reset_accuracy_command(server: ServerOptions, session_id: str) -> None:
    """Resets the accuracy and drift of a session, and prints its status, as JSON.

    Its state, its forecasts and their intervals do not change.
    """
    with connect(server) as client:
        _print(client.reset_accuracy(session_id))


@sessions_group.command("restore")
@server_options
@click.argument("session_id")
def restore_command(server: ServerOptions, session_id: str) -> None:
    """Opens an expired session again, as it was, and prints its status, as JSON."""
    with connect(server) as client:
        _print(client.restore_expired(session_id).info)


@sessions_group.command("fork")
@server_options
@click.argument("session_id")
@click.argument("new_id", required=False)
def fork_command(server: ServerOptions, session_id: str, new_id: str | None) -> None:
    """Opens a copy of a session and prints its status, as JSON.

    Without NEW_ID the server makes an id.
    """
    with connect(server) as client:
        _print(client.fork(session_id, new_id).info)


@sessions_group.command("export")
@server_options
@click.argument("session_id")
@click.option("--output", type=click.Path(), help="The file to write; - is standard output.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
def export_command(
    server: ServerOptions, session_id: str, output: str | None, *, force: bool
) -> None:
    """Writes a snapshot of a session to SESSION_ID.snapshot. The session stays open."""
    with connect(server) as client:
        snapshot = client.export(session_id)
    if output == "-":
        sys.stdout.buffer.write(snapshot)
        return
    file = Path(output or f"{session_id}.snapshot")
    _write(file, snapshot, force=force)
    click.echo(f"{file}: {len(snapshot)} bytes", err=True)


@sessions_group.command("import")
@server_options
@click.argument("file", type=click.File("rb"))
@click.option("--session-id", help="Id of the new session. Default: the id in the snapshot.")
def import_command(server: ServerOptions, file: BinaryIO, session_id: str | None) -> None:
    """Opens a session from the snapshot in FILE (- for standard input), and prints it as JSON."""
    with connect(server) as client:
        _print(client.restore(file.read(), session_id=session_id).info)


def _write(file: Path, snapshot: bytes, *, force: bool) -> None:
    try:
        with file.open("wb" if force else "xb") as opened:
            opened.write(snapshot)
    except FileExistsError as error:
        raise click.ClickException(f"{file} exists: --force overwrites it") from error
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from error


def _print(info: SessionInfo) -> None:
    fields = without_nan(asdict(info))
    click.echo(json.dumps(fields, default=str, indent=2, allow_nan=False))
