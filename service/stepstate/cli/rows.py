"""Rows of CSV, by the columns of a model."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator

from stepstate.client import ModelInfo


class BadRow(ValueError):
    """Something that was given can't be read."""


def read_rows(
    lines: Iterable[str], model: ModelInfo, where: str, *, empty: bool, part: bool = False
) -> Iterator[list[float]]:
    """Rows [D]. A first line that holds names is a header: its columns are taken by name.

    Args:
        lines: of CSV.
        model: whose rows they are.
        where: what they come from, for errors.
        empty: an empty cell is a missing value, NaN; otherwise an error.
        part: a header may lack columns, which are then all NaN.

    Raises:
        BadRow: it names the line.
    """
    columns: list[int | None] = list(range(model.input_width))
    for number, line in enumerate(csv.reader(lines), start=1):
        names = [name.strip() for name in line]
        if number == 1 and _is_header(names, model, part=part):
            columns = [names.index(name) if name in names else None for name in model.inputs]
        elif line:
            yield _row(line, columns, f"line {number} of {where}", empty=empty)


def _is_header(names: list[str], model: ModelInfo, *, part: bool) -> bool:
    return bool(set(model.inputs) & set(names)) if part else set(model.inputs) <= set(names)


def _row(line: list[str], columns: list[int | None], where: str, *, empty: bool) -> list[float]:
    try:
        return [
            math.nan
            if column is None or (empty and not line[column].strip())
            else float(line[column])
            for column in columns
        ]
    except (IndexError, ValueError) as error:
        raise BadRow(
            f"{where} is {','.join(line)[:80]!r}: expected {len(columns)} "
            f"numbers separated by commas ({error})"
        ) from error
