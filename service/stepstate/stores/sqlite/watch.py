"""Notices that the files of a store were deleted or replaced while they are open.

SQLite has two more files beside the database while it is open: the WAL, where commits are until a
checkpoint copies them into the database, and its index, the `-shm`. Whoever deletes or replaces
one of the three separates the server from what others find under these names, and SQLite does not
notice: commits still succeed, and are gone with the process.

Servers that share the file notice at different times, and SQLite's own locks are in the files that
are gone. So there is one more lock, on their folder: every server has a share of it, and gives it
up when it notices. The one that then gets it alone moves to new files, and the others follow.
"""

from __future__ import annotations

import enum
import fcntl
import os
import sqlite3
import struct
import time
from pathlib import Path

LOCK_SECONDS = 3.0
"""For other servers to notice, too: each looks for sessions to expire every second."""
POLL_SECONDS = 0.005

Identity = tuple[int, int] | None
"""Device and inode of a file; None: it is not there."""

_SHARED_FIRST, _SHARED_SIZE = 0x40000002, 510
"""The bytes of the database by which SQLite's connections lock it (os.h of SQLite)."""
_READ_LOCK = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, _SHARED_FIRST, _SHARED_SIZE, 0)
"""A `struct flock`."""


class FileReplaced(sqlite3.OperationalError):
    """The file was deleted or replaced while something was written to it."""

    sqlite_errorcode = sqlite3.SQLITE_IOERR

    def __init__(self) -> None:
        super().__init__(
            "the database or a file beside it was deleted or replaced while the server wrote to "
            "it: leave them alone while a server runs"
        )


class FilesLocked(sqlite3.OperationalError):
    """Another server does not notice, or does not finish to move to new files."""

    sqlite_errorcode = sqlite3.SQLITE_BUSY

    def __init__(self) -> None:
        super().__init__(
            "a file beside the database was deleted, and another server still uses it: end that "
            "one if it hangs"
        )


class Files(enum.Enum):
    """What happened to the files since they were opened."""

    THERE = enum.auto()
    BESIDE_DELETED = enum.auto()
    """The WAL or its index is not there, and nobody has made new ones."""
    REPLACED = enum.auto()
    """The database is not there or is another one, or others have made new files beside it."""


class FileWatch:
    """Looks at the files of an open database, and locks them against other servers.

    Args:
        path: of the database, which was just opened.
    """

    def __init__(self, path: Path) -> None:
        real = os.path.realpath(path)  # SQLite has the others there, if it is a link
        self._paths = (str(path), f"{real}-wal", f"{real}-shm")
        self._opened = self._identities()
        self._shared = False
        self._folder = os.open(Path(real).parent, os.O_RDONLY | os.O_DIRECTORY)

    def look(self) -> Files:
        """What happened to the files."""
        now = self._identities()
        if now == self._opened and None not in now:
            return Files.THERE
        if now[0] != self._opened[0] or now[0] is None:
            return Files.REPLACED
        beside = zip(now[1:], self._opened[1:], strict=True)
        replaced = any(there not in (None, opened) for there, opened in beside)
        return Files.REPLACED if replaced else Files.BESIDE_DELETED

    def share(self) -> None:
        """Keeps other servers from moving to new files, until this one notices or ends.

        Raises:
            FilesLocked: one does so, and does not finish.
        """
        until = time.monotonic() + LOCK_SECONDS
        while not self._shared:
            self._shared = self._lock(fcntl.LOCK_SH, until)

    def wait_alone(self) -> bool:
        """Waits until every server has noticed that a file beside the database was deleted.

        Returns:
            Whether this one may move to new files; False: another one has, or they were replaced.

        Raises:
            FilesLocked: another one still uses them.
        """
        until = time.monotonic() + LOCK_SECONDS
        fcntl.flock(self._folder, fcntl.LOCK_UN)
        self._shared = False
        while self.look() is Files.BESIDE_DELETED:
            if self._lock(fcntl.LOCK_EX, until):
                return self.look() is Files.BESIDE_DELETED
        return False

    def close(self) -> None:
        """Ends the watch, and gives up the lock."""
        os.close(self._folder)

    def _identities(self) -> list[Identity]:
        return [_identity(path) for path in self._paths]

    def _lock(self, kind: int, until: float) -> bool:
        try:
            fcntl.flock(self._folder, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise FilesLocked from None
            time.sleep(POLL_SECONDS)
            return False
        return True


def close_apart(connection: sqlite3.Connection, path: Path) -> None:
    """Closes a connection to files that were replaced, and leaves those that are there alone.

    The last connection to a database would copy its WAL, and delete what has the WAL's name. It
    does not while somebody else seems to have the database open.
    """
    try:
        database = path.open("rb")
    except OSError:
        connection.close()
        return
    with database:
        fcntl.fcntl(database, fcntl.F_OFD_SETLK, _READ_LOCK)
        connection.close()


def _identity(path: str) -> Identity:
    try:
        found = os.stat(path)  # noqa: PTH116 (hot: Path.stat takes longer)
    except OSError:
        return None
    return found.st_dev, found.st_ino
