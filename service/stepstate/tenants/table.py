"""The tenants of a server, what each of them uses, and what is refused because of its limits.

Rule 1: an amount is taken from the buckets of the tenant and of all tenants together, or from
        neither.
Rule 2: limits change between two requests, for all tenants at once; buckets keep their level.
Rule 3: a tenant that does nothing, and whose buckets are full, is forgotten, but for the first
        `MAX_NAMED`: whoever can make up names of tenants can't make the table grow.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from stepstate.buckets import TokenBucket
from stepstate.errors import TenantLimitReached
from stepstate.identity import DEFAULT_TENANT
from stepstate.tenants.limits import LimitTable, RateLimits, TenantLimits

MAX_NAMED = 100
"""Tenants that have series of their own in the metrics, beside those with limits of their own."""
OTHERS = "other"
"""The label of all other tenants together."""
RETRY_SECONDS = 0.5
"""For what ends with other calls of the tenant: nobody knows when."""
SESSIONS_RETRY_SECONDS = 5.0
"""Sessions end when they are closed, or expire."""

Clock = Callable[[], float]


class HeldBytes(Protocol):
    """Whatever counts the memory that clients of a tenant make the server hold."""

    held: int


class Rate:
    """What an owner may ask for in a second, and of what all owners together may.

    Args:
        limit: its name in `RateLimits`.
        tenant: whose it is; empty: of all together.
        clock: monotonic seconds.
        together: that of all tenants.
    """

    __slots__ = ("_bucket", "_clock", "_limit", "_tenant", "_together", "refused", "taken")

    def __init__(self, limit: str, tenant: str, clock: Clock, together: Rate | None = None) -> None:
        self._limit = limit
        self._tenant = tenant
        self._clock = clock
        self._together = together
        self._bucket: TokenBucket | None = None
        self.taken = 0
        """All that was taken."""
        self.refused = 0
        """Requests that were refused."""

    def set(self, per_second: float | None, burst: float | None) -> None:
        """Changes the limit."""
        if per_second is None:
            self._bucket = None
        elif self._bucket is None:
            self._bucket = TokenBucket(per_second, burst, self._clock)
        else:
            self._bucket.change(per_second, burst)

    @property
    def idle(self) -> bool:
        """Whether a new one would grant the same."""
        return self._bucket is None or self._bucket.full

    def take(self, amount: int) -> None:
        """Takes an amount.

        Raises:
            TenantLimitReached: nothing was taken.
        """
        buckets = self._buckets()
        if buckets:
            self._check()
        self._count(amount, buckets)

    def take_some(self, count: int) -> int:
        """Takes up to so many single ones; returns how many."""
        buckets = self._buckets()
        if buckets:
            count = min(count, *(bucket.whole() for bucket in buckets))
        self._count(count, buckets)
        return count

    def _check(self) -> None:
        for rate in (self, self._together):
            bucket = None if rate is None else rate._bucket  # noqa: SLF001 - of this class
            if bucket is not None and (seconds := bucket.wait_seconds()):
                self.refused += 1
                tenant = self._tenant if rate is self else ""
                raise TenantLimitReached(tenant, self._limit, bucket.rate, seconds)

    def _count(self, amount: int, buckets: Iterable[TokenBucket]) -> None:
        self.taken += amount
        for bucket in buckets:
            bucket.take(amount)

    def _buckets(self) -> tuple[TokenBucket, ...]:
        """Its own and that of all: none, most often."""
        own = self._bucket
        shared = None if self._together is None else self._together._bucket  # noqa: SLF001
        if shared is None:
            return () if own is None else (own,)
        return (shared,) if own is None else (own, shared)


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of one owner."""

    rows: Rate
    forecasts: Rate

    def set(self, limits: RateLimits) -> None:
        """Changes the limits."""
        self.rows.set(limits.rows_per_second, limits.rows_burst)
        self.forecasts.set(limits.forecasts_per_second, limits.forecasts_burst)


