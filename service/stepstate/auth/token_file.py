"""The file of tokens: read by servers, and changed by `stepstate tokens`.

Rule 1: it is replaced as a whole: who reads it has the former content or the new one.
Rule 2: one writer at a time: the second one waits, and goes on from what the first has written.
Rule 3: a broken file changes nothing: a server keeps the tokens that it has.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from stepstate.auth.tokens import KnownToken, TokenList, TokenRecord, TokenTable
from stepstate.auth.watched_file import WatchedFile
from stepstate.errors import CredentialsInvalid
from stepstate.identity import Identity
from stepstate.logging.audit import AuditEvent, AuditRecord, audit

log = logging.getLogger(__name__)

OPTION = "tokens-file"
FORGET_AFTER = timedelta(days=90)
"""Tokens that ended so long ago are removed by the next change: nobody needs to be told any more
that they have expired or are revoked."""

Tokens = tuple[TokenRecord, ...]


class TokenFile:
    """The tokens that a server accepts, as of the last time that their file could be read.

    Args:
        file: its name.

    Raises:
        CredentialsInvalid: it can't be read now.
    """

    name = "tokens"
    """In metrics."""

    def __init__(self, file: str) -> None:
        self.stale = False
        """Whether the file could not be read again."""
        self._file = _watched(file)
        self._tokens = _parse(self._file)
        self._table = TokenTable(self._tokens)
        self._refreshing = asyncio.Lock()

    def find(self, sha256: str) -> KnownToken | None:
        """The token with a hash."""
        return self._table.find(sha256)

    def is_usable(self, identity: Identity) -> bool:
        """Whether a token proves this identity, and is not revoked."""
        return self._table.is_usable(identity)

    async def refresh(self, *, force: bool = False) -> None:
        """Reads the file again if it has changed, or if `force`; what fails changes nothing."""
        async with self._refreshing:  # of two at once, the older reading must not end last
            await self._refresh(force=force)

    async def _refresh(self, *, force: bool) -> None:
        if not force and not await asyncio.to_thread(self._file.changed):
            return
        try:
            tokens = await asyncio.to_thread(_parse, self._file)
            before, self._tokens = self._tokens, tokens
            self._table = TokenTable(self._tokens)
            self.stale = False
            for record in added(before, self._tokens):
                audit(record_of_token(AuditEvent.TOKEN_LOADED, record))
            for record in ended(before, self._tokens):
                audit(record_of_token(AuditEvent.TOKEN_DROPPED, record))
            log.info("tokens were read", extra={"tokens": len(self._table)})
        except CredentialsInvalid as error:
            if not self.stale or force:
                log.error("the tokens that are known stay in use: %s", error)  # noqa: TRY400
            self.stale = True


def read_tokens(file: str) -> Tokens:
    """The tokens of a file.

    Raises:
        CredentialsInvalid: it can't be read.
    """
    return _parse(_watched(file))


def change_tokens(file: str, change: Callable[[Tokens], Tokens]) -> tuple[Tokens, Tokens]:
    """Changes a file of tokens, or makes it; returns what was in it, and what is.

    Args:
        file: its name.
        change: from the tokens that are there to those that are to be.

    Raises:
        CredentialsInvalid: it can't be read, what is to be written is not valid, or those who
            read it now could not read it then.
        OSError: it can't be written.
    """
    path = Path(file).resolve()  # of a link, what it leads to
    with _write_lock(path):
        before = read_tokens(file) if path.exists() else ()
        tokens = change(before)
        limit = datetime.now(UTC) - FORGET_AFTER
        kept = tuple(token for token in tokens if token.ended is None or token.ended > limit)
        try:
            checked = TokenList(tokens=kept)
        except ValidationError as error:
            raise WatchedFile(OPTION, file).invalid(_problem(error)) from None
        _replace(path, checked.model_dump_json(indent=1, exclude_none=True).encode() + b"\n")
    return before, kept


def added(before: Tokens, after: Tokens) -> Iterator[TokenRecord]:
    """The tokens that are new in a file."""
    known = {record.sha256 for record in before}
    return (record for record in after if record.sha256 not in known)


def ended(before: Tokens, after: Tokens) -> Iterator[TokenRecord]:
    """The tokens of a file that were revoked, or taken out of it before they expired."""
    now = datetime.now(UTC)
    usable = {record.sha256 for record in after if not record.revoked}
    gone = (record for record in before if record.sha256 not in usable and not record.revoked)
    return (record for record in gone if record.expires is None or record.expires > now)


def record_of_token(
    event: AuditEvent, record: TokenRecord, identity: str | None = None
) -> AuditRecord:
    """What is put on record of a token; `identity`: who did it, where it is known."""
    expires = "never" if record.expires is None else f"{record.expires:%FT%TZ}"
    detail = f"{record.identity}#{record.id}, {','.join(record.scopes)}, expires {expires}"
    return AuditRecord(event=event, tenant=record.tenant, identity=identity, detail=detail)


def _watched(file: str) -> WatchedFile:
    advice = "; `stepstate tokens create` makes one"
    return WatchedFile(OPTION, file, secret=True, advice=advice)


def _parse(file: WatchedFile) -> Tokens:
    try:
        return TokenList.model_validate_json(file.read()).tokens
    except ValidationError as error:
        raise file.invalid(f"{_problem(error)}; `stepstate tokens` writes it") from None


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


@contextmanager
def _write_lock(path: Path) -> Iterator[None]:
    """Waits until no other process changes the file. The lock is on a file that is not replaced."""
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _keep_readers(path: Path, successor: str) -> None:
    """Gives a new file the owner, group, mode and access list of the one whose place it takes.

    Without them a server that runs as another user could not read it, and would accept what was
    revoked.

    Raises:
        CredentialsInvalid: only its owner or root may do that.
    """
    before = path.stat()
    try:
        os.chown(successor, before.st_uid, before.st_gid)
    except PermissionError:
        raise WatchedFile(OPTION, str(path)).invalid(
            f"is of the user {before.st_uid} and the group {before.st_gid}, and a new one can't be "
            "given to them: nothing was changed; run this as that user or as root"
        ) from None
    shutil.copystat(path, successor)


def _replace(path: Path, data: bytes) -> None:
    """Writes a file, for its owner alone; who may read one that was there may read the new one."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with open(descriptor, "wb") as opened:  # noqa: PTH123 - a descriptor
            if path.exists():
                _keep_readers(path, name)
            opened.write(data)
            opened.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
