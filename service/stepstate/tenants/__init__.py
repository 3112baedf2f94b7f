"""Tenants: what each may use, what it uses, and how they share a server."""

from stepstate.tenants.fair import FairQueue, Share, SourceQueue, WorkSource
from stepstate.tenants.limits import LimitTable, RateLimits, TenantLimits
from stepstate.tenants.table import OTHERS, Tenant, TenantTable, TenantTotals

__all__ = [
    "OTHERS",
    "FairQueue",
    "LimitTable",
    "RateLimits",
    "Share",
    "SourceQueue",
    "Tenant",
    "TenantLimits",
    "TenantTable",
    "TenantTotals",
    "WorkSource",
]
