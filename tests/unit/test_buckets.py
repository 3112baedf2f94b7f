"""A bucket grants as much as it says, neither more nor less, whatever comes when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstate.buckets import TokenBucket
from tests.unit.rig import Clock

RATES = st.floats(0.1, 1e5)
BURSTS = st.none() | st.floats(1, 1e5)
WAITS = st.floats(0, 100)
ROUNDING = 2e-3


def granted(bucket: TokenBucket, amount: float) -> bool:
    if bucket.wait_seconds():
        return False
    bucket.take(amount)
    return True


@given(RATES, BURSTS, st.lists(st.tuples(WAITS, st.integers(0, 300)), max_size=40))
def test_single_tokens_are_never_more_than_rate_and_burst_over_any_interval(rate, burst, calls):
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    taken: list[tuple[float, int]] = []
    for wait, asked in calls:
        clock.advance(wait)
        count = sum(granted(bucket, 1) for _ in range(asked))
        taken.append((clock.now, count))
    for first, (begin, _) in enumerate(taken):
        for last in range(first, len(taken)):
            total = sum(count for _, count in taken[first : last + 1])
            assert total <= rate * (taken[last][0] - begin) + bucket.burst + ROUNDING


@given(RATES, BURSTS, st.lists(st.tuples(WAITS, st.integers(1, 1000)), max_size=40))
def test_requests_of_any_size_pass_it_by_less_than_the_last_of_them(rate, burst, calls):
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    begin, total, largest = clock.now, 0, 0
    for wait, amount in calls:
        clock.advance(wait)
        if granted(bucket, amount):
            total, largest = total + amount, max(largest, amount)
        assert total <= rate * (clock.now - begin) + bucket.burst + largest + ROUNDING


@given(RATES, BURSTS, st.lists(st.tuples(WAITS, st.integers(1, 1000)), min_size=1, max_size=20))
def test_who_waits_as_long_as_it_is_told_is_served_and_not_before(rate, burst, calls):
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    for wait, amount in calls:
        clock.advance(wait)
        seconds = bucket.wait_seconds()
        clock.advance(0.9 * seconds)
        assert bucket.wait_seconds() or seconds * rate < 0.1
        clock.advance(0.1 * seconds)
        assert not bucket.wait_seconds()
        bucket.take(amount)


@given(RATES, BURSTS, st.integers(0, 10**6), WAITS)
def test_whole_tokens_are_those_that_can_be_taken_one_by_one(rate, burst, before, wait):
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    bucket.take(before)
    clock.advance(wait)
    whole = bucket.whole()
    assert sum(granted(bucket, 1) for _ in range(min(whole, 300))) == min(whole, 300)
    bucket.take(whole - min(whole, 300))
    assert not granted(bucket, 1)


def test_a_bucket_begins_full_with_the_tokens_of_one_second_and_at_least_one():
    assert TokenBucket(7, None, Clock()).whole() == 7
    assert TokenBucket(0.1, None, Clock()).whole() == 1
    assert TokenBucket(7, 100, Clock()).whole() == 100


@pytest.mark.parametrize(("burst", "left"), [(None, 5), (5, 5), (1000, 15), (2, 2)])
def test_a_change_keeps_what_is_in_it(burst, left):
    clock = Clock()
    bucket = TokenBucket(10, 20, clock)
    bucket.take(15)
    clock.advance(1)
    bucket.change(5, burst)
    assert bucket.whole() == left
    assert not bucket.full or left == bucket.burst


def test_a_debt_is_filled_up_first():
    clock = Clock()
    bucket = TokenBucket(10, 10, clock)
    bucket.take(100)
    assert bucket.wait_seconds() == pytest.approx(9.1)
    assert bucket.whole() == 0
    clock.advance(9.1)
    assert bucket.whole() == 1


@given(BURSTS, WAITS)
def test_time_before_something_is_taken_does_not_make_up_for_it(burst, wait):
    clock = Clock()
    bucket = TokenBucket(1.0, burst, clock)
    clock.advance(wait)
    bucket.take(bucket.burst)
    assert bucket.whole() == 0