class Tenant:
    """One tenant: its limits, and what it uses.

    Args:
        name: its name.
        label: its label in the metrics.
        rates: of it.
        limits: of it.
    """

    __slots__ = (
        "_rates", "_refused", "accounts", "forecasts", "held", "label", "limits", "name", "rows",
    )  # fmt: skip

    def __init__(self, name: str, label: str, rates: Rates, limits: TenantLimits) -> None:
        self.name = name
        self.label = label
        self._rates = rates
        self.rows, self.forecasts = rates.rows, rates.forecasts
        self.held: Counter[str] = Counter()
        """What it has now, by the name of the limit in `TenantLimits`."""
        self.accounts: set[HeldBytes] = set()
        """Of its clients."""
        self._refused: Counter[str] = Counter()  # by the name of the limit in `held`
        self.set(limits)

    def set(self, limits: TenantLimits) -> None:
        """Changes its limits."""
        self.limits = limits
        self._rates.set(limits)

    def hold(self, limit: str, more: int = 1) -> None:
        """Counts what it has more from now on.

        Raises:
            TenantLimitReached: it would be more than its limit; nothing was counted.
        """
        most: int | None = getattr(self.limits, limit)
        if most is not None and self.held[limit] + more > most:
            self.refuse(limit)
        self.held[limit] += more

    def refuse(self, limit: str, retry_seconds: float = RETRY_SECONDS) -> NoReturn:
        """Refuses a request because of a limit of what it has.

        Raises:
            TenantLimitReached.
        """
        self._refused[limit] += 1
        raise TenantLimitReached(self.name, limit, getattr(self.limits, limit), retry_seconds)

    def release(self, limit: str, less: int = 1) -> None:
        """Counts what it no longer has."""
        self.held[limit] -= less

    def used(self, limit: str) -> float:
        """What it has now, or of a rate all that it asked for."""
        if limit == "memory_bytes":
            return sum(account.held for account in list(self.accounts))
        if limit == "rows_per_second":
            return self.rows.taken
        return self.forecasts.taken if limit == "forecasts_per_second" else self.held[limit]

    @property
    def refused(self) -> Counter[str]:
        """Requests that were refused, by the name of the limit."""
        rates = Counter(
            rows_per_second=self.rows.refused, forecasts_per_second=self.forecasts.refused
        )
        return self._refused + rates

    @property
    def idle(self) -> bool:
        """Whether a new one would be as good."""
        busy = self.accounts or any(self.held.values())
        return not busy and self.rows.idle and self.forecasts.idle


@dataclass(slots=True)
class TenantTotals:
    """What the tenants of one label asked for, since the server started."""

    rows: int = 0
    forecasts: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, tenant: Tenant) -> None:
        """Adds what a tenant asked for."""
        self.rows += tenant.rows.taken
        self.forecasts += tenant.forecasts.taken
        self.refused += tenant.refused


class TenantTable:
    """The tenants that have done something.

    Args:
        limits: of all tenants.
        clock: monotonic seconds.
    """

    def __init__(self, limits: LimitTable | None = None, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._together = Rates(
            Rate("rows_per_second", "", clock), Rate("forecasts_per_second", "", clock)
        )
        self._tenants: dict[str, Tenant] = {}
        self._named: set[str] = set()
        self._forgotten = TenantTotals()
        self.limits = LimitTable()
        """The limits now."""
        self.set(limits or self.limits)
        self.get(DEFAULT_TENANT)

    def set(self, limits: LimitTable) -> None:
        """Changes the limits of all tenants."""
        self.limits = limits
        self._named.update(limits.tenants)
        self._together.set(limits.together)
        for tenant in self._tenants.values():
            tenant.set(limits.of(tenant.name))

    def get(self, name: str) -> Tenant:
        """The tenant of this name."""
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._named) < MAX_NAMED:
                self._named.add(name)
            label = name if name in self._named else OTHERS
            tenant = Tenant(name, label, self._rates(name), self.limits.of(name))
            self._tenants[name] = tenant
        return tenant

    def _rates(self, tenant: str) -> Rates:
        clock, together = self._clock, self._together
        return Rates(
            Rate("rows_per_second", tenant, clock, together.rows),
            Rate("forecasts_per_second", tenant, clock, together.forecasts),
        )

    def peek(self, name: str) -> Tenant:
        """As `get`, but a tenant that is new is not kept."""
        known = self._tenants.get(name)
        return known or Tenant(name, OTHERS, self._rates(name), self.limits.of(name))

    def outside(self) -> Tenant:
        """One without limits that is not in the table, for callers of no tenant."""
        return Tenant("", OTHERS, self._rates(""), TenantLimits())

    def __iter__(self) -> Iterator[Tenant]:
        return iter(list(self._tenants.values()))

    def forget_idle(self) -> None:
        """Forgets tenants that do nothing; to be called every few seconds."""
        for tenant in self:
            if tenant.label == OTHERS and tenant.idle:
                self._forgotten.add(tenant)
                del self._tenants[tenant.name]

    def totals(self) -> Mapping[str, TenantTotals]:
        """What was asked for since the server started, by label."""
        totals = {OTHERS: TenantTotals()}
        totals[OTHERS].rows = self._forgotten.rows
        totals[OTHERS].forecasts = self._forgotten.forecasts
        totals[OTHERS].refused += self._forgotten.refused
        for tenant in self:
            totals.setdefault(tenant.label, TenantTotals()).add(tenant)
        return totals
