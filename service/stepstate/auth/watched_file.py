"""A small file with credentials or keys, which is read again when it has changed."""

from __future__ import annotations

import os
from pathlib import Path

from stepstate.errors import CredentialsInvalid
from stepstate.watched_files import FileVersion, version_of, warn_if_readable

MAX_BYTES = 64 * 2**20
"""Of a file: 200,000 tokens."""


class WatchedFile:
    """Reads a file, and sees that it has changed.

    It has changed when its modification time, size or inode differs. A replacement by rename is
    always noticed, and so is a Kubernetes secret, which is replaced by moving a link.

    Args:
        option: the setting that names it, for errors.
        file: its name.
        secret: warn if others than its owner and group can read it.
        advice: what to do if it can't be read.
    """

    def __init__(self, option: str, file: str, *, secret: bool = False, advice: str = "") -> None:
        self.option = option
        self.file = file
        self._path = Path(file)
        self._secret = secret
        self._advice = advice
        self._version: FileVersion | None = None

    def changed(self) -> bool:
        """Whether it is another one than was read last, or has gone. It does not raise."""
        try:
            return version_of(self._path.stat()) != self._version
        except OSError:
            return self._version is not None

    def read(self) -> bytes:
        """The content.

        Raises:
            CredentialsInvalid: it can't be read, or is too long.
        """
        self._version = None
        try:
            with self._path.open("rb") as opened:
                status, data = os.fstat(opened.fileno()), opened.read(MAX_BYTES + 1)
        except OSError as error:
            raise self.invalid(f"can't be read: {error.strerror}{self._advice}") from error
        self._version = version_of(status)
        if len(data) > MAX_BYTES:
            raise self.invalid(f"has more than {MAX_BYTES} bytes")
        if self._secret:
            warn_if_readable(self.file, status.st_mode, group_may=True)
        return data

    def invalid(self, problem: str) -> CredentialsInvalid:
        """The error about it."""
        return CredentialsInvalid(self.option, self.file, problem)
