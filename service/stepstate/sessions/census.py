"""How many sessions the store has, and which of them have had their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from stepstate.sessions.link import StoreLink
from stepstate.sessions.table import Table
from stepstate.stores import Ending, EndReason

COUNT_SECONDS = 5.0
"""How old the count may be."""
OVERDUE_GRACE_SECONDS = 60.0
"""A server that was cut off from the store has this long to save what it stepped meanwhile."""
ENDED_AT_ONCE = 500


class EndObserver(Protocol):
    """Is told of sessions that ended."""

    def closed(self, reason: str) -> None:
        """A session ended."""
        ...


class Census:
    """Open sessions by model, resident or not.

    What happens here is counted at once; what other servers do is seen when the
    store is asked again.

    Args:
        link: the store.
        table: the resident sessions.
        clock: monotonic seconds.
        wall: Unix seconds.
        observer: told of sessions that ended.
    """

    def __init__(
        self,
        link: StoreLink,
        table: Table,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        observer: EndObserver,
    ) -> None:
        self._link = link
        self._table = table
        self._clock = clock
        self._wall = wall
        self._observer = observer
        self._counts: Counter[str] = Counter()
        self._changes = 0
        self._due_at = clock()

    def __getitem__(self, model_key: str) -> int:
        return self._counts[model_key]

    @property
    def total(self) -> int:
        """Open sessions of all models."""
        return self._counts.total()

    @property
    def due(self) -> bool:
        """Whether the store should be asked again."""
        return self._clock() >= self._due_at or not self._link.up

    def opened(self, model_key: str) -> None:
        """A session was opened here."""
        self._counts[model_key] += 1
        self._changes += 1

    def ended(self, model_key: str, ending: Ending) -> None:
        """A session ended here."""
        self._counts[model_key] -= 1
        self._changes += 1
        self._observer.closed(ending.reason.value)

    async def count(self) -> None:
        """Takes the store's count, unless sessions came or went here while it was counting.

        Raises:
            StoreUnavailable.
        """
        before = self._changes
        counts = await self._link.ask(self._link.store.count())
        if before == self._changes:
            self._counts = Counter(counts)
        self._due_at = self._clock() + COUNT_SECONDS

    async def sweep(self) -> int:
        """Ends sessions that are not resident and whose time is up; returns how many.

        Raises:
            StoreUnavailable.
        """
        ended = 0
        before = self._wall() - OVERDUE_GRACE_SECONDS
        for entry in await self._link.ask(self._link.store.overdue(before, ENDED_AT_ONCE)):
            record = entry.record
            if self._table.get(record.session_id) is not None:
                continue
            ending = Ending(EndReason.EXPIRED, entry.t, record.idle_timeout_seconds)
            if await self._link.ask(self._link.store.end(record.session_id, entry.epoch, ending)):
                self.ended(record.model_key, ending)
                ended += 1
        return ended
