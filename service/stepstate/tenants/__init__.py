"""Tenants: what each may use, what it uses, and how they share a server."""

from stepstate.tenants.fair import FairQueue, Share, SourceQueue, WorkSource
from stepstate.tenants.limits import LIMITS, LimitTable, RateLimits, TenantLimits
from stepstate.tenants.table import (
    OTHERS,
    SESSIONS_RETRY_SECONDS,
    Tenant,
    TenantTable,
    TenantTotals,
)

__all__ = [
    "LIMITS",
    "OTHERS",
    "SESSIONS_RETRY_SECONDS",
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
