"""The store, and whether it can be written, for health and metrics.

Rule 1: any call that fails, a read too, means that the store is away. Only a fault that may be that
        of one session leaves it to a small write at the next check: a damaged session that its
        client asks for again and again is no outage.
Rule 2: only a write that reached all of the store means that it is back, and only when nothing
        has failed for a while. A replica, a full disk and a cluster without one of its nodes
        answer reads, and some writes.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from stepstate.errors import STORE_CAUSES, StoreUnavailable
from stepstate.stores import SessionStore

log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
"""Between two probes of a store that is up: one small write, so that an idle server notices."""
STEADY_SECONDS = 3.0
"""Without a failure until a store counts as back: one that fails now and then does not."""
CORRUPT = "corrupt"
"""The cause that may lie in one session: damaged pages of the file."""

T = TypeVar("T")


class MonitoredStore:
    """A store, and whether it can be written.

    Args:
        store: the store.
        clock: monotonic seconds.
    """

    def __init__(self, store: SessionStore, *, clock: Callable[[], float]) -> None:
        self.backend = store
        self.up = True
        self._closed = False
        self.failures = dict.fromkeys(STORE_CAUSES, 0)
        """Calls that failed, by cause."""
        self._clock = clock
        self._probe_at = clock()
        self._failed_at = clock()

    async def ask(self, answer: Awaitable[T]) -> T:
        """Waits for an answer of the store.

        Raises:
            StoreUnavailable: there is none.
        """
        try:
            return await answer
        except StoreUnavailable as error:
            self._count(error)
            if error.cause == CORRUPT:
                self._probe_at = self._clock()
            else:
                self._fail(error)
            raise

    async def check(self) -> None:
        """Probes the store: now and then while it is up, each time while it is away."""
        if self.up and self._clock() < self._probe_at:
            return
        self._probe_at = self._clock() + PROBE_SECONDS
        try:
            await self.backend.probe()
        except StoreUnavailable as error:
            self._count(error)
            self._fail(error)
            return
        if not self.up and self._clock() - self._failed_at >= STEADY_SECONDS:
            log.warning("the store is back")
            self.up = True

    async def close(self) -> None:
        """Closes the store; calls that fail from then on are not noted."""
        self._closed = True
        await self.backend.close()

    def _count(self, error: StoreUnavailable) -> None:
        if not self._closed:
            self.failures[error.cause] += 1

    def _fail(self, error: StoreUnavailable) -> None:
        if self._closed:
            return
        self._failed_at = self._clock()
        if self.up:
            log.warning("the store is away", extra={"problem": error.problem})
        self.up = False
