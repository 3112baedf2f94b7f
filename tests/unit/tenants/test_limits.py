from __future__ import annotations

import math

import pytest

from stepstate.tenants import LimitTable, RateLimits, TenantLimits


def test_a_tenant_has_the_defaults_or_an_exception_of_its_own():
    own = TenantLimits(open_sessions=3, weight=2.0)
    table = LimitTable(defaults=TenantLimits(open_sessions=1), tenants={"acme": own})
    assert table.of("acme") is own
    assert table.of("other").open_sessions == 1


def test_nothing_is_limited_by_default():
    table = LimitTable()
    assert table.of("any") == TenantLimits()
    assert table.together == RateLimits()


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize(
    "name", ["rows_per_second", "rows_burst", "forecasts_per_second", "forecasts_burst"]
)
def test_rates_and_bursts_are_positive(name, value):
    given = {"rows_per_second": 1.0, "forecasts_per_second": 1.0} | {name: value}
    for limits in (RateLimits, TenantLimits):
        with pytest.raises(ValueError, match=f"{name} is"):
            limits(**given)


def test_a_burst_needs_a_rate():
    with pytest.raises(ValueError, match="rows_burst is set without rows_per_second"):
        TenantLimits(rows_burst=5)


@pytest.mark.parametrize(
    "name", ["open_sessions", "streams", "calls", "replay_bytes", "snapshot_bytes", "memory_bytes"]
)
def test_numbers_and_sizes_may_be_zero_and_not_less(name):
    assert getattr(TenantLimits(**{name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"{name} is -1"):
        TenantLimits(**{name: -1})


@pytest.mark.parametrize("weight", [0.0, -1.0, 101.0, math.nan])
def test_a_weight_is_within_its_bounds(weight):
    with pytest.raises(ValueError, match="weight is"):
        TenantLimits(weight=weight)
