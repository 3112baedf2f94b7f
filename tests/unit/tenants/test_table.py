"""Whose limits a request meets, and what is remembered of whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstate.budget import MemoryAccount, MemoryBudget
from stepstate.errors import TenantLimitReached
from stepstate.tenants import OTHERS, LimitTable, RateLimits, TenantLimits, TenantTable
from stepstate.tenants.table import MAX_NAMED
from tests.unit.rig import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limited(clock: Clock, **limits: float) -> TenantTable:
    return TenantTable(LimitTable(defaults=TenantLimits(**limits)), clock)


def test_each_tenant_has_a_bucket_of_its_own(clock):
    table = limited(clock, rows_per_second=10)
    table.get("a").rows.take(10)
    with pytest.raises(TenantLimitReached) as refused:
        table.get("a").rows.take(1)
    assert refused.value.fields() == {
        "tenant": "a",
        "limit": "rows_per_second",
        "value": "10",
        "retry_after_seconds": "0.1",
    }
    table.get("b").rows.take(10)
    assert table.get("a").refused == {"rows_per_second": 1}


@pytest.mark.parametrize("kind", ["rows", "forecasts"])
def test_all_tenants_together_have_one_beside(clock, kind):
    together = RateLimits(**{f"{kind}_per_second": 10})
    table = TenantTable(LimitTable(together=together), clock)
    getattr(table.get("a"), kind).take(6)
    getattr(table.get("b"), kind).take(4)
    with pytest.raises(TenantLimitReached, match="all tenants together have reached") as refused:
        getattr(table.get("c"), kind).take(1)
    assert (refused.value.tenant, refused.value.limit) == ("", f"{kind}_per_second")


def test_what_one_bucket_refuses_the_other_has_not_lost(clock):
    together = RateLimits(rows_per_second=10)
    defaults = TenantLimits(rows_per_second=5)
    table = TenantTable(LimitTable(defaults=defaults, together=together), clock)
    a, b = table.get("a"), table.get("b")
    assert a.rows.take_some(100) == 5
    for _ in range(20):
        with pytest.raises(TenantLimitReached):
            a.rows.take(1)
    assert b.rows.take_some(100) == 5
    clock.advance(1)
    assert a.rows.take_some(100) == 5


def test_limits_change_for_all_at_once_and_buckets_keep_their_level(clock):
    table = limited(clock, rows_per_second=10)
    a = table.get("a")
    a.rows.take(8)
    table.set(LimitTable(tenants={"a": TenantLimits(rows_per_second=100, weight=3)}))
    assert a.limits.weight == 3
    assert a.rows.take_some(100) == 2
    table.set(LimitTable())
    assert a.rows.take_some(10**6) == 10**6
    table.set(LimitTable(defaults=TenantLimits(rows_per_second=4)))
    assert a.rows.take_some(100) == 4
    assert table.get("b").limits.rows_per_second == 4


def test_what_is_held_is_counted_up_to_the_limit(clock):
    tenant = limited(clock, streams=2).get("a")
    tenant.hold("streams")
    tenant.hold("streams")
    with pytest.raises(TenantLimitReached) as refused:
        tenant.hold("streams")
    assert (refused.value.limit, refused.value.value) == ("streams", 2)
    tenant.release("streams")
    tenant.hold("streams")
    assert tenant.held["streams"] == 2
    assert tenant.refused == {"streams": 1}


def test_names_that_anybody_makes_up_do_not_stay(clock):
    table = limited(clock, rows_per_second=10)
    for number in range(10_000):
        table.get(f"made up {number}").rows.take(10)
    clock.advance(0.5)
    table.forget_idle()
    assert len(list(table)) == 10_001  # their buckets are not full
    clock.advance(0.6)
    table.get("made up 9999").hold("streams")
    table.forget_idle()
    assert len(list(table)) == MAX_NAMED + 1
    totals = table.totals()
    assert len(totals) == MAX_NAMED + 1
    assert sum(one.rows for one in totals.values()) == 100_000
    assert totals[OTHERS].rows == 100_000 - (MAX_NAMED - 1) * 10


def test_a_tenant_with_clients_is_not_forgotten_although_it_has_no_calls(clock):
    """Its clients may have refused calls only. A limit on their memory counts all of them."""
    table = limited(clock)
    for number in range(MAX_NAMED):
        table.get(f"made up {number}")
    tenant, account = table.get("the last"), MemoryAccount(MemoryBudget(2**30))
    assert tenant.label == OTHERS
    tenant.accounts.add(account)
    table.forget_idle()
    assert table.get("the last") is tenant
    tenant.accounts.discard(account)
    table.forget_idle()
    assert table.get("the last") is not tenant


def test_who_has_limits_of_its_own_has_series_of_its_own(clock):
    table = TenantTable(LimitTable(tenants={"late": TenantLimits()}), clock)
    for number in range(2 * MAX_NAMED):
        table.get(f"made up {number}")
    assert table.get("late").label == "late"
    assert table.get("another").label == OTHERS


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.floats(0, 3)), max_size=60),
    st.lists(st.integers(0, 59), max_size=5),
)
def test_forgetting_grants_nobody_more(calls, forget_at):
    """The grants of a table that forgets, at some times, are those of one that does not."""
    clock = Clock()
    keeps, forgets = (limited(clock, rows_per_second=10, rows_burst=25) for _ in range(2))
    forgets._named.update(f"taken {n}" for n in range(MAX_NAMED))  # noqa: SLF001 - all are others
    for place, (name, amount, wait) in enumerate(calls):
        clock.advance(wait)
        if place in forget_at:
            forgets.forget_idle()
        outcomes = []
        for table in (keeps, forgets):
            try:
                table.get(name).rows.take(amount)
                outcomes.append(True)
            except TenantLimitReached:
                outcomes.append(False)
        assert outcomes[0] == outcomes[1]
