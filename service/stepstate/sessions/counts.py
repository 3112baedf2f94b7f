"""How many sessions the store has, open and expired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from stepstate.sessions.monitored_store import MonitoredStore
from stepstate.stores import EndReason, Tombstone

COUNT_SECONDS = 5.0
"""How old the count may be."""


class EndObserver(Protocol):
    """Is told of sessions that ended."""

    def closed(self, reason: str) -> None:
        """A session ended."""
        ...

    def expired_restored(self) -> None:
        """An expired session was restored."""
        ...


class SessionCounts:
    """Open sessions by model, resident or not.

    What happens here is counted at once; what other servers do is seen when the
    store is asked again.

    Args:
        link: the store.
        clock: monotonic seconds.
        observer: told of sessions that ended.
    """

    def __init__(
        self,
        link: MonitoredStore,
        *,
        clock: Callable[[], float],
        observer: EndObserver,
    ) -> None:
        self._link = link
        self._clock = clock
        self._observer = observer
        self.expired = 0
        """Expired sessions that are kept."""
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

    def ended(self, model_key: str, ending: Tombstone) -> None:
        """A session ended here."""
        self._counts[model_key] -= 1
        self._changes += 1
        self._observer.closed(ending.reason.value)

    def expired_here(self, model_keys: Iterable[str]) -> None:
        """Sessions of some models expired here, and are kept."""
        for model_key in model_keys:
            self._counts[model_key] -= 1
            self.expired += 1
            self._observer.closed(EndReason.EXPIRED.value)
        self._changes += 1

    def restored(self, model_key: str) -> None:
        """An expired session was restored here."""
        self._counts[model_key] += 1
        self.expired -= 1
        self._changes += 1
        self._observer.expired_restored()

    async def count(self) -> None:
        """Takes the store's count, unless sessions came or went here while it was counting.

        Raises:
            StoreUnavailable.
        """
        before = self._changes
        counts = await self._link.ask(self._link.store.count())
        expired = await self._link.ask(self._link.store.count_expired())
        if before == self._changes:
            self._counts = Counter(counts)
            self.expired = expired
        self._due_at = self._clock() + COUNT_SECONDS
