"""What `stepstate step` reads: the rows of standard input, and a file of earlier rows.

Progress bars are on standard error, where that is a terminal.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import click

from stepstate.cli.rows import BadRow, Format, RowReader, whole
from stepstate.client import ModelInfo, Session, TimedRows
from stepstate.errors import InvalidField, NonFiniteInput, NonFiniteResult


class InputReader:
    """The rows of standard input.

    Args:
        model: whose rows they are.
        format_: how they are read.
        empty: an empty cell is a missing value.
    """

    def __init__(self, model: ModelInfo, format_: Format, *, empty: bool) -> None:
        lines = _lines_with_progress(sys.stdin.buffer)
        self._rows = RowReader(lines, model, "the input", empty=empty, format_=format_)
        self._items = iter(self._rows)

    @property
    def start(self) -> datetime | None:
        """The time of the first row, if it has one; waits for it."""
        first = next(self._items, None)
        if first is None:
            return None
        self._items = chain((first,), self._items)
        return first.times if isinstance(first, TimedRows) else None

    def outputs(self, session: Session) -> Iterator[Iterable[float]]:
        """The outputs of each row, one after the other.

        Raises:
            BadRow: it names the line.
        """
        rows = self._rows  # its place is that of the failed row: one is in flight at a time
        try:
            yield from session.stream(self._items)
        except NonFiniteInput as error:
            raise BadRow(f"{rows.place}: {_non_finite(error)}") from error
        except NonFiniteResult as error:
            raise BadRow(f"{rows.place}: {error}") from error
        except InvalidField as error:
            if error.field != "x":
                raise
            problem = _by_options(error.problem.replace("row 0", "it"))
            raise BadRow(f"{rows.place}: {problem}") from error


class HistoryFile:
    """The rows of a file, read at once: no session is opened for a file that can't be read.

    Args:
        file: CSV.
        model: whose rows they are.
        format_: how it is read.
        empty: an empty cell is a missing value.
    """

    def __init__(self, file: Path, model: ModelInfo, format_: Format, *, empty: bool) -> None:
        self._file = file
        with file.open("rb") as lines:
            rows = RowReader(lines, model, str(file), empty=empty, format_=format_)
            self._rows, self._lines = whole(rows)

    @property
    def start(self) -> datetime | None:
        """The time of the first row, if it has one."""
        first: datetime | None = self._rows.times[0] if isinstance(self._rows, TimedRows) else None
        return first

    def prime(self, session: Session) -> None:
        """Primes a session with the rows.

        Raises:
            BadRow: it names the line.
        """
        try:
            with _progress_bar("history", len(self._lines)) as update:
                session.prime(self._rows, progress=lambda done, _total: update(done))
        except NonFiniteInput as error:
            where = f"{self._at(error.row)} of {self._file}"
            raise BadRow(f"{where}: {_non_finite(error)}") from error
        except InvalidField as error:
            problem = re.sub(r"\brow (\d+)", lambda row: self._at(int(row[1])), error.problem)
            raise BadRow(f"{self._file}: {_by_options(problem)}") from error

    def _at(self, row: int) -> str:
        return f"line {self._lines[row]}"


def _by_options(problem: str) -> str:
    """A problem whose solution is an argument of the client, with the option instead."""
    return problem.replace("missing='impute' or 'hold'", "--missing impute or hold")


def _non_finite(error: NonFiniteInput) -> str:
    problem = f"{error.column!r} is {error.value}"
    if error.value == "nan":
        problem += "; a missing value takes a session that was opened with --missing impute or hold"
    return problem


@contextmanager
def _progress_bar(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """Draws a bar; its updates are calls with the length that is done so far."""
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.pos)


def _lines_with_progress(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, with a bar unless outputs are printed on the terminal."""
    size = _size(file)
    if not size or sys.stdout.isatty():
        yield from file
        return
    with _progress_bar("rows", size) as update:
        done = 0
        for line in file:
            yield line
            done += len(line)
            update(done)


def _size(file: BinaryIO) -> int:
    """Bytes of a regular file; 0 for a pipe, whose length is unknown."""
    try:
        found = os.fstat(file.fileno())
    except OSError:  # not a file of the operating system
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
