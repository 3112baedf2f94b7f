"""The file of a store: opened, and opened again after it broke or was deleted.

SQLite has two more files beside it while it is open: the WAL, where commits are until a checkpoint
copies them into the database, and its index, the `-shm`. Whoever deletes or replaces one of the
three separates the server from what others find under these names, and SQLite does not notice:
commits still succeed, and are gone with the process.

Rule 1: the three files are looked at before each operation, and after each commit before it is
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
from contextlib import suppress
from pathlib import Path

from stepstate.errors import StoreOpenError
from stepstate.stores.sqlite.reserve import OutOfSpace, Reserve
from stepstate.stores.sqlite.schema import NotAStepstateFile, configure, prepare, probe
from stepstate.stores.types import DiskUsage
from stepstate.uptime import UptimeClock

log = logging.getLogger(__name__)

BUSY_SECONDS = 2.0
"""How long another process on the same file may take for its own transaction."""
LOOK_SECONDS = 1.0
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

Identity = tuple[int, int] | None
"""Device and inode of a file; None: it is not there."""


class FileReplaced(sqlite3.OperationalError):
    """The file was deleted or replaced while something was written to it."""

    sqlite_errorcode = sqlite3.SQLITE_IOERR

    def __init__(self) -> None:
        super().__init__(
            "the database or a file beside it was deleted or replaced while the server wrote to "
            "it: leave them alone while a server runs"
        )


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
        self._parts: tuple[str, ...] = ()
        """The paths of the database, its WAL and its index."""
        self._opened: list[Identity] = []
        """What they were when they were opened."""
        self._looked_at = 0.0

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

    def connection(self, *, rows: int = 0, size: int = 0) -> sqlite3.Connection:
        """The connection, opened again if necessary, with room on the disk for a write.

        Args:
            rows: how many rows are to be written; 0: the connection is only read.
            size: the bytes of their snapshots.

        Raises:
            sqlite3.Error, OSError: it can't be opened, there is too little room, or the room
                can't be determined; nothing may be written.
        """
        self._look()
        connection = self._connection or self._open()
        if rows:
            self._reserve.ensure(connection, rows, size)
        return connection

    def confirm(self) -> None:
        """Makes sure that the commit that was just done is where others, and a restart, find it.

        Raises:
            FileReplaced: it is not, or that is unknown.
            sqlite3.Error: it is in a WAL that was deleted and can't be copied now.
        """
        if not self._look():
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
        if connection is not None:
            self._reserve.delete()  # to make room for that
            connection.close()

    def _open(self) -> sqlite3.Connection:
        real = os.path.realpath(self.path)  # SQLite has the others there, if it is a link
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
        except BaseException:
            connection.close()
            raise
        self._parts = (str(self.path), f"{real}-wal", f"{real}-shm")
        self._opened = [_identity(part) for part in self._parts]
        self._looked_at = time.monotonic()
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

    def _look(self) -> bool:
        """Leaves files of which one was deleted or replaced.

        Returns:
            Whether the database has all that was committed before.
        """
        if self._connection is None:
            return True
        now = [_identity(part) for part in self._parts]
        if now == self._opened and None not in now:
            self._look_at_reserve()
            return True
        return self._leave(self._connection, now)

    def _leave(self, connection: sqlite3.Connection, now: list[Identity]) -> bool:
        changed = [i for i, there in enumerate(now) if there is None or there != self._opened[i]]
        # Where there is a new one, another process may use it: nothing may be copied beside it.
        whole = 0 not in changed and all(now[i] is None for i in changed)
        if whole and not self._reserve.copy_wal(connection):
            raise OutOfSpace("wal", _KEPT_FROM_COPYING)
        log.warning(
            "files of the store were deleted or replaced: they are opened or made anew",
            extra={"files": [self._parts[i] for i in changed], "commits_lost": not whole},
        )
        self.close()
        return whole

    def _look_at_reserve(self) -> None:
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self._reserve.look()


def _identity(path: str) -> Identity:
    try:
        found = os.stat(path)  # noqa: PTH116 (hot: Path.stat takes longer)
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
    "SQLITE_CORRUPT": "move it away, or bring back a copy",
}
_OTHER_ADVICE = "see that the server may write there, or give another path"
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
