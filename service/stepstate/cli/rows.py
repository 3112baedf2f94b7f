"""Rows of CSV, by the columns of a model, with their times where there are some."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any

import click

from stepstate.client import ModelInfo, TimedRows

_TIME_NAMES = ("time", "timestamp", "datetime", "date")
_MISSING = {"", "na", "n/a", "#n/a", "null", "none"}
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class BadRow(click.ClickException):
    """Rows that can't be read; it ends the command with one line."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a file is read.

    `delimiter`: between cells; empty: found from the first line. `time_column`: the name of the
    column with the times; empty: time, timestamp, datetime or date, if there is one.
    """

    delimiter: str = ""
    time_column: str = ""


@dataclass(frozen=True, slots=True)
class _Columns:
    """The positions in a line: of the inputs in the model's order (None: missing), and the time."""

    inputs: Sequence[int | None]
    time: int | None
    width: int
    named: bool = False


class RowReader:
    """Rows [D]. A first line that holds names is a header: its columns are taken by name.

    Cells are separated by commas, semicolons or tabs; with the latter two numbers may have a
    decimal comma. A row whose line has a time is a `TimedRows`.

    `place`: where the last row was, for errors.

    Args:
        lines: of CSV, in UTF-8.
        model: whose rows they are.
        where: their source, for errors.
        empty: an empty cell is a missing value, NaN; otherwise an error.
        part: a header may lack columns, which are then all NaN.
        format_: how they are read.
    """

    def __init__(
        self,
        lines: Iterable[bytes],
        model: ModelInfo,
        where: str,
        *,
        empty: bool,
        part: bool = False,
        format_: Format | None = None,
    ) -> None:
        self._lines = lines
        self._model = model
        self._where = where
        self._empty = empty
        self._part = part
        self._format = format_ or Format()
        self._delimiter = self._format.delimiter
        self.line = 0
        self.place = where

    def __iter__(self) -> Iterator[list[float] | TimedRows]:
        """The rows, as they come.

        Raises:
            BadRow: it names the line, and the columns that are expected.
        """
        columns: _Columns | None = None
        for line in self._cells():
            if not line:
                continue
            if columns is None:
                columns = self._columns([name.strip() for name in line])
                if columns.named:
                    continue
            yield self._row(line, columns)

    def _cells(self) -> Iterator[list[str]]:
        """The cells of each line; none of a blank one."""
        texts, head = _texts(self._lines), list[str]()
        try:
            while not (head and head[-1].strip()) and (text := next(texts, None)) is not None:
                head.append(text)
        except UnicodeDecodeError as error:
            raise BadRow(f"line {len(head) + 1} of {self._where} is not UTF-8: {error}") from error
        self._delimiter = self._delimiter or _delimiter_of(head[-1] if head else "")
        reader = csv.reader(chain(head, texts), delimiter=self._delimiter)
        while True:
            try:
                line = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                # The reader has not counted a line that it could not decode.
                number = reader.line_num + isinstance(error, UnicodeDecodeError)
                problem = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "is no CSV"
                raise BadRow(f"line {number} of {self._where} {problem}: {error}") from error
            if line is None:
                return
            self.line = reader.line_num
            self.place = f"line {self.line} of {self._where}"
            yield line

    def _columns(self, cells: list[str]) -> _Columns:
        """The positions that the first line gives; without a header, those of the model."""
        inputs = list(self._model.inputs)
        known = set(inputs) & set(cells)
        if known and (self._part or len(known) == len(inputs)):
            return self._by_name(cells)
        if not any(self._is_value(cell) for cell in cells):
            missing = ", ".join(name for name in inputs if name not in known)
            raise BadRow(f"{self.place} is a header without {missing}: {self._expected()}")
        timed = len(cells) == len(inputs) + 1 and _is_time(cells[0])
        indices = range(timed, timed + len(inputs))
        return _Columns(indices, time=0 if timed else None, width=timed + len(inputs))

    def _by_name(self, names: list[str]) -> _Columns:
        inputs = self._model.inputs
        twice = next((name for name in inputs if names.count(name) > 1), None)
        if twice is not None:
            raise BadRow(f"{self.place} has {twice} twice: {self._expected()}")
        time = self._time_of(names)
        others = [n for index, n in enumerate(names) if n and n not in inputs and index != time]
        if others:
            click.echo(f"columns of {self._where} that are not used: {', '.join(others)}", err=True)
        indices = [names.index(one) if one in names else None for one in inputs]
        return _Columns(indices, time, len(names), named=True)

    def _time_of(self, names: list[str]) -> int | None:
        """The position of the column with the times."""
        wanted = self._format.time_column
        if wanted:
            if wanted not in names:
                raise BadRow(f"{self.place} is a header without {wanted}, the column of the times")
            return names.index(wanted)
        inputs = self._model.inputs
        found = [n for n in names if n.lower() in _TIME_NAMES and n not in inputs]
        if len(found) > 1:
            several = " or ".join(found)
            raise BadRow(
                f"{self.place}: which of {several} holds the time? Say it by --time-column"
            )
        return names.index(found[0]) if found else None

    def _row(self, line: list[str], columns: _Columns) -> list[float] | TimedRows:
        if len(line) != columns.width:
            raise self._bad(line, columns, f"it has {len(line)}")
        try:
            values = [
                math.nan if index is None else self._value(line[index]) for index in columns.inputs
            ]
            return values if columns.time is None else TimedRows(values, _time(line[columns.time]))
        except ValueError as error:
            raise self._bad(line, columns, str(error)) from error

    def _value(self, cell: str) -> float:
        text = cell.strip()
        if text.lower() not in _MISSING:
            return self._number(text)
        if self._empty:
            return math.nan
        what = f"{text!r}" if text else "an empty cell"
        raise ValueError(f"{what} is a missing value, which takes --missing impute or hold")

    def _number(self, text: str) -> float:
        decimal_comma = self._delimiter != "," and text.count(",") == 1 and "." not in text
        try:
            return float(text.replace(",", ".") if decimal_comma else text)
        except ValueError as error:
            raise ValueError(f"{text!r} is not a number") from error

    def _is_value(self, cell: str) -> bool:
        """Whether a row may have it: it is not a name."""
        try:
            self._number(cell)
        except ValueError:
            return cell.lower() in _MISSING or _is_time(cell)
        return True

    def _bad(self, line: list[str], columns: _Columns, problem: str) -> BadRow:
        width = columns.width
        thing = "cell" if columns.named or columns.time is not None else "number"
        between = _DELIMITERS.get(self._delimiter, repr(self._delimiter))
        expected = f"1 {thing}" if width == 1 else f"{width} {thing}s separated by {between}"
        shown = self._delimiter.join(line)[:80]
        hint = ""
        if width == 1 and len(line) == 2 and self._delimiter == ",":
            hint = "; for numbers with a decimal comma give --delimiter ';'"
        text = f"{self.place} is {shown!r}: expected {expected} ({problem}); {self._expected()}"
        return BadRow(text + hint)

    def _expected(self) -> str:
        model = f"{self._model.name}/{self._model.version}"
        return (
            f"the columns of {model} are {', '.join(self._model.inputs)}, and time if it is known"
        )


