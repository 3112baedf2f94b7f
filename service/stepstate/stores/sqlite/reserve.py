"""Room on the disk: a bounded WAL, and a reserve with which it can always be written back.

SQLite writes to its WAL first, and copies it into the database later: a checkpoint, for which the
database may have to grow. On a disk that the WAL has filled it can't, and then nothing is ever
freed again. So a file beside the database keeps room for that.

Rule 1: the reserve is at least as large as the WAL. A write that would break that is refused.
Rule 2: when a checkpoint has no room, the reserve is given back for it, and taken again after it.
Rule 3: once the disk was full, nothing is written before the WAL is written back, the reserve is
        there again and as much is free besides; so writes don't succeed and fail in turn.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from stepstate.stores.base import DiskUsage

BYTES_OF_A_ROW = 8 * 4096
"""Without its snapshot: pages of its table, its indexes and its ending, some of which split."""
RESERVE_BYTES = 16 * 2**20
"""At the least; on a small disk a sixteenth of it."""
MAX_WAL_BYTES = 2**30
"""Beyond it writes are refused: a reader that keeps so much from being written back is forgotten
rather than slow."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutOfSpace(sqlite3.OperationalError):
    """Nothing is written, as it might never be written back.

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
        """Whether a write failed for want of room, and none has been looked for since."""
        database = Path(os.path.realpath(database))  # where SQLite has its WAL, if it is a link
        self._database = database
        self._path = Path(f"{database}-reserve")
        self._wal = f"{database}-wal"
        self._least = 0
        self._held = 0

    def open(self) -> None:
        """Takes the reserve, as far as there is room.

        Raises:
            OSError: it can't be made, for another reason.
        """
        volume = os.statvfs(self._database.parent)
        self._least = min(RESERVE_BYTES, volume.f_blocks * volume.f_frsize // 16)
        self.full |= not self._take(self._wal_bytes())

    def give_back(self) -> None:
        """Lets go of the room."""
        self._held = 0
        with suppress(OSError):
            self._path.unlink()

    def look(self) -> None:
        """Notes what others did to it, and gives back what a shorter WAL does not need."""
        self._held = _size(self._path)
        wanted = self._size_for(self._wal_bytes())
        if self._held > 2 * wanted:
            with suppress(OSError):
                os.truncate(self._path, wanted)
            self._held = _size(self._path)

    def ensure(self, connection: sqlite3.Connection, rows: int, size: int) -> None:
        """Sees that a write has room, and can be written back.

        Args:
            connection: to the database.
            rows: how many rows are written.
            size: the bytes of their snapshots.

        Raises:
            OutOfSpace: it has not.
            sqlite3.Error: the WAL can't be written back now.
            OSError: the reserve can't be made.
        """
        if not self.full:
            if self._wal_bytes() + size + rows * BYTES_OF_A_ROW <= self._held:
                return
            if self._has_room(rows, size, spare=self._least // 4):
                return
        self.full = True
        emptied = self._write_back(connection)
        self.look()
        if not self._has_room(rows, size, spare=self._least):
            raise _no_room(0 if emptied else self._wal_bytes())
        self.full = False

    def usage(self) -> DiskUsage | None:
        """What is used and free; None: the files are gone. Any thread may ask."""
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
        """Whether both the reserve and the WAL can grow for a write, and some more after it."""
        wal = self._wal_bytes()
        # Many rows write no more pages than there are: each of them once.
        size += min(rows * BYTES_OF_A_ROW, _size(self._database) + wal + BYTES_OF_A_ROW)
        fits = wal <= MAX_WAL_BYTES and self._take(wal + size)
        return fits and self._free_bytes() >= size + spare

    def _wal_bytes(self) -> int:
        return _size(self._wal)

    def _free_bytes(self) -> int:
        volume = os.statvfs(self._database.parent)
        return volume.f_bavail * volume.f_frsize

    def _size_for(self, wal: int) -> int:
        """A quarter of the least more than the WAL, so that not every write has to take some."""
        return max(self._least, wal + self._least // 4)

    def _take(self, wal: int) -> bool:
        """Makes the reserve large enough for a WAL; whether there was room.

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
                    file.truncate(before)  # some file systems keep what they could take
                    raise
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return False
        self._held = max(before, wanted)
        return True

    def _write_back(self, connection: sqlite3.Connection) -> bool:
        """Writes the WAL back, as far as readers let it; whether it is empty now."""
        (timeout,) = connection.execute("PRAGMA busy_timeout").fetchone()
        connection.execute("PRAGMA busy_timeout = 0")  # readers are not waited for
        try:
            try:
                return _checkpoint(connection)
            except sqlite3.OperationalError:
                self.give_back()
                return _checkpoint(connection)
        finally:
            connection.execute(f"PRAGMA busy_timeout = {timeout}")


def _no_room(wal: int) -> OutOfSpace:
    """An error about a WAL of so many bytes that could not be emptied; 0: it is not to blame."""
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
