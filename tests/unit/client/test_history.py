"""A history in pieces, without a server."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from stepstate.client._protocol.history import (
    PIECE_BYTES,
    PIECE_ROWS,
    HistoryReader,
    missing_pieces,
    missing_rows,
)
from stepstate.errors import InvalidField, NonFiniteInput, SessionClosed
from tests.unit.client.test_step_protocol import session_at
from tests.unit.client.test_types import ONE, THREE, model


def feed(history, session=None, **options) -> HistoryReader:
    return HistoryReader(session or session_at(), history, **options)


def sizes(made: HistoryReader) -> list[int]:
    return [len(piece) for piece in made.pieces()]


@pytest.mark.parametrize(
    ("history", "pieces"),
    [
        (5.0, [1]),
        ([1.0, 2.0], [2]),
        ([[1.0], [2.0]], [2]),
        (np.zeros(PIECE_ROWS * 2 + 1), [PIECE_ROWS, PIECE_ROWS, 1]),
        (pd.DataFrame({"a": [1, 2, 3]}), [3]),
        (pd.Series([1, 2, 3]), [3]),
        ([np.zeros((2, 1)), np.zeros((3, 1))], [2, 3]),
        ([[[1.0], [2.0]], [[3.0]]], [2, 1]),
        (iter([np.zeros((2, 1)), [], np.zeros((0, 1)), [1.0]]), [2, 1]),
        ((np.zeros((2, 1)) for _ in range(2)), [2, 2]),
        (range(3), [3]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_history_is_rows_or_chunks_of_rows(history, pieces):
    assert sizes(feed(history)) == pieces


def test_a_piece_of_wide_rows_is_no_larger_than_a_bound():
    session = session_at()
    session.model = model(*[f"x{n}" for n in range(1000)])
    (first, *_) = feed(np.zeros((1000, 1000)), session).pieces()
    assert first.nbytes <= PIECE_BYTES


@pytest.mark.parametrize("history", [[], "many", [[1.0, 2.0]], np.zeros((0, 1)), [[[1.0, 2.0]]]])
def test_what_is_no_history_is_refused_by_name(history):
    with pytest.raises(InvalidField, match=r"^history: "):
        sizes(feed(history))


def test_an_asynchronous_history_takes_an_asynchronous_client():
    async def chunks():
        yield [1.0]

    with pytest.raises(InvalidField, match="AsyncClient"):
        sizes(feed(chunks()))


def test_progress_and_stand_ins_are_those_of_all_pieces():
    session, told = session_at(at=10), []
    made = feed(np.zeros(30), session, progress=lambda *at: told.append(at))
    for t in (20, 40):
        session.received(t, imputed_rows=3, fallback_rows=1)
        made.take(np.array([t]))
    assert told == [(10, 30), (30, 30)]
    assert made.finish() == [40]
    assert (session.imputed_rows, session.fallback_rows) == (6, 2)


def test_a_history_that_had_no_rows_is_refused():
    with pytest.raises(InvalidField, match=r"^history: has no rows"):
        feed(iter(())).finish()


def test_an_error_about_a_row_names_it_by_its_place_in_the_history():
    session = session_at(at=10)
    made = feed(np.zeros(30), session)
    session.t = 25
    error = NonFiniteInput("a", 3, "x", "inf")
    assert made.error_in_history(error).row == 18
    closed = SessionClosed("a", 3)
    assert made.error_in_history(closed) is closed


@pytest.mark.parametrize("count", [1, PIECE_ROWS, 2 * PIECE_ROWS + 3])
def test_rows_in_which_everything_is_missing(count):
    pieces = list(missing_pieces(THREE, count))
    assert sum(map(len, pieces)) == len(missing_rows(THREE, count)) == count
    assert all(math.isnan(value) for piece in pieces for value in piece[-1])
    with pytest.raises(InvalidField, match=r"^n: is 0"):
        missing_rows(ONE, 0)
