"""`stepstate step`: reads rows from a pipe, prints outputs."""

from __future__ import annotations

import csv
import json
import sys
from datetime import datetime

import click

from stepstate.cli.options import option, server_option
from stepstate.cli.rows import BadRow, read_rows
from stepstate.client import Client, Durability, MissingPolicy, ModelInfo, Session
from stepstate.errors import SessionUnknown, StepstateError


@click.command("step")
@server_option
@option("--model", "", str, "The model's name; may be left out if there is one only.")
@option("--version", "", str, "The model's version; left out: the newest.")
@option("--session-id", "", str, "Opens this session, or goes on with it; left out: a new one.")
@option("--start-time", "", str, "Time of the first row, for models that need it.")
@click.option(
    "--durability",
    type=click.Choice(["none", "async", "sync"]),
    help="What of a new session survives its server; left out: the server's own choice.",
)
@click.option(
    "--missing",
    type=click.Choice(["reject", "impute", "hold"]),
    help="What a missing value, an empty cell, means to a new session; left out: reject.",
)
@option("--output", "csv", click.Choice(["csv", "jsonl"]), "CSV with a header, or JSON lines.")
@click.option("--keep", is_flag=True, help="Leave the session open at the end.")
def step_command(
    server: str,
    model: str,
    version: str,
    session_id: str,
    start_time: str,
    durability: Durability | None,
    missing: MissingPolicy | None,
    output: str,
    *,
    keep: bool,
) -> None:
    """Steps a session with each CSV row of standard input, and prints the outputs of each.

    A first line that holds names is a header: its columns are taken by name. With --missing
    impute or hold an empty cell is a missing value.
    """
    try:
        with Client(server) as client:
            session = _old_session(client, session_id) or client.open(
                model,
                version=version,
                session_id=session_id or None,
                start_time=_moment(start_time),
                durability=durability,
                missing=missing,
            )
            _run(session, output)
            if not keep:
                session.close()
    except (StepstateError, BadRow) as error:
        raise click.ClickException(str(error)) from error


def _old_session(client: Client, session_id: str) -> Session | None:
    try:
        return client.session(session_id) if session_id else None
    except SessionUnknown:
        return None


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError as error:
        raise BadRow(f"--start-time {text!r}: {error}") from error


def _run(session: Session, output: str) -> None:
    names = _output_names(session.model)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if output == "csv":
        writer.writerow(["t", *names])
    # In a file of one column an empty cell is "": an empty line is none.
    empty = session.info.missing in ("impute", "hold")
    for y in session.stream(read_rows(sys.stdin, session.model, "the input", empty=empty)):
        values = [float(f"{value:.9g}") for value in y]
        if output == "csv":
            writer.writerow([session.t, *values])
        else:
            click.echo(json.dumps({"t": session.t, **dict(zip(names, values, strict=True))}))
        sys.stdout.flush()


def _output_names(model: ModelInfo) -> list[str]:
    return [
        (f"{output.name}+{horizon}" if horizon else output.name) + quantile
        for output in model.outputs
        for horizon in output.horizons
        for quantile in [f"@{level:g}" for level in output.quantiles] or [""]
    ]