def _time(cell: str) -> datetime:
    try:
        return datetime.fromisoformat(cell.strip())
    except ValueError as error:
        raise ValueError(
            f"{cell.strip()!r} is no time such as 2026-03-29T02:30 or 2026-03-29T02:30+02:00"
        ) from error


def _is_time(cell: str) -> bool:
    try:
        _time(cell)
    except ValueError:
        return False
    return "-" in cell or ":" in cell  # 20260329 is a number


def _delimiter_of(line: str) -> str:
    return next((one for one in (";", "\t") if one in line), ",")


def _texts(lines: Iterable[bytes]) -> Iterator[str]:
    """The lines as text, without the byte order mark that some programs write."""
    encoding = "utf-8-sig"
    for line in lines:
        yield line.decode(encoding)
        encoding = "utf-8"


def whole(rows: RowReader) -> tuple[TimedRows | list[list[float]], list[int]]:
    """All rows at once, with the number of each one's line.

    Raises:
        BadRow: a line can't be read, or there are none.
    """
    values: list[Any] = []
    times: list[datetime] = []
    lines: list[int] = []
    for row in rows:
        lines.append(rows.line)
        values.append(row.values if isinstance(row, TimedRows) else row)
        if isinstance(row, TimedRows):
            times.append(row.times)
    if not values:
        raise BadRow(f"{rows.place} has no rows")
    return (TimedRows(values, times) if times else values), lines
