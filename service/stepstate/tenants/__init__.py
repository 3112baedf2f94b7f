"""Tenants: what each may use, and what it uses."""

from stepstate.tenants.limits import LimitTable, RateLimits, TenantLimits

__all__ = ["LimitTable", "RateLimits", "TenantLimits"]
