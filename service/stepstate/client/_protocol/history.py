"""A session's history on its way to the server: its pieces, and how much of it is done. No I/O.

D inputs a row, O outputs.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain
from typing import Generic, TypeGuard, TypeVar, cast

import numpy as np

from stepstate.client._protocol.session import BaseSession
from stepstate.client.times import RowsLike, TimedRows, first_time
from stepstate.client.types import Floats, ModelInfo
from stepstate.errors import InvalidField, NonFiniteInput, StepstateError

PIECE_ROWS = 8_192
"""A twelfth of a server's limit for one request, and of its limit for unsaved rows: while one piece
is worked on, the next ones are on their way."""
PIECE_BYTES = 2**20
"""A sixteenth of a server's limit for a message."""
IN_FLIGHT = 4
"""Pieces: enough that the server never waits for the next one."""

S = TypeVar("S", bound=BaseSession)
History = RowsLike | Iterable[RowsLike]
"""Rows [T, D], or an iterable of such, which need not be in memory as a whole."""
AsyncHistory = History | AsyncIterable[RowsLike]
Progress = Callable[[int, int | None], object]
"""Called with the number of rows that are done, and the total, None if it is not known."""


class HistoryReader(Generic[S]):
    """A history that is applied to a session.

    Args:
        session: at the row where the history begins.
        history: rows, or an iterable of chunks, also an async one.
        progress: called after each piece.

    Raises:
        InvalidField: the rows have another shape, or are not numbers.
    """

    def __init__(self, session: S, history: AsyncHistory, progress: Progress | None = None) -> None:
        self._session = session
        self._start = session.t
        self._progress = progress
        self._y: Floats | None = None
        self._imputed_rows = self._fallback_rows = 0
        self._rows = self._given = 0  # so far: with missing rows, and without
        self._gaps: list[tuple[int, int]] = []  # rows before the gap, and how many are missing
        self._whole: Floats | None = None
        self._chunks: Iterable[RowsLike] | AsyncIterable[RowsLike] = ()
        if isinstance(history, AsyncIterable) or not _is_rows(history):
            self._chunks = history  # type: ignore[assignment] # not rows, so an iterable of them
        else:
            self._whole = self._place(history)

    def pieces(self) -> Iterator[Floats]:
        """The rows [n, D], some thousand at a time.

        Raises:
            InvalidField: the chunks come asynchronously.
        """
        if isinstance(self._chunks, AsyncIterable):
            raise InvalidField("history", "is asynchronous, which takes an AsyncClient")
        if self._whole is not None:
            yield from _cut(self._whole)
        for chunk in self._chunks:
            if not _is_empty(chunk):
                yield from _cut(self._place(chunk))

    async def items(self) -> AsyncIterator[tuple[S, Floats]]:
        """The pieces as items of a stream."""
        if isinstance(self._chunks, AsyncIterable):
            async for chunk in self._chunks:
                if not _is_empty(chunk):
                    for piece in _cut(self._place(chunk)):
                        yield self._session, piece
        else:
            for piece in self.pieces():
                yield self._session, piece

    def take(self, y: Floats) -> None:
        """Takes the outputs [O] of a piece's last row."""
        session = self._session
        self._y = y
        self._imputed_rows += session.imputed_rows
        self._fallback_rows += session.fallback_rows
        if self._progress is not None:
            total = None if self._whole is None else len(self._whole)
            self._progress(session.t - self._start, total)

    def finish(self) -> Floats:
        """The outputs [O] of the last row; the session has the replaced rows of the whole history.

        Raises:
            InvalidField: there were no rows.
        """
        if self._y is None:
            raise InvalidField("history", "has no rows")
        self._session.imputed_rows = self._imputed_rows
        self._session.fallback_rows = self._fallback_rows
        return self._y

    def error_in_history(self, error: StepstateError) -> StepstateError:
        """An error about a row of a piece, with the number of this row in the history."""
        if isinstance(error, NonFiniteInput):
            row = error.row + self._session.t - self._start
            return replace(error, row=row - sum(n for at, n in self._gaps if at < row))
        return error

    def _place(self, chunk: RowsLike) -> Floats:
        """The rows of a chunk, with rows of NaN where rows are missing by their times."""
        at = self._start + self._rows
        placed = self._session.place(chunk, at, "history", first_row=self._given)
        self._given += len(placed.rows)
        if placed.given is not None:
            missing = np.diff(placed.given, prepend=-1) - 1
            for row in np.flatnonzero(missing).tolist():
                self._gaps.append((self._rows + int(placed.given[row]) - 1, int(missing[row])))
            self._given -= int(missing.sum())
        self._rows += len(placed.rows)
        return placed.rows


def _cut(rows: Floats) -> Iterator[Floats]:
    count = max(1, min(PIECE_ROWS, PIECE_BYTES // (4 * rows.shape[1])))
    for first in range(0, len(rows), count):
        yield rows[first : first + count]


def start_of(history: History) -> tuple[datetime | None, History]:
    """The time of a history's first row, if it has one, and the history from its beginning.

    Raises:
        InvalidField: its times can't be read.
    """
    if _is_rows(history):
        return first_time(history, "history"), history
    chunks = iter(cast("Iterable[RowsLike]", history))
    first = next((chunk for chunk in chunks if not _is_empty(chunk)), None)
    if first is None:
        return None, ()
    return first_time(first, "history"), chain((first,), chunks)


async def start_of_async(history: AsyncHistory) -> tuple[datetime | None, AsyncHistory]:
    """The same for a history that may be an async iterable."""
    if not isinstance(history, AsyncIterable):
        return start_of(history)
    chunks = aiter(history)
    async for first in chunks:
        if not _is_empty(first):
            return first_time(first, "history"), _chained(first, chunks)
    return None, ()


async def _chained(first: RowsLike, others: AsyncIterator[RowsLike]) -> AsyncIterator[RowsLike]:
    yield first
    async for chunk in others:
        yield chunk


def _is_empty(chunk: RowsLike) -> bool:
    shape = getattr(chunk, "shape", None)
    return not chunk if isinstance(chunk, Sequence) else shape is not None and shape[:1] == (0,)


def _is_rows(history: History) -> TypeGuard[RowsLike]:
    """Whether it is rows, not an iterable of chunks of rows."""
    if isinstance(history, TimedRows) or hasattr(history, "__array__"):
        return True
    if isinstance(history, Sequence):
        return not history or np.ndim(history[0]) < 2
    return not isinstance(history, Iterable)


def missing_rows(model: ModelInfo, count: int) -> Floats:
    """Rows [count, D] in which every value is missing.

    Raises:
        InvalidField: there are none.
    """
    if count < 1:
        raise InvalidField("n", f"is {count}, expected 1 or more")
    return np.full((count, model.input_width), np.nan, np.float32)


def missing_pieces(model: ModelInfo, count: int) -> Iterator[Floats]:
    """The same in pieces, for very many rows."""
    for first in range(0, count, PIECE_ROWS):
        yield missing_rows(model, min(PIECE_ROWS, count - first))
