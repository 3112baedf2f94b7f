"""`stepstate tokens`: makes, lists and revokes the tokens of a file, which servers read."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NoReturn

import click
from pydantic import ValidationError

from stepstate.auth import TokenRecord, change_tokens, digest_of, make_token, read_tokens
from stepstate.auth.token_file import added, ended, record_of_token
from stepstate.cli.common import option
from stepstate.errors import CredentialsInvalid
from stepstate.identity import DEFAULT_TENANT, Scope
from stepstate.logging.audit import AuditEvent, audit, audit_lines

Change = Callable[[tuple[TokenRecord, ...]], tuple[TokenRecord, ...]]

_DAYS = re.compile(r"([1-9][0-9]{0,4})d")

file_option = option("--tokens-file", None, str, "The file of tokens; a server reads it again.")
audit_option = option("--audit-log", "", str, "File in which the change is put on record.")


@click.group("tokens")
def tokens_group() -> None:
    """Makes, lists and revokes the bearer tokens in a file, which servers read when it changes.

    The file has only hashes of the tokens.
    """


@tokens_group.command("create")
@click.argument("identity")
@file_option
@audit_option
@click.option(
    "--tenant", default=DEFAULT_TENANT, show_default=True, help="Whose sessions it works on."
)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    default=(Scope.STEP.value, Scope.READ.value),
    show_default=True,
    help="What it may do; several are several options. admin: name another tenant.",
)
@click.option(
    "--expires-in", default="365d", show_default=True, help='Days, such as 90d, or "never".'
)
def create_command(
    identity: str,
    tokens_file: str | None,
    audit_log: str,
    tenant: str,
    scopes: tuple[str, ...],
    expires_in: str,
) -> None:
    """Makes a token for IDENTITY, who may have several, and prints it: this once."""
    now = datetime.now(UTC).replace(microsecond=0)
    text = make_token()
    try:
        record = TokenRecord(
            identity=identity,
            tenant=tenant,
            scopes=tuple(Scope(scope) for scope in dict.fromkeys(scopes)),
            created=now,
            expires=_expiry(now, expires_in),
            sha256=digest_of(text),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise click.ClickException(f"{first['loc'][0]}: {first['msg']}") from error
    _change(tokens_file, audit_log, lambda tokens: (*tokens, record))
    click.echo(text)


@tokens_group.command("list")
@file_option
def list_command(tokens_file: str | None) -> None:
    """Prints a line for each token. The id of a token is the beginning of its SHA-256."""
    try:
        tokens = read_tokens(_required(tokens_file))
    except CredentialsInvalid as error:
        _fail(error)
    click.echo(f"{'id':<12}  {'identity':<20} {'tenant':<16} {'scopes':<16} {'created':<12} state")
    for token in tokens:
        scopes = ",".join(token.scopes)
        click.echo(
            f"{token.id:<12}  {token.identity:<20} {token.tenant:<16} {scopes:<16} "
            f"{token.created:%F}   {_end(token)}"
        )


@tokens_group.command("revoke")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@file_option
@audit_option
@click.option("--identity", help="Revoke all tokens of this identity.")
def revoke_command(
    ids: tuple[str, ...], tokens_file: str | None, audit_log: str, identity: str | None
) -> None:
    """Revokes tokens by their ids. Open streams that began with them end within seconds."""
    now = datetime.now(UTC).replace(microsecond=0)
    revoked: list[str] = []

    def revoke(token: TokenRecord) -> TokenRecord:
        if token.id not in ids and token.identity != identity:
            return token
        revoked.append(token.id)
        return token if token.revoked else token.model_copy(update={"revoked": now})

    def change(tokens: tuple[TokenRecord, ...]) -> tuple[TokenRecord, ...]:
        changed = tuple(map(revoke, tokens))
        unknown = set(ids) - set(revoked)
        if unknown or not revoked:
            what = ", ".join(sorted(unknown)) or identity or "which: give ids, or --identity"
            raise click.ClickException(f"no token {what}; `stepstate tokens list` shows them")
        return changed

    _change(tokens_file, audit_log, change)
    click.echo(f"revoked: {', '.join(revoked)}")


def _change(tokens_file: str | None, audit_log: str, change: Change) -> None:
    """Changes the file and puts that on record; where that is not possible, it is not changed."""
    file = _required(tokens_file)
    try:
        with audit_lines(audit_log):
            before, after = change_tokens(file, change)
            for record in added(before, after):
                audit(record_of_token(AuditEvent.TOKEN_CREATED, record, _user()))
            for record in ended(before, after):
                audit(record_of_token(AuditEvent.TOKEN_REVOKED, record, _user()))
    except CredentialsInvalid as error:
        _fail(error)
    except OSError as error:
        raise click.ClickException(f"{error.filename or file}: {error.strerror}") from error


def _user() -> str:
    """Who runs this command, as the system knows it."""
    try:
        return f"os:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"os:{os.getuid()}"


def _required(tokens_file: str | None) -> str:
    if not tokens_file:
        raise click.ClickException(
            "which file? Give --tokens-file FILE, or set STEPSTATE_TOKENS_FILE, as for the server"
        )
    return tokens_file


def _fail(error: CredentialsInvalid) -> NoReturn:
    raise click.ClickException(str(error)) from error


def _expiry(now: datetime, text: str) -> datetime | None:
    if text == "never":
        return None
    days = _DAYS.fullmatch(text)
    if days is None:
        raise click.ClickException(f"--expires-in is {text!r}, expected such as 90d, or never")
    return now + timedelta(days=int(days[1]))


def _end(token: TokenRecord) -> str:
    if token.revoked:
        return f"revoked {token.revoked:%F %T}Z"
    if token.expires is None:
        return "never expires"
    return f"expire{'s' if token.expires > datetime.now(UTC) else 'd'} {token.expires:%F %T}Z"
