"""The audit log: who did what to whose sessions, as JSON lines in a file of their own.

Rule 1: each act is one line, also one that may have been done (`MAYBE_DONE`). Only acts that were
refused, and would fill the disk if somebody repeats them, are limited: `LINES_PER_SECOND` for each
event, reason and tenant, and a line says how many were left out.
Rule 2: nobody waits for it. Lines go through a queue to a thread, as those of the log do. What the
disk does not take in time is dropped, counted in `AUDIT_DROPPED`, and said in a line.
Rule 3: no line has a credential or anything of a session but its names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

from stepstate.logging.limit import LINES_PER_SECOND, LineLimit, Place
from stepstate.logging.lines import renderer
from stepstate.logging.writer import DescriptorOutput, LineQueue, LineWriter, write_all
from stepstate.watched_files import warn_if_readable

log = logging.getLogger(__name__)
audit_logger = logging.getLogger("stepstate.audit")
audit_logger.setLevel(logging.INFO)
audit_logger.propagate = False  # its lines are in its own file only
audit_logger.disabled = True  # until there is one

STDOUT = 1
"""Its file descriptor."""
MAX_QUEUED = 10_000
"""Some MiB, and seconds of the most that a server can open and close."""
AT_ONCE = 100
OK = "OK"
MAYBE_DONE = frozenset({OK, "CANCELLED", "INTERNAL"})
"""Results of acts that were done, or may have been: who cancels a call at the right moment must not
be able to hide it behind others."""

AUDIT_DROPPED = {"queue_full": 0, "rate_limit": 0, "failed": 0}
"""Audit lines that were not written, by cause."""


class AuditEvent(StrEnum):
    """What is on record."""

    SESSION_OPENED = "session opened"
    SESSION_CLOSED = "session closed"
    SESSION_EXPIRED = "session expired"
    SESSION_DELETED = "expired session deleted"
    SESSION_RESTORED = "session restored"
    SESSION_FORKED = "session forked"
    SESSION_EXPORTED = "session exported"
    SESSION_IMPORTED = "session imported"
    ADMIN_ACT = "admin act"
    """Any other call on the sessions of another tenant than the caller's, or on all tenants."""
    CREDENTIAL_REFUSED = "credential refused"
    TOKEN_CREATED = "token created"  # noqa: S105 - not a token
    TOKEN_REVOKED = "token revoked"  # noqa: S105 - not a token
    TOKEN_LOADED = "token loaded"  # noqa: S105 - not a token
    """A server has read a token that it did not know."""
    TOKEN_DROPPED = "token dropped"  # noqa: S105 - not a token
    """A server has read that a token is revoked or removed."""
    CONFIGURATION_RELOADED = "configuration reloaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One line. What does not apply is None."""

    event: AuditEvent
    result: str = OK
    """"OK", or the name of the gRPC status."""
    reason: str | None = None
    """Of another result: that of the error."""
    method: str | None = None
    """The RPC."""
    tenant: str | None = None
    """Whose sessions it acts on."""
    identity: str | None = None
    """Who did it, as the credential names it."""
    identity_tenant: str | None = None
    """Where that identity belongs; another one than `tenant` for the act of an admin."""
    admin: bool = False
    """Whether it needed the scope `admin`."""
    peer: str | None = None
    """The address that it came from."""
    session: str | None = None
    source: str | None = None
    """The session that a fork was made of."""
    model: str | None = None
    """NAME/VERSION."""
    detail: str | None = None


_FIELDS = tuple(field.name for field in fields(AuditRecord) if field.name != "event")


def audit(record: AuditRecord) -> None:
    """Writes a record, if there is an audit log."""
    if not audit_logger.disabled:
        values = {name: getattr(record, name) for name in _FIELDS}
        audit_logger.info(record.event, extra=values)


@contextmanager
def audit_lines(path: str) -> Iterator[None]:
    """Writes the acts of this process to a file while the block runs.

    Args:
        path: of the file, which is made if it is not there, readable by its owner only, and made
            again when it was moved away, as logrotate does; "-": standard output; "": nothing is
            written.

    Raises:
        OSError: the file can't be written.
    """
    if not path:
        yield
        return
    file = None if path == "-" else AuditFile(path)
    limit = LineLimit(LINES_PER_SECOND)
    writer = LineWriter(
        file or DescriptorOutput(STDOUT),
        renderer("json", terminal=False),
        limit,
        dropped=AUDIT_DROPPED,
        max_queued=MAX_QUEUED,
        at_once=AT_ONCE,
    )
    handler = LineQueue(writer.lines, limit, AUDIT_DROPPED, _limited_place)
    audit_logger.addHandler(handler)
    audit_logger.disabled = False
    writer.start()
    try:
        yield
    finally:
        audit_logger.removeHandler(handler)
        others = any(isinstance(one, LineQueue) for one in audit_logger.handlers)
        audit_logger.disabled = not others
        writer.stop()
        if file is not None and not writer.is_alive():
            file.close()


class AuditFile:
    """A file to which lines are appended, also after it was moved away.

    Args:
        path: of the file.

    Raises:
        OSError: it can't be opened.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._fd = self._open()
        self._torn = False

    def write(self, lines: list[bytes]) -> None:
        """See `LineOutput`."""
        try:
            if self._moved():
                self._reopen()
            write_all(self._fd, (b"\n" if self._torn else b"") + b"".join(lines))
            self._torn = False
        except OSError as error:
            self._torn = True  # a line may be there in part
            problem = {"file": str(self._path), "problem": error.strerror}
            log.error("audit lines were not written", extra=problem)  # noqa: TRY400 - of the disk
            raise

    def close(self) -> None:
        """Ends it."""
        os.close(self._fd)

    def _reopen(self) -> None:
        fd = self._open()
        os.close(self._fd)
        self._fd = fd

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        warn_if_readable(self._path, os.fstat(fd).st_mode)
        return fd

    def _moved(self) -> bool:
        """Whether the path leads to another file than the open one, or to none."""
        here = os.fstat(self._fd)
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)


def _limited_place(record: logging.LogRecord) -> Place | None:
    """Acts that were refused count together by event, reason and tenant; others have no limit."""
    values = vars(record)
    if values["result"] in MAYBE_DONE:
        return None
    return record.msg, values["reason"], values["tenant"]
