from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepstate.client._protocol.replay import (
    AS_SENT,
    AT_ONCE_BYTES,
    AT_ONCE_ROWS,
    ReplayBuffer,
    SentRequest,
)
from stepstate.errors import RowsMissing

D = 3


def x_at(t: int, count: int = 1) -> np.ndarray:
    return (np.arange(t, t + count, dtype=np.float32)[:, None] * [1, 10, 100]).astype(np.float32)


def sent(t: int, count: int = 1, **options: bool) -> SentRequest:
    return SentRequest(t, count, x_at(t, count).tobytes(), **options)


def buffer_of(*counts: int, t: int = 0, limit: int = 1_000_000) -> ReplayBuffer:
    made = ReplayBuffer("a", D, limit, t)
    for count in counts:
        made.put(sent(made.end, count))
    return made


def requests(kept: ReplayBuffer, first: int, end: int) -> list[SentRequest]:
    """Everything that is sent again."""
    found = []
    while first < end:
        found.append(kept.again(first, end))
        assert found[-1].t == first
        first = found[-1].end
    return found


def missing(kept: ReplayBuffer, first: int, last: int) -> tuple[int, int]:
    with pytest.raises(RowsMissing) as raised:
        kept.rows(first, last)
    assert raised.value.session_id == "a"
    return raised.value.first, raised.value.last


def test_rows_come_out_as_they_were_put_in():
    kept = buffer_of(1, 1, 5, 1, t=7)
    assert (kept.start, kept.end, len(kept)) == (7, 15, 8)
    for first in range(7, 15):
        for last in range(first - 1, 15):
            assert np.array_equal(kept.rows(first, last), x_at(first, last - first + 1))


def test_durable_rows_are_dropped():
    kept = buffer_of(*[1] * 10, 5)
    kept.drop_before(4)
    assert (kept.start, len(kept)) == (4, 11)
    kept.drop_before(12)  # amid a request
    assert np.array_equal(kept.rows(12, 14), x_at(12, 3))
    kept.drop_before(3)
    assert kept.start == 12
    kept.drop_before(100)  # more than was ever sent from here
    assert (kept.start, kept.end) == (15, 15)
    kept.put(sent(15))
    assert np.array_equal(kept.rows(15, 15), x_at(15))


def test_beyond_the_limit_the_oldest_rows_are_dropped():
    kept = buffer_of(*[3] * 10, limit=10)
    assert (kept.start, kept.end) == (20, 30)
    assert np.array_equal(kept.rows(20, 29), x_at(20, 10))
    kept.put(sent(30, 50))
    assert (kept.start, kept.end) == (70, 80)
    assert np.array_equal(kept.rows(70, 79), x_at(70, 10))


def test_without_a_limit_above_zero_nothing_is_kept():
    kept = buffer_of(*[1] * 100, 50, limit=0)
    assert len(kept) == 0
    one = sent(kept.end)
    before = sys.getrefcount(one)
    kept.put(one)
    assert sys.getrefcount(one) == before
    assert missing(kept, 3, 149) == (3, 149)


def test_what_is_missing_is_named_exactly():
    kept = buffer_of(*[1] * 20, t=100)
    kept.drop_before(110)
    assert missing(kept, 50, 119) == (50, 109)
    assert missing(kept, 50, 60) == (50, 60)
    assert missing(kept, 115, 130) == (120, 130)
    assert missing(kept, 125, 130) == (125, 130)
    assert missing(buffer_of(t=5), 2, 9) == (2, 9)
    assert not kept.holds(109, 115)
    assert kept.holds(110, 119)
    assert kept.holds(119, 118)


def test_rows_put_again_replace_those_and_all_after_them():
    kept = buffer_of(1, 1, 4, 1, 1)
    kept.put(SentRequest(3, 1, x_at(77).tobytes()))
    assert kept.end == 4
    assert np.array_equal(kept.rows(0, 2), x_at(0, 3))
    assert np.array_equal(kept.rows(3, 3), x_at(77))


