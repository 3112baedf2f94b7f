"""`stepstate step`: reads rows from a pipe, prints outputs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import click

from stepstate.cli.options import option, server_option
from stepstate.cli.rows import BadRow, Rows
from stepstate.client import (
    Client,
    Durability,
    MissingPolicy,
    ModelInfo,
    Session,
    SessionInfo,
)
from stepstate.errors import (
    NonFiniteInput,
    NonFiniteResult,
    NotFound,
    SessionClosed,
    SessionUnknown,
    StepstateError,
    Unavailable,
)


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
    impute or hold an empty cell is a missing value. A blank line is skipped: where there is
    one column, a missing value is written "" or nan.

    After an error a session that was given no name is closed; one with --session-id or
    --keep is left open, to go on with.
    """
    try:
        started = _moment(start_time)
        with Client(server) as client:
            session = _old_session(client, session_id)
            if session is None:
                session = client.open(
                    model,
                    version=version,
                    session_id=session_id or None,
                    start_time=started,
                    durability=durability,
                    missing=missing,
                )
            else:
                wishes = {
                    "model": model,
                    "version": version,
                    "start_time": started,
                    "durability": durability,
                    "missing": missing,
                }
                _agree(session.info, wishes)
            with _ending(session, named=bool(session_id), keep=keep):
                _run(session, output)
    except (StepstateError, BadRow) as error:
        raise click.ClickException(str(error)) from error


def _old_session(client: Client, session_id: str) -> Session | None:
    """An open session; None for one that is to be opened."""
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


def _agree(info: SessionInfo, wishes: Mapping[str, object]) -> None:
    """Refuses wishes that an open session does not meet: they are for a new one."""
    for field, wish in wishes.items():
        if wish and wish != (has := getattr(info, field)):
            flag = "--" + field.replace("_", "-")
            raise click.ClickException(
                f"session {info.session_id!r} is open with {flag} {has or 'left out'}, not {wish}: "
                f"leave {flag} out to go on with it, or choose another --session-id"
            )


@contextmanager
def _ending(session: Session, *, named: bool, keep: bool) -> Iterator[None]:
    """Closes a session at the end if it is not to be kept, and after an error if nobody knows it.

    Raises:
        ClickException: an error, with where the session is left.
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


def _run(session: Session, output: str) -> None:
    names = _output_names(session.model)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if output == "csv":
        writer.writerow(["t", *names])
    for y in _outputs(session):
        values = [float(f"{value:.9g}") for value in y]
        if output == "csv":
            writer.writerow([session.t, *values])
        else:
            click.echo(json.dumps({"t": session.t, **dict(zip(names, values, strict=True))}))
        sys.stdout.flush()


def _outputs(session: Session) -> Iterator[Iterable[float]]:
    """The outputs of each row of standard input.

    Raises:
        BadRow: it names the line.
    """
    # In a file of one column an empty cell is "": an empty line is none.
    empty = session.info.missing in ("impute", "hold")
    rows = Rows(sys.stdin.buffer, session.model, "the input", empty=empty)
    try:
        yield from session.stream(rows)
    except NonFiniteInput as error:  # of the last row: one is in flight at a time
        hint = ""
        if error.value == "nan":
            hint = "; a missing value takes a session that was opened with --missing impute or hold"
        raise BadRow(f"{rows.place}: {error.column!r} is {error.value}{hint}") from error
    except NonFiniteResult as error:
        raise BadRow(f"{rows.place}: {error}") from error


def _output_names(model: ModelInfo) -> list[str]:
    return [
        (f"{output.name}+{horizon}" if horizon else output.name) + quantile
        for output in model.outputs
        for horizon in output.horizons
        for quantile in [f"@{level:g}" for level in output.quantiles] or [""]
    ]
