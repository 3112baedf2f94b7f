"""The file of a store: opened, and opened again after it broke or was deleted.

Rule 1: the files are looked at before an operation, and after each commit before it is
        acknowledged.
Rule 2: commits in a WAL that was deleted are copied into the database from the open file, so none
        is lost as long as the process lives; then the files are opened again.
Rule 3: a commit that was written while the database was deleted, or another process made new
        files, is not acknowledged.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stepstate.errors import StoreOpenError
from stepstate.stores.sqlite.reserve import OutOfSpace, Reserve
from stepstate.stores.sqlite.schema import NotAStepstateFile, configure, prepare, probe
from stepstate.stores.sqlite.watch import FileReplaced, Files, FileWatch, close_apart
from stepstate.stores.types import DiskUsage
from stepstate.uptime import UptimeClock

log = logging.getLogger(__name__)

BUSY_SECONDS = 2.0
"""How long another process on the same file may take for its own transaction."""
FRESH_SECONDS = 0.01
"""How long a look counts: writes that follow each other look after each commit only."""
MEASURE_SECONDS = 1.0
"""How often to look at the size of the reserve."""
OLDEST_SQLITE = (3, 33, 0)
"""The first with UPDATE ... FROM."""
PRIVATE = 0o600
"""The mode of a new file: sessions are the data of their clients. SQLite gives it to the others
beside it."""

_KEPT = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
"""Errors after which the connection still works."""
_KEPT_FROM_COPYING = (
    "its WAL was deleted, and can't be copied into the database while another process reads that: "
    "end that process"
)
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
"""The latter for a quota that is used up."""


class SessionFile:
    """One connection to one file, for one thread.

    Pages of ended sessions are used again, not given back: the file stays as large as the most
    sessions that it ever held, and no step pays for shrinking it.

    Args:
        path: the file; it is made if its folder is there.
        fsync: whether a commit waits for the disk (synchronous = FULL), so that it survives
            a loss of power too. Without, it survives any end of the process.
        clock: set to the file's clock whenever the file is opened.
    """

    def __init__(self, path: Path, *, fsync: bool, clock: UptimeClock) -> None:
        self.path = path
        self.clock = clock
        self._fsync = fsync
        self._connection: sqlite3.Connection | None = None
        self._reserve = Reserve(path)
        self._watch: FileWatch | None = None
        self._looked_at = 0.0
        self._measured_at = 0.0

    def open(self) -> None:
        """Opens the file for the first time.

        Raises:
            StoreOpenError: it is not a file to keep sessions in.
        """
        try:
            _check_place(self.path)
            self._check_writable(self._open())
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise StoreOpenError(f"sqlite:{self.path}", _problem(error)) from error
        self._check_mode()

    @contextmanager
    def use(self, *, rows: int = 0, size: int = 0) -> Iterator[sqlite3.Connection]:
        """The connection for one operation, opened again if necessary, with room for a write.

        At the end of the block a commit is confirmed: others, and a restart, find it.

        Args:
            rows: how many rows are to be written; 0: the connection is only read.
            size: the bytes of their snapshots.

        Raises:
            sqlite3.Error, OSError: it can't be opened, there is too little room, or the room
                can't be determined; nothing may be written.
            FileReplaced: what was committed may be lost.
        """
        self._share()
        if not rows or time.monotonic() - self._looked_at > FRESH_SECONDS:
            self._look()
        connection = self._connection or self._open()
        self._share()
        if rows:
            self._reserve.ensure(connection, rows, size)
        yield connection
        if rows and not self._look():
            raise FileReplaced

    def recover(self, error: Exception) -> None:
        """Rolls back, and closes a connection that may not work any more."""
        connection = self._connection
        if connection is None:
            return
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        self._reserve.full |= code in _NO_ROOM
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self.close()
        if code not in _KEPT:
            self.close()

    def disk_usage(self) -> DiskUsage | None:
        """See `SessionStore.disk_usage`."""
        return self._reserve.usage()

    def close(self) -> None:
        """Closes the connection; the last one to a file copies its WAL into the database."""
        connection, self._connection = self._connection, None
        watch, self._watch = self._watch, None
        if connection is not None and watch is not None:
            watch.close()
            self._reserve.delete()  # to make room for that
            connection.close()

    def _open(self) -> sqlite3.Connection:
        real = os.path.realpath(self.path)
        with suppress(OSError):  # it is there; or SQLite says why it can't be made
            os.mknod(real, stat.S_IFREG | PRIVATE)
            os.chmod(real, PRIVATE)  # noqa: PTH101 (the umask may have taken some of it)
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self.clock.set(prepare(connection, self.clock()))
            configure(connection, fsync=self._fsync, busy_seconds=BUSY_SECONDS)
            self._reserve.open()
            self._watch = FileWatch(self.path)
        except BaseException:
            connection.close()
            raise
        self._looked_at = self._measured_at = time.monotonic()
        self._connection = connection
        return connection

    def _check_writable(self, connection: sqlite3.Connection) -> None:
        """Refuses a file that can't be written: a server could do nothing with it.

        Only a write shows it: on a read-only file SQLite makes BEGIN IMMEDIATE a plain BEGIN.
        """
        try:
            probe(connection)
        except sqlite3.OperationalError as error:
            # Later it can, if another process writes it now, or there is no room.
            if error.sqlite_errorcode & 0xFF not in _KEPT and not self._reserve.full:
                raise

    def _check_mode(self) -> None:
        """Warns if other users can read the file; a new one is private."""
        mode = self.path.stat().st_mode
        if mode & 0o006 and self.path.parent.stat().st_mode & 0o001:
            log.warning(
                "other users of this machine can read the sessions: chmod o-rwx the files",
                extra={"path": str(self.path), "mode": f"{mode & 0o777:04o}"},
            )

    def _share(self) -> None:
        if self._watch is not None:
            self._watch.share()

    def _look(self) -> bool:
        """Moves to new files if one was deleted or replaced.

        Returns:
            Whether the database has all that was committed before.
        """
        connection, watch = self._connection, self._watch
        if connection is None or watch is None:
            return True
        self._looked_at = time.monotonic()
        if watch.look() is Files.THERE:
            self._look_at_reserve()
            return True
        return self._move(connection, watch)

    def _move(self, connection: sqlite3.Connection, watch: FileWatch) -> bool:
        whole = watch.wait_alone()
        if whole and not self._reserve.copy_wal(connection):
            raise OutOfSpace("wal", _KEPT_FROM_COPYING)
        log.warning("files of the store were deleted or replaced", extra={"path": str(self.path)})
        self._connection = self._watch = None
        try:
            self._reserve.delete()
            if whole:
                connection.close()
            else:
                close_apart(connection, self.path)
            self._open()
        finally:
            watch.close()
        return whole

    def _look_at_reserve(self) -> None:
        if self._looked_at - self._measured_at >= MEASURE_SECONDS:
            self._measured_at = self._looked_at
            self._reserve.look()


def _check_place(path: Path) -> None:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise sqlite3.NotSupportedError(
            f"this Python has SQLite {sqlite3.sqlite_version}, and 3.33 or later is needed"
        )
    if path.is_dir():
        raise IsADirectoryError("it is a folder: give the path of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"the folder {path.parent} does not exist: make it, or give another path"
        )


def _problem(error: Exception) -> str:
    """SQLite's message, and what to do about it."""
    name = getattr(error, "sqlite_errorname", "")
    if isinstance(error, OSError) and error.errno in _NOT_OURS:
        return f"{error.strerror}: {_OTHER_ADVICE}"
    if isinstance(error, NotAStepstateFile | sqlite3.NotSupportedError) or not name:
        return str(error)
    for start, advice in _ADVICE.items():
        if name.startswith(start):
            return f"{error}: {advice}"
    return f"{error} ({name}): {_OTHER_ADVICE}"


_ADVICE = {
    "SQLITE_NOTADB": "give a path of its own, the file there is something else",
    "SQLITE_BUSY": "another process keeps it locked, end that one",
    "SQLITE_FULL": "make room on the disk",
    "SQLITE_IOERR_SHMSIZE": "make room on the disk",
    "SQLITE_CORRUPT": "move it away, or bring back a copy",
}
_OTHER_ADVICE = "see that the server may write there, or give another path"
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
