"""Which requests of sessions are accepted, and how many of them have no outcome yet."""

from __future__ import annotations

import asyncio

from stepstate.errors import Draining, QueueFull
from stepstate.sessions.context import Limits
from stepstate.sessions.types import Source

_WAITING = "waiting on this server, of which a client may have as many as are free"


class Admission:
    """Counts accepted requests until they have their outcome, and refuses more than the limits.

    A share of the server may have as many waiting as are free, so that a few greedy ones leave room
    for others (see `stepstate.budget`).
    """

    def __init__(self, limits: Limits) -> None:
        self.draining = False
        self.queued_requests = 0
        self.queued_rows = 0
        self.own = Source()
        """Of barriers, which are never refused."""
        self._max_requests = limits.queued_requests
        self._max_rows = limits.queued_rows
        self._all_settled = asyncio.Event()

    def check_open(self) -> None:
        """Refuses new work once the server drains.

        Raises:
            Draining.
        """
        if self.draining:
            raise Draining

    def accept(self, requests: int, rows: int, *, source: Source) -> None:
        """Accepts requests of a source; `settled` is called for each.

        Raises:
            Draining, QueueFull, TenantLimitReached: nothing was accepted.
        """
        self.check(rows, source=source)
        source.tenant.rows.take(rows)
        self.count(requests, rows, source=source)

    def check(self, rows: int, *, source: Source) -> None:
        """Makes sure that there is room for a request.

        Raises:
            Draining, QueueFull: there is none.
        """
        if self.draining:
            raise Draining
        share = source.share
        if share.queued_requests >= self._max_requests - self.queued_requests:
            raise QueueFull(f"requests {_WAITING}", self._max_requests)
        queued = self.queued_rows
        if queued and share.queued_rows + rows > self._max_rows - queued:
            raise QueueFull(f"rows {_WAITING}", self._max_rows)

    def count(self, requests: int, rows: int, *, source: Source) -> None:
        """Counts requests that have their place already: they are never refused."""
        self.queued_requests += requests
        self.queued_rows += rows
        source.share.queued_requests += requests
        source.share.queued_rows += rows

    def settled(self, requests: int, rows: int, *, source: Source) -> None:
        """Accepted requests have their outcome; called before it is delivered."""
        self.queued_requests -= requests
        self.queued_rows -= rows
        source.share.queued_requests -= requests
        source.share.queued_rows -= rows
        if self.draining and not self.queued_requests:
            self._all_settled.set()

    async def drain(self) -> None:
        """Accepts nothing more, and waits until all that was accepted has its outcome."""
        self.draining = True
        if self.queued_requests:
            await self._all_settled.wait()
