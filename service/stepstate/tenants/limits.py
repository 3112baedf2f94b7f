"""How much each tenant may use: values only.

A limit that is None is no limit. What is refused because of one is RESOURCE_EXHAUSTED, and says
which limit it was, its value and whose it is (see `errors.TenantLimitReached`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
LIMITS = (
    "open_sessions", "streams", "calls", "rows_per_second", "forecasts_per_second",
    "replay_bytes", "snapshot_bytes", "memory_bytes",
)  # fmt: skip
"""The limits of `TenantLimits`, without what goes with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimits:
    """What may be asked for in a second."""

    rows_per_second: float | None = None
    """Rows to apply, by whatever call; those of `advance` and of retries count too."""
    rows_burst: float | None = None
    """Rows that may come at once after a pause; None: those of one second. A request is served
    whole once one row is left, and those after it wait until its rows are made up for."""
    forecasts_per_second: float | None = None
    """Forecasts to make: one for each session and scenario of a call."""
    forecasts_burst: float | None = None
    """As `rows_burst`."""

    def __post_init__(self) -> None:
        for name in ("rows", "forecasts"):
            rate, burst = getattr(self, f"{name}_per_second"), getattr(self, f"{name}_burst")
            _check_positive(f"{name}_per_second", rate)
            _check_positive(f"{name}_burst", burst)
            if burst is not None and rate is None:
                raise ValueError(f"{name}_burst is set without {name}_per_second: set both")


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits(RateLimits):
    """What one tenant may use."""

    open_sessions: int | None = None
    """Open sessions, on all servers of one store; expired ones that are kept do not count."""
    streams: int | None = None
    """Streaming calls that have not ended, on one server."""
    calls: int | None = None
    """Other calls that have not ended, on one server."""
    replay_bytes: int | None = None
    """Remembered replies with many rows, on one server: beyond it the oldest are forgotten."""
    snapshot_bytes: int | None = None
    """Memory for snapshots that are being exported or imported, on one server: about two copies of
    each. Those in the store are bounded by `open_sessions`."""
    memory_bytes: int | None = None
    """Part of the memory that clients may make one server hold (`memory_limit`)."""
    weight: float = 1.0
    """Share of a busy server, compared with the weights of others who want something then."""

    def __post_init__(self) -> None:
        super(TenantLimits, self).__post_init__()
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and "int" in str(one.type) and value < 0:
                raise ValueError(f"{one.name} is {value}, expected 0 or more")
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight is {self.weight}, expected {MIN_WEIGHT} to {MAX_WEIGHT:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitTable:
    """The limits of all tenants."""

    defaults: TenantLimits = field(default_factory=TenantLimits)
    """Of each tenant that is not in `tenants`."""
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)
    """All limits of some tenants, by name."""
    together: RateLimits = field(default_factory=RateLimits)
    """Of all tenants together, on one server."""

    def of(self, tenant: str) -> TenantLimits:
        """The limits of a tenant."""
        return self.tenants.get(tenant, self.defaults)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}, expected more than 0")
