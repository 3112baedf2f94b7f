"""Rows with times against a plain reading of the rule, however they are cut into calls."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import assume, given
from hypothesis import strategies as st

from stepstate.client.times import MAX_GAP_ROWS, RowClock, Times
from stepstate.errors import InvalidField
from stepstate.stores import to_utc

START = datetime(2026, 1, 5, tzinfo=UTC)
EARLY = datetime.min + timedelta(days=3)  # noqa: DTZ901 - the zone is drawn
LATE = datetime.max - timedelta(days=3)  # noqa: DTZ901
INTERVALS = [
    timedelta(milliseconds=100),
    timedelta(minutes=5),
    timedelta(hours=1),
    timedelta(days=1),
]

moves = st.one_of(
    st.just(1.0),
    st.integers(-3, 6).map(float),
    st.sampled_from([0.5, 1.25, MAX_GAP_ROWS + 1.0, MAX_GAP_ROWS + 2.0]),
)
"""By how many intervals a row comes after the one before it."""


def first_bad(moved: list[float], *, fill: bool) -> int:
    """The number of the first row that is not where it may be; that of all rows if none is."""
    for row, move in enumerate(moved):
        whole = move == int(move) and move >= 1
        if not whole or (move > 1 and not fill) or move - 1 > MAX_GAP_ROWS:
            return row
    return len(moved)


def apply(made: RowClock, times: np.ndarray, t: int, found: list[int]) -> str:
    """Adds the places of rows in the session to those found, or tells why there are none."""
    try:
        found += [t + int(after) for after in made.place(Times(times, naive=False), t, "x")]
    except InvalidField as error:
        return error.problem
    return ""


@given(
    moved=st.lists(moves, min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 11)),
    interval=st.sampled_from(INTERVALS),
    fill=st.booleans(),
)
def test_rows_are_placed_up_to_the_first_that_is_no_next_one(
    moved: list[float],
    cuts: set[int],
    interval: timedelta,
    fill: bool,  # noqa: FBT001 - drawn
):
    step = interval // timedelta(microseconds=1)
    begin = int(START.timestamp() * 1e6)
    places = np.cumsum(moved) - 1
    times = (begin + places * step).astype(np.int64)
    made = RowClock("m/1", interval, START, takes_missing=fill)
    bad, t, found = first_bad(moved, fill=fill), 0, []
    edges = [0, *sorted(cut for cut in cuts if cut < len(moved)), len(moved)]
    for first, end in pairwise(edges):
        inner = moved[first + 1 : end]
        assume(not (inner and all(move < 0 for move in inner)))  # from last to first, too
        problem = apply(made, times[first:end], t, found)
        assume("has a row every" not in problem)  # another step has words of its own
        assert bool(problem) is (first <= bad < end)
        if problem:
            assert problem.startswith(f"row {bad - first} is at ")
            break
        t = found[-1] + 1
    assert found == [int(place) for place in places[: len(found)]]


@given(
    st.one_of(
        st.datetimes(),
        st.datetimes(max_value=EARLY),
        st.datetimes(min_value=LATE),
    ),
    st.none() | st.integers(-24 * 60 + 1, 24 * 60 - 1),
)
def test_a_time_from_outside_is_refused_or_exists_wherever_it_is_shown(moment, minutes):
    if minutes is not None:
        moment = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    try:
        taken = to_utc(moment)
    except ValueError:
        assert not EARLY <= moment.replace(tzinfo=None) <= LATE
        return
    Timestamp().FromDatetime(taken)
    for hours in (-23, 0, 23):
        taken.astimezone(timezone(timedelta(hours=hours)))
