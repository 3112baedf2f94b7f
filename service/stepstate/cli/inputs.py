"""What `stepstate step` is given: the rows of standard input, and a history before them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path

from stepstate.cli.progress import lines_with_progress, progress_bar
from stepstate.cli.rows import BadRow, Format, RowReader, whole
from stepstate.client import ModelInfo, Session, TimedRows
from stepstate.errors import InvalidField, NonFiniteInput, NonFiniteResult


class InputReader:
    """The rows of standard input.

    Args:
        model: whose rows they are.
        format_: how they are to be read.
        empty: an empty cell is a missing value.
    """

    def __init__(self, model: ModelInfo, format_: Format, *, empty: bool) -> None:
        lines = lines_with_progress(sys.stdin.buffer)
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
        rows = self._rows  # where the last one was: one is in flight at a time
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
    """The rows of a file, all at once: nothing is opened for a file that can't be read.

    Args:
        file: CSV.
        model: whose rows they are.
        format_: how it is to be read.
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
        start: datetime | None = None
        if isinstance(self._rows, TimedRows):
            start = self._rows.times[0]
        return start

    def prime(self, session: Session) -> None:
        """Brings a session up to date.

        Raises:
            BadRow: it names the line.
        """
        try:
            with progress_bar("history", len(self._lines)) as update:
                session.prime(self._rows, progress=lambda done, _total: update(done))
        except NonFiniteInput as error:
            told = f"{self._at(error.row)} of {self._file}: {_non_finite(error)}"
            raise BadRow(told) from error
        except InvalidField as error:
            told = re.sub(r"\brow (\d+)", lambda row: self._at(int(row[1])), error.problem)
            raise BadRow(f"{self._file}: {_by_options(told)}") from error

    def _at(self, row: int) -> str:
        return f"line {self._lines[row]}"


def _by_options(problem: str) -> str:
    """A problem whose solution is an argument of the client, with the option that it is here."""
    return problem.replace("missing='impute' or 'hold'", "--missing impute or hold")


def _non_finite(error: NonFiniteInput) -> str:
    told = f"{error.column!r} is {error.value}"
    if error.value == "nan":
        told += "; a missing value takes a session that was opened with --missing impute or hold"
    return told
