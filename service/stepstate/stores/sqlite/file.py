"""The file of a store, and the room that it needs on its disk.

The file is opened, and opened again after it broke or was deleted.

SQLite writes to its WAL first, and copies it into the database later, in a checkpoint, for which
the database may have to grow. On a disk that the WAL has filled it can't grow, and no room is ever
freed again. So a second file beside the database, the reserve, keeps room for a checkpoint.

Rule 1: the reserve is at least as large as the WAL. A write that would break this is refused.
Rule 2: when a checkpoint has no room, the reserve is deleted for it, and made again after it.
Rule 3: once the disk was full, nothing is written before the WAL is copied, the reserve is there
        again and as much is free besides; so writes don't alternate between success and failure.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from stepstate.errors import StoreOpenError
from stepstate.stores.sqlite.schema import NotAStepstateFile, configure, prepare
from stepstate.stores.types import DiskUsage
from stepstate.uptime import UptimeClock

log = logging.getLogger(__name__)

BUSY_SECONDS = 2.0
"""How long another process on the same file may take for its own transaction."""
LOOK_SECONDS = 1.0
"""How often to check that the file is still there: writes to a deleted one succeed."""
OLDEST_SQLITE = (3, 33, 0)
"""The first with UPDATE ... FROM."""
ROW_BYTES = 8 * 4096
"""Without its snapshot: pages of its table, its indexes and its tombstone, some of which split."""
RESERVE_BYTES = 16 * 2**20
"""The minimum; on a small disk a sixteenth of it."""
MAX_WAL_BYTES = 2**30
"""Beyond it writes are refused: a reader that keeps so much from being copied is one that was
left behind rather than a slow one."""

_KEPT = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
"""Errors after which the connection still works."""
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
"""The latter for a quota that is used up."""
_OS_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutOfSpace(sqlite3.OperationalError):
    """Nothing is written, because it might never be copied into the database.

    Args:
        cause: full or wal, as in `errors.STORE_CAUSES`.
        problem: what is wrong, and what to do next.
    """

    sqlite_errorcode = sqlite3.SQLITE_FULL

    def __init__(self, cause: str, problem: str) -> None:
        super().__init__(problem)
        self.cause = cause


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
        self._inode = (0, 0)
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
            raise StoreOpenError(f"sqlite:{self.path}", _problem(error)) from error

    def connection(self, *, rows: int = 0, size: int = 0) -> sqlite3.Connection:
        """The connection, opened again if necessary, with room on the disk for a write.

        Args:
            rows: how many rows are to be written; 0: the connection is only read.
            size: the bytes of their snapshots.

        Raises:
            sqlite3.Error, OSError: it can't be opened, there is too little room, or the room
                can't be determined; nothing may be written.
        """
        if self._connection is not None and self._is_gone():
            log.warning("the file of sessions is gone: it is made anew", extra=self._where())
            self.close()
        connection = self._connection or self._open()
        if rows:
            self._reserve.ensure(connection, rows, size)
        return connection

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
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self.clock.set(prepare(connection, self.clock()))
            configure(connection, fsync=self._fsync, busy_seconds=BUSY_SECONDS)
            self._reserve.open()
            status = self.path.stat()
        except BaseException:
            connection.close()
            raise
        self._inode = (status.st_dev, status.st_ino)
        self._looked_at = time.monotonic()
        self._connection = connection
        return connection

    def _check_writable(self, connection: sqlite3.Connection) -> None:
        """Refuses a read-only file: a server could do nothing with it."""
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # else another one writes it
                self.close()
                raise

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


class Reserve:
    """The reserve of one database.

    Args:
        database: its path; the reserve is `database`-reserve.
    """

    def __init__(self, database: Path) -> None:
        self.full = False
        """Whether a write failed because the disk was full, and there was no room since."""
        database = Path(os.path.realpath(database))  # where SQLite has its WAL, if it is a link
        self._database = database
        self._path = Path(f"{database}-reserve")
        self._wal = f"{database}-wal"
        self._min_bytes = 0
        self._held = 0

    def open(self) -> None:
        """Makes the reserve, if there is room.

        Raises:
            OSError: it can't be made, for another reason.
        """
        volume = os.statvfs(self._database.parent)
        self._min_bytes = min(RESERVE_BYTES, volume.f_blocks * volume.f_frsize // 16)
        self.full |= not self._grow(self._wal_bytes())

    def delete(self) -> None:
        """Frees the room."""
        self._held = 0
        with suppress(OSError):
            self._path.unlink()

    def look(self) -> None:
        """Reads the size that it has now, and shrinks it to what a shorter WAL needs."""
        self._held = _size(self._path)
        wanted = self._size_for(self._wal_bytes())
        if self._held > 2 * wanted:
            with suppress(OSError):
                os.truncate(self._path, wanted)
            self._held = _size(self._path)

    def ensure(self, connection: sqlite3.Connection, rows: int, size: int) -> None:
        """Makes sure that a write has room, and can be copied into the database later.

        Args:
            connection: to the database.
            rows: how many rows are written.
            size: the bytes of their snapshots.

        Raises:
            OutOfSpace: there is no room.
            sqlite3.Error: the WAL can't be copied now.
            OSError: the reserve can't be made.
        """
        if not self.full:
            if self._wal_bytes() + size + rows * ROW_BYTES <= self._held:
                return
            if self._has_room(rows, size, spare=self._min_bytes // 4):
                return
        self.full = True
        emptied = self._copy_wal(connection)
        self.look()
        if not self._has_room(rows, size, spare=self._min_bytes):
            raise _out_of_space(0 if emptied else self._wal_bytes())
        self.full = False

    def usage(self) -> DiskUsage | None:
        """What is used and free; None: the files are gone. May be called from any thread."""
        try:
            volume = os.statvfs(self._database.parent)
        except OSError:
            return None
        return DiskUsage(
            database=_size(self._database),
            wal=self._wal_bytes(),
            reserve=_size(self._path),
            free=volume.f_bavail * volume.f_frsize,
            volume=volume.f_blocks * volume.f_frsize,
        )

    def _has_room(self, rows: int, size: int, *, spare: int) -> bool:
        """Whether both the reserve and the WAL can grow for a write, with `spare` bytes left."""
        wal = self._wal_bytes()
        # Many rows write each page once, so no more pages than there are.
        size += min(rows * ROW_BYTES, _size(self._database) + wal + ROW_BYTES)
        fits = wal <= MAX_WAL_BYTES and self._grow(wal + size)
        return fits and self._free_bytes() >= size + spare

    def _wal_bytes(self) -> int:
        return _size(self._wal)

    def _free_bytes(self) -> int:
        volume = os.statvfs(self._database.parent)
        return volume.f_bavail * volume.f_frsize

    def _size_for(self, wal: int) -> int:
        """The WAL and a quarter of the minimum, so that not every write has to grow it."""
        return max(self._min_bytes, wal + self._min_bytes // 4)

    def _grow(self, wal: int) -> bool:
        """Makes the reserve large enough for a WAL; returns whether there was room.

        Raises:
            OSError: it can't be made, for another reason.
        """
        wanted = self._size_for(wal)
        try:
            with self._path.open("ab") as file:
                before = file.tell()
                try:
                    if before < wanted:
                        os.posix_fallocate(file.fileno(), 0, wanted)
                except OSError:
                    file.truncate(before)  # some file systems keep the part that there was room for
                    raise
        except OSError as error:
            if error.errno not in _OS_NO_ROOM:
                raise
            return False
        self._held = max(before, wanted)
        return True

    def _copy_wal(self, connection: sqlite3.Connection) -> bool:
        """Copies as much of the WAL as readers allow; returns whether it is empty now."""
        (timeout,) = connection.execute("PRAGMA busy_timeout").fetchone()
        connection.execute("PRAGMA busy_timeout = 0")  # don't wait for readers
        try:
            try:
                return _checkpoint(connection)
            except sqlite3.OperationalError:
                self.delete()
                return _checkpoint(connection)
        finally:
            connection.execute(f"PRAGMA busy_timeout = {timeout}")


def _out_of_space(wal: int) -> OutOfSpace:
    """An error about a WAL of so many bytes that could not be emptied; 0: the disk is full."""
    if not wal:
        return OutOfSpace("full", "the disk is full: make room on it, or enlarge it")
    return OutOfSpace(
        "wal",
        f"another process has read or written the database for so long that {wal:,} bytes of its "
        "WAL can't be written back, and there is no room for more: end that process",
    )


def _checkpoint(connection: sqlite3.Connection) -> bool:
    (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


def _size(path: str | Path) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (hot: Path.stat takes longer)
    except OSError:
        return 0


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
    if isinstance(error, PermissionError):
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
