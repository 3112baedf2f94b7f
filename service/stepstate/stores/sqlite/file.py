"""The file of a store: opened, and opened again after it broke or was deleted."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path

from stepstate.errors import StoreOpenError
from stepstate.stores.base import DiskUsage
from stepstate.stores.sqlite.reserve import Reserve
from stepstate.stores.sqlite.schema import NotAStepstateFile, prepare
from stepstate.uptime import UptimeClock

log = logging.getLogger(__name__)

BUSY_SECONDS = 2.0
"""How long another process on the same file may take for its own transaction."""
WAL_PAGES = 8192
"""32 MiB of WAL between checkpoints: one takes some 20 ms, and pages that were written many
times since the last are copied once. A restart after kill -9 reads it in some 30 ms."""
WAL_BYTES = 64 * 2**20
"""What a WAL that had to grow further, past a reader, is cut to."""
LOOK_SECONDS = 1.0
"""How often it is looked whether the file is still there: writes to a deleted one succeed."""
OLDEST_SQLITE = (3, 33, 0)
"""The first with UPDATE ... FROM."""

_KEPT = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
"""After these errors the connection is as good as before."""
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
"""A quota that is used up is the latter."""


class SessionFile:
    """One connection to one file, for one thread.

    Pages that ended sessions leave are used again, not given back: the file stays as large
    as the most sessions it ever held, and no step pays for shrinking it.

    Args:
        path: the file; it is made if its folder is there.
        fsync: whether a commit waits for the disk (synchronous = FULL), so that it survives
            a loss of power too. Without, it survives the end of the process however that comes.
        clock: set to what the file's clock shows whenever it is opened.
    """

    def __init__(self, path: Path, *, fsync: bool, clock: UptimeClock) -> None:
        self.path = path
        self.clock = clock
        self._fsync = fsync
        self._connection: sqlite3.Connection | None = None
        self._reserve = Reserve(path)
        self._inode = (0, 0)
        self._looked_at = 0.0

    def open(self) -> None:
        """Opens the file for the first time.

        Raises:
            StoreOpenError: it is not a file to keep sessions in.
        """
        try:
            self._check_place()
            self._open()
            self._check_writable()
        except (sqlite3.Error, OSError) as error:
            raise StoreOpenError(f"sqlite:{self.path}", _problem(error)) from error

    def connection(self) -> sqlite3.Connection:
        """The connection, opened again if need be.

        Raises:
            sqlite3.Error, OSError: it can't be.
        """
        if self._connection is not None and self._is_gone():
            log.warning("the file of sessions is gone: it is made anew", extra=self._where())
            self.close()
        if self._connection is None:
            self._open()
        assert self._connection is not None
        return self._connection

    def failed(self, error: Exception) -> None:
        """Rolls back, and lets go of a connection that may not be good any more."""
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

    def make_room(self, rows: int, size: int) -> None:
        """Sees that a write of so many rows, with so many bytes of snapshots, has room.

        Raises:
            sqlite3.Error, OSError: it has not, or there is no telling; nothing may be written.
        """
        self._reserve.ensure(self.connection(), rows, size)

    def disk_usage(self) -> DiskUsage | None:
        """See `SessionStore.disk_usage`."""
        return self._reserve.usage()

    def close(self) -> None:
        """Closes the connection; the last one to a file writes its WAL back."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._reserve.give_back()  # for that
            connection.close()

    def _open(self) -> None:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self.clock.set(prepare(connection, self.clock()))
            self._configure(connection)
            self._reserve.open()
            status = self.path.stat()
        except BaseException:
            connection.close()
            raise
        self._inode = (status.st_dev, status.st_ino)
        self._looked_at = time.monotonic()
        self._connection = connection

    def _configure(self, connection: sqlite3.Connection) -> None:
        _use_wal(connection)
        connection.execute(f"PRAGMA synchronous = {'FULL' if self._fsync else 'NORMAL'}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        # A statement of many rows has a journal of its own, which goes to a temporary file
        # beyond 64 KiB; a container may have no folder for that.
        connection.execute("PRAGMA temp_store = MEMORY")

    def _check_writable(self) -> None:
        """Refuses a file that can be read only: a server of it could serve nothing."""
        connection = self.connection()
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # then another one writes it
                self.close()
                raise

    def _check_place(self) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise sqlite3.NotSupportedError(
                f"this Python has SQLite {sqlite3.sqlite_version}, and 3.33 or later is needed"
            )
        if self.path.is_dir():
            raise IsADirectoryError("it is a folder: give the path of a file in it")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"the folder {self.path.parent} does not exist: make it, or give another path"
            )

    def _is_gone(self) -> bool:
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return False
        self._looked_at = now
        try:
            status = os.stat(self.path)  # noqa: PTH116 (hot: Path.stat takes longer)
        except OSError:
            return True
        self._reserve.look()
        return (status.st_dev, status.st_ino) != self._inode

    def _where(self) -> dict[str, str]:
        return {"path": str(self.path)}


def _use_wal(connection: sqlite3.Connection) -> None:
    """The change to WAL needs the file for itself, and does not wait for it."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise sqlite3.NotSupportedError(
                "its file system can't share memory between processes, which WAL needs: "
                "give a path on a local disk"
            )
        return


def _problem(error: Exception) -> str:
    """What SQLite said, and what to do about it."""
    name = getattr(error, "sqlite_errorname", "")
    if isinstance(error, PermissionError):
        return f"{error.strerror}: see that the server may write there, or give another path"
    if isinstance(error, NotAStepstateFile | sqlite3.NotSupportedError) or not name:
        return str(error)
    for start, advice in _ADVICE.items():
        if name.startswith(start):
            return f"{error}: {advice}"
    return f"{error} ({name}): see that the server may write there, or give another path"


_ADVICE = {
    "SQLITE_NOTADB": "give a path of its own, the file there is something else",
    "SQLITE_BUSY": "another process keeps it locked, end that one",
    "SQLITE_FULL": "make room on the disk",
    "SQLITE_CORRUPT": "move it away, or bring back a copy",
}
