"""Files that an operator changes while the server runs: when to read them, and who else may.

A file has changed when its modification time, size or inode differs, or when it is gone. So has one
to which a link on its path leads elsewhere, as with a Kubernetes secret.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

FileVersion = tuple[int, int, int]
"""Modification time, size and inode."""


def version_of(status: os.stat_result) -> FileVersion:
    """The version of a file by its status."""
    return status.st_mtime_ns, status.st_size, status.st_ino


class WatchedFiles:
    """Files that are read again once they have changed and are the same at two polls.

    Whoever writes them in parts, or one after the other, has finished then. They count as read when
    this is made, so make it before they are read for the first time.

    Args:
        paths: where they are, or will be.
    """

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._read = self._polled = self._versions()

    def settled(self) -> bool:
        """Polls them. Returns whether they are not as when read, but as at the last poll."""
        before, self._polled = self._polled, self._versions()
        return self._polled == before != self._read

    def mark_read(self) -> None:
        """To be called just before they are read, so that a change meanwhile is not missed."""
        self._read = self._versions()

    def _versions(self) -> tuple[FileVersion | None, ...]:
        return tuple(map(_version_at, self._paths))


def _version_at(path: Path) -> FileVersion | None:
    try:
        return version_of(path.stat())
    except OSError:
        return None


def warn_if_readable(file: str | Path, mode: int, *, group_may: bool = False) -> None:
    """Warns if users who should not may read or change a file.

    Args:
        file: its name.
        mode: its permissions.
        group_may: whether its group may read it, and not its owner only.
    """
    mask, advice = (0o027, "g-w,o-rwx") if group_may else (0o077, "go-rwx")
    if mode & mask:
        problem = "others can read or change a private file: chmod %s"
        log.warning(problem, advice, extra={"file": str(file)})