@pytest.mark.parametrize("t", [0, 4, 9, 500])
def test_rows_apart_from_what_is_kept_replace_it(t: int):
    kept = buffer_of(1, 1, t=5)
    kept.put(sent(t, 2))
    assert (kept.start, kept.end) == (t, t + 2)
    assert np.array_equal(kept.rows(t, t + 1), x_at(t, 2))


def test_the_newest_requests_go_again_as_they_were_sent():
    kept = ReplayBuffer("a", D, 1_000)
    for t in range(0, 200, 2):
        kept.put(sent(t, 2, inspect=t == 196, last_only=t != 198))
    again = requests(kept, 10, 200)
    assert [s.count for s in again] == [200 - 2 * AS_SENT - 10] + [2] * AS_SENT
    assert (again[0].inspect, again[0].last_only) == (False, True)
    assert [s.inspect for s in again[1:]] == [False] * (AS_SENT - 2) + [True, False]
    assert [s.last_only for s in again[1:]] == [True] * (AS_SENT - 1) + [False]


def test_older_rows_go_again_many_at_once_within_a_bound():
    kept = buffer_of(*[1] * 10_000, 3_000, *[1] * AS_SENT)
    again = requests(kept, 1, kept.end)
    assert [s.count for s in again[:4]] == [AT_ONCE_ROWS] * 3 + [12_999 - 3 * AT_ONCE_ROWS]
    assert [s.count for s in again[4:]] == [1] * AS_SENT
    wide = ReplayBuffer("a", 100_000, 1_000)
    for t in range(100):
        wide.put(SentRequest(t, 1, bytes(400_000)))
    assert max(len(s.data) for s in requests(wide, 0, 100)) <= AT_ONCE_BYTES


def test_only_rows_before_the_end_go_again():
    kept = buffer_of(*[1] * 100)
    again = requests(kept, 0, 60)
    assert [s.count for s in again] == [60 - AS_SENT] + [1] * AS_SENT


def test_requests_cut_by_a_server_that_stands_amid_them_go_on_there():
    kept = buffer_of(10, 10)
    again = requests(kept, 4, 20)
    assert [(s.t, s.count) for s in again] == [(4, 6), (10, 10)]


def test_a_copy_goes_on_apart():
    kept = buffer_of(*[1] * 10)
    copy = kept.copy("b", limit=6)
    kept.put(sent(10))
    kept.drop_before(9)
    copy.put(SentRequest(10, 1, x_at(77).tobytes()))
    assert np.array_equal(copy.rows(5, 10), np.concatenate((x_at(5, 5), x_at(77))))
    with pytest.raises(RowsMissing) as raised:
        copy.rows(3, 10)
    assert (raised.value.session_id, raised.value.first, raised.value.last) == ("b", 3, 4)


@settings(max_examples=100)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(-12, 3), st.integers(1, 6)),
            st.tuples(st.just("drop_before"), st.integers(-15, 2), st.just(0)),
        ),
        max_size=40,
    ),
    st.integers(1, 30),
)
def test_it_equals_a_plain_list_of_rows(steps, limit: int):
    """Against a model: a mapping of t to row, one run without a hole."""
    kept, rows, start, end, number = ReplayBuffer("a", 1, limit), {}, 0, 0, 0
    for kind, back, count in steps:
        t = max(0, end + back)
        if kind == "put":
            if not start <= t <= end:
                start = t
            values = np.arange(number, number + count, dtype=np.float32)
            number += count
            kept.put(SentRequest(t, count, values.tobytes()))
            rows |= dict(enumerate(values.tolist(), start=t))
            end = t + count
            start = max(start, end - limit)
        else:
            kept.drop_before(t)
            start = max(start, min(t, end))
        assert (kept.start, kept.end) == (start, end)
        want = [rows[place] for place in range(start, end)]
        assert kept.rows(start, end - 1)[:, 0].tolist() == want
        again = b"".join(s.data for s in requests(kept, start, end))
        assert np.frombuffer(again, np.float32).tolist() == want
