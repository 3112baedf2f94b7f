"""Progress bars on standard error, where that is a terminal."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import click


@contextmanager
def progress_bar(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """Draws a bar; call what it gives with how much is done. Without a terminal it draws nothing.

    Args:
        label: what is done.
        length: how much there is.
    """
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.pos)


def lines_with_progress(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, with a bar where no outputs are printed beside it."""
    size = _size(file)
    if not size or sys.stdout.isatty():
        yield from file
        return
    with progress_bar("rows", size) as update:
        done = 0
        for line in file:
            yield line
            done += len(line)
            update(done)


def _size(file: BinaryIO) -> int:
    """Bytes of a regular file; 0 of a pipe, which has no end that is known."""
    try:
        found = os.fstat(file.fileno())
    except OSError:  # no file of the system's
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
