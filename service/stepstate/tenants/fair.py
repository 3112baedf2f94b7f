"""Fair queues: what waits is taken from those who sent it in turn, none waits for all of another.

A server is shared between tenants, by their weights, and the share of each between its clients. On
a server without identities each client has a share of its own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Generic, Protocol, TypeVar

from stepstate.identity import DEFAULT_TENANT
from stepstate.tenants.limits import LimitTable
from stepstate.tenants.table import Tenant, TenantTable

T = TypeVar("T")
_UNLIMITED = TenantTable(LimitTable())


def _nobody() -> Tenant:
    return _UNLIMITED.get(DEFAULT_TENANT)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Share:
    """One of those between whom a server is shared: a tenant, or a client if nobody is known."""

    tenant: Tenant = field(default_factory=_nobody)
    queued_requests: int = 0
    """Accepted requests of it without an outcome."""
    queued_rows: int = 0
    """Rows of these."""

    @property
    def weight(self) -> float:
        """How much of the server it gets, compared with others that want something too."""
        return self.tenant.limits.weight


class WorkSource(Protocol):
    """Whoever sends work: one of those between whom a share is shared."""

    @property
    def share(self) -> Share:
        """Of the server."""
        ...


class SourceQueue(Generic[T]):
    """Items with some rows each, in an order in which all sources get the same number of rows.

    Self-clocked fair queueing (S. J. Golestani, "A self-clocked fair queueing scheme for broadband
    applications", 1994): an item of n rows has its turn when each other source that waits has had
    about n rows since the item became the first of its own. A single row of a source that had
    nothing waiting comes before the second row of any other.
    """

    def __init__(self) -> None:
        self._items: dict[object, deque[tuple[T, int]]] = {}
        self.turns: list[tuple[int, int, object]] = []
        """A heap, empty if nothing waits: when the first item of a source is due, in rows; a number
        to break ties; the source."""
        self._now = 0
        self._numbers = count()

    def put(self, source: object, item: T, rows: int) -> None:
        """Queues an item behind those of its source."""
        items = self._items.get(source)
        if items is None:
            items = self._items[source] = deque()
            heappush(self.turns, (self._now + rows, next(self._numbers), source))
        items.append((item, rows))

    def first(self) -> tuple[T, int]:
        """The item whose turn it is, and its rows."""
        return self._items[self.turns[0][2]][0]

    def take(self) -> None:
        """Removes the item whose turn it is."""
        self._now, _, source = self.turns[0]
        items = self._items[source]
        items.popleft()
        if items:
            heapreplace(self.turns, (self._now + items[0][1], next(self._numbers), source))
        else:
            heappop(self.turns)
            del self._items[source]


class FairQueue(Generic[T]):
    """A `SourceQueue` of each share, and the same between these: rows in proportion to weights."""

    def __init__(self) -> None:
        self._sources: dict[Share, SourceQueue[T]] = {}
        self.turns: list[tuple[float, int, Share, int]] = []
        """A heap, empty if nothing waits: when a share is due, in rows of one with weight 1; a
        number to break ties; the share; the rows of its first item when that was reckoned."""
        self._now = 0.0
        self._numbers = count()

    def put(self, sender: WorkSource, item: T, rows: int) -> None:
        """Queues an item behind those of its sender."""
        share = sender.share
        sources = self._sources.get(share)
        if sources is None:
            sources = self._sources[share] = SourceQueue()
            due = self._now + rows / share.weight
            heappush(self.turns, (due, next(self._numbers), share, rows))
        sources.put(sender, item, rows)

    def first(self) -> tuple[T, int]:
        """The item whose turn it is, and its rows."""
        return self._sources[self.turns[0][2]].first()

    def take(self) -> None:
        """Removes the item whose turn it is."""
        self._now, _, share, expected = self.turns[0]
        sources = self._sources[share]
        _, rows = sources.first()
        sources.take()
        if not sources.turns:
            heappop(self.turns)
            del self._sources[share]
            return
        _, following = sources.first()
        more = following + rows - expected  # another of its senders may have come first meanwhile
        due = self._now + more / share.weight
        heapreplace(self.turns, (due, next(self._numbers), share, following))
