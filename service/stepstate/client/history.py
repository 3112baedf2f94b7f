"""A session's history on its way to the server: in which pieces, and how far it got. No I/O.

D inputs a row, O outputs.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeGuard, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from stepstate.client.footing import Footing
from stepstate.client.values import Floats, ModelInfo
from stepstate.errors import InvalidField, NonFiniteInput, StepstateError

PIECE_ROWS = 8_192
"""A twelfth of what a server takes in one request, and a twelfth of what it lets wait for its
store: what follows is on its way while one is worked on."""
PIECE_BYTES = 2**20
"""A sixteenth of what a server takes as a message."""
IN_FLIGHT = 4
"""Pieces: enough that the server never waits for the next one."""

S = TypeVar("S", bound=Footing)
History = ArrayLike | Iterable[ArrayLike]
"""Rows [T, D], or an iterable of such, which needs not be in memory as a whole."""
Progress = Callable[[int, int | None], object]
"""Called with the rows that are done, and with all there are, None where that is not known."""


class Feed:
    """A history that a session is brought through.

    Args:
        session: stands where the history begins.
        history: rows, or an iterable of chunks, an asynchronous one too.
        progress: told how far it got.

    Raises:
        InvalidField: the rows have another shape, or are not numbers.
    """

    def __init__(
        self,
        session: Footing,
        history: History | AsyncIterable[ArrayLike],
        progress: Progress | None = None,
    ) -> None:
        self._session = session
        self._start = session.t
        self._progress = progress
        self._y: Floats | None = None
        self._imputed_rows = self._fallback_rows = 0
        self._total: int | None = None
        self._chunks: Iterable[ArrayLike] | AsyncIterable[ArrayLike]
        if isinstance(history, AsyncIterable) or not _is_rows(history):
            self._chunks = history  # type: ignore[assignment] # not rows, so an iterable of them
        else:
            rows = self._rows(history)
            self._chunks, self._total = (rows,), len(rows)

    def pieces(self) -> Iterator[Floats]:
        """The rows [n, D], some thousand at a time.

        Raises:
            InvalidField: the chunks come asynchronously.
        """
        if isinstance(self._chunks, AsyncIterable):
            raise InvalidField("history", "is asynchronous, which takes an AsyncClient")
        for chunk in self._chunks:
            yield from self._cut(chunk)

    async def items(self, session: S) -> AsyncIterator[tuple[S, Floats]]:
        """The pieces as items of a stream."""
        if isinstance(self._chunks, AsyncIterable):
            async for chunk in self._chunks:
                for piece in self._cut(chunk):
                    yield session, piece
        else:
            for piece in self.pieces():
                yield session, piece

    def take(self, y: Floats) -> None:
        """Takes the outputs [O] of a piece's last row."""
        session = self._session
        self._y = y
        self._imputed_rows += session.imputed_rows
        self._fallback_rows += session.fallback_rows
        if self._progress is not None:
            self._progress(session.t - self._start, self._total)

    def finish(self) -> Floats:
        """The outputs [O] of the last row; the session tells of all rows what stood in.

        Raises:
            InvalidField: there were no rows.
        """
        if self._y is None:
            raise InvalidField("history", "has no rows")
        self._session.imputed_rows = self._imputed_rows
        self._session.fallback_rows = self._fallback_rows
        return self._y

    def placed(self, error: StepstateError) -> StepstateError:
        """An error about a row of a piece, as one about that row of the history."""
        if isinstance(error, NonFiniteInput):
            return replace(error, row=error.row + self._session.t - self._start)
        return error

    def _cut(self, chunk: ArrayLike) -> Iterator[Floats]:
        if _is_empty(chunk):
            return
        rows = self._rows(chunk)
        count = max(1, min(PIECE_ROWS, PIECE_BYTES // (4 * rows.shape[1])))
        for first in range(0, len(rows), count):
            yield rows[first : first + count]

    def _rows(self, chunk: ArrayLike) -> Floats:
        rows, _ = self._session.model.rows(chunk, "history")
        return rows


def _is_empty(chunk: ArrayLike) -> bool:
    shape = getattr(chunk, "shape", None)
    return not chunk if isinstance(chunk, Sequence) else shape is not None and shape[:1] == (0,)


def _is_rows(history: History) -> TypeGuard[ArrayLike]:
    """Whether it is rows, and not an iterable of chunks of rows."""
    if hasattr(history, "columns") or hasattr(history, "__array__"):
        return True
    if isinstance(history, Sequence):
        return not history or np.ndim(history[0]) < 2
    return not isinstance(history, Iterable)


def nothing(model: ModelInfo, count: int) -> Floats:
    """So many rows [count, D] in which everything is missing.

    Raises:
        InvalidField: there are none.
    """
    if count < 1:
        raise InvalidField("n", f"is {count}, expected 1 or more")
    return np.full((count, model.input_width), np.nan, np.float32)


def nothings(model: ModelInfo, count: int) -> Iterator[Floats]:
    """The same in pieces, for very many rows."""
    for first in range(0, count, PIECE_ROWS):
        yield nothing(model, min(PIECE_ROWS, count - first))
