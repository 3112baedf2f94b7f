"""Rows of CSV, by the columns of a model."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator

from stepstate.client import ModelInfo


class BadRow(ValueError):
    """Something that was given can't be read."""


class Rows:
    """Rows [D]. A first line that holds names is a header: its columns are taken by name.

    `place`: where the last row stood, for errors.

    Args:
        lines: of CSV, in UTF-8.
        model: whose rows they are.
        where: what they come from, for errors.
        empty: an empty cell is a missing value, NaN; otherwise an error.
        part: a header may lack columns, which are then all NaN.
    """

    def __init__(
        self,
        lines: Iterable[bytes],
        model: ModelInfo,
        where: str,
        *,
        empty: bool,
        part: bool = False,
    ) -> None:
        self._lines = lines
        self._model = model
        self._where = where
        self._empty = empty
        self._part = part
        self.place = where

    def __iter__(self) -> Iterator[list[float]]:
        """The rows, as they come.

        Raises:
            BadRow: it names the line.
        """
        columns: list[int | None] = list(range(self._model.input_width))
        width = len(columns)
        for number, line in enumerate(self._cells()):
            names = [name.strip() for name in line]
            if number == 0 and self._is_header(names):
                width = len(names)
                columns = [names.index(one) if one in names else None for one in self._model.inputs]
            elif line:
                yield self._row(line, columns, width)

    def _cells(self) -> Iterator[list[str]]:
        """The cells of each line; none of a blank one."""
        reader = csv.reader(_texts(self._lines))
        while True:
            try:
                line = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                # The reader has not counted a line that is no text.
                number = reader.line_num + isinstance(error, UnicodeDecodeError)
                raise BadRow(f"line {number} of {self._where}: {error}") from error
            if line is None:
                return
            self.place = f"line {reader.line_num} of {self._where}"
            yield line

    def _is_header(self, names: list[str]) -> bool:
        inputs = set(self._model.inputs)
        return bool(inputs & set(names)) if self._part else inputs <= set(names)

    def _row(self, line: list[str], columns: list[int | None], width: int) -> list[float]:
        if len(line) != width:
            raise self._bad(line, width, f"it has {len(line)}")
        try:
            return [math.nan if column is None else self._value(line[column]) for column in columns]
        except ValueError as error:
            raise self._bad(line, width, str(error)) from error

    def _value(self, cell: str) -> float:
        if cell.strip():
            return float(cell)
        if self._empty:
            return math.nan
        raise ValueError("an empty cell is a missing value, which takes --missing impute or hold")

    def _bad(self, line: list[str], width: int, problem: str) -> BadRow:
        thing = "number" if width == self._model.input_width else "cell"
        expected = f"1 {thing}" if width == 1 else f"{width} {thing}s separated by commas"
        return BadRow(f"{self.place} is {','.join(line)[:80]!r}: expected {expected} ({problem})")


def _texts(lines: Iterable[bytes]) -> Iterator[str]:
    """The lines as text; the mark that some programs begin a file with is none of it."""
    encoding = "utf-8-sig"
    for line in lines:
        yield line.decode(encoding)
        encoding = "utf-8"
