"""`stepstate step`: reads rows from a pipe, prints outputs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import click

from stepstate.cli.common import ServerOptions, connect, format_options, option, server_options
from stepstate.cli.inputs import HistoryFile, InputReader
from stepstate.cli.rows import BadRow, Format
from stepstate.client import Client, Durability, MissingPolicy, Session, SessionInfo
from stepstate.errors import (
    InvalidField,
    NotFound,
    SessionClosed,
    SessionUnknown,
    StepstateError,
    Unavailable,
)


@dataclass(frozen=True, slots=True)
class _SessionOptions:
    """What is want of the session; an open session must already have it."""

    model: str
    version: str
    start_time: datetime | None
    durability: Durability | None
    missing: MissingPolicy | None


@click.command("step")
@server_options
@option("--model", "", str, "Name of the model. Not needed if only one is loaded.")
@option("--version", "", str, "Version of the model. Default: the newest.")
@option("--session-id", "", str, "Opens this session or continues it. Default: a new one.")
@option(
    "--start-time",
    "",
    str,
    "Time of the first row. Default: the time in the first line, if it has one.",
)
@click.option(
    "--durability",
    type=click.Choice(["none", "async", "sync"]),
    help="What of a new session survives its server. Default: as the server is configured.",
)
@click.option(
    "--missing",
    type=click.Choice(["reject", "impute", "hold"]),
    help="How a new session treats missing values (empty cells). Default: reject.",
)
@option("--output", "csv", click.Choice(["csv", "jsonl"]), "CSV with a header, or JSON lines.")
@click.option(
    "--history",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A CSV file with past rows. A new session is primed with them first.",
)
@format_options
@click.option("--keep", is_flag=True, help="Leave the session open at the end.")
def step_command(
    server: ServerOptions,
    model: str,
    version: str,
    session_id: str,
    start_time: str,
    durability: Durability | None,
    missing: MissingPolicy | None,
    output: str,
    history: Path | None,
    delimiter: str,
    time_column: str,
    *,
    keep: bool,
) -> None:
    """Steps a session with each CSV row of standard input, and prints the outputs of each.

    If the first line holds names it is a header: columns are found by name, in any order. Cells
    are separated by commas, semicolons or tabs. With --missing impute or hold, an empty cell or
    NA is a missing value. Blank lines are skipped: if there is only one column, write a missing
    value as "", NA or nan.

    A column named time has the time of each row in ISO 8601, in UTC if there is no time zone. The
    session starts at the first time, and each line must have the time of the session's next row.
    With --missing impute or hold, rows may be missing between two lines.

    After an error, the session is closed, unless it has a --session-id or --keep is given: then
    it stays open and can be continued.
    """
    options = _SessionOptions(model, version, _moment(start_time), durability, missing)
    format_ = Format(delimiter, time_column)
    with connect(server) as client:
        session = _open_session(client, session_id)
        if session is not None:
            _check(session.info, options, history)
        info = client.model(model, version) if session is None else session.model
        empty = (missing if session is None else session.info.missing) in ("impute", "hold")
        past = None if history is None else HistoryFile(history, info, format_, empty=empty)
        rows = InputReader(info, format_, empty=empty)
        if session is None:
            session = _open(client, session_id, options, past or rows)
        with _ending(session, named=bool(session_id), keep=keep):
            if past is not None:
                past.prime(session)
            _run(session, rows, output)


def _open_session(client: Client, session_id: str) -> Session | None:
    """The session of this id; None if it has to be opened."""
    try:
        return client.session(session_id) if session_id else None
    except SessionUnknown:
        return None
    except SessionClosed as closed:
        click.echo(f"session {session_id!r} was closed at t={closed.t}: it begins anew", err=True)
        return None


def _moment(text: str) -> datetime | None:
    """A time; without a zone it is read as UTC."""
    try:
        moment = datetime.fromisoformat(text) if text else None
    except ValueError as error:
        raise BadRow(f"--start-time {text!r}: {error}") from error
    return moment.replace(tzinfo=UTC) if moment and not moment.tzinfo else moment


def _check(info: SessionInfo, options: _SessionOptions, history: Path | None) -> None:
    """Refuses options for a new session that an open one does not have."""
    if history is not None and info.t:
        raise click.ClickException(
            f"session {info.session_id!r} is open at t={info.t}, and --history is for a new one: "
            "leave it out to go on, or choose another --session-id"
        )
    for field in fields(options):
        want, has = getattr(options, field.name), getattr(info, field.name)
        if want and want != has:
            flag = "--" + field.name.replace("_", "-")
            raise click.ClickException(
                f"session {info.session_id!r} is open with {flag} {has or 'left out'}, not {want}: "
                f"leave {flag} out to go on with it, or choose another --session-id"
            )


def _open(
    client: Client, session_id: str, options: _SessionOptions, first: HistoryFile | InputReader
) -> Session:
    """Opens a session, by default at the time of the first row."""
    try:
        return client.open(
            options.model,
            version=options.version,
            session_id=session_id or None,
            start_time=options.start_time or first.start,
            durability=options.durability,
            missing=options.missing,
        )
    except InvalidField as error:
        if error.field == "start_time" and error.problem.startswith("is missing"):
            hint = "by --start-time, or by a column named time"
            raise click.ClickException(f"{error} {hint}") from error
        raise


@contextmanager
def _ending(session: Session, *, named: bool, keep: bool) -> Iterator[None]:
    """Closes a session at the end unless it is kept, and after an error if it was given no name.

    Raises:
        ClickException: an error, and where the session is left open.
    """
    try:
        yield
    except BaseException as error:
        left = f"session {session.session_id!r} is left open at t={session.t}"
        if isinstance(error, NotFound):  # it is not open
            raise
        if not (named or keep or isinstance(error, Unavailable)):
            with suppress(StepstateError):
                session.close()
            raise
        if isinstance(error, StepstateError | BadRow):
            raise click.ClickException(f"{error}; {left}") from error
        click.echo(left, err=True)
        raise
    if not keep:
        session.close()


def _run(session: Session, rows: InputReader, output: str) -> None:
    """Prints the outputs of each row as soon as they are there."""
    names = session.model.output_columns
    timed = session.time(0) is not None
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if output == "csv":
        writer.writerow(["t", *(["time"] if timed else []), *names])
    for y in rows.outputs(session):
        values = [float(f"{value:.9g}") for value in y]
        moment = session.time()
        time = {"time": f"{moment:%FT%T}Z"} if timed else {}
        if output == "csv":
            writer.writerow([session.t, *time.values(), *values])
        else:
            line = {"t": session.t, **time, **dict(zip(names, values, strict=True))}
            click.echo(json.dumps(line))
        sys.stdout.flush()
