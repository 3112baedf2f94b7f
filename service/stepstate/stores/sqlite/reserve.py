"""The room that the file of a store needs on its disk.

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
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from stepstate.stores.types import DiskUsage

ROW_BYTES = 9 * 4096
"""Without its snapshot: pages of its table, its indexes, its tombstone and its count, some of which
split."""
RESERVE_BYTES = 16 * 2**20
"""The minimum; on a small disk a sixteenth of it."""
MAX_WAL_BYTES = 2**30
"""Beyond it writes are refused: a reader that keeps so much from being copied is one that was
left behind rather than a slow one."""

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
        emptied = self.copy_wal(connection)
        self.look()
        if not self._has_room(rows, size, spare=self._min_bytes):
            raise _out_of_space(0 if emptied else self._wal_bytes())
        self.full = False

    def copy_wal(self, connection: sqlite3.Connection) -> bool:
        """Copies as much of the WAL as readers allow; returns whether it is empty now.

        Raises:
            sqlite3.Error: it can't be copied now.
        """
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
            with os.fdopen(self._open(), "ab") as file:
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

    def _open(self) -> int:
        """Opens the reserve; a new one has the mode of the database, as SQLite's other files."""
        mode = self._database.stat().st_mode & 0o777
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode)
        if not os.fstat(file).st_size:
            with suppress(PermissionError):  # of another user, who had no room to fill it
                os.fchmod(file, mode)  # the umask may have taken some of it
        return file


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
